"""`python -m samclip_hf.export`, the deprecated name of `samclip export`. Delete it after version 0.2.0."""

import sys

from samclip_cli import main

if __name__ == "__main__":
    print("python -m samclip_hf.export is deprecated, use samclip export.", file=sys.stderr)
    sys.exit(main(["export", *sys.argv[1:]]))
