"""
Evaluates a miniature SAM-CLIP and its teachers on the same procedural scenes, and draws a figure.

    python -m samclip_hf.miniature_lab.report --model runs/demo/model

Training never uses the seeds of these scenes.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import miniature
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
from ..processing_samclip import SamClipProcessor
from ..segmentation_samclip import SamClipForImageSegmentation
from .tasks import NUM_SCENES, SIZES, evaluate, scene, segmented_images, tasks

EVALUATION_SEED = 101
REPORT_TASKS = ("classification", "prompts", "semantic", "composed")
NUM_COLOR_SCENES = 480  # covers every pair of a class and a background

MetricsByTask = dict[tuple[str, str], float | None]  # by task and metric


def set_miniature_vocabulary(model: SamClipForImageSegmentation, processor: SamClipProcessor) -> None:
    """Sets the vocabulary of a miniature model: all 48 class names and the background prompts."""
    model.set_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, TEMPLATES, processor.tokenizer)


def report_tasks(seed: int = EVALUATION_SEED, fraction: float = 1.0) -> dict[str, Evaluator]:
    """The tasks of the report: zero-shot classification, and segmentation from prompts and from text."""
    return {name: task for name, task in tasks(seed, fraction).items() if name.partition(":")[0] in REPORT_TASKS}


def evaluate_all(model: ModelAdapter, evaluators: Mapping[str, Evaluator]) -> MetricsByTask:
    """Runs all evaluators that apply to the model."""
    return {
        (name, metric): value
        for name, evaluator in evaluators.items()
        if evaluator.applies_to(model)
        for metric, value in evaluate(evaluator, model).items()
    }


def load_teachers() -> tuple[SamAdapter, ClipAdapter]:
    sam, clip = load_adapter(str(miniature.sam_teacher())), load_adapter(str(miniature.clip_teacher()))
    assert isinstance(sam, SamAdapter) and isinstance(clip, ClipAdapter)
    return sam, clip


def load_student(folder: str | Path) -> SamClipAdapter:
    """Loads a SAM-CLIP. Raises `ValueError` if the folder contains another model."""
    student = load_adapter(str(folder))
    if not isinstance(student, SamClipAdapter):
        raise ValueError(f"{folder} is not a SAM-CLIP.")
    return student


def compare(student: MetricsByTask, teachers: MetricsByTask) -> dict[str, dict[str, float | None]]:
    """
    Selects the metrics of the README's table, all in [0, 1]. The student is evaluated at 128 px, which corresponds to
    SAM's 1024 px. The CLIP teacher classifies at 64 px, its own size, and segments at 96 px, where it is best.

    Returns:
        `dict[str, dict[str, float | None]]`: By metric, the values of the student and the teachers.
    """
    metric_names = {"zero_shot_top1": "top1, captioned", "zero_shot_top1_heldout": "top1, never captioned"}
    classification = {
        key: {
            "teacher": teachers["classification:miniature@64", name],
            "student": student["classification:miniature@128", name],
        }
        for key, name in metric_names.items()
    }
    prompts = {
        key: {"teacher": teachers["prompts:miniature", key], "student": student["prompts:miniature", key]}
        for key in ("point_miou", "box_miou")
    }
    semantic = {
        "teacher_patches": teachers["semantic:miniature@96", "mean_iou"],
        "clip_head": student["semantic:miniature@128", "mean_iou"],
        "both_heads": student["composed:miniature", "mean_iou"],
    }
    by_size = {str(size): student[f"classification:miniature@{size}", "top1, captioned"] for size in SIZES}
    return {**classification, **prompts, "semantic_miou": semantic, "top1_by_size": by_size}


class NearestColor(LabelMapEvaluator):
    """
    A baseline without a model: each pixel is assigned to the class or background with the nearest mean color, measured
    on scenes with a single object. The result shows how well color alone segments the scenes.
    """

    name = "nearest color"

    def prepare(self, model: ModelAdapter) -> None:
        groups: dict[tuple[int, str], list[np.ndarray]] = {}
        for index in range(NUM_COLOR_SCENES):
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


# ---- the figure ----


def draw_figure(clip: ClipAdapter, student: SamClipAdapter, path: Path, num_scenes: int = 6) -> None:
    """
    Saves a figure with one scene per row. The columns show the image, the ground truth, and the masks of the student
    and the CLIP teacher.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    evaluators = report_tasks()
    scenes = [scene(EVALUATION_SEED + 1, 2 * number + 1) for number in range(num_scenes)]  # two or four objects each
    label_maps = {
        "ground truth": [scene.label_map for scene in scenes],
        "text:\nCLIP teacher's patches": predict_label_maps(evaluators["semantic:miniature@96"], clip, scenes),
        "text:\nCLIP head": predict_label_maps(evaluators["semantic:miniature@128"], student, scenes),
        "text:\nboth heads": predict_label_maps(evaluators["composed:miniature"], student, scenes),
    }
    titles = ["image", "ground truth", "point", "box", *list(label_maps)[1:]]
    figure, axes = plt.subplots(
        len(scenes),
        len(titles),
        figsize=(2.1 * len(titles), 2.1 * len(scenes) + 0.6),
        layout="constrained",
        squeeze=False,
    )
    figure.suptitle(
        "Masks from a point, from a box and from text, with all 48 class names as labels (wrong labels are struck out)"
    )
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for number, (row, shown) in enumerate(zip(axes, scenes, strict=True)):
        for axis, title in zip(row, titles, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.imshow(shown.image)
            if title in label_maps:
                draw_label_map(axis, label_maps[title][number], shown.label_map)
            elif title != "image":
                draw_prompt_and_mask(axis, student, shown, prompt=title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def predict_label_maps(evaluator: Evaluator, model: ModelAdapter, scenes: Sequence[Scene]) -> list[np.ndarray]:
    """Label maps `(height, width)` of the scenes, predicted by an evaluator of semantic segmentation."""
    assert isinstance(evaluator, SemanticSegmentation | ComposedSegmentation)
    evaluator.prepare(model)  # type: ignore[arg-type]
    return [evaluator.predict(model, Image.fromarray(scene.image)) for scene in scenes]  # type: ignore[arg-type]


def draw_prompt_and_mask(axis: Any, student: SamClipAdapter, shown: Scene, prompt: str) -> None:
    """Draws a "point" or "box" prompt for the largest object of a scene, and the student's mask for it."""
    image = Image.fromarray(shown.image)
    largest = shown.masks[shown.masks.sum(axis=(1, 2)).argmax()]
    if prompt == "point":
        point = random_pixel(largest, np.random.default_rng(0))
        masks, iou_scores = student.predict_masks(image, points=torch.tensor([point]))
        axis.plot(*point, marker="*", color="lime", markeredgecolor="black", markersize=14)
    else:
        box = mask_to_prompt_box(largest)
        masks, iou_scores = student.predict_masks(image, boxes=torch.tensor([box]))
        x1, y1, x2, y2 = box
        axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="lime", linewidth=2)
    mask = masks[0, iou_scores[0].argmax()].numpy()
    axis.imshow(colorize(mask.astype(int), {1: (1.0, 1.0, 1.0)}, opacity=0.45))
    axis.contour(mask, levels=[0.5], colors="black", linewidths=1)


def draw_label_map(axis: Any, label_map: np.ndarray, truth: np.ndarray) -> None:
    """
    Draws segments in the colors of their classes, with the pattern's name on those of at least 150 pixels. The name is
    struck out if most pixels of the segment belong to another class.
    """
    from matplotlib.colors import to_rgb

    colors = {class_id + 1: to_rgb(COLOURS[class_id % len(COLOURS)]) for class_id in range(len(CLASS_NAMES))}
    axis.imshow(colorize(label_map, colors, opacity=0.75))
    for label in np.unique(label_map):
        rows, columns = np.nonzero(label_map == label)
        if label == 0 or len(rows) < 150:
            continue
        pattern = PATTERNS[(label - 1) // len(COLOURS)]
        center = np.hypot(rows - rows.mean(), columns - columns.mean()).argmin()
        correct = np.bincount(truth[rows, columns]).argmax() == label
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8 if correct else 0.5, "linewidth": 0}
        # matplotlib has no strikethrough: a combining stroke follows each letter.
        name = pattern if correct else "".join(letter + "\u0336" for letter in pattern)
        axis.text(columns[center], rows[center], name, fontsize=7, ha="center", va="center", bbox=box)


def colorize(label_map: np.ndarray, colors: Mapping[int, tuple[float, ...]], opacity: float) -> np.ndarray:
    """Returns an RGBA image `(height, width, 4)` of a label map `(height, width)`. Label 0 is translucent black."""
    rgba = np.zeros((*label_map.shape, 4))
    rgba[..., 3] = 0.6
    for label, color in colors.items():
        rgba[label_map == label] = (*color, opacity)
    return rgba


# ---- the table ----


def format_table(metrics: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """Returns the metrics of students (from `compare`, by the student's name) and teachers as a Markdown table."""
    first = next(iter(metrics.values()))
    rows = [
        ("zero-shot top-1", "zero_shot_top1"),
        ("zero-shot top-1, classes never captioned", "zero_shot_top1_heldout"),
        ("mIoU from a point", "point_miou"),
        ("mIoU from a box", "box_miou"),
    ]
    lines = ["| | teacher | " + " | ".join(metrics) + " |", "|---|" + "---|" * (len(metrics) + 1)]
    for title, key in rows:
        values = [f"{of_student[key]['student']:.3f}" for of_student in metrics.values()]
        lines.append(f"| {title} | " + " | ".join([f"{first[key]['teacher']:.3f}", *values]) + " |")
    patches = first["semantic_miou"]["teacher_patches"]
    for title, key in (("CLIP head", "clip_head"), ("both heads", "both_heads")):
        values = [f"{of_student['semantic_miou'][key]:.3f}" for of_student in metrics.values()]
        lines.append(f"| mIoU by text, {title} | " + " | ".join([f"{patches:.3f} (patches)", *values]) + " |")
    for size in first["top1_by_size"]:
        values = [f"{of_student['top1_by_size'][size]:.3f}" for of_student in metrics.values()]
        lines.append(f"| zero-shot top-1 at {size} px | " + " | ".join(["", *values]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=miniature.checkpoint(), help="folder of a miniature SAM-CLIP (default: the shipped one)"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/report"), help="folder for metrics.json and figure.png"
    )
    parser.add_argument(
        "--seed", type=int, default=EVALUATION_SEED, help="seed of the scenes: 101, 201, 301, ... (default: 101)"
    )
    parser.add_argument(
        "--composition",
        choices=["segments", "classes"],
        help="how the two heads are combined (default: the checkpoint's setting)",
    )
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    sam, clip = load_teachers()
    student = load_student(arguments.model)
    if arguments.composition:
        student.model.config.composition = arguments.composition
    evaluators = report_tasks(arguments.seed)
    teachers = evaluate_all(sam, evaluators) | evaluate_all(clip, evaluators)
    metrics = compare(evaluate_all(student, evaluators), teachers)
    nearest_color = evaluate(NearestColor(segmented_images(arguments.seed + 1, NUM_SCENES)), student)["mean_iou"]
    metrics["semantic_miou"]["nearest_color"] = nearest_color
    (arguments.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw_figure(clip, student, arguments.output_dir / "figure.png")
    print(format_table({"student": metrics}))
    print(f"mIoU by nearest color, without a model: {nearest_color:.3f}")


if __name__ == "__main__":
    main()
