"""
Measures fine-tuning in the miniature, with the guard against forgetting and without it:

    python benchmarks/finetune.py

The new classes are the 8 classes that no caption names, and a pattern that neither teacher has seen, in 6 colors.
Each run trains on 200 labeled scenes by `samclip finetune miniature`, with the names of the old classes as other
names. The table has the results on other scenes, before and after: the mean IoU of text to masks with the old and the
new names in one vocabulary, over the new and over the old classes; with the 48 names of the miniature on scenes of old
classes; and with the new names only, on the scenes that the run holds out; zero-shot classification; and the mean IoU
of points and boxes.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from samclip_cli import main as samclip
from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, SamClipVocabulary, miniature
from samclip_hf.evaluation import load_adapter
from samclip_hf.miniature.scenes import (
    BACKGROUND_PROMPTS,
    CLASS_NAMES,
    COLOURS,
    HELD_OUT,
    SEEN,
    TEMPLATES,
    Scene,
    render,
)
from samclip_hf.miniature_lab.tasks import evaluate, tasks

NEW_PATTERN = "ringed"
NAMES = (*CLASS_NAMES, *(f"{color} {NEW_PATTERN} shape" for color in COLOURS))  # label i + 1 in label maps
NEW = (*HELD_OUT, *range(len(CLASS_NAMES), len(NAMES)))
IGNORED = 255
OWN_NAMES = "new classes, new names only"  # from the run's own held-out scenes
RETAINED = {
    "prompts:miniature": ("point_miou", "box_miou"),
    "classification:miniature@64": ("top1, captioned",),
}


def draw(seed: int, index: int, new_only: bool) -> tuple[np.ndarray, np.ndarray]:
    """
    A scene with one to four objects, the first one of a new class.

    new_only (`bool`):
        Whether objects of old classes are not labeled.

    Returns the image `(128, 128, 3)` and its label map, 0 for background and indices in `NAMES` plus 1.
    """
    class_id = NEW[index % len(NEW)]
    color = class_id - len(CLASS_NAMES)
    # The new pattern is drawn on a solid object of the color, whose tones it has.
    scene = render(seed, index, num_objects=1 + index % 4, class_id=color if color >= 0 else class_id)
    image, label_map = scene.image.copy(), scene.label_map
    if color >= 0:
        mask = scene.masks[0]
        draw_rings(np.random.default_rng((seed, index, 2)), image, mask, scene)
        label_map = np.where(mask, class_id + 1, label_map)
    if new_only:
        is_old = ~np.isin(label_map, [0, *(number + 1 for number in NEW)])
        label_map = np.where(is_old, IGNORED, label_map)
    return image, label_map


def draw_rings(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, scene: Scene) -> None:
    """Draws concentric rings of a darker or lighter tone on a solid object."""
    rows, columns = np.nonzero(mask)
    distance = np.hypot(rows - rows.mean(), columns - columns.mean())
    is_ring = distance / rng.uniform(9, 12) % 1 < 0.5
    tone = image[mask].mean(axis=0)
    tone = tone * 0.35 if tone.max() > 150 else tone + 0.6 * (255 - tone)
    image[rows[is_ring], columns[is_ring]] = np.clip(tone + rng.normal(0, 4, (int(is_ring.sum()), 3)), 0, 255)


def write_data(folder: Path, seed: int, num_scenes: int) -> None:
    """Writes labeled scenes as a folder that `samclip finetune` reads."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    labels = np.full(256, IGNORED, dtype=np.uint8)
    labels[0] = 0
    labels[np.array(NEW) + 1] = range(1, len(NEW) + 1)
    for index in range(num_scenes):
        image, label_map = draw(seed, index, new_only=True)
        Image.fromarray(image).save(folder / f"images/{index:04d}.png")
        Image.fromarray(labels[label_map]).save(folder / f"labels/{index:04d}.png")
    names = {"names": ["background", *(NAMES[number] for number in NEW)], "background": list(BACKGROUND_PROMPTS)}
    (folder / "classes.json").write_text(json.dumps(names))


