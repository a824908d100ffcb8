"""What a miniature SAM-CLIP can do, beside its teachers, in figures and in one picture.

    python -m samclip_hf.miniature.report --model runs/demo/model

Scenes are fresh: no training run draws from their seeds.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import SamClipForImageSegmentation, SamClipProcessor, miniature
from ..evaluation import (
    ClipAdapter,
    ComposedSegmentation,
    Evaluator,
    LabelMapEvaluator,
    ModelAdapter,
    SamAdapter,
    SamClipAdapter,
    SemanticSegmentation,
    load_adapter,
)
from ..evaluation.prompted_segmentation import random_pixel
from ..images import mask_to_prompt_box
from ..miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, COLOURS, PATTERNS, TEMPLATES, Scene, evaluation_scene
from .tasks import NUM_SCENES, SIZES, scene, segmented_images, tasks

EVALUATION_SEED = 101
NUM_COLOUR_SCENES = 480  # one for each class and each kind of background, and more

Figures = dict[tuple[str, str], float | None]  # by task and figure


def set_world_vocabulary(model: SamClipForImageSegmentation, processor: SamClipProcessor) -> None:
    """All class names of the miniature world and its descriptions of background."""
    model.set_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, TEMPLATES, processor.tokenizer)


def world_tasks(seed: int = EVALUATION_SEED, share: float = 1.0) -> dict[str, Evaluator]:
    """Those of the miniature's tasks that this report is of: naming single objects, masks from prompts, masks by
    text."""
    wanted = ("classification", "prompts", "semantic", "composed")
    return {key: task for key, task in tasks(seed, share).items() if key.partition(":")[0] in wanted}


def measure(model: ModelAdapter, by: Mapping[str, Evaluator]) -> Figures:
    """What the tasks find, of those that the model can be asked."""
    figures: Figures = {}
    for key, task in by.items():
        if task.applies_to(model):
            outcome = task.run(model)
            assert outcome is not None  # this is one process
            figures |= {(key, figure): value for figure, value in outcome.metrics.items()}
    return figures


def load_teachers() -> tuple[SamAdapter, ClipAdapter]:
    sam, clip = load_adapter(str(miniature.sam_teacher())), load_adapter(str(miniature.clip_teacher()))
    assert isinstance(sam, SamAdapter) and isinstance(clip, ClipAdapter)
    return sam, clip


def load_student(folder: str | Path) -> SamClipAdapter:
    """Raises `ValueError` where the folder holds another kind of model."""
    student = load_adapter(str(folder))
    if not isinstance(student, SamClipAdapter):
        raise ValueError(f"{folder} holds no SAM-CLIP.")
    return student


def beside_teachers(student: Figures, teachers: Figures) -> dict[str, dict[str, float | None]]:
    """
    The student's figures, in [0, 1], and the teachers' on the same scenes; the README's tables explain them. The CLIP
    teacher is asked for names at its own size, 64 px, and by patches where it does best, at 96 px; the student at
    128 px, which stands for SAM's 1024.
    """
    names = {"zero_shot_top1": "top1, captioned", "zero_shot_top1_heldout": "top1, never captioned"}
    top1 = {
        key: {
            "teacher": teachers["classification:miniature@64", figure],
            "student": student["classification:miniature@128", figure],
        }
        for key, figure in names.items()
    }
    prompted = {
        key: {
            name: figures["prompts:miniature", key] for name, figures in (("teacher", teachers), ("student", student))
        }
        for key in ("point_miou", "box_miou")
    }
    by_text = {
        "teacher_patches": teachers["semantic:miniature@96", "mean_iou"],
        "clip_head": student["semantic:miniature@128", "mean_iou"],
        "both_heads": student["composed:miniature", "mean_iou"],
    }
    by_size = {str(size): student[f"classification:miniature@{size}", "top1, captioned"] for size in SIZES}
    return {**top1, **prompted, "semantic_miou": by_text, "top1_by_size": by_size}


class NearestColour(LabelMapEvaluator):
    """
    The baseline without learning: each pixel takes the class, or the background, of the nearest mean colour over the
    pixels of single-object scenes. What this reaches is what can be had from raw colour. The model is not asked.
    """

    name = "nearest colour"

    def applies_to(self, model: ModelAdapter) -> bool:
        return True

    def prepare(self, model: ModelAdapter) -> None:
        groups: dict[tuple[int, str], list[np.ndarray]] = {}
        for index in range(NUM_COLOUR_SCENES):
            single = evaluation_scene(EVALUATION_SEED + 2, index)
            groups.setdefault((single.class_ids[0] + 1, ""), []).append(single.image[single.masks[0]])
            groups.setdefault((0, single.background), []).append(single.image[~single.masks[0]])
        self.labels = np.array([label for label, _ in groups])
        means = [np.concatenate(pixels).mean(axis=0) for pixels in groups.values()]
        self.means = np.stack(means).astype(np.float32)

    def predict(self, model: ModelAdapter, image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image).astype(np.float32)
        # |p - m|^2 without |p|^2, which is the same for all means.
        return self.labels[((self.means**2).sum(axis=1) - 2 * pixels @ self.means.T).argmin(axis=-1)]


def prompted_mask(student: SamClipAdapter, scene: Scene, prompt: str) -> np.ndarray:
    """The student's mask of the scene's largest object, `(height, width)` bool, from one "point" or one "box"."""
    image, mask = Image.fromarray(scene.image), largest(scene)
    if prompt == "point":
        masks, scores = student.predict_masks(image, points=torch.tensor([point_in(mask)]))
    else:
        masks, scores = student.predict_masks(image, boxes=torch.tensor([mask_to_prompt_box(mask)]))
    return masks[0, scores[0].argmax()].numpy()


def largest(scene: Scene) -> np.ndarray:
    return scene.masks[scene.masks.sum(axis=(1, 2)).argmax()]


def point_in(mask: np.ndarray) -> tuple[int, int]:
    """The x and y that the picture clicks at: any pixel of the mask, always the same one."""
    return random_pixel(mask, np.random.default_rng(0))


def draw(clip: ClipAdapter, student: SamClipAdapter, path: Path, num_scenes: int = 6) -> None:
    """The picture: scenes in rows; what goes in, the truth, and what each of the models makes of it in columns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by = world_tasks()
    scenes = [scene(EVALUATION_SEED + 1, 2 * number + 1) for number in range(num_scenes)]  # of two or four objects
    columns: dict[str, str | Sequence[np.ndarray] | np.ndarray | None] = {
        "image": None,
        "truth": [scene.label_map for scene in scenes],
        "SAM-CLIP: one point": "point",
        "SAM-CLIP: one box": "box",
        "by text:\nCLIP teacher's patches": segmented(by["semantic:miniature@96"], clip, scenes),
        "by text:\nSAM-CLIP's CLIP head": segmented(by["semantic:miniature@128"], student, scenes),
        "by text:\nSAM-CLIP's both heads": segmented(by["composed:miniature"], student, scenes),
    }
    figure, axes = plt.subplots(
        len(scenes), len(columns), figsize=(2.1 * len(columns), 2.1 * len(scenes) + 0.6), layout="constrained"
    )
    figure.suptitle(
        "One model segments by point, by box and by text: every class name of this world was asked for at once "
        "(struck out: wrong names)"
    )
    for number, (row, shown) in enumerate(zip(axes, scenes, strict=True)):
        for axis, (title, content) in zip(row, columns.items(), strict=True):
            axis.set(xticks=[], yticks=[])
            if axis in axes[0]:
                axis.set_title(title, fontsize=10)
            axis.imshow(shown.image)
            if isinstance(content, str):
                mask = prompted_mask(student, shown, content)
                axis.imshow(overlay(mask.astype(int), {1: (1.0, 1.0, 1.0)}))
                axis.contour(mask, levels=[0.5], colors="black", linewidths=1)
                draw_prompt(axis, largest(shown), content)
            elif content is not None:
                label_map = content[number]
                axis.imshow(overlay(label_map, class_colours()))
                name_segments(axis, label_map, shown.label_map)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def segmented(task: Evaluator, model: ModelAdapter, scenes: Sequence[Scene]) -> list[np.ndarray]:
    """Label maps `(height, width)`, by one of the tasks that make them."""
    assert isinstance(task, SemanticSegmentation | ComposedSegmentation)
    task.prepare(model)  # type: ignore[arg-type]
    return [task.predict(model, Image.fromarray(scene.image)) for scene in scenes]  # type: ignore[arg-type]


