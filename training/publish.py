"""
Publishes a model on the Hub: `python training/publish.py FOLDER OWNER/NAME`.

The command itself is `samclip publish`, in `src/samclip_cli/publish.py`. It runs as a module in a process without this folder on
its search path, because `evaluate.py` here would hide the library `evaluate`.
"""

import os
import subprocess
import sys

if __name__ == "__main__":
    command = [sys.executable, "-P", "-m", "samclip_cli.publish", *sys.argv[1:]]
    if os.name == "posix":
        os.execv(sys.executable, command)
    sys.exit(subprocess.call(command))
