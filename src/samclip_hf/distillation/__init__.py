"""Distillation of a SAM and a CLIP into one SAM-CLIP. Requires `pip install samclip-hf[train]`."""

import warnings
from typing import Any

from ..datasets.streams import DataError
from .arguments import SamClipTrainingArguments
from .checkpoints import last_checkpoint
from .embedding_cache import EmbeddingCache, RegionEmbeddingCache
from .teachers import ClipTeacher, RegionTeacher, SamTeacher
from .trainer import SamClipTrainer

__all__ = [
    "ClipTeacher",
    "DataError",
    "EmbeddingCache",
    "RegionEmbeddingCache",
    "RegionTeacher",
    "SamClipTrainer",
    "SamClipTrainingArguments",
    "SamTeacher",
    "last_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "TeacherStore":
        warnings.warn("TeacherStore is deprecated. Use EmbeddingCache.", FutureWarning, stacklevel=2)
        return EmbeddingCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
