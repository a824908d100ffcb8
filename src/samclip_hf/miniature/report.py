"""What a miniature SAM-CLIP can do, beside its teachers, in figures and in one picture.

    python -m samclip_hf.miniature.report --model runs/demo/model

Scenes are fresh: no training run draws from their seeds.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor, SamModel, SamProcessor

from .. import SamClipForImageSegmentation, SamClipModel, SamClipProcessor, miniature
from .evaluation import (
    bounding_box,
    classification_scenes,
    nearest_colour,
    prompted_miou,
    random_point,
    segmentation_scenes,
    semantic_miou,
    teacher_patches,
    zero_shot_top1,
)
from .scenes import BACKGROUND_PROMPTS, CLASS_NAMES, COLOURS, PATTERNS, TEMPLATES, Scene

# The miniature's counterparts of the paper's input sizes: 224, 448 and 1024 px.
SIZES = (64, 96, 128)
CLASSIFICATION_SIZE = 128
SEGMENTATION_SIZE = 128
EVALUATION_SEED = 101


def text_segmenter(model: SamClipForImageSegmentation, processor: SamClipProcessor, both_heads: bool):
    """Text segmentation by a student: images to label maps `(num_images, height, width)`; 0 background, `class_id + 1`
    elsewhere. The model's vocabulary is the miniature world's."""

    def predict(images: list[Image.Image]) -> np.ndarray:
        inputs = processor(images=images, size={"longest_edge": SEGMENTATION_SIZE}).to(model.device)
        with torch.inference_mode():
            outputs = model(**inputs, both_heads=both_heads)
        target_sizes = [(image.height, image.width) for image in images]
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes)
        return torch.stack(maps).cpu().numpy()

    return predict


def set_world_vocabulary(model: SamClipForImageSegmentation, processor: SamClipProcessor) -> None:
    """All class names of the miniature world and its descriptions of background."""
    model.set_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, TEMPLATES, processor.tokenizer)


class Teachers:
    """Both teachers of the miniature world and, measured once, what they reach on the single objects of a seed and the
    scenes of the next."""

    def __init__(self, seed: int = EVALUATION_SEED):
        self.sam = SamModel.from_pretrained(miniature.sam_teacher()).eval()
        self.sam_processor = SamProcessor.from_pretrained(miniature.sam_teacher())
        self.clip = CLIPModel.from_pretrained(miniature.clip_teacher()).eval()
        self.clip_processor = CLIPProcessor.from_pretrained(miniature.clip_teacher())
        self.patches = teacher_patches(self.clip, self.clip_processor)
        self.objects = classification_scenes(seed=seed)
        self.scenes = segmentation_scenes(seed=seed + 1)

    @functools.cached_property
    def figures(self) -> dict[str, float]:
        """All figures, in [0, 1]."""
        top1 = zero_shot_top1(self.clip, self.clip_processor, self.objects)
        return {
            "zero_shot_top1": top1["seen"],
            "zero_shot_top1_heldout": top1["held_out"],
            "point_miou": prompted_miou(self.sam, self.sam_processor, self.scenes, "point"),
            "box_miou": prompted_miou(self.sam, self.sam_processor, self.scenes, "box"),
            "teacher_patches": semantic_miou(self.patches, self.scenes),
        }


class Student:
    """A miniature SAM-CLIP, loaded once for figures and picture alike."""

    def __init__(self, model: str | Path):
        self.model = SamClipModel.from_pretrained(model).eval()
        self.segmenter = SamClipForImageSegmentation.from_pretrained(model).eval()
        self.processor = SamClipProcessor.from_pretrained(model)
        set_world_vocabulary(self.segmenter, self.processor)
        self.clip_head = text_segmenter(self.segmenter, self.processor, both_heads=False)
        self.both_heads = text_segmenter(self.segmenter, self.processor, both_heads=True)

    def figures(self, teachers: Teachers) -> dict[str, dict[str, float]]:
        """All figures, in [0, 1], beside the teachers' on the same scenes; the README's tables explain them."""
        objects, scenes = teachers.objects, teachers.scenes
        progress = tqdm(total=len(SIZES) + 4, desc="evaluating the student", unit="figure")

        def step(value):
            progress.update()
            return value

        by_size = {size: step(self._top1(objects, size)) for size in SIZES}
        student = {
            "zero_shot_top1": by_size[CLASSIFICATION_SIZE]["seen"],
            "zero_shot_top1_heldout": by_size[CLASSIFICATION_SIZE]["held_out"],
            "point_miou": step(prompted_miou(self.model, self.processor, scenes, "point")),
            "box_miou": step(prompted_miou(self.model, self.processor, scenes, "box")),
        }
        semantic = {
            "clip_head": step(semantic_miou(self.clip_head, scenes)),
            "both_heads": step(semantic_miou(self.both_heads, scenes)),
        }
        progress.close()
        figures = {name: {"teacher": teachers.figures[name], "student": value} for name, value in student.items()}
        figures["semantic_miou"] = {"teacher_patches": teachers.figures["teacher_patches"], **semantic}
        figures["top1_by_size"] = {str(size): top1["seen"] for size, top1 in by_size.items()}
        return figures

    def _top1(self, scenes: list[Scene], size: int) -> dict[str, float]:
        return zero_shot_top1(self.model, self.processor, scenes, {"size": {"longest_edge": size}})

    def prompted_mask(self, scene: Scene, prompt: str) -> np.ndarray:
        """The student's mask of the scene's largest object, `(128, 128)` bool, from one "point" or one "box"."""
        mask = largest(scene)
        prompts: dict[str, list] = (
            {"input_points": [[[list(random_point(mask, seed=0))]]]}
            if prompt == "point"
            else {"input_boxes": [[[float(side) for side in bounding_box(mask)]]]}
        )
        inputs = self.processor(images=Image.fromarray(scene.image), **prompts)
        with torch.inference_mode():
            outputs = self.model(**inputs, multimask_output=prompt == "point")
        best = int(outputs.iou_scores[0, 0].argmax())
        logits: Tensor = outputs.pred_masks[:, 0, best : best + 1]
        return (F.interpolate(logits, size=scene.masks.shape[1:], mode="bilinear")[0, 0] > 0).numpy()


def largest(scene: Scene) -> np.ndarray:
    return scene.masks[scene.masks.sum(axis=(1, 2)).argmax()]


def draw(teachers: Teachers, student: Student, path: Path, num_scenes: int = 6) -> None:
    """The picture: scenes in rows; what goes in, the truth, and what each of the models makes of it in columns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scenes = segmentation_scenes(num_scenes * 4)[1::2][:num_scenes]
    images = [Image.fromarray(scene.image) for scene in scenes]
    columns: dict[str, str | Sequence[np.ndarray] | np.ndarray | None] = {
        "image": None,
        "truth": [scene.label_map for scene in scenes],
        "SAM-CLIP: one point": "point",
        "SAM-CLIP: one box": "box",
        "by text:\nCLIP teacher's patches": teachers.patches(images),
        "by text:\nSAM-CLIP's CLIP head": student.clip_head(images),
        "by text:\nSAM-CLIP's both heads": student.both_heads(images),
    }
    figure, axes = plt.subplots(
        len(scenes), len(columns), figsize=(2.1 * len(columns), 2.1 * len(scenes) + 0.6), layout="constrained"
    )
    figure.suptitle(
        "One model segments by point, by box and by text: every class name of this world was asked for at once "
        "(struck out: wrong names)"
    )
    for number, (row, scene) in enumerate(zip(axes, scenes, strict=True)):
        for axis, (title, content) in zip(row, columns.items(), strict=True):
            axis.set(xticks=[], yticks=[])
            if axis in axes[0]:
                axis.set_title(title, fontsize=10)
            axis.imshow(scene.image)
            if isinstance(content, str):
                mask = student.prompted_mask(scene, content)
                axis.imshow(overlay(mask.astype(int), {1: (1.0, 1.0, 1.0)}))
                axis.contour(mask, levels=[0.5], colors="black", linewidths=1)
                draw_prompt(axis, largest(scene), content)
            elif content is not None:
                label_map = content[number]
                axis.imshow(overlay(label_map, class_colours()))
                name_segments(axis, label_map, scene.label_map)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
        axis.plot(*random_point(mask, seed=0), marker="*", color="lime", markeredgecolor="black", markersize=14)
    else:
        x1, y1, x2, y2 = bounding_box(mask)
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


def markdown(figures: dict[str, dict[str, dict[str, float]]]) -> str:
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
    teachers, student = Teachers(arguments.seed), Student(arguments.model)
    if arguments.composition:
        student.segmenter.config.composition = arguments.composition
    figures = student.figures(teachers)
    figures["semantic_miou"]["nearest_colour"] = semantic_miou(nearest_colour(), teachers.scenes)
    (arguments.output_dir / "figures.json").write_text(json.dumps(figures, indent=2))
    draw(teachers, student, arguments.output_dir / "figure.png")
    print(markdown({"student": figures}))
    print(f"nearest colour per pixel, no learning: {figures['semantic_miou']['nearest_colour']:.3f}")


if __name__ == "__main__":
    main()
