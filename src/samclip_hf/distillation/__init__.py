"""Distilling a SAM and a CLIP into one SAM-CLIP; needs the extra `train`."""

from .arguments import SamClipTrainingArguments
from .teachers import ClipTeacher, SamTeacher
from .trainer import SamClipTrainer

__all__ = ["ClipTeacher", "SamClipTrainer", "SamClipTrainingArguments", "SamTeacher"]
