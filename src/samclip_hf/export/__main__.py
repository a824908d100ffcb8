"""`python -m samclip_hf.export` is `samclip export`."""

from .writer import main

main()
