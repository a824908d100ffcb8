"""
How a checkpoint came about: a small file beside it, handed on from stage to stage, from which its card is written.
"""

import json
import platform
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import TrainingArguments

from .. import miniature
from ..publishing.repository import teachers
from .arguments import SamClipTrainingArguments

FILE_NAME = "provenance.json"
PACKAGES = ("samclip-hf", "torch", "transformers", "accelerate", "datasets")
# What of transformers' own arguments decides over the result, beside all of ours.
DECISIVE = {
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "seed", "bf16", "fp16"),
}


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The stages, oldest first, that led to the checkpoint in `folder`; none where nothing is on record there."""
    path = Path(folder) / FILE_NAME
    return json.loads(path.read_text())["stages"] if path.is_file() else []


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


def publish(source: str | Path, folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """
    What is on record of `source`, as strangers may see it: of paths of this machine only the last part. Writes it into
    `folder`, which may be the same, if there is anything.

    Returns the stages, and by their teachers' names the licences that cards tell, on the Hub or in their folders.
    """
    stages = read(source)
    licenses = {_without_folders(name): found for _, name in teachers(stages) if (found := _license(name))}
    stages = _without_folders(stages)
    if stages:
        (folder / FILE_NAME).write_text(json.dumps({"stages": stages}, indent=2) + "\n")
    return stages, licenses


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    if value in (miniature.sam_teacher(), miniature.clip_teacher()):
        return "miniature"
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _license(name: str) -> str | None:
    if _without_folders(name) == "miniature":
        return "apache-2.0"  # this package's
    card = Path(name, "README.md")
    if Path(name).exists() and not card.is_file():
        return None
    try:
        return ModelCard.load(card if card.is_file() else name).data.get("license")
    except (OSError, ValueError, EntryNotFoundError):  # no card, no connection: the new card says that it is unknown
        return None
