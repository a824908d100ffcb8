"""The miniature world as data sets to judge by, and the tasks that stand for the paper's tables in it."""

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
    LinearProbing,
    PromptedSegmentation,
    Retrieval,
    SemanticSegmentation,
    ZeroShotClassification,
    ZeroShotInstanceSegmentation,
)
from ..images import encode_mask, mask_to_prompt_box
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

SIZES = (64, 96, 128)  # stand for the paper's 224, 448 and 1024 px
NUM_SCENES = 200  # of one to four objects


class MiniatureClassification(ZeroShotClassification):
    """Tells pairs of pattern and colour that had captions from those that never had; all 48 names are choices."""

    def compute_metrics(self, metrics) -> dict[str, float | None]:
        counts = metrics["top_k"].compute()
        correct, num = np.array(counts["correct_per_label"]), np.array(counts["num_per_label"])
        held_out = np.isin(np.arange(len(CLASS_NAMES)), HELD_OUT)
        groups = {"top1, captioned": ~held_out, "top1, never captioned": held_out}
        by_group: dict[str, float | None] = {
            name: float(correct[group].sum() / num[group].sum()) if num[group].sum() else None
            for name, group in groups.items()
        }
        return by_group | {"top1": counts["top1"], "top5": counts["top5"]}


@lru_cache(maxsize=8)  # image, labels and objects of a scene are asked for one after another
def scene(seed: int, index: int) -> Scene:
    """One to four objects of any class."""
    return render(seed, index, num_objects=1 + index % 4)


def single_object(seed: int, index: int) -> Image.Image:
    return Image.fromarray(evaluation_scene(seed, index).image)


def image(seed: int, index: int) -> Image.Image:
    return Image.fromarray(scene(seed, index).image)


def label_map(seed: int, index: int) -> np.ndarray:
    return scene(seed, index).label_map


def objects(seed: int, index: int) -> list[dict[str, Any]]:
    """As COCO's annotations."""
    annotations = []
    for number, (mask, class_id) in enumerate(
        zip(scene(seed, index).masks, scene(seed, index).class_ids, strict=True)
    ):
        x1, y1, x2, y2 = mask_to_prompt_box(mask)
        annotations.append(
            {
                "id": index * 8 + number + 1,
                "image_id": index,
                "category_id": class_id + 1,
                "segmentation": encode_mask(mask, compressed=True),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int(mask.sum()),
                "iscrowd": 0,
            }
        )
    return annotations


def labelled_images(seed: int, num_scenes: int) -> DataSet[LabeledImage]:
    """Single objects, balanced over all classes."""
    samples = [
        LabeledImage(f"scene {seed}/{index}", partial(single_object, seed, index), index % len(CLASS_NAMES))
        for index in range(num_scenes)
    ]
    return DataSet("miniature", samples, [[name] for name in CLASS_NAMES], description=described(seed, num_scenes))


def segmented_images(seed: int, num_scenes: int) -> DataSet[SegmentedImage]:
    """Scenes of one to four objects; label 0 is background."""
    samples = [
        SegmentedImage(f"scene {seed}/{index}", partial(image, seed, index), partial(label_map, seed, index))
        for index in range(num_scenes)
    ]
    names = [["background"], *([name] for name in CLASS_NAMES)]
    return DataSet("miniature", samples, names, list(BACKGROUND_PROMPTS), described(seed, num_scenes))


def images_with_objects(seed: int, num_scenes: int) -> DataSet[ImageWithObjects]:
    """The same scenes."""
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
    return DataSet("miniature", samples, description=described(seed, num_scenes) | {"categories": categories})


def captioned_images(seed: int, num_scenes: int) -> DataSet[CaptionedImage]:
    """Scenes whose captions no other one has, so that there is one right answer."""
    samples, seen = [], set()
    for index in range(num_scenes):
        caption = render(seed, index, held_out=False).caption
        if caption is not None and caption not in seen:
            seen.add(caption)
            samples.append(CaptionedImage(f"scene {seed}/{index}", partial(captioned_image, seed, index), (caption,)))
    return DataSet("miniature", samples, description=described(seed, num_scenes) | {"captions": "each occurs once"})


def captioned_image(seed: int, index: int) -> Image.Image:
    return Image.fromarray(render(seed, index, held_out=False).image)


def described(seed: int, num_scenes: int) -> dict[str, Any]:
    return {"data": f"drawn scenes, seed {seed}, {num_scenes} of them"}


def tasks(seed: int = 101, share: float = 1.0) -> dict[str, Evaluator]:
    """
    By name, the tasks that stand for the paper's tables.

    seed (`int`):
        Of the scenes, in steps of 100; no training draws from seeds below a million.
    share (`float`):
        Of the scenes and of the probes' training steps: less for a quick look.
    """

    def number(full: int) -> int:
        return max(16, round(full * share))

    scenes = segmented_images(seed + 1, number(NUM_SCENES))
    with_objects = images_with_objects(seed + 1, number(NUM_SCENES))
    by_size: dict[str, Evaluator] = {}
    for size in SIZES:
        by_size[f"classification:miniature@{size}"] = MiniatureClassification(
            labelled_images(seed, number(480)), size, TEMPLATES
        )
    for size in SIZES[1:]:
        by_size[f"semantic:miniature@{size}"] = SemanticSegmentation(scenes, size, templates=TEMPLATES)
    probe_images = labelled_images(seed + 2, number(1920)), labelled_images(seed, number(480))
    probe_scenes = segmented_images(seed + 3, number(800)), scenes
    return by_size | {
        "retrieval:miniature": Retrieval(captioned_images(seed + 4, number(500))),
        "instances:miniature": ZeroShotInstanceSegmentation(with_objects),
        "prompts:miniature": PromptedSegmentation(with_objects, point="random"),
        "composed:miniature": ComposedSegmentation(scenes, templates=TEMPLATES),
        "cascade:miniature": CascadeSegmentation(scenes, MASK_GENERATION, templates=TEMPLATES),
        "linear-probe:miniature": LinearProbing(*probe_images, size=IMAGE_SIZE),
        "head-probe:miniature": HeadProbing(*probe_scenes, size=IMAGE_SIZE, steps=number(400)),
        "cost:miniature": Cost(IMAGE_SIZE, IMAGE_SIZE, list(CLASS_NAMES), size=IMAGE_SIZE, generation=MASK_GENERATION),
    }
