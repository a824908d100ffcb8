"""
Segmentation of objects from points and boxes: mask AP from a detector's boxes (paper, section 5, table 1), and mean
IoU from one point or one box (Kirillov et al. 2023, section 7.1).
"""

import zlib
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as run_lengths
from scipy.ndimage import distance_transform_edt

from ..datasets.samples import DataSet, ImageWithObjects
from ..visualization import with_masks, with_prompts
from .adapters import ModelAdapter, PromptableAdapter
from .evaluator import SampleEvaluator
from .metrics import AccumulatingMetric, MaskAveragePrecision, MaskIoU


class ZeroShotInstanceSegmentation(SampleEvaluator[ImageWithObjects]):
    """
    Every box of a detector is a prompt for one mask, which keeps the box's class and score. Where the data have no
    detections, the true boxes take their place, with a score of 1: an upper bound, and called that.

    style (`"coco"` or `"lvis"`):
        Whose rules count: LVIS names, for every image, the classes that were looked for.
    """

    name = "instances"
    batch_size = 1

    def __init__(self, data: DataSet[ImageWithObjects], style: Literal["coco", "lvis"] = "coco"):
        super().__init__(data)
        self.style = style

    def applies_to(self, model: ModelAdapter) -> bool:
        return isinstance(model, PromptableAdapter)

    def describe(self) -> dict[str, Any]:
        return {
            "boxes": "the true ones, score 1 (no detections were given: an upper bound)",
            **self.data.description,
            "masks": "one for each box",
            "rules": self.style,
        }

    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        categories = self.data.description.get("categories")
        return {"average_precision": MaskAveragePrecision(style=self.style, categories=categories)}

    def prepare(self, model: PromptableAdapter) -> None:
        pass

    def update(self, model: PromptableAdapter, samples: list[ImageWithObjects], metrics) -> list[float]:
        scores = []
        for sample in samples:
            objects, boxes, masks = self._masks(model, sample)
            results = [
                {"category_id": box["category_id"], "score": box["score"], "segmentation": encode(mask)}
                for box, mask in zip(boxes, masks, strict=True)
            ]
            metrics["average_precision"].add(
                prediction=results, reference={"image": sample.image_info, "annotations": objects}
            )
            truths = [decode(o, sample.image_info) for o in objects if not o.get("iscrowd")]
            scores.append(float(np.mean([best_iou(truth, masks) for truth in truths])) if truths else 1.0)
        return scores

    def _masks(self, model: PromptableAdapter, sample: ImageWithObjects) -> tuple[list[dict], list[dict], np.ndarray]:
        """True objects, boxes with classes and scores, and a mask for each of these."""
        image, objects = sample.image(), sample.objects()
        boxes = sample.detections
        if "boxes" not in self.data.description:
            boxes = [{**o, "score": 1.0} for o in objects if not o.get("iscrowd")]
        if not boxes:
            return objects, [], np.zeros((0, image.height, image.width), dtype=bool)
        corners = np.array([box["bbox"] for box in boxes], dtype=np.float32)
        corners[:, 2:] += corners[:, :2]
        limits = np.array([image.width, image.height] * 2, dtype=np.float32)
        masks, _ = model.predict_masks(image, boxes=torch.from_numpy(corners.clip(0, limits)))
        return objects, boxes, masks[:, 0].numpy()

    def compute_metrics(self, metrics) -> dict[str, float | None]:
        return metrics["average_precision"].compute()

    def visualize(self, model: PromptableAdapter, sample: ImageWithObjects) -> list[tuple[str, np.ndarray]]:
        objects, boxes, masks = self._masks(model, sample)
        pixels = np.asarray(sample.image())
        corners = np.array([box["bbox"] for box in boxes], dtype=np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        return [
            ("boxes", with_prompts(pixels, boxes=corners)),
            ("truth", with_masks(pixels, [decode(o, sample.image_info) for o in objects])),
            ("masks", with_masks(pixels, list(masks))),
        ]


class PromptedSegmentation(SampleEvaluator[ImageWithObjects]):
    """
    The IoU of every object's mask with that found from one point, and from its tight box.

    Of a point's three masks counts the one that the model itself thinks best and, as "oracle", the one that is.

    point (`"center"` or `"random"`):
        The pixel farthest from the object's border, as in SAM's paper, or any pixel of the object, drawn by `seed` and
        the sample's key: harder, as a hasty user clicks.
    """

    name = "prompts"
    batch_size = 1

    def __init__(self, data: DataSet[ImageWithObjects], point: Literal["center", "random"] = "center", seed: int = 0):
        super().__init__(data)
        self.point, self.seed = point, seed

    def applies_to(self, model: ModelAdapter) -> bool:
        return isinstance(model, PromptableAdapter)

    def describe(self) -> dict[str, Any]:
        description = {key: value for key, value in self.data.description.items() if key != "categories"}
        return {
            **description,
            "point": {"center": "farthest from the border", "random": f"any of the object's, seed {self.seed}"}[
                self.point
            ],
            "box": "tight",
            "crowds": "left out",
        }

    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        return {name: MaskIoU() for name in ("point_miou", "point_oracle_miou", "box_miou")}

    def prepare(self, model: PromptableAdapter) -> None:
        pass

    def update(self, model: PromptableAdapter, samples: list[ImageWithObjects], metrics) -> list[float]:
        scores = []
        for sample in samples:
            truths, _, _, found = self._masks(model, sample)
            for name, masks in found.items():
                metrics[name].add_batch(predictions=masks, references=truths)
            ious = [iou(mask, truth) for mask, truth in zip(found["point_miou"], truths, strict=True)]
            scores.append(float(np.mean(ious)) if ious else 1.0)
        return scores

    def _masks(self, model: PromptableAdapter, sample: ImageWithObjects):
        """True masks, their points and boxes, and by each figure's name the masks found."""
        image = sample.image()
        info = {"height": image.height, "width": image.width}
        truths = [decode(o, info) for o in sample.objects() if not o.get("iscrowd")]
        truths = [truth for truth in truths if truth.any()]  # polygons thinner than a pixel have no point to click at
        if not truths:
            return [], np.zeros((0, 2)), np.zeros((0, 4)), {name: [] for name in self.new_metrics()}
        rng = np.random.default_rng((self.seed, zlib.crc32(sample.key.encode())))
        points = np.array([center(truth) if self.point == "center" else random_pixel(truth, rng) for truth in truths])
        boxes = np.array([tight_box(truth) for truth in truths])
        masks, scores = model.predict_masks(image, points=torch.from_numpy(points))
        from_boxes, _ = model.predict_masks(image, boxes=torch.from_numpy(boxes))
        likely = [mask[score.argmax()].numpy() for mask, score in zip(masks, scores, strict=True)]
        oracle = [max(mask.numpy(), key=lambda m: iou(m, truth)) for mask, truth in zip(masks, truths, strict=True)]
        found = {"point_miou": likely, "point_oracle_miou": oracle, "box_miou": list(from_boxes[:, 0].numpy())}
        return truths, points, boxes, found

    def compute_metrics(self, metrics) -> dict[str, float | None]:
        return {name: metric.compute()["mean_iou"] for name, metric in metrics.items()}

    def visualize(self, model: PromptableAdapter, sample: ImageWithObjects) -> list[tuple[str, np.ndarray]]:
        truths, points, boxes, found = self._masks(model, sample)
        pixels = np.asarray(sample.image())
        return [
            ("prompts", with_prompts(pixels, points, boxes)),
            ("truth", with_masks(pixels, truths)),
            ("from points", with_masks(pixels, found["point_miou"])),
            ("from boxes", with_masks(pixels, found["box_miou"])),
        ]


def encode(mask: np.ndarray) -> dict:
    """A mask `(height, width)` of type bool as COCO's run lengths."""
    return run_lengths.encode(np.asfortranarray(mask, dtype=np.uint8))


def decode(annotation: dict, image_info: dict) -> np.ndarray:
    """An annotation's mask, `(height, width)` of type bool, from polygons or run lengths."""
    segmentation, height, width = annotation["segmentation"], image_info["height"], image_info["width"]
    if isinstance(segmentation, list):
        segmentation = run_lengths.merge(run_lengths.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = run_lengths.frPyObjects(segmentation, height, width)
    return run_lengths.decode(segmentation).astype(bool)


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Of two masks `(height, width)` of type bool, not both empty."""
    return float((mask & truth).sum() / (mask | truth).sum())


def best_iou(truth: np.ndarray, masks: np.ndarray) -> float:
    """The highest IoU of any of the masks with the truth; 0 if there are none, or no truth."""
    return max((iou(mask, truth) for mask in masks), default=0.0) if truth.any() else 0.0


def center(mask: np.ndarray) -> tuple[int, int]:
    """x and y of the pixel farthest from the mask's border; the image's own border counts as one."""
    distance = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(distance.argmax(), mask.shape)
    return int(column), int(row)


def random_pixel(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """x and y of any pixel of the mask."""
    rows, columns = np.nonzero(mask)
    chosen = rng.integers(len(rows))
    return int(columns[chosen]), int(rows[chosen])


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around the mask, last pixel included."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])
