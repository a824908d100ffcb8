"""Mean intersection over union of objects' masks."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import Features, List, Value

from .accumulating import AccumulatingMetric


class MaskIoU(AccumulatingMetric):
    r"""
    The mean intersection over union over all objects, each with the same weight. SAM's authors call it mIoU (arXiv
    2304.02643, section 7.1).

    predictions, references (boolean arrays of shape `(num_objects, height, width)`, or lists of `(height, width)`):
        The mask of each object. The IoU of an empty prediction is 0.

    `compute` returns `mean_iou` and `num_objects`. Raises `ValueError` if a reference is empty, masks are not boolean,
    or shapes differ.
    """

    input_features = Features({name: List(List(Value("bool"))) for name in ("predictions", "references")})

    def _measure(self, predictions: Iterable[np.ndarray], references: Iterable[np.ndarray]) -> dict[str, Any]:
        ious = []
        for prediction, reference in zip(map(np.asarray, predictions), map(np.asarray, references), strict=True):
            if prediction.dtype != bool or reference.dtype != bool:
                raise ValueError(f"Masks must be boolean, got {prediction.dtype} and {reference.dtype}.")
            if prediction.shape != reference.shape or reference.ndim != 2:
                raise ValueError(
                    f"Masks must have one shape (height, width), got {prediction.shape} and {reference.shape}."
                )
            if not reference.any():
                raise ValueError("A reference mask is empty.")
            ious.append(((prediction & reference).sum() / (prediction | reference).sum()).item())
        return {"ious": ious}

    def _result(self, state: dict[str, Any]) -> dict[str, Any]:
        # fsum rounds only once, so the order does not affect the result.
        return {"mean_iou": math.fsum(state["ious"]) / len(state["ious"]), "num_objects": len(state["ious"])}
