"""Runs `samclip` commands in new processes."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

# Warmup steps of the recipes, by stage. The recipes state them as fractions of their own `max_steps`; shorter runs use
# the same numbers of steps.
WARMUP_STEPS = {1: 50, 2: 50, 3: 20}


def read_recipe(stage: int) -> dict[str, Any]:
    """Returns the training arguments in the miniature's recipe of a stage."""
    path = Path(__file__).parents[1] / "recipes" / f"miniature_stage{stage}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


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
        output_dir (`Path`), seed (`int`), max_steps (`int`): Arguments that override the recipe's.
        model (`Path`, *optional*): The checkpoint to start from. Default: the teachers.
        options (`Sequence[str]`): Further options of the command.
    """
    command: list[object] = ["train", f"miniature_stage{stage}", "--output_dir", output_dir]
    command += ["--seed", seed, "--max_steps", max_steps, "--warmup_steps", min(WARMUP_STEPS[stage], max_steps)]
    command += options
    if model is not None:
        command += ["--model", model]
    run(title, command)


def run(title: str, command: Sequence[object]) -> None:
    """Prints and runs a `samclip` command. Exits with a message if it fails."""
    arguments = list(map(str, command))
    print(f"\n== {title} ==\nsamclip {shlex.join(arguments)}", flush=True)
    returncode = subprocess.run([sys.executable, "-m", "samclip_cli", *arguments]).returncode
    if returncode:
        sys.exit(f"{title} failed with exit code {returncode}.")
