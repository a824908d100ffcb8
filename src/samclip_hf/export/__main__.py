"""`python -m samclip_hf.export` is `samclip export`."""

import sys

from samclip_cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
