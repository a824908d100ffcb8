"""
Publishes a model on the Hub: `python training/publish.py FOLDER OWNER/NAME`.

The command itself is `samclip publish`, in `src/samclip_cli/publish.py`.
"""

from samclip_cli.scripts import run_command

if __name__ == "__main__":
    run_command("publish")
