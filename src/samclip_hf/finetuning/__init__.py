"""Fine-tuning of a SAM-CLIP on labeled images of a user. Requires `pip install samclip-hf[train]`."""

from .arguments import FinetuningArguments
from .data import LabelMapBatches, check_labels, hold_out, open_data
from .trainer import FinetuningTrainer, FrozenModel

__all__ = [
    "FinetuningArguments",
    "FinetuningTrainer",
    "FrozenModel",
    "LabelMapBatches",
    "check_labels",
    "hold_out",
    "open_data",
]
