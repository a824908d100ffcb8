"""`python -m samclip_cli` is the `samclip` command."""

import sys

from . import main

sys.exit(main())
