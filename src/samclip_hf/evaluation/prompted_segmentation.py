"""Segmentation of objects from one point or one box: mean IoU (Kirillov et al. 2023, section 7.1)."""

import zlib
from typing import Any, Literal

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from ..datasets.samples import DataSet, ImageWithObjects
from ..images import decode_mask, mask_to_prompt_box
from ..visualization import draw_prompts, overlay_masks
from .adapters import PromptableAdapter, describe_sizes
from .evaluator import SampleEvaluator
from .metrics import AccumulatingMetric, MaskIoU


class PromptedSegmentation(SampleEvaluator[ImageWithObjects]):
    """
    Compares each object's mask with the masks that are predicted from a point and from the object's bounding box. Of
    the three masks of a point, `point_miou` uses the one with the highest predicted IoU, `point_oracle_miou` the one
    with the highest IoU.

    data (`DataSet`):
        Images with objects.
    point (`"center"` or `"random"`, *optional*, defaults to `"center"`):
        The pixel that is farthest from the object's border, as in SAM's paper, or a random pixel of the object, which
        is harder.
    seed (`int`, *optional*, defaults to 0):
        The seed of random points. They also depend on the sample's key.
    """

    name = "prompts"
    adapter_class = PromptableAdapter
    batch_size = 1

    def __init__(self, data: DataSet[ImageWithObjects], point: Literal["center", "random"] = "center", seed: int = 0):
        super().__init__(data)
        self.point, self.seed = point, seed

    def describe(self) -> dict[str, Any]:
        points = {"center": "farthest from the border", "random": f"any of the object's, seed {self.seed}"}
        return {
            **{key: value for key, value in self.data.description.items() if key != "categories"},
            "point": points[self.point],
            "box": "tight",
            "crowds": "left out",
        }

    def describe_settings(self, model: PromptableAdapter) -> dict[str, Any]:
        return describe_sizes(model)

    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        return {name: MaskIoU() for name in ("point_miou", "point_oracle_miou", "box_miou")}

    def update(self, model: PromptableAdapter, samples: list[ImageWithObjects], metrics) -> list[float]:
        scores = []
        for sample in samples:
            truths, _, _, predictions = self._predict(model, sample)
            for name, masks in predictions.items():
                metrics[name].add_batch(predictions=masks, references=truths)
            ious = [mask_iou(mask, truth) for mask, truth in zip(predictions["point_miou"], truths, strict=True)]
            scores.append(float(np.mean(ious)) if ious else 1.0)
        return scores

    def _predict(self, model: PromptableAdapter, sample: ImageWithObjects):
        """Returns ground-truth masks, their points and boxes, and the predicted masks by metric."""
        image = sample.image()
        size = (image.height, image.width)
        annotations = [annotation for annotation in sample.objects() if not annotation.get("iscrowd")]
        truths = [decode_mask(annotation["segmentation"], size) for annotation in annotations]
        truths = [truth for truth in truths if truth.any()]  # polygons thinner than a pixel are empty
        if not truths:
            return [], np.zeros((0, 2)), np.zeros((0, 4)), {name: [] for name in self.new_metrics()}
        rng = np.random.default_rng((self.seed, zlib.crc32(sample.key.encode())))
        points = np.array(
            [center_pixel(truth) if self.point == "center" else random_pixel(truth, rng) for truth in truths]
        )
        boxes = np.array([mask_to_prompt_box(truth) for truth in truths])
        masks, scores = model.predict_masks(image, points=torch.from_numpy(points))
        box_masks, _ = model.predict_masks(image, boxes=torch.from_numpy(boxes))
        predictions = {
            "point_miou": [mask[score.argmax()].numpy() for mask, score in zip(masks, scores, strict=True)],
            "point_oracle_miou": [
                max(mask.numpy(), key=lambda m: mask_iou(m, truth)) for mask, truth in zip(masks, truths, strict=True)
            ],
            "box_miou": list(box_masks[:, 0].numpy()),
        }
        return truths, points, boxes, predictions

    def compute_metrics(self, metrics) -> dict[str, float | None]:
        return {name: metric.compute()["mean_iou"] for name, metric in metrics.items()}

    def visualize(self, model: PromptableAdapter, sample: ImageWithObjects) -> list[tuple[str, np.ndarray]]:
        truths, points, boxes, predictions = self._predict(model, sample)
        pixels = np.asarray(sample.image())
        return [
            ("prompts", draw_prompts(pixels, points, boxes)),
            ("ground truth", overlay_masks(pixels, truths)),
            ("from points", overlay_masks(pixels, predictions["point_miou"])),
            ("from boxes", overlay_masks(pixels, predictions["box_miou"])),
        ]


def mask_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Returns the IoU of two masks `(height, width)` of type bool that are not both empty."""
    return float((mask & truth).sum() / (mask | truth).sum())


def center_pixel(mask: np.ndarray) -> tuple[int, int]:
    """Returns x and y of the pixel that is farthest from the mask's border and from the edges of the image."""
    distance = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(distance.argmax(), mask.shape)
    return int(column), int(row)


def random_pixel(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Returns x and y of a random pixel of the mask."""
    rows, columns = np.nonzero(mask)
    index = rng.integers(len(rows))
    return int(columns[index]), int(rows[index])
