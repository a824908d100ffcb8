"""
Hugging Face `evaluate` metrics that accumulate; need the extra `train`. Each file is also one that `evaluate.load`
takes by its path, without the network.
"""

from .accumulating import AccumulatingMetric
from .mask_average_precision import MaskAveragePrecision
from .mask_iou import MaskIoU
from .mean_iou import MeanIoU
from .recall_at_k import RecallAtK
from .top_k import TopK

__all__ = ["AccumulatingMetric", "MaskAveragePrecision", "MaskIoU", "MeanIoU", "RecallAtK", "TopK"]
