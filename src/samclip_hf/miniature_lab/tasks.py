"""Evaluation sets of procedural scenes, and the evaluation tasks that correspond to the paper's tables."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Literal

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
    SamClipAdapter,
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
    render_cluttered,
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
            for name in ("mean_iou", OBJECT_COUNTS[num_objects(sample.key) - 1]):
                metrics[name].merge(own["mean_iou"].state)
        return scores

    def compute_metrics(self, metrics) -> Metrics:
        return super().compute_metrics(metrics) | {
            name: metrics[name].compute()["mean_iou"] if metrics[name].state else None for name in OBJECT_COUNTS
        }


class MiniatureSemantic(ByNumberOfObjects, SemanticSegmentation):
    """Segmentation by patch embeddings."""


class MiniatureComposed(ByNumberOfObjects, ComposedSegmentation):
    """
    Segmentation by the model's own composition, or by another one.

    composition (`"segments"` or `"classes"`, *optional*):
        Replaces the composition in the model's configuration during the evaluation.
    """

    def __init__(self, data: DataSet[SegmentedImage], composition: Literal["segments", "classes"] | None = None):
        super().__init__(data, templates=TEMPLATES)
        self.composition = composition

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({"composition": self.composition} if self.composition else {})

    def describe_settings(self, model: SamClipAdapter) -> dict[str, Any]:
        with self._composition_of(model):
            return super().describe_settings(model)

    def predict(self, model: SamClipAdapter, image: Image.Image) -> np.ndarray:
        with self._composition_of(model):
            return super().predict(model, image)

    @contextmanager
    def _composition_of(self, model: SamClipAdapter) -> Iterator[None]:
        config = model.model.config
        own, config.composition = config.composition, self.composition or config.composition
        try:
            yield
        finally:
            config.composition = own


class MiniatureCascade(ByNumberOfObjects, CascadeSegmentation):
    """Segmentation by the cascade."""


def evaluate(evaluator: Evaluator, model: ModelAdapter) -> Metrics:
    """Runs an evaluator in a single process and returns its metrics."""
    result = evaluator.run(model)
    assert result is not None  # `None` only in further processes
    return result.metrics


@lru_cache(maxsize=8)  # the image, label map and objects of a scene are read separately
def scene(seed: int, index: int, is_cluttered: bool = False) -> Scene:
    """A scene with one to four objects of any class."""
    return (render_cluttered if is_cluttered else render)(seed, index, num_objects=1 + index % len(OBJECT_COUNTS))


def sample_key(seed: int, index: int, is_cluttered: bool) -> str:
    return f"{'cluttered' if is_cluttered else 'scene'} {seed}/{index}"


def num_objects(key: str) -> int:
    """The number of objects in the scene with a key of [`sample_key`]."""
    kind, numbers = key.split()
    seed, index = map(int, numbers.split("/"))
    return len(scene(seed, index, kind == "cluttered").masks)


def single_object(seed: int, index: int) -> Image.Image:
    return Image.fromarray(evaluation_scene(seed, index).image)


def image(seed: int, index: int, is_cluttered: bool) -> Image.Image:
    return Image.fromarray(scene(seed, index, is_cluttered).image)


def label_map(seed: int, index: int, is_cluttered: bool) -> np.ndarray:
    return scene(seed, index, is_cluttered).label_map


def objects(seed: int, index: int, is_cluttered: bool) -> list[dict[str, Any]]:
    """The objects of a scene as annotations in COCO's format."""
    annotations = []
    shown = scene(seed, index, is_cluttered)
    for number, (mask, class_id) in enumerate(zip(shown.masks, shown.class_ids, strict=True)):
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


