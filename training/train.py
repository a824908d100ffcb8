"""
Trains one stage: `accelerate launch training/train.py RECIPE [--argument value ...]`.

The command itself is `samclip train`, in `src/samclip_cli/train.py`.
"""

from samclip_cli.scripts import run_command

if __name__ == "__main__":
    run_command("train")
