"""
How a checkpoint came about: a small file beside it, handed on from stage to stage, from which its card is written.
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

from .arguments import SamClipTrainingArguments, rename_deprecated_arguments

FILE_NAME = "provenance.json"
PACKAGES = ("samclip-hf", "torch", "transformers", "accelerate", "datasets")
# What of transformers' own arguments decides over the result, beside all of ours.
DECISIVE = {
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
    Writes what led to `args.output_dir`: the stages that `args.model` has on record, and this one.

    metrics (`dict[str, float]`):
        Of `Trainer.train`; a run that was interrupted knows the time of its last part only.
    commits (`dict[str, str | None]`):
        Of the teachers by their arguments' names: the commit on the Hub, or `None` for a folder.
    """
    stage = {
        "stage": args.stage,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": decisive_arguments(args),
        "teachers": {"sam_teacher": args.sam_teacher, "clip_teacher": args.clip_teacher},
        "commits": commits,
        "steps": args.max_steps,
        "images_seen": metrics.get("train_images_seen"),
        "seconds": metrics.get("train_runtime"),
        "processes": args.world_size,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else platform.machine(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    earlier = read(args.model) if args.model is not None else []
    path = Path(args.output_dir) / FILE_NAME
    path.write_text(json.dumps({"stages": [*earlier, stage]}, indent=2, default=str) + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from its source, for example; no reason to lose a training
        return None


def decisive_arguments(args: SamClipTrainingArguments) -> dict[str, Any]:
    """Ours, and transformers' that `DECISIVE` names."""
    others = {field.name for field in fields(TrainingArguments)} - DECISIVE | {"model"}
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in others}
    return {name: "inf" if value == float("inf") else value for name, value in values.items()}  # JSON has no infinity


def teachers(stages: Sequence[dict[str, Any]]) -> dict[tuple[str, str], str | None]:
    """
    What a model was made from: by role ("SAM", "CLIP", "SAM as the start") and name, the commit on the Hub where one
    is on record. Stage 3 asks no SAM teacher, whatever its arguments name, and only stage 2 looks its commit up.
    """
    found: dict[tuple[str, str], str | None] = {}
    for stage in stages:
        if start := stage["arguments"].get("sam_student"):
            found.setdefault(("SAM as the start", start), None)
        for kind, role in (("sam_teacher", "SAM"), ("clip_teacher", "CLIP")):
            if kind == "clip_teacher" or stage["stage"] < 3 or len(stages) == 1:
                key = role, stage["teachers"][kind]
                found[key] = stage["commits"].get(kind) or found.get(key)
    return found
