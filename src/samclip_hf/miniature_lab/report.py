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
    Evaluator,
    LabelMapEvaluator,
    ModelAdapter,
    PromptableAdapter,
    SamAdapter,
    SamClipAdapter,
    UnmergedAdapter,
    load_adapter,
)
from ..evaluation.prompted_segmentation import random_pixel
from ..images import mask_to_prompt_box
from ..miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, COLOURS, PATTERNS, TEMPLATES, Scene, evaluation_scene
from ..processing_samclip import SamClipProcessor
from ..segmentation_samclip import SamClipForImageSegmentation
from .tasks import NUM_SCENES, SIZES, evaluate, scene, segmented_images, tasks

EVALUATION_SEED = 101
REPORT_TASKS = (
    *(f"classification:miniature@{size}" for size in SIZES),
    *("prompts:miniature", "semantic:miniature@96", "semantic:miniature@128"),
    *("composed:miniature", "composed:miniature@classes", "cascade:miniature"),
)
NUM_COLOR_SCENES = 480  # covers every pair of a class and a background

MetricsByTask = dict[tuple[str, str], float | None]  # by task and metric


def set_miniature_vocabulary(model: SamClipForImageSegmentation, processor: SamClipProcessor) -> None:
    """Sets the vocabulary of a miniature model: all 48 class names and the background prompts."""
    model.set_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, TEMPLATES, processor.tokenizer)


def report_tasks(seed: int = EVALUATION_SEED, fraction: float = 1.0) -> dict[str, Evaluator]:
    """The tasks of the report: zero-shot classification, and segmentation from prompts and from text."""
    available = tasks(seed, fraction)
    return {name: available[name] for name in REPORT_TASKS}


def evaluate_all(model: ModelAdapter, evaluators: Mapping[str, Evaluator]) -> MetricsByTask:
    """Runs all evaluators that apply to the model."""
    return {
        (name, metric): value
        for name, evaluator in evaluators.items()
        if evaluator.applies_to(model)
        for metric, value in evaluate(evaluator, model).items()
    }


def evaluate_teachers(
    sam: SamAdapter, clip: ClipAdapter, unmerged: UnmergedAdapter, evaluators: Mapping[str, Evaluator]
) -> MetricsByTask:
    """Runs all evaluators that apply to a SAM or to a CLIP, and `composed` and `cascade` for both together."""
    both = {name: task for name, task in evaluators.items() if name in ("composed:miniature", "cascade:miniature")}
    return evaluate_all(sam, evaluators) | evaluate_all(clip, evaluators) | evaluate_all(unmerged, both)


def load_teachers() -> tuple[SamAdapter, ClipAdapter, UnmergedAdapter]:
    """Loads the SAM, the CLIP, and the unmerged model of both."""
    folders = miniature.sam_teacher(), miniature.clip_teacher()
    sam, clip, unmerged = load_adapter(folders[0]), load_adapter(folders[1]), load_adapter(folders[0], clip=folders[1])
    assert isinstance(sam, SamAdapter) and isinstance(clip, ClipAdapter) and isinstance(unmerged, UnmergedAdapter)
    return sam, clip, unmerged


def load_student(folder: str | Path) -> SamClipAdapter:
    """Loads a SAM-CLIP. Raises `ValueError` if the folder contains another model."""
    student = load_adapter(str(folder))
    if not isinstance(student, SamClipAdapter):
        raise ValueError(f"{folder} is not a SAM-CLIP.")
    return student