def count_pixels(model, processor, vocabulary: SamClipVocabulary, scenes: Sequence[tuple]) -> np.ndarray:
    """The numbers of pixels by label and prediction, for scenes whose labels are those of the vocabulary."""
    num_labels = len(vocabulary.id2label)
    counts = np.zeros((num_labels, num_labels), dtype=np.int64)
    for image, label_map in scenes:
        inputs = processor(Image.fromarray(image), return_tensors="pt")
        outputs = model(**inputs, vocabulary=vocabulary)
        (found,) = processor.post_process_semantic_segmentation(outputs, [label_map.shape])
        pairs = label_map * num_labels + found.numpy()
        counts += np.bincount(pairs.ravel(), minlength=counts.size).reshape(counts.shape)
    return counts


def mean_iou(counts: np.ndarray, class_ids: Sequence[int]) -> float:
    """The mean IoU over classes, the labels of which are their numbers plus 1."""
    both, labeled, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    found = [number + 1 for number in class_ids if labeled[number + 1]]
    return float((both[found] / (labeled + predicted - both)[found]).mean())


@torch.inference_mode()
def measure(folder: str | Path, seed: int, num_scenes: int) -> dict[str, float]:
    """The results of a model on scenes of a seed."""
    model = SamClipForImageSegmentation.from_pretrained(folder).eval()
    processor = SamClipProcessor.from_pretrained(folder)
    everything = model.embed_vocabulary(NAMES, BACKGROUND_PROMPTS, TEMPLATES, processor.tokenizer)
    general = model.embed_vocabulary(CLASS_NAMES, BACKGROUND_PROMPTS, TEMPLATES, processor.tokenizer)
    mixed = [draw(seed, index, new_only=False) for index in range(num_scenes)]
    old = [render(seed + 1, index, num_objects=1 + index % 4, held_out=False) for index in range(num_scenes)]
    old_scenes = [(scene.image, scene.label_map) for scene in old]
    counts = count_pixels(model, processor, everything, [*mixed, *old_scenes])
    values = {
        "new classes, all names": mean_iou(counts, NEW),
        "of these, never captioned": mean_iou(counts, HELD_OUT),
        "of these, new pattern": mean_iou(counts, NEW[len(HELD_OUT) :]),
        "old classes, all names": mean_iou(counts, SEEN),
        "new classes relative to old classes": mean_iou(counts, NEW) / mean_iou(counts, SEEN),
        "general vocabulary": mean_iou(count_pixels(model, processor, general, old_scenes), SEEN),
    }
    available = tasks(seed, num_scenes / 200)
    adapter = load_adapter(str(folder))
    for task, metrics in RETAINED.items():
        results = evaluate(available[task], adapter)
        values |= {f"{task.partition(':')[0]}, {metric}": float(results[metric] or 0) for metric in metrics}
    return values


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 201, 301], help="of scenes and training")
    parser.add_argument("--guard_weights", type=float, nargs="+", default=[10.0, 0.0])
    parser.add_argument("--num_images", type=int, default=200, help="labeled scenes for training and evaluation")
    parser.add_argument("--num_scenes", type=int, default=200, help="scenes of each measurement")
    parser.add_argument(
        "--other_names", choices=["all", "half", "none"], default="all", help="names of old classes in the training"
    )
    parser.add_argument("options", nargs="*", help="more arguments of samclip finetune, after --")
    arguments = parser.parse_args(argv)
    table: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        table.setdefault("before", []).append(measure(miniature.checkpoint(), seed, arguments.num_scenes))
        for weight in arguments.guard_weights:
            with tempfile.TemporaryDirectory() as temporary:
                data, output = Path(temporary, "scenes"), Path(temporary, "model")
                write_data(data, 2_000_000 + seed, arguments.num_images)
                options = ["--data", data, "--output_dir", output, "--seed", seed, "--guard_weight", weight]
                if arguments.other_names != "all":
                    half = [CLASS_NAMES[number] for number in SEEN[::2]]
                    options += ["--other_names", *(half if arguments.other_names == "half" else [""])]
                assert samclip(["finetune", "miniature", *map(str, options), *arguments.options]) == 0
                own, *_ = json.loads((output / "retention.json").read_text())["results"]
                after = measure(output, seed, arguments.num_scenes) | {OWN_NAMES: own["after"]}
            table["before"][-1].setdefault(OWN_NAMES, own["before"])
            table.setdefault(f"guard_weight {weight:g}", []).append(after)
            print_table(table)


def print_table(table: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n|  | {' | '.join(table)} |\n|---|{'---|' * len(table)}")
    for name in list(table.values())[-1][-1]:
        cells = [" / ".join(f"{values[name]:.3f}" for values in rows) for rows in table.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
