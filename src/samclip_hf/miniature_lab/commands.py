"""Runs `samclip` commands in new processes."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def read_recipe(name: str) -> dict[str, Any]:
    """Returns the training arguments in a recipe of the package, for example `miniature_stage1`."""
    path = Path(__file__).parents[1] / "recipes" / f"{name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def train(
    title: str,
    recipe: str,
    output_dir: Path,
    seed: int,
    max_steps: int,
    model: Path | None = None,
    options: Sequence[str] = (),
) -> None:
    """
    Runs `samclip train` with fewer steps than in a recipe, and with the same number of warmup steps.

    Args:
        title (`str`): Printed before the command.
        recipe (`str`): A recipe of the package whose `warmup_steps` are a fraction of its `max_steps`.
        output_dir (`Path`), seed (`int`), max_steps (`int`): Arguments that override the recipe's.
        model (`Path`, *optional*): The checkpoint to start from. Default: the teachers.
        options (`Sequence[str]`): Further options of the command.
    """
    arguments = read_recipe(recipe)
    warmup_steps = min(round(arguments["warmup_steps"] * arguments["max_steps"]), max_steps)
    command: list[object] = ["train", recipe, "--output_dir", output_dir, "--seed", seed]
    command += ["--max_steps", max_steps, "--warmup_steps", warmup_steps, *options]
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