def class_colours() -> dict[int, tuple[float, ...]]:
    """The colour of each class's name, by label."""
    from matplotlib.colors import to_rgb

    return {class_id + 1: to_rgb(COLOURS[class_id % len(COLOURS)]) for class_id in range(len(CLASS_NAMES))}


def overlay(label_map: np.ndarray, colours: dict[int, tuple[float, ...]]) -> np.ndarray:
    """Labels `(height, width)` as half-transparent colours `(height, width, 4)`; 0 darkens."""
    rgba = np.zeros((*label_map.shape, 4))
    rgba[..., 3] = 0.6
    for label, colour in colours.items():
        rgba[label_map == label] = (*colour, 0.75 if len(colours) > 1 else 0.45)
    return rgba


def draw_prompt(axis, mask: np.ndarray, prompt: str) -> None:
    if prompt == "point":
        axis.plot(*point_in(mask), marker="*", color="lime", markeredgecolor="black", markersize=14)
    else:
        x1, y1, x2, y2 = mask_to_prompt_box(mask)
        axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="lime", linewidth=2)


def name_segments(axis, label_map: np.ndarray, truth: np.ndarray) -> None:
    """Writes the pattern's name on every segment of some size, struck out where most of the segment is something else;
    its colour is to be seen."""
    for label in np.unique(label_map):
        rows, columns = np.nonzero(label_map == label)
        if label == 0 or len(rows) < 150:
            continue
        pattern = PATTERNS[(label - 1) // len(COLOURS)]
        middle = np.hypot(rows - rows.mean(), columns - columns.mean()).argmin()
        right = np.bincount(truth[rows, columns]).argmax() == label
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8 if right else 0.5, "linewidth": 0}
        # Combining strokes; matplotlib strikes nothing out by itself.
        name = pattern if right else "".join(letter + "\u0336" for letter in pattern)
        axis.text(columns[middle], rows[middle], name, fontsize=7, ha="center", va="center", bbox=box)