def segmented_images(seed: int, num_scenes: int, is_cluttered: bool = False) -> DataSet[SegmentedImage]:
    """Scenes with one to four objects and their label maps. Label 0 is background."""
    samples = [
        SegmentedImage(
            sample_key(seed, index, is_cluttered),
            partial(image, seed, index, is_cluttered),
            partial(label_map, seed, index, is_cluttered),
        )
        for index in range(num_scenes)
    ]
    names = [["background"], *([name] for name in CLASS_NAMES)]
    return DataSet("miniature", samples, names, list(BACKGROUND_PROMPTS), describe(seed, num_scenes, is_cluttered))


def images_with_objects(seed: int, num_scenes: int, is_cluttered: bool = False) -> DataSet[ImageWithObjects]:
    """The scenes of `segmented_images`, with their objects."""
    samples = [
        ImageWithObjects(
            sample_key(seed, index, is_cluttered),
            partial(image, seed, index, is_cluttered),
            partial(objects, seed, index, is_cluttered),
            image_info={"id": index, "height": IMAGE_SIZE, "width": IMAGE_SIZE},
        )
        for index in range(num_scenes)
    ]
    categories = [{"id": class_id + 1, "name": name} for class_id, name in enumerate(CLASS_NAMES)]
    description = describe(seed, num_scenes, is_cluttered) | {"categories": categories}
    return DataSet("miniature", samples, description=description)


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


def describe(seed: int, num_scenes: int, is_cluttered: bool = False) -> dict[str, Any]:
    kind = "cluttered procedural" if is_cluttered else "procedural"
    return {"data": f"{num_scenes} {kind} scenes, seed {seed}"}


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
    cluttered = segmented_images(seed + 1, number(NUM_SCENES), is_cluttered=True)
    by_size: dict[str, Evaluator] = {}
    for size in SIZES:
        by_size[f"classification:miniature@{size}"] = MiniatureClassification(
            labeled_images(seed, number(480)), size, TEMPLATES
        )
    for size in SIZES[1:]:
        by_size[f"semantic:miniature@{size}"] = MiniatureSemantic(scenes, size, templates=TEMPLATES)
    probe_images = labeled_images(seed + 2, number(1920)), labeled_images(seed, number(480))
    probe_scenes = segmented_images(seed + 3, number(800)), scenes
    with_objects = images_with_objects(seed + 1, number(NUM_SCENES))
    cluttered_objects = images_with_objects(seed + 1, number(NUM_SCENES), is_cluttered=True)
    return by_size | {
        "semantic:miniature@cluttered": MiniatureSemantic(cluttered, IMAGE_SIZE, templates=TEMPLATES),
        "retrieval:miniature": Retrieval(captioned_images(seed + 4, number(500))),
        "instances:miniature": ZeroShotInstanceSegmentation(with_objects),
        "prompts:miniature": PromptedSegmentation(with_objects, point="random"),
        "prompts:miniature@cluttered": PromptedSegmentation(cluttered_objects, point="random"),
        "composed:miniature": MiniatureComposed(scenes),
        "composed:miniature@classes": MiniatureComposed(scenes, "classes"),
        "composed:miniature@cluttered": MiniatureComposed(cluttered),
        "composed:miniature@cluttered-classes": MiniatureComposed(cluttered, "classes"),
        "cascade:miniature": cascade(scenes),
        "cascade:miniature@raw-crops": cascade(scenes, masked_crops=False),
        "cascade:miniature@cluttered": cascade(cluttered),
        "cascade:miniature@cluttered-raw-crops": cascade(cluttered, masked_crops=False),
        "linear-probe:miniature": LinearProbing(*probe_images, size=IMAGE_SIZE),
        "head-probe:miniature": HeadProbing(*probe_scenes, size=IMAGE_SIZE, steps=number(400)),
        "cost:miniature": Cost(IMAGE_SIZE, IMAGE_SIZE, list(CLASS_NAMES), size=IMAGE_SIZE, generation=MASK_GENERATION),
    }


def cascade(scenes: DataSet[SegmentedImage], masked_crops: bool = True) -> MiniatureCascade:
    return MiniatureCascade(scenes, MASK_GENERATION, masked_crops, templates=TEMPLATES)
