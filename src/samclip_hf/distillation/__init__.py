"""Distilling a SAM and a CLIP into one SAM-CLIP; needs the extra `train`."""

from .arguments import SamClipTrainingArguments
from .store import TeacherStore
from .streams import DataError
from .teachers import ClipTeacher, SamTeacher
from .trainer import SamClipTrainer, last_checkpoint

__all__ = [
    "ClipTeacher",
    "DataError",
    "SamClipTrainer",
    "SamClipTrainingArguments",
    "SamTeacher",
    "TeacherStore",
    "last_checkpoint",
]
