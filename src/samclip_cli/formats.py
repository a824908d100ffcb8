"""Predictions for an image, and the formats in which they are written."""

import io
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    import numpy as np
    from PIL import Image

# Values of --formats: where each is written, and what it contains. {} is the name of the image without extension.
FORMATS = {
    "overlay": ("{}.png", "the image with tinted and outlined masks, a legend and the name of the model"),
    "labelmap": ("{}_labels.png", "PNG with a palette: 0 for no segment, otherwise the label_id of the JSON"),
    "masks": ("{}_masks/", "one black and white PNG for each mask"),
    "cutouts": ("{}_cutouts/", "one PNG for each mask: its part of the image, transparent outside the mask"),
    "json": ("{}.json", "the result as JSON"),
    "jsonl": ("results.jsonl", "the results of all images, one line for each"),
    "coco": (
        "coco_results.json",
        "COCO results of all images with compressed run-length encodings; image and category ids are in "
        "coco_dataset.json. For several images, results.jsonl is written, too: an interrupted run "
        "continues from it",
    ),
}
WITHOUT_MASKS = ("overlay", "json", "jsonl")
RESULTS = "results.jsonl"
RUN_FILES = {"jsonl": [RESULTS], "coco": ["coco_results.json", "coco_dataset.json"]}
CONTENT, CUTOUT = "Content", "cut-out"  # metadata of cut-outs, for those whose object fills them
MAX_PALETTE_INDEX = 254  # 255 is "ignore" in the label maps of many datasets


@dataclass
class Prediction:
    r"""
    Result for one image.

    record (`dict`):
        Content of the JSON, without the image's name and size.
    legend (`list[tuple[int | None, str]]`):
        Rows of the annotated image's legend: the label id of a color, or `None`, and a text.
    caption (`str`):
        The model, for the annotated image and the metadata of all PNGs.
    masks (`Sequence[numpy.ndarray]` of shape `(height, width)`):
        Boolean masks.
    label_ids (`list[int]`):
        Value of each mask in the label map, from 1, or 0 for background and masks without a label; also its color.
        Masks with 0 are left out of the annotated image. If masks have no names, they are numbered.
    names (`list[str]`):
        Names of the labels 1, 2, ...; empty if masks have no names.
    """

    record: dict[str, Any]
    legend: list[tuple[int | None, str]]
    caption: str
    masks: Sequence["np.ndarray"] = field(default_factory=list)
    label_ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def parse_formats(text: str, has_masks: bool) -> tuple[str, ...]:
    """The names of `--formats` of an image command. Raises `CommandError` as [`parse_names`] does."""
    return parse_names(text, [name for name in FORMATS if has_masks or name in WITHOUT_MASKS])


def parse_names(text: str, available: Collection[str]) -> tuple[str, ...]:
    """The comma-separated names of `--formats`. Raises `CommandError` for an unknown or repeated name."""
    formats = tuple(name.strip() for name in text.split(","))
    for name in formats:
        if name not in available:
            raise CommandError(f"--formats: {name!r} is not a format. Formats are {', '.join(available)}.")
        if formats.count(name) > 1:
            raise CommandError(f"--formats: {name} is repeated.")
    return formats


def file_names(stem: str, formats: Sequence[str]) -> list[str]:
    """Files and folders (with a final "/") of one image in the output folder. `stem` is the image's name there."""
    return [FORMATS[name][0].format(stem) for name in formats if name not in RUN_FILES]


def run_files(formats: Sequence[str], has_record: bool) -> list[str]:
    """
    Files for all images of a run in the output folder.

    formats (`Sequence[str]`):
        Names of formats.
    has_record (`bool`):
        Whether the run can be continued after an interruption: COCO's files are then made from `results.jsonl`.
    """
    files = [file for name in formats for file in RUN_FILES.get(name, [])]
    return [RESULTS, *files] if has_record and "coco" in formats and RESULTS not in files else files


def coco_annotation(mask: "np.ndarray", segmentation: dict | None = None) -> dict[str, Any]:
    """
    COCO's fields of a mask: `bbox`, `area` and `segmentation`.

    mask (`numpy.ndarray` of shape `(height, width)`):
        Boolean.
    segmentation (`dict`, *optional*):
        The mask's run-length encoding, if it is available.
    """
    from samclip_hf.images import encode_mask, mask_to_coco_box

    return {
        "bbox": mask_to_coco_box(mask),
        "area": int(mask.sum()),
        "segmentation": encode_mask(mask) if segmentation is None else segmentation,
    }


def encode(
    image: "Image.Image", record: dict, prediction: Prediction, formats: Sequence[str], stem: str
) -> dict[str, bytes]:
    """Files of one image: names relative to the output folder, see [`file_names`], and contents. `record` is the
    content of the JSON with the image's name and size."""
    files: dict[str, bytes] = {}
    for name in formats:
        if name in RUN_FILES:
            continue
        path = FORMATS[name][0].format(stem)
        if name == "json":
            files[path] = (json.dumps(record) + "\n").encode()
        elif name == "overlay":
            files[path] = _png(_overlay(image, prediction), prediction)
        elif name == "labelmap":
            files[path] = _png(label_map(prediction, image.size), prediction)
        else:
            for number, mask in enumerate(prediction.masks):
                if name == "cutouts" and not mask.any():
                    continue
                own = _cutout(image, mask) if name == "cutouts" else _black_and_white(mask)
                files[f"{path}{number + 1:03d}{_suffix(prediction, number)}.png"] = _png(own, prediction)
    return files


