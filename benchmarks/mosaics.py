"""
Benchmark of the quality of tiled inference, on mosaics of the miniature's scenes with exact masks.

    python benchmarks/mosaics.py --columns 8 --rows 6 --tiles 0 500 300            # many scenes, small objects
    python benchmarks/mosaics.py --columns 4 --rows 4 --tiles 0 250 --large 600 450  # objects larger than a tile

Every row of the tables is a mosaic with a side of the tiles in pixels, 0 for no tiles:

- `labels`: semantic segmentation by text. mIoU of the label map with the true one, and the fraction of pixels with the
  same label as without tiles.
- `segments`: panoptic segmentation by text. Mask AP with the label as the category.
- `masks`: everything mode. Mask AP without categories, the number of masks that match an object with an IoU above 0.5,
  how many of them get its name among 48, and the number of pairs of masks with an IoU above 0.8 (duplicates).

For all of them, `cuts` is the number of straight edges of 15 pixels or more along a seam (an inner edge of a tile, or
the middle of two tiles' overlap) where the truth has no edge within 4 pixels. `control` is that number for lines at
other places, which are no seams. `large` is the mean IoU of the best segment for each object of `--large`.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import pipeline

from samclip_hf import (
    SamClipForImageSegmentation,
    SamClipImageProcessor,
    SamClipMaskGenerationPipeline,
    miniature,
)
from samclip_hf.evaluation.metrics import MeanIoU
from samclip_hf.mask_generation_samclip import mask_to_box
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, render
from samclip_hf.tiling_samclip import ImageTiles

MODES = ("labels", "segments", "masks")
MIN_CUT = 15  # pixels along a seam
EDGE_TOLERANCE = 4  # pixels between an edge and a true edge
TEXTS = {
    "candidate_labels": list(CLASS_NAMES),
    "hypothesis_template": "a {}",
    "background": list(BACKGROUND_PROMPTS),
}


@dataclass
class Mosaic:
    """
    Scenes side by side, and objects that cover several of them.

    image (`PIL.Image.Image`)
    objects (`np.ndarray` of shape `(height, width)`): The number of the object of each pixel, from 1; 0 is background.
    class_ids (`list[int]`): The index of each object's class in `CLASS_NAMES`.
    num_large (`int`): The number of objects that cover several scenes. They are the last ones.
    borders (`np.ndarray` of shape `(height, width)`): Whether a pixel is the first of a scene in its row or column.
    """

    image: Image.Image
    objects: np.ndarray
    class_ids: list[int]
    num_large: int
    borders: np.ndarray

    def label_map(self) -> np.ndarray:
        return np.array([0, *(class_id + 1 for class_id in self.class_ids)])[self.objects]


def draw(seed: int, columns: int, rows: int, side: int, large: Sequence[int]) -> Mosaic:
    """Scenes of `side` x `side` pixels, and for each number of `large` an object of this longer side in pixels, at a
    random place."""
    pixels = np.zeros((rows * side, columns * side, 3), dtype=np.uint8)
    objects = np.zeros(pixels.shape[:2], dtype=np.int32)
    borders = np.zeros(objects.shape, dtype=bool)
    borders[::side], borders[:, ::side] = True, True
    class_ids: list[int] = []
    for index in range(rows * columns):
        scene = render(seed=seed, index=index)
        top, left = index // columns * side, index % columns * side
        part = np.s_[top : top + side, left : left + side]
        pixels[part] = np.asarray(Image.fromarray(scene.image).resize((side, side), Image.Resampling.BICUBIC))
        for mask, class_id in zip(scene.masks, scene.class_ids, strict=True):
            class_ids.append(class_id)
            objects[part][resize(mask, (side, side))] = len(class_ids)
    rng = np.random.default_rng(seed)
    for number, length in enumerate(large):
        scene = render(seed=seed, index=10_000 + number, num_objects=1)
        left, top, right, bottom = mask_to_box(scene.masks[0])
        scale = length / max(right - left, bottom - top)
        size = round((right - left) * scale), round((bottom - top) * scale)
        mask = resize(scene.masks[0][top:bottom, left:right], size)
        texture = Image.fromarray(scene.image[top:bottom, left:right]).resize(size, Image.Resampling.BICUBIC)
        y, x = (rng.integers(whole - part + 1) for whole, part in zip(objects.shape, size[::-1], strict=True))
        part = np.s_[y : y + size[1], x : x + size[0]]
        class_ids.append(scene.class_ids[0])
        pixels[part][mask], objects[part][mask] = np.asarray(texture)[mask], len(class_ids)
        borders[part][mask] = False
    return Mosaic(Image.fromarray(pixels), objects, class_ids, len(large), borders)


def resize(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another width and height."""
    return np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)) > 0.5


