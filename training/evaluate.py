"""
Evaluates models: `accelerate launch training/evaluate.py --model NAME ... --task TASK ...`.

The command itself is `samclip evaluate`, in `src/samclip_cli/evaluate.py`.
"""

from samclip_cli.scripts import run_command

if __name__ == "__main__":
    run_command("evaluate")
