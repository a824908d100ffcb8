"""`python -m samclip_hf` is the `samclip` command."""

from samclip_cli import main

raise SystemExit(main())
