"""Mean intersection over union of objects' masks."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import Features, List, Value

from .accumulating import AccumulatingMetric


class MaskIoU(AccumulatingMetric):
    r"""
    How well prompted masks fit: the mean over all objects, small and large alike, of intersection over union. SAM's
    authors call it mIoU (arXiv 2304.02643, section 7.1).

    predictions, references (boolean arrays of shape `(num_objects, height, width)`, or lists of `(height, width)`):
        Of each object the mask. An empty prediction has 0.

    `compute` returns `mean_iou` and `num_objects`. `ValueError` where a reference is empty, masks are not boolean, or
    the two differ in shape.
    """

    input_features = Features({name: List(List(Value("bool"))) for name in ("predictions", "references")})

    def _measure(self, predictions: Iterable[np.ndarray], references: Iterable[np.ndarray]) -> dict[str, Any]:
        ious = []
        for prediction, reference in zip(map(np.asarray, predictions), map(np.asarray, references), strict=True):
            if prediction.dtype != bool or reference.dtype != bool:
                raise ValueError(f"Masks are boolean, not {prediction.dtype} and {reference.dtype}.")
            if prediction.shape != reference.shape or reference.ndim != 2:
                raise ValueError(
                    f"Masks are of one shape (height, width), not {prediction.shape} and {reference.shape}."
                )
            if not reference.any():
                raise ValueError("A reference mask is empty: there is no object to find.")
            ious.append(((prediction & reference).sum() / (prediction | reference).sum()).item())
        return {"ious": ious}

    def _result(self, state: dict[str, Any]) -> dict[str, Any]:
        # fsum rounds once, at the end, so the order does not matter.
        return {"mean_iou": math.fsum(state["ious"]) / len(state["ious"]), "num_objects": len(state["ious"])}
