"""Runs `samclip` commands in processes of their own."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"


def train(
    title: str,
    stage: int,
    output_dir: Path,
    seed: int,
    max_steps: int,
    model: Path | None = None,
    options: Sequence[str] = (),
) -> None:
    """
    Runs `samclip train` with a recipe of the miniature.

    Args:
        title (`str`): Printed before the command.
        stage (`int`): The training stage, 1 to 3.
        output_dir (`Path`), seed (`int`), max_steps (`int`): Arguments that replace the recipe's.
        model (`Path`, *optional*): The checkpoint to start from. Default: the teachers.
        options (`Sequence[str]`): Further options of the command.
    """
    command = ["train", RECIPES / f"miniature_stage{stage}.yaml", "--output_dir", output_dir]
    command += ["--seed", seed, "--max_steps", max_steps, *options]
    if model is not None:
        command += ["--model", model]
    run(title, command)


def run(title: str, command: Sequence[object]) -> None:
    """Runs a `samclip` command. Exits with a message if it fails."""
    name, *arguments = map(str, command)
    line = [sys.executable, "-m", f"samclip_cli.{name}", *arguments]
    print(f"\n== {title} ==\n{shlex.join(line)}", flush=True)
    returncode = subprocess.run(line).returncode
    if returncode:
        sys.exit(f"{title} failed with exit code {returncode}.")
