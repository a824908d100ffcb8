"""`python -m samclip_hf.export` is `samclip export`."""

from samclip_cli.export import main

if __name__ == "__main__":
    raise SystemExit(main())