def compare(student: MetricsByTask, teachers: MetricsByTask) -> dict[str, dict[str, float | None]]:
    """
    Selects the metrics of the README's table, all in [0, 1], from the results of [`evaluate_all`] for the student and
    of [`evaluate_teachers`]. The student is evaluated at 128 px, which corresponds to SAM's 1024 px. The CLIP teacher
    classifies at 64 px, its own size, and segments at 96 px, where it is best.

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
        "both_heads_paper": student["composed:miniature@classes", "mean_iou"],
        "cascade": teachers["cascade:miniature", "mean_iou"],
        "unmerged": teachers["composed:miniature", "mean_iou"],
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

PROMPTS_TITLE = "box and point:\nSAM-CLIP"
FIRST_SCENE = 7  # of the figure: every second scene has two or four objects
FIGURE_TITLE = (
    "Segmentation of drawn scenes from a box and a point, and from text: all 48 class names.\n"
    "Colors and names show the classes that were found; wrong names are struck out. CLIP alone and two encoders: the "
    "teachers, without training."
)


def text_columns(
    clip: ClipAdapter, unmerged: UnmergedAdapter, students: Mapping[str, SamClipAdapter]
) -> dict[str, tuple[str, ModelAdapter]]:
    """The columns of segmentation by text for [`draw_figure`]: CLIP alone, both teachers, and students by title."""
    columns: dict[str, tuple[str, ModelAdapter]] = {
        "text: CLIP alone,\nits patches": ("semantic:miniature@96", clip),
        "text: SAM + CLIP,\ntwo encoders": ("composed:miniature", unmerged),
    }
    return columns | {f"text: {title}": ("composed:miniature", student) for title, student in students.items()}


def draw_figure(
    sam: PromptableAdapter,
    columns: Mapping[str, tuple[str, ModelAdapter]],
    path: Path,
    num_scenes: int = 3,
    caption: str = "",
) -> None:
    """
    Saves a figure with one scene per row.

    Args:
        sam ([`PromptableAdapter`]):
            The model whose masks from a box and from a point are shown.
        columns (`dict[str, tuple[str, ModelAdapter]]`):
            By title, the name of a task in [`tasks`] and the model whose label maps are shown.
        path (`Path`):
            The file.
        num_scenes (`int`, *optional*, defaults to 3).
        caption (`str`, *optional*): A further line of the title, about the models.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    evaluators = tasks(EVALUATION_SEED)
    scenes = [scene(EVALUATION_SEED + 1, FIRST_SCENE + 2 * number) for number in range(num_scenes)]
    label_maps = {
        title: predict_label_maps(evaluators[name], model, scenes) for title, (name, model) in columns.items()
    }
    titles = ["image", "ground truth", PROMPTS_TITLE, *label_maps]
    figure, axes = plt.subplots(
        len(scenes),
        len(titles),
        figsize=(1.55 * len(titles), 1.55 * len(scenes) + 1.0),
        layout="constrained",
        squeeze=False,
    )
    figure.suptitle(f"{FIGURE_TITLE}\n{caption}".rstrip(), fontsize=9)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8.5)
    for number, (row, shown) in enumerate(zip(axes, scenes, strict=True)):
        for axis, title in zip(row, titles, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.imshow(shown.image)
            if title == "ground truth":
                draw_label_map(axis, shown.label_map, shown.label_map)
            elif title in label_maps:
                draw_label_map(axis, label_maps[title][number], shown.label_map)
            elif title != "image":
                draw_prompts_and_masks(axis, sam, shown)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def predict_label_maps(evaluator: Evaluator, model: ModelAdapter, scenes: Sequence[Scene]) -> list[np.ndarray]:
    """Label maps `(height, width)` of the scenes, predicted by an evaluator of semantic segmentation."""
    assert isinstance(evaluator, LabelMapEvaluator)
    evaluator.prepare(model)
    return [evaluator.predict(model, Image.fromarray(scene.image)) for scene in scenes]


def draw_prompts_and_masks(axis: Any, sam: PromptableAdapter, shown: Scene) -> None:
    """Draws a box around the largest object of a scene and a point in the second largest, and the masks for them."""
    image = Image.fromarray(shown.image)
    largest, second = shown.masks[np.argsort(-shown.masks.sum(axis=(1, 2)))[:2]]
    x1, y1, x2, y2 = box = mask_to_prompt_box(largest)
    point = random_pixel(second, np.random.default_rng(0))
    labels = np.zeros(shown.image.shape[:2], dtype=int)
    for label, prompt in ((1, {"boxes": torch.tensor([box])}), (2, {"points": torch.tensor([point])})):
        masks, iou_scores = sam.predict_masks(image, **prompt)
        labels[masks[0, iou_scores[0].argmax()].numpy()] = label
    axis.imshow(colorize(labels, {1: (0.0, 0.9, 1.0), 2: (1.0, 0.8, 0.0)}, opacity=0.6))
    axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="cyan", linewidth=1.5)
    axis.plot(*point, marker="*", color="gold", markeredgecolor="black", markersize=13)


def draw_label_map(axis: Any, label_map: np.ndarray, truth: np.ndarray) -> None:
    """
    Draws segments in the colors of their classes, with the pattern's name on those of at least 250 pixels. The name is
    struck out if most pixels of the segment belong to another class.
    """
    from matplotlib.colors import to_rgb

    colors = {class_id + 1: to_rgb(COLOURS[class_id % len(COLOURS)]) for class_id in range(len(CLASS_NAMES))}
    axis.imshow(colorize(label_map, colors, opacity=0.75))
    for label in np.unique(label_map):
        rows, columns = np.nonzero(label_map == label)
        if label == 0 or len(rows) < 250:
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
    lines = ["| | teachers | " + " | ".join(metrics) + " |", "|---|" + "---|" * (len(metrics) + 1)]
    for title, key in rows:
        values = [f"{of_student[key]['student']:.3f}" for of_student in metrics.values()]
        lines.append(f"| {title} | " + " | ".join([f"{first[key]['teacher']:.3f}", *values]) + " |")
    by_text = [
        ("CLIP head", "clip_head", "teacher_patches", "patches"),
        ("both heads", "both_heads", "unmerged", "two encoders"),
        ("both heads, paper's composition", "both_heads_paper", "cascade", "cascade"),
    ]
    for title, key, of_teachers, kind in by_text:
        values = [f"{first['semantic_miou'][of_teachers]:.3f} ({kind})"]
        values += [f"{of_student['semantic_miou'][key]:.3f}" for of_student in metrics.values()]
        lines.append(f"| mIoU by text, {title} | " + " | ".join(values) + " |")
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
    sam, clip, unmerged = load_teachers()
    student = load_student(arguments.model)
    if arguments.composition:
        student.model.config.composition = arguments.composition
    evaluators = report_tasks(arguments.seed)
    teachers = evaluate_teachers(sam, clip, unmerged, evaluators)
    metrics = compare(evaluate_all(student, evaluators), teachers)
    nearest_color = evaluate(NearestColor(segmented_images(arguments.seed + 1, NUM_SCENES)), student)["mean_iou"]
    metrics["semantic_miou"]["nearest_color"] = nearest_color
    (arguments.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    columns = text_columns(clip, unmerged, {"SAM-CLIP,\nboth heads": student})
    columns["text: SAM-CLIP,\nCLIP head alone"] = ("semantic:miniature@128", student)
    draw_figure(student, columns, arguments.output_dir / "figure.png", num_scenes=6)
    print(format_table({"student": metrics}))
    print(f"mIoU by nearest color, without a model: {nearest_color:.3f}")


if __name__ == "__main__":
    main()