def average_precision(mosaic: Mosaic, found: Sequence[tuple[np.ndarray, float, int]], has_labels: bool) -> float:
    """COCO's mask AP of masks with score and category, for any number of them."""
    height, width = mosaic.objects.shape

    def encode(mask: np.ndarray) -> dict:
        return coco.encode(np.asfortranarray(mask, dtype=np.uint8))

    truth = COCO()
    annotations = []
    for number, class_id in enumerate(mosaic.class_ids, start=1):
        mask = mosaic.objects == number
        if mask.any():
            annotations.append(
                {
                    "id": number,
                    "image_id": 1,
                    "category_id": class_id + 1 if has_labels else 1,
                    "segmentation": encode(mask),
                    "area": int(mask.sum()),
                    "bbox": [0, 0, 1, 1],
                    "iscrowd": 0,
                }
            )
    categories = sorted({annotation["category_id"] for annotation in annotations})
    truth.dataset = {
        "images": [{"id": 1, "height": height, "width": width}],
        "annotations": annotations,
        "categories": [{"id": number} for number in categories],
    }
    truth.createIndex()
    results = [
        {"image_id": 1, "category_id": label if has_labels else 1, "score": score, "segmentation": encode(mask)}
        for mask, score, label in found
    ]
    results = [result for result in results if result["category_id"] in categories]
    if not results:
        return 0.0
    evaluation = COCOeval(truth, truth.loadRes(results), "segm")
    evaluation.params.maxDets = [10_000]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # of objects of all sizes
    return float(precision[precision > -1].mean())


def edges(labels: np.ndarray, axis: int) -> np.ndarray:
    """Whether a pixel `(height, width)` differs from the one before it in its row (axis 1) or column (axis 0)."""
    result = np.zeros(labels.shape, dtype=bool)
    if axis:
        result[:, 1:] = labels[:, 1:] != labels[:, :-1]
    else:
        result[1:] = labels[1:] != labels[:-1]
    return result


