"""Distilling a SAM and a CLIP into one SAM-CLIP; needs the extra `train`."""

from ..datasets.streams import DataError
from .arguments import SamClipTrainingArguments
from .embedding_cache import EmbeddingCache
from .teachers import ClipTeacher, SamTeacher
from .trainer import SamClipTrainer, last_checkpoint

__all__ = [
    "ClipTeacher",
    "DataError",
    "EmbeddingCache",
    "SamClipTrainer",
    "SamClipTrainingArguments",
    "SamTeacher",
    "last_checkpoint",
]
