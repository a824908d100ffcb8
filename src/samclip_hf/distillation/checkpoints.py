"""
Checkpoints of a training. In addition to the files of [`Trainer`], a checkpoint has a `stream_state.json` with the
positions in the data and the counters of the log.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..files import write_atomically
from .arguments import rename_deprecated_arguments
from .collation import furthest_positions

logger = logging.get_logger(__name__)

STREAM_STATE_NAME = "stream_state.json"
DEPRECATED_STATE_NAMES = {"item": "micro_batches", "lanes": "readers"}  # of version 0.1 -> current


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Returns the newest complete checkpoint in a folder, or `None`. Incomplete checkpoints, whose writing was
    interrupted, are skipped with a warning."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
            json.loads((folder / STREAM_STATE_NAME).read_text())
        except (OSError, ValueError, TypeError):
            logger.warning(f"Skipped {folder}, which is incomplete: its writing was interrupted.")
        else:
            return folder
    return None


def write_stream_state(folder: Path, run: dict[str, Any], processes: Sequence[dict[str, Any]]) -> None:
    """
    Writes `stream_state.json` of a checkpoint.

    Args:
        folder (`Path`):
            The folder of the checkpoint.
        run (`dict[str, Any]`):
            Values that all processes have in common.
        processes (`Sequence[dict[str, Any]]`):
            For each process the state of its loader (`streams`), its number of `images` and its averages (`log`).
    """
    state = run | {
        "streams": merge_loader_states([process["streams"] for process in processes]),
        "images": sum(process["images"] for process in processes),
        "logs": [process["log"] for process in processes],
    }
    write_atomically(folder / STREAM_STATE_NAME, json.dumps(state, indent=1) + "\n")


def read_stream_state(folder: Path) -> dict[str, Any]:
    """Reads `stream_state.json` of a checkpoint. Names that earlier releases wrote are replaced by current ones."""
    state = json.loads((folder / STREAM_STATE_NAME).read_text())
    for part in ("order", "settings"):
        if part in state:
            state[part] = rename_deprecated_arguments(state[part])
    state["streams"] = {DEPRECATED_STATE_NAMES.get(name, name): value for name, value in state["streams"].items()}
    return state


def merge_loader_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merges the states of the [`StepLoader`] of all processes."""
    return states[0] | {
        "readers": furthest_positions([state["readers"] for state in states]),
        "seen": sum(state["seen"] for state in states),
        "skipped": dict(sum((Counter(state["skipped"]) for state in states), Counter())),
    }


def shards_checksum(names: Sequence[str]) -> str:
    """Returns the number and the checksum of the file names of shards. Folders are excluded, because they may
    change."""
    checksum = zlib.crc32(repr([Path(name).name for name in names]).encode())
    return f"{len(names)} of checksum {checksum:08x}"  # checkpoints contain this text, and resuming compares it


def weights_checksum(parameters: Iterable[Tensor]) -> str:
    """Returns a checksum of the first values of every parameter. It is fast to compute and changes in any training."""
    checksum = 0
    for parameter in parameters:
        checksum = zlib.crc32(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"