def seams(tiles: ImageTiles) -> tuple[list[int], list[int]]:
    """Rows and columns where tiles begin or end inside the image, and the middles of their overlaps."""

    def of(spans) -> list[int]:
        inner = [edge for (_, end), (start, _) in pairwise(spans) for edge in (start, (start + end) // 2, end)]
        return sorted(set(inner))

    return of(tiles.rows), of(tiles.columns)


def shift(lines: tuple[list[int], list[int]], shape: tuple[int, int], side: int) -> tuple[list[int], list[int]]:
    """As many lines at other places, at least 6 pixels from all of `lines`."""

    def of(own: list[int], length: int) -> list[int]:
        moved = [(line + side // 16 + 6) % length for line in own]
        return [line for line in moved if min((abs(line - other) for other in own), default=length) >= 6]

    return of(lines[0], shape[0]), of(lines[1], shape[1])


def count_cuts(mosaic: Mosaic, maps: Sequence[np.ndarray], lines: tuple[list[int], list[int]]) -> int:
    """The number of straight edges of the maps on lines where the truth has none."""
    truth = [edges(mosaic.objects, axis) | mosaic.borders for axis in (0, 1)]
    count = 0
    for labels in maps:
        box = mask_to_box(labels) if labels.dtype == bool else (0, 0, labels.shape[1], labels.shape[0])
        if box is None:
            continue
        for axis in (0, 1):
            start, end = box[1 - axis], box[3 - axis]  # of the map, across the line
            for line in lines[axis]:
                if not start - 2 <= line <= end + 2:
                    continue
                # One line of pixels at a time, since a cut is straight.
                longest = 0
                for position in range(max(1, line - 2), min(labels.shape[axis], line + 3)):
                    one, other = labels.take(position, axis), labels.take(position - 1, axis)
                    near = truth[axis].take(
                        range(
                            max(0, position - EDGE_TOLERANCE), min(labels.shape[axis], position + EDGE_TOLERANCE + 1)
                        ),
                        axis,
                    )
                    longest = max(longest, longest_run((one != other) & ~near.any(axis=axis)))
                count += longest >= MIN_CUT
    return count


def longest_run(values: np.ndarray) -> int:
    changes = np.flatnonzero(np.diff(np.concatenate([[0], values.astype(np.int8), [0]])))
    return int((changes[1::2] - changes[::2]).max(initial=0))


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 0.0


def iou_matrix(masks: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
    encoded = [[coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in part] for part in (masks, others)]
    if not masks or not others:
        return np.zeros((len(masks), len(others)))
    return np.asarray(coco.iou(*encoded, [False] * len(others)))


def measure(mosaic: Mosaic, mode: str, tile: int, arguments: argparse.Namespace, whole: dict) -> dict[str, str]:
    """The cells of a row of the table."""
    options = {"tile": tile or None, "overlap": arguments.overlap if tile else None}
    height, width = mosaic.objects.shape
    lines = seams(ImageTiles(height, width, tile, arguments.overlap)) if tile else ([], [])
    others = shift(lines, mosaic.objects.shape, tile)
    large = [mosaic.objects == len(mosaic.class_ids) - number for number in range(mosaic.num_large)]
    row: dict[str, str] = {}
    start = time.perf_counter()
    if mode == "masks":
        model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
        image_processor = SamClipImageProcessor.from_pretrained(miniature.checkpoint())
        generate = SamClipMaskGenerationPipeline(model=model, image_processor=image_processor)
        thresholds = miniature.MASK_GENERATION | {"points_per_crop": arguments.points}
        result = generate(mosaic.image, output_segment_embeds=True, **options, **thresholds)
        with torch.inference_mode():
            best_names = model.classify(result["segment_embeds"], model.vocabulary).argmax(dim=-1).tolist()
        ids = {name: number for number, name in enumerate(CLASS_NAMES, start=1)}
        found = [
            (np.asarray(mask), score, ids.get(model.config.id2label[index], 0))
            for mask, score, index in zip(result["masks"], result["scores"].tolist(), best_names, strict=True)
        ]
    else:
        segmenter = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint())
        subtask = "semantic" if mode == "labels" else "panoptic"
        ids = {name: number for number, name in enumerate(CLASS_NAMES, start=1)}
        result = segmenter(mosaic.image, subtask=subtask, threshold=arguments.threshold, **options, **TEXTS)
        found = [
            (np.asarray(entry["mask"]) > 0, entry["score"] or 1.0, ids.get(entry["label"], 0)) for entry in result
        ]
    seconds = time.perf_counter() - start
    masks = [mask for mask, _, _ in found]
    if mode == "labels":
        labels = np.zeros(mosaic.objects.shape, dtype=np.int64)
        for mask, _, label in found:
            labels[mask] = label
        metric = MeanIoU(num_labels=len(CLASS_NAMES) + 1)
        metric.add(prediction=labels, reference=mosaic.label_map())
        row["mIoU"] = f"{metric.compute()['mean_iou']:.3f}"
        row["as whole"] = f"{(labels == whole.setdefault('labels', labels)).mean():.3f}"
        maps = [labels]
        best = [overlap(labels == mosaic.class_ids[-1 - i] + 1, mask) for i, mask in enumerate(large)]
    else:
        row["AP"] = f"{average_precision(mosaic, found, mode == 'segments'):.3f}"
        maps = masks
        if mode == "segments":
            classes = [mosaic.class_ids[-1 - i] + 1 for i in range(len(large))]
            own = [[mask for mask, _, label in found if label == class_id] for class_id in classes]
            best = [max(iou_matrix([mask], part)[0], default=0.0) for mask, part in zip(large, own, strict=True)]
        else:
            best = [max(iou_matrix([mask], masks)[0], default=0.0) for mask in large]
            objects = [mosaic.objects == number for number in range(1, len(mosaic.class_ids) + 1)]
            matched = np.argwhere(iou_matrix(masks, objects) > 0.5).tolist()
            correct = sum(found[index][2] == mosaic.class_ids[number] + 1 for index, number in matched)
            row["matched"], row["named"] = str(len(matched)), str(correct)
            row["duplicates"] = str(int((np.triu(iou_matrix(masks, masks), 1) > 0.8).sum()))
    row["count"] = str(len(found))
    row["cuts"], row["control"] = str(count_cuts(mosaic, maps, lines)), str(count_cuts(mosaic, maps, others))
    row["large"] = f"{np.mean(best):.3f}" if best else "-"
    row["seconds"] = f"{seconds:.0f}"
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=3, help="scenes in a row (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=3, help="rows of scenes (default: %(default)s)")
    parser.add_argument("--side", type=int, default=250, help="side of a scene in pixels (default: %(default)s)")
    parser.add_argument("--large", type=int, nargs="*", default=[], help="longer sides of large objects in pixels")
    parser.add_argument("--tiles", type=int, nargs="+", default=[0, 300], help="sides of the tiles, 0 for none")
    parser.add_argument("--overlap", type=float, default=0.25, help="fraction of a tile (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one mosaic for each (default: 0)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--points", type=int, default=16, help="everything mode: points on a side of the grid")
    parser.add_argument("--threshold", type=float, default=0.3, help="of segments (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    whole: dict[int, dict] = {seed: {} for seed in arguments.seeds}
    for mode in arguments.modes:
        header = None
        for seed in arguments.seeds:
            mosaic = draw(seed, arguments.columns, arguments.rows, arguments.side, arguments.large)
            for tile in arguments.tiles:
                row = measure(mosaic, mode, tile, arguments, whole[seed])
                if header is None:
                    header = ["mode", "seed", "tile", *row]
                    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
                print("| " + " | ".join([mode, str(seed), str(tile or "none"), *row.values()]) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
