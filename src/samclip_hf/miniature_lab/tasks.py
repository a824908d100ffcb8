"""Evaluation sets of procedural scenes, and the evaluation tasks that correspond to the paper's tables."""

from functools import lru_cache, partial
from typing import Any

import numpy as np
from PIL import Image

from ..datasets.samples import CaptionedImage, DataSet, ImageWithObjects, LabeledImage, SegmentedImage
from ..evaluation import (
    CascadeSegmentation,
    ComposedSegmentation,
    Cost,
    Evaluator,
    HeadProbing,
    LabelMapEvaluator,
    LinearProbing,
    ModelAdapter,
    PromptedSegmentation,
    Retrieval,
    SemanticSegmentation,
    ZeroShotClassification,
    ZeroShotInstanceSegmentation,
)
from ..evaluation.metrics import AccumulatingMetric
from ..images import encode_mask, mask_to_coco_box
from ..miniature import MASK_GENERATION
from ..miniature.scenes import (
    BACKGROUND_PROMPTS,
    CLASS_NAMES,
    HELD_OUT,
    IMAGE_SIZE,
    TEMPLATES,
    Scene,
    evaluation_scene,
    render,
)

SIZES = (64, 96, 128)  # correspond to the paper's 224, 448 and 1024 px
NUM_SCENES = 200
OBJECT_COUNTS = ("mean_iou, 1 object", *(f"mean_iou, {number} objects" for number in (2, 3, 4)))  # metrics

Metrics = dict[str, float | None]


class MiniatureClassification(ZeroShotClassification):
    """
    Zero-shot classification with all 48 class names. Reports the accuracy on classes that occur in captions and on
    held-out classes separately.
    """

    def compute_metrics(self, metrics) -> Metrics:
        counts = metrics["top_k"].compute()
        correct, num = np.array(counts["correct_per_label"]), np.array(counts["num_per_label"])
        held_out = np.isin(np.arange(len(CLASS_NAMES)), HELD_OUT)
        groups = {"top1, captioned": ~held_out, "top1, never captioned": held_out}
        by_group: Metrics = {
            name: float(correct[group].sum() / num[group].sum()) if num[group].sum() else None
            for name, group in groups.items()
        }
        return by_group | {"top1": counts["top1"], "top5": counts["top5"]}


class ByNumberOfObjects(LabelMapEvaluator):
    """Reports the mean IoU also of the scenes with one, two, three and four objects, separately."""

    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        metrics = super().new_metrics()
        for name in OBJECT_COUNTS:
            metrics |= {name: super().new_metrics()["mean_iou"]}
        return metrics

    def update(self, model: ModelAdapter, samples: list[SegmentedImage], metrics) -> list[float]:
        scores = []
        for sample in samples:
            own = super().new_metrics()
            scores += super().update(model, [sample], own)
            seed, index = map(int, sample.key.split()[1].split("/"))
            for name in ("mean_iou", OBJECT_COUNTS[len(scene(seed, index).masks) - 1]):
                metrics[name].merge(own["mean_iou"].state)
        return scores

    def compute_metrics(self, metrics) -> Metrics:
        return super().compute_metrics(metrics) | {
            name: metrics[name].compute()["mean_iou"] if metrics[name].state else None for name in OBJECT_COUNTS
        }


class MiniatureComposed(ByNumberOfObjects, ComposedSegmentation):
    """Segmentation by the model's own composition."""


class MiniatureCascade(ByNumberOfObjects, CascadeSegmentation):
    """Segmentation by the cascade."""


def evaluate(evaluator: Evaluator, model: ModelAdapter) -> Metrics:
    """Runs an evaluator in a single process and returns its metrics."""
    result = evaluator.run(model)
    assert result is not None  # `None` only in further processes
    return result.metrics


@lru_cache(maxsize=8)  # the image, label map and objects of a scene are read separately
def scene(seed: int, index: int) -> Scene:
    """A scene with one to four objects of any class."""
    return render(seed, index, num_objects=1 + index % len(OBJECT_COUNTS))


def single_object(seed: int, index: int) -> Image.Image:
    return Image.fromarray(evaluation_scene(seed, index).image)


def image(seed: int, index: int) -> Image.Image:
    return Image.fromarray(scene(seed, index).image)


def label_map(seed: int, index: int) -> np.ndarray:
    return scene(seed, index).label_map


