"""Mean intersection over union of label maps."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Features, List, Value

from .accumulating import AccumulatingMetric


class MeanIoU(AccumulatingMetric):
    r"""
    The mean intersection over union of labels, from one confusion matrix over the pixels of all images (PASCAL VOC,
    Everingham et al., 2010).

    predictions, references (lists of integer arrays of shape `(height, width)`):
        Label maps. Images may differ in size.
    num_labels (`int`):
        The number of labels, including background.
    ignore_index (`int`):
        The label of reference pixels that are ignored. The prediction there must be a valid label.
    boundary_width (`int`):
        Pixels are ignored if the reference has another label, `ignore_index` included, within this Chebyshev distance.
        The result then measures the labels of regions independently of their outlines.

    `compute` returns `mean_iou` over the labels that occur in references or predictions; `mean_accuracy` over those in
    references; `overall_accuracy`; `iou_per_label` and `accuracy_per_label`, `None` for labels that are excluded from
    the mean; and `num_pixels`, the number of pixels that are not ignored. Raises `ValueError` if all pixels are
    ignored, a value is not a valid label, or shapes differ.
    """

    input_features = Features({name: List(List(Value("int64"))) for name in ("predictions", "references")})

    def __init__(self, num_labels: int, ignore_index: int = 255, boundary_width: int = 0, **module_arguments: Any):
        super().__init__(**module_arguments)
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.boundary_width = boundary_width

    def image_mean_iou(self, prediction: np.ndarray, reference: np.ndarray) -> float | None:
        """Returns the mean IoU of one image, or `None` if all its pixels are ignored. Does not add the image."""
        state = self._measure([prediction], [reference])
        return self._result(state)["mean_iou"] if state["confusion"].any() else None

    def _measure(self, predictions: Iterable[np.ndarray], references: Iterable[np.ndarray]) -> dict[str, Any]:
        confusion = np.zeros((self.num_labels, self.num_labels), dtype=np.int64)  # rows are references
        for prediction, reference in zip(map(np.asarray, predictions), map(np.asarray, references), strict=True):
            if prediction.shape != reference.shape or reference.ndim != 2:
                raise ValueError(
                    f"Label maps must have one shape (height, width), got {prediction.shape} and {reference.shape}."
                )
            counts = reference != self.ignore_index
            self._check_labels("prediction", prediction)
            self._check_labels("reference", reference[counts])
            if self.boundary_width:
                counts &= ~near_boundary(reference, self.boundary_width)
            pairs = reference[counts].astype(np.int64) * self.num_labels + prediction[counts].astype(np.int64)
            confusion += np.bincount(pairs, minlength=confusion.size).reshape(confusion.shape)
        return {"confusion": confusion}

    def _check_labels(self, name: str, labels: np.ndarray) -> None:
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"Labels must be integers, but the {name} has {labels.dtype}.")
        if labels.size and not 0 <= labels.min() <= labels.max() < self.num_labels:
            raise ValueError(
                f"Labels must be 0 to {self.num_labels - 1}, but the {name} has {labels.min()} to {labels.max()}."
            )

    def _result(self, state: dict[str, Any]) -> dict[str, Any]:
        confusion = state["confusion"]
        if not confusion.any():
            raise ValueError("All pixels are ignored or near a boundary.")
        correct, truth, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
        iou, accuracy = ratios(correct, truth + predicted - correct), ratios(correct, truth)
        return {
            "mean_iou": mean(iou),
            "mean_accuracy": mean(accuracy),
            "overall_accuracy": (correct.sum() / confusion.sum()).item(),
            "iou_per_label": iou,
            "accuracy_per_label": accuracy,
            "num_pixels": confusion.sum().item(),
        }


def near_boundary(label_map: np.ndarray, width: int) -> np.ndarray:
    """Returns a mask `(height, width)` of the pixels with another label within the Chebyshev distance `width`. At
    these pixels, the largest label in the window around the pixel differs from the smallest."""

    def max_filter(labels: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(labels, kernel_size=2 * width + 1, stride=1, padding=width)

    labels = torch.as_tensor(label_map.astype(np.float64))[None]
    return (max_filter(labels) != -max_filter(-labels))[0].numpy()


def ratios(counts: np.ndarray, totals: np.ndarray) -> list[float | None]:
    return [count / total if total else None for count, total in zip(counts.tolist(), totals.tolist(), strict=True)]


def mean(values: list[float | None]) -> float:
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present)
