"""Entry points for scripts that must not import from their own folder, such as `training/evaluate.py`."""

import os
import subprocess
import sys
from typing import NoReturn


def run_command(command: str) -> NoReturn:
    """
    Replaces the script that calls it by `python -m samclip_cli <command>`, with the same arguments and interpreter
    options.

    Python puts a script's folder first on its search path, so next to `training/evaluate.py` every `import evaluate`
    would import that script instead of the library. `python -P` leaves the folder out.
    """
    interpreter_options = sys.orig_argv[1 : -len(sys.argv)]  # such as -u, which torchrun passes, or -m pdb
    argv = [sys.executable, "-P", *interpreter_options, "-m", "samclip_cli", command, *sys.argv[1:]]
    if os.name == "posix":
        os.execv(sys.executable, argv)  # the same process: signals and the exit status need no forwarding
    sys.exit(subprocess.call(argv))