def objects(seed: int, index: int) -> list[dict[str, Any]]:
    """The objects of a scene as annotations in COCO's format."""
    annotations = []
    for number, (mask, class_id) in enumerate(
        zip(scene(seed, index).masks, scene(seed, index).class_ids, strict=True)
    ):
        annotations.append(
            {
                "id": index * 8 + number + 1,
                "image_id": index,
                "category_id": class_id + 1,
                "segmentation": encode_mask(mask, compressed=True),
                "bbox": mask_to_coco_box(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
            }
        )
    return annotations


def labeled_images(seed: int, num_scenes: int) -> DataSet[LabeledImage]:
    """Scenes with a single object, balanced over all classes."""
    samples = [
        LabeledImage(f"scene {seed}/{index}", partial(single_object, seed, index), index % len(CLASS_NAMES))
        for index in range(num_scenes)
    ]
    return DataSet("miniature", samples, [[name] for name in CLASS_NAMES], description=describe(seed, num_scenes))


def segmented_images(seed: int, num_scenes: int) -> DataSet[SegmentedImage]:
    """Scenes with one to four objects and their label maps. Label 0 is background."""
    samples = [
        SegmentedImage(f"scene {seed}/{index}", partial(image, seed, index), partial(label_map, seed, index))
        for index in range(num_scenes)
    ]
    names = [["background"], *([name] for name in CLASS_NAMES)]
    return DataSet("miniature", samples, names, list(BACKGROUND_PROMPTS), describe(seed, num_scenes))


def images_with_objects(seed: int, num_scenes: int) -> DataSet[ImageWithObjects]:
    """The scenes of `segmented_images`, with their objects."""
    samples = [
        ImageWithObjects(
            f"scene {seed}/{index}",
            partial(image, seed, index),
            partial(objects, seed, index),
            image_info={"id": index, "height": IMAGE_SIZE, "width": IMAGE_SIZE},
        )
        for index in range(num_scenes)
    ]
    categories = [{"id": class_id + 1, "name": name} for class_id, name in enumerate(CLASS_NAMES)]
    return DataSet("miniature", samples, description=describe(seed, num_scenes) | {"categories": categories})


def captioned_images(seed: int, num_scenes: int) -> DataSet[CaptionedImage]:
    """Scenes with distinct captions. Scenes whose caption has occurred before are left out."""
    samples, captions = [], set()
    for index in range(num_scenes):
        caption = render(seed, index, held_out=False).caption
        if caption is not None and caption not in captions:
            captions.add(caption)
            samples.append(CaptionedImage(f"scene {seed}/{index}", partial(captioned_image, seed, index), (caption,)))
    return DataSet("miniature", samples, description=describe(seed, num_scenes) | {"captions": "distinct"})


def captioned_image(seed: int, index: int) -> Image.Image:
    return Image.fromarray(render(seed, index, held_out=False).image)


def describe(seed: int, num_scenes: int) -> dict[str, Any]:
    return {"data": f"{num_scenes} procedural scenes, seed {seed}"}


def tasks(seed: int = 101, fraction: float = 1.0) -> dict[str, Evaluator]:
    """
    Returns the evaluation tasks that correspond to the paper's tables, by name.

    Args:
        seed (`int`): Seed of the scenes. The tasks use `seed` to `seed + 4`; training uses seeds from 1,000,000.
        fraction (`float`): Fraction of the scenes and of the probes' training steps, for faster evaluation.
    """

    def number(full: int) -> int:
        return max(16, round(full * fraction))

    scenes = segmented_images(seed + 1, number(NUM_SCENES))
    with_objects = images_with_objects(seed + 1, number(NUM_SCENES))
    by_size: dict[str, Evaluator] = {}
    for size in SIZES:
        by_size[f"classification:miniature@{size}"] = MiniatureClassification(
            labeled_images(seed, number(480)), size, TEMPLATES
        )
    for size in SIZES[1:]:
        by_size[f"semantic:miniature@{size}"] = SemanticSegmentation(scenes, size, templates=TEMPLATES)
    probe_images = labeled_images(seed + 2, number(1920)), labeled_images(seed, number(480))
    probe_scenes = segmented_images(seed + 3, number(800)), scenes
    return by_size | {
        "retrieval:miniature": Retrieval(captioned_images(seed + 4, number(500))),
        "instances:miniature": ZeroShotInstanceSegmentation(with_objects),
        "prompts:miniature": PromptedSegmentation(with_objects, point="random"),
        "composed:miniature": MiniatureComposed(scenes, templates=TEMPLATES),
        "cascade:miniature": MiniatureCascade(scenes, MASK_GENERATION, templates=TEMPLATES),
        "cascade:miniature@raw-crops": MiniatureCascade(
            scenes, MASK_GENERATION, masked_crops=False, templates=TEMPLATES
        ),
        "linear-probe:miniature": LinearProbing(*probe_images, size=IMAGE_SIZE),
        "head-probe:miniature": HeadProbing(*probe_scenes, size=IMAGE_SIZE, steps=number(400)),
        "cost:miniature": Cost(IMAGE_SIZE, IMAGE_SIZE, list(CLASS_NAMES), size=IMAGE_SIZE, generation=MASK_GENERATION),
    }
