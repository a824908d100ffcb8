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
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import TrainingArguments
from transformers.utils import logging

from ..files import write_atomically
from .arguments import SamClipTrainingArguments, rename_deprecated_arguments

logger = logging.get_logger(__name__)

FILE_NAME = "provenance.json"
PACKAGES = ("samclip-hf", "torch", "transformers", "accelerate", "datasets")
# The arguments of transformers that are recorded, in addition to all arguments of this package.
RECORDED_ARGUMENTS = {
    *("max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
    *("max_grad_norm", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "seed", "bf16", "fp16"),
}


def read(model: str | Path) -> list[dict[str, Any]]:
    """
    Reads the training stages of a checkpoint, oldest first.

    Deprecated argument names, which earlier releases wrote, are replaced by the current ones.

    Args:
        model (`str` or `Path`):
            A folder, or a repository on the Hub. An empty string if the model was not loaded from one.

    Returns:
        `list[dict]`: One entry for each stage. Empty if `model` has no `provenance.json`.
    """
    if not model:  # `Path("")` would be the working directory
        return []
    path = Path(model) / FILE_NAME
    if not Path(model).is_dir():
        try:
            path = Path(hf_hub_download(str(model), FILE_NAME))
        except LocalEntryNotFoundError:  # no connection
            logger.warning(f"The earlier training stages of {model} are not known: {FILE_NAME} is not in the cache.")
            return []
        except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError):
            return []
    if not path.is_file():
        return []
    stages = json.loads(path.read_text())["stages"]
    return [stage | {"arguments": rename_deprecated_arguments(stage["arguments"])} for stage in stages]


def write(
    folder: Path, args: SamClipTrainingArguments, stage: dict[str, Any], earlier_stages: Sequence[dict[str, Any]]
) -> None:
    """
    Writes `provenance.json` into the folder of a checkpoint: the earlier stages, and this one.

    Args:
        folder (`Path`):
            The folder.
        args ([`SamClipTrainingArguments`]):
            Arguments of this stage.
        stage (`dict[str, Any]`):
            The record of this stage: `arguments` ([`recorded_arguments`]), `teachers` and their `commits` by
            argument, `steps`, `images_seen`, `seconds`. After a resumed run, `seconds` is the time since the last
            resume. Of fine-tuning also `stage`, which replaces the number, the `model` before it, and `retention`.
        earlier_stages (`Sequence[dict]`):
            The stages of the model that this stage started from.
    """
    stage = {
        "stage": args.stage,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **stage,
        "processes": args.world_size,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else platform.machine(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    text = json.dumps({"stages": [*earlier_stages, stage]}, indent=2, default=str) + "\n"
    write_atomically(folder / FILE_NAME, text)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # for example a source tree that is not installed
        return None


def recorded_arguments(args: SamClipTrainingArguments) -> dict[str, Any]:
    """Returns the arguments that determine the weights: those of this package and `RECORDED_ARGUMENTS`, except those
    that have no effect in the stage."""
    excluded = {field.name for field in fields(TrainingArguments)} - RECORDED_ARGUMENTS | {"model"}
    if args.stage != 2:
        excluded.add("sam_data_weights")  # derived in every stage
    excluded |= {name for names, has_effect, _ in args.without_effect if not has_effect(args) for name in names}
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in excluded}
    return {name: "inf" if value == float("inf") else value for name, value in values.items()}  # JSON has no infinity


def teachers(stages: Sequence[dict[str, Any]]) -> dict[tuple[str, str], str | None]:
    """
    Collects the models that a checkpoint was distilled from.

    The SAM teacher of stage 3 is ignored: stage 3 does not use it, and earlier releases recorded it. Only stage 2
    records the commit of the SAM teacher.

    Returns:
        `dict[tuple[str, str], str | None]`: Commit on the Hub, if known, by role ("SAM", "CLIP", "SAM as the start"
        for a `sam_student`, "SAM-CLIP as the start" for a fine-tuned model without earlier stages) and name.
    """
    found: dict[tuple[str, str], str | None] = {}
    for stage in stages:
        if stage is stages[0] and (model := stage.get("model")):  # fine-tuned, and its training is not recorded
            found[("SAM-CLIP as the start", model)] = None
        if start := stage["arguments"].get("sam_student"):
            found.setdefault(("SAM as the start", start), None)
        for argument, role in (("sam_teacher", "SAM"), ("clip_teacher", "CLIP")):
            if argument in stage["teachers"] and (
                argument == "clip_teacher" or stage["stage"] < 3 or len(stages) == 1
            ):
                key = role, stage["teachers"][argument]
                found[key] = stage["commits"].get(argument) or found.get(key)
    return found
