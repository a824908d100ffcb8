"""Zero-shot instance segmentation: mask AP from a detector's boxes (paper, section 5, table 1)."""

from typing import Any, Literal

import numpy as np
import torch

from ..datasets.samples import DataSet, ImageWithObjects
from ..images import decode_mask, encode_mask
from ..visualization import draw_prompts, overlay_masks
from .adapters import PromptableAdapter, describe_sizes
from .evaluator import SampleEvaluator
from .metrics import AccumulatingMetric, MaskAveragePrecision
from .prompted_segmentation import mask_iou


class ZeroShotInstanceSegmentation(SampleEvaluator[ImageWithObjects]):
    """
    Prompts the model with each box of a detector. The mask has the class and the score of its box. Without detections,
    the ground-truth boxes are used with a score of 1. This gives an upper bound, and the description says so.

    data (`DataSet`):
        Images with objects and, optionally, detections.
    style (`"coco"` or `"lvis"`, *optional*, defaults to `"coco"`):
        The rules of average precision, see [`MaskAveragePrecision`].
    """

    name = "instances"
    adapter_class = PromptableAdapter
    batch_size = 1

    def __init__(self, data: DataSet[ImageWithObjects], style: Literal["coco", "lvis"] = "coco"):
        super().__init__(data)
        self.style = style

    def describe(self) -> dict[str, Any]:
        return {
            "boxes": "the true ones, score 1 (no detections were given: an upper bound)",
            **self.data.description,
            "boxes of a detector": "boxes" in self.data.description,
            "masks": "one for each box",
            "rules": self.style,
        }

    def describe_settings(self, model: PromptableAdapter) -> dict[str, Any]:
        return describe_sizes(model)

    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        categories = self.data.description.get("categories")
        return {"average_precision": MaskAveragePrecision(style=self.style, categories=categories)}

    def update(self, model: PromptableAdapter, samples: list[ImageWithObjects], metrics) -> list[float]:
        scores = []
        for sample in samples:
            objects, boxes, masks = self._predict(model, sample)
            predictions = [
                {
                    "category_id": box["category_id"],
                    "score": box["score"],
                    "segmentation": encode_mask(mask, compressed=True),
                }
                for box, mask in zip(boxes, masks, strict=True)
            ]
            metrics["average_precision"].add(
                prediction=predictions, reference={"image": sample.image_info, "annotations": objects}
            )
            truths = [decode_object(annotation, sample) for annotation in objects if not annotation.get("iscrowd")]
            scores.append(float(np.mean([best_iou(truth, masks) for truth in truths])) if truths else 1.0)
        return scores

    def _predict(
        self, model: PromptableAdapter, sample: ImageWithObjects
    ) -> tuple[list[dict], list[dict], np.ndarray]:
        """Returns annotations, boxes with classes and scores, and one mask for each box."""
        image, objects = sample.image(), sample.objects()
        boxes = sample.detections
        if "boxes" not in self.data.description:
            boxes = [{**annotation, "score": 1.0} for annotation in objects if not annotation.get("iscrowd")]
        if not boxes:
            return objects, [], np.zeros((0, image.height, image.width), dtype=bool)
        limits = np.array([image.width, image.height] * 2, dtype=np.float32)
        prompts = torch.from_numpy(box_corners(boxes).clip(0, limits))
        masks, _ = model.predict_masks(image, boxes=prompts)
        return objects, boxes, masks[:, 0].numpy()

    def compute_metrics(self, metrics) -> dict[str, float | None]:
        return metrics["average_precision"].compute()

    def visualize(self, model: PromptableAdapter, sample: ImageWithObjects) -> list[tuple[str, np.ndarray]]:
        objects, boxes, masks = self._predict(model, sample)
        pixels = np.asarray(sample.image())
        return [
            ("boxes", draw_prompts(pixels, boxes=box_corners(boxes))),
            ("ground truth", overlay_masks(pixels, [decode_object(annotation, sample) for annotation in objects])),
            ("masks", overlay_masks(pixels, list(masks))),
        ]


def box_corners(annotations: list[dict]) -> np.ndarray:
    """Returns x1, y1, x2, y2 `(num_annotations, 4)` of COCO's `"bbox"` (left, top, width, height)."""
    corners = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    return corners


def decode_object(annotation: dict, sample: ImageWithObjects) -> np.ndarray:
    """Returns the mask of an annotation, `(height, width)` of type bool."""
    return decode_mask(annotation["segmentation"], (sample.image_info["height"], sample.image_info["width"]))


def best_iou(truth: np.ndarray, masks: np.ndarray) -> float:
    """Returns the highest IoU of any mask with the ground truth; 0 if there are no masks or the truth is empty."""
    return max((mask_iou(mask, truth) for mask in masks), default=0.0) if truth.any() else 0.0
