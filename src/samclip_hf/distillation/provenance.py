"""
The provenance of a checkpoint: `provenance.json` in its folder records all of its training stages. The model card is
generated from it.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..files import write_atomically
from .arguments import SamClipTrainingArguments, rename_deprecated_arguments

FILE_NAME = "provenance.json"
PACKAGES = ("samclip-hf", "torch", "transformers", "accelerate", "datasets")
# The arguments of transformers that are recorded, in addition to all arguments of this package.
RECORDED_ARGUMENTS = {
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "seed", "bf16", "fp16"),
}


def read(folder: str | Path) -> list[dict[str, Any]]:
    """
    Reads the training stages of a checkpoint, oldest first.

    Deprecated argument names, which earlier releases wrote, are replaced by the current ones.

    Returns:
        `list[dict]`: One entry for each stage. Empty if `folder` has no `provenance.json`.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return []
    stages = json.loads(path.read_text())["stages"]
    return [stage | {"arguments": rename_deprecated_arguments(stage["arguments"])} for stage in stages]


def write(args: SamClipTrainingArguments, metrics: dict[str, float], commits: dict[str, str | None]) -> None:
    """
    Writes `provenance.json` into `args.output_dir`: the stages of `args.model`, and this one.

    Args:
        args ([`SamClipTrainingArguments`]):
            Arguments of this stage.
        metrics (`dict[str, float]`):
            Metrics of `Trainer.train`. After a resumed run, `train_runtime` covers the time since the last resume.
        commits (`dict[str, str | None]`):
            Hub commits of the teachers by argument name, `None` for a folder.
    """
    stage = {
        "stage": args.stage,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": recorded_arguments(args),
        "teachers": {"sam_teacher": args.sam_teacher, "clip_teacher": args.clip_teacher},
        "commits": commits,
        "steps": args.max_steps,
        "images_seen": metrics.get("train_images_seen"),
        "seconds": metrics.get("train_runtime"),
        "processes": args.world_size,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else platform.machine(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    stages = [*(read(args.model) if args.model is not None else []), stage]
    text = json.dumps({"stages": stages}, indent=2, default=str) + "\n"
    write_atomically(Path(args.output_dir) / FILE_NAME, text)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # for example a source tree that is not installed
        return None


def recorded_arguments(args: SamClipTrainingArguments) -> dict[str, Any]:
    """Returns the arguments that determine the weights: those of this package and `RECORDED_ARGUMENTS`."""
    excluded = {field.name for field in fields(TrainingArguments)} - RECORDED_ARGUMENTS | {"model"}
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in excluded}
    return {name: "inf" if value == float("inf") else value for name, value in values.items()}  # JSON has no infinity


def teachers(stages: Sequence[dict[str, Any]]) -> dict[tuple[str, str], str | None]:
    """
    Collects the models that a checkpoint was distilled from.

    The SAM teacher of stage 3 is ignored, because stage 3 does not use it. Only stage 2 records the commit of the SAM
    teacher.

    Returns:
        `dict[tuple[str, str], str | None]`: Commit on the Hub, if known, by role ("SAM", "CLIP", "SAM as the start"
        for a `sam_student`) and name.
    """
    found: dict[tuple[str, str], str | None] = {}
    for stage in stages:
        if start := stage["arguments"].get("sam_student"):
            found.setdefault(("SAM as the start", start), None)
        for argument, role in (("sam_teacher", "SAM"), ("clip_teacher", "CLIP")):
            if argument == "clip_teacher" or stage["stage"] < 3 or len(stages) == 1:
                key = role, stage["teachers"][argument]
                found[key] = stage["commits"].get(argument) or found.get(key)
    return found
