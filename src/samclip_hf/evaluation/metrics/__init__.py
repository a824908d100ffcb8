"""
Metrics of Hugging Face `evaluate` that accumulate counts instead of predictions. They need the extra `train`.
`evaluate.load` also loads each file by its path, without network access.
"""

from .accumulating import AccumulatingMetric
from .mask_average_precision import MaskAveragePrecision
from .mask_iou import MaskIoU
from .mean_iou import MeanIoU
from .recall_at_k import RecallAtK
from .top_k import TopK

__all__ = ["AccumulatingMetric", "MaskAveragePrecision", "MaskIoU", "MeanIoU", "RecallAtK", "TopK"]