def markdown(figures: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """The figures of several students (by name) and of their teachers as one table."""
    first = next(iter(figures.values()))
    names = list(figures)
    rows = [
        ("zero-shot top-1", "zero_shot_top1", "teacher"),
        ("zero-shot top-1, pairs never captioned", "zero_shot_top1_heldout", "teacher"),
        ("mIoU from one point", "point_miou", "teacher"),
        ("mIoU from a box", "box_miou", "teacher"),
    ]
    lines = ["| | teacher | " + " | ".join(names) + " |", "|---|" + "---|" * (len(names) + 1)]
    for title, key, teacher in rows:
        cells = [f"{first[key][teacher]:.3f}", *(f"{f[key]['student']:.3f}" for f in figures.values())]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    patches = first["semantic_miou"]["teacher_patches"]
    for title, key in (("CLIP head", "clip_head"), ("both heads", "both_heads")):
        cells = [f"{patches:.3f} (patches)", *(f"{f['semantic_miou'][key]:.3f}" for f in figures.values())]
        lines.append(f"| mIoU by text, {title} | " + " | ".join(cells) + " |")
    for size in first["top1_by_size"]:
        cells = ["", *(f"{f['top1_by_size'][size]:.3f}" for f in figures.values())]
        lines.append(f"| zero-shot top-1 at {size} px | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=miniature.checkpoint(), help="folder of a miniature SAM-CLIP")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/report"))
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED, help="of the scenes: 101, 201, 301, ...")
    parser.add_argument("--composition", choices=["segments", "classes"], help="instead of the checkpoint's own")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    sam, clip = load_teachers()
    student = load_student(arguments.model)
    if arguments.composition:
        student.model.config.composition = arguments.composition
    by = world_tasks(arguments.seed)
    figures = beside_teachers(measure(student, by), measure(sam, by) | measure(clip, by))
    colours = {"nearest colour": NearestColour(segmented_images(arguments.seed + 1, NUM_SCENES))}
    figures["semantic_miou"]["nearest_colour"] = measure(student, colours)["nearest colour", "mean_iou"]
    (arguments.output_dir / "figures.json").write_text(json.dumps(figures, indent=2))
    draw(clip, student, arguments.output_dir / "figure.png")
    print(markdown({"student": figures}))
    print(f"nearest colour per pixel, no learning: {figures['semantic_miou']['nearest_colour']:.3f}")


if __name__ == "__main__":
    main()