def _overlay(image: "Image.Image", prediction: Prediction) -> "Image.Image":
    from samclip_hf.tiling_samclip import ComputedSequence
    from samclip_hf.visualization import draw_segments

    shown = [number for number, label_id in enumerate(prediction.label_ids) if label_id]
    masks = ComputedSequence(len(shown), lambda index: prediction.masks[shown[index]])
    label_ids = [prediction.label_ids[number] for number in shown]
    return draw_segments(image, masks, label_ids, prediction.legend, prediction.caption)


def label_map(prediction: Prediction, size: tuple[int, int]) -> "Image.Image":
    """
    The label id of every pixel, 0 without a mask. Where masks overlap, the smallest one counts.

    size (`tuple[int, int]`):
        Width and height of the image.

    Returns an image of mode `P` whose palette has the colors of the annotated image. Label ids above 254 do not fit
    and give an image of mode `I;16` without a palette.
    """
    import numpy as np
    from PIL import Image

    from samclip_hf.visualization import color_of

    values = np.zeros(size[::-1], dtype=np.uint16)
    for index in sorted(range(len(prediction.masks)), key=lambda index: -np.count_nonzero(prediction.masks[index])):
        values[prediction.masks[index]] = prediction.label_ids[index]
    if max(len(prediction.names), *prediction.label_ids, 0) > MAX_PALETTE_INDEX:
        return Image.fromarray(values)
    result = Image.fromarray(values.astype(np.uint8), "L")
    result.putpalette([0, 0, 0, *(part for number in range(1, 255) for part in color_of(number)), 255, 255, 255])
    return result


def write_coco(records: Iterable[dict], folder: Path, names: Sequence[str], description: dict[str, Any]) -> None:
    """
    Writes `coco_results.json` and `coco_dataset.json`. The score of a mask is that of its name, if it has one. Masks
    of the background are left out.

    records (`Iterable[dict]`):
        Contents of the JSON of all images. The image id is the position, from 1.
    folder (`Path`):
        The output folder.
    names (`Sequence[str]`):
        Names of the categories 1, 2, ...; without names, all masks have the category 1, "object".
    description (`dict`):
        The model.
    """
    from samclip_hf.files import atomic_path, write_atomically
    from samclip_hf.images import compress_rle

    images = []
    with atomic_path(folder / "coco_results.json") as path, open(path, "w", encoding="utf-8") as file:
        separator = "["
        for image_id, record in enumerate(records, start=1):
            images.append(
                {"id": image_id, "file_name": record["image"], "height": record["height"], "width": record["width"]}
            )
            for mask in record["segments"] if "segments" in record else record["masks"]:
                if mask.get("label_id") == 0:  # background is no category
                    continue
                result = {
                    "image_id": image_id,
                    "category_id": mask.get("label_id", 1),
                    "score": mask.get("label_score", mask["score"]),
                    "segmentation": compress_rle(mask["segmentation"]),
                }  # without "bbox", from which pycocotools would take the area
                file.write(f"{separator}{json.dumps(result)}")
                separator = ",\n"
        file.write("[]\n" if separator == "[" else "]\n")
    dataset = {
        "info": {"description": "images and categories of coco_results.json", "model": description},
        "images": images,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names or ["object"], start=1)],
        "annotations": [],
    }
    write_atomically(folder / "coco_dataset.json", json.dumps(dataset) + "\n")


def _black_and_white(mask: "np.ndarray") -> "Image.Image":
    from PIL import Image

    return Image.fromarray(mask.astype("uint8") * 255)


def _cutout(image: "Image.Image", mask: "np.ndarray") -> "Image.Image":
    alpha = _black_and_white(mask)
    box = alpha.getbbox()
    cutout = image.crop(box)
    cutout.putalpha(alpha.crop(box))
    return cutout


def _suffix(prediction: Prediction, number: int) -> str:
    """The label of a mask, as far as it can be part of a file name."""
    if not prediction.names:
        return ""
    label_id, masks = prediction.label_ids[number], prediction.record.get("masks", [])
    if number < len(masks) and masks[number]["label"] is None:
        return ""
    name = prediction.names[label_id - 1] if label_id else "background"
    return "_" + re.sub(r"[^\w-]+", "_", name)[:40]


def _png(image: "Image.Image", prediction: Prediction) -> bytes:
    """PNG with the model and the labels in its metadata."""
    from PIL.PngImagePlugin import PngInfo

    metadata, file = PngInfo(), io.BytesIO()
    metadata.add_itxt("Comment", prediction.caption)
    if image.mode == "RGBA":
        metadata.add_itxt(CONTENT, CUTOUT)
    if image.mode in ("P", "I;16"):
        labels = [f"{number} {name}" for number, name in enumerate(prediction.names, start=1)]
        metadata.add_itxt("Labels", "\n".join(["0 no segment", *labels]))
    image.save(file, "PNG", pnginfo=metadata)
    return file.getvalue()
