"""
The datasets that `samclip annotate` writes: a COCO file, parquet and webdataset shards, a contact sheet, a list of
uncertain images and a report. All of them are written in one pass over the images and their results.
"""

import contextlib
import hashlib
import heapq
import io
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import CommandError, first_line, log
from .inputs import ImageInput, read_image
from .run_record import SINGLE_PROCESS, RecordedOutputs
from .vocabulary import label_legend

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    import numpy as np
    from PIL import Image

# Values of --formats: the file or folder of each, and what it contains.
DATA_SET_FORMATS = {
    "coco": ("annotations.json", "COCO instances with compressed run-length encodings, or polygons"),
    "parquet": ("parquet/", "tables for datasets.load_dataset, with the images"),
    "webdataset": ("webdataset/", "tars with an image and its annotations as in SA-1B, for training"),
}
CONTACT_SHEET, REVIEW, REPORT = "contact_sheet.png", "review.json", "report.json"
IMAGES_PER_SHARD = 1000
ROWS_PER_GROUP = 100
TILE_SIZE = 320  # longer side of an image of the contact sheet, in pixels
KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # other images are stored as PNG
DEEP_MODES = ("I", "F")  # Pillow's modes with more than 8 bits per channel start with these letters, as I;16 does
MARGIN = "the smallest difference between the score of an annotation of the image and the threshold"


def data_set_files(formats: Sequence[str], num_review: int | None) -> list[str]:
    """Files and folders (with a final "/") of a dataset in the output folder."""
    files = [DATA_SET_FORMATS[name][0] for name in formats]
    return [*files, CONTACT_SHEET, *([] if num_review is None else [REVIEW]), REPORT]


@dataclass
class DataSetWriter:
    """
    Writes a dataset. Each file is written atomically, and the same results give the same bytes.

    folder (`Path`):
        The output folder.
    formats (`Sequence[str]`):
        Names in `DATA_SET_FORMATS`.
    names (`Sequence[str]`):
        Names of the categories 1, 2, ...
    threshold (`float`):
        The lowest score of an annotation.
    polygons (`bool`):
        Whether the COCO file has polygons.
    with_images (`bool`):
        Whether the parquet files contain the images.
    num_tiles (`int`):
        Images on the contact sheet.
    num_review (`int`, *optional*):
        Images in the list of uncertain images.
    """

    folder: Path
    formats: Sequence[str]
    names: Sequence[str]
    threshold: float
    polygons: bool = False
    with_images: bool = True
    num_tiles: int = 16
    num_review: int | None = None

    def write(
        self,
        results: Iterator[tuple[ImageInput, dict[str, Any]]],
        description: dict[str, Any],
        errors: dict[str, str],
    ) -> None:
        """
        Writes all files.

        results (iterator of `tuple[ImageInput, dict]`):
            Each image with its line in `results.jsonl`. The image id is the position, from 1.
        description (`dict`):
            Options and model of the run, for the report and the COCO file.
        errors (`dict[str, str]`):
            Messages by the keys of images that failed, for the report.

        Raises `CommandError` if an image cannot be read again or has changed.
        """
        from samclip_hf.files import remove_temporary_files, write_atomically

        self._outputs, self._shards = RecordedOutputs(self.folder), set[str]()
        for name in data_set_files(self.formats, self.num_review):
            remove_temporary_files(self.folder / name.rstrip("/"))
        counts: Counter[str] = Counter()
        labels: Counter[str] = Counter()
        tiles: list[tuple[int, int, bytes, dict]] = []  # a heap: negative hash, image id, content, result
        margins: list[tuple[float, int, str]] = []
        with contextlib.ExitStack() as stack:
            coco = self._open_coco(stack, description) if "coco" in self.formats else None
            rows = self._rows(results, counts)
            for shard in itertools.count():
                if (first := next(rows, None)) is None:
                    break
                with contextlib.ExitStack() as shard_stack:
                    parquet = self._open_parquet(shard_stack, shard) if "parquet" in self.formats else None
                    tar = self._open_tar(shard_stack, shard) if "webdataset" in self.formats else None
                    files = [file for file in (coco, parquet, tar) if file is not None]
                    for row in itertools.chain([first], itertools.islice(rows, IMAGES_PER_SHARD - 1)):
                        image_id, result, annotations, content, _ = row
                        labels.update(self.names[own["category_id"] - 1] for own in annotations)
                        counts["left_out"] += result["left_out"]
                        counts["without_annotations"] += not annotations
                        if annotations:
                            margin = min(own["score"] for own in annotations) - self.threshold
                            margins.append((margin, image_id, result["image"]))
                        _keep_tile(tiles, self.num_tiles, (_rank(result["image"]), image_id, content, result))
                        for file in files:
                            file.add(row)
                    if parquet is not None:
                        parquet.close()
            if coco is not None:
                coco.close()
                counts["masks_without_exact_polygons"] = coco.num_inexact
        for name in ("parquet", "webdataset"):
            if name in self.formats:
                self._outputs.delete_others(f"{name}/", self._shards, SINGLE_PROCESS)
        write_atomically(self.folder / CONTACT_SHEET, _png(self._contact_sheet(tiles), compress_level=1))
        if self.num_review is not None:
            margins.sort()
            review = {
                "margin": MARGIN,
                "threshold": self.threshold,
                "images": [
                    {"image": key, "image_id": image_id, "margin": margin}
                    for margin, image_id, key in margins[: self.num_review]
                ],
                "images_without_annotations": counts["without_annotations"],
            }
            write_atomically(self.folder / REVIEW, json.dumps(review, indent=1) + "\n")
        report = {
            "run": description,
            "overlap": "Without multi_label, segments do not overlap. There is no non-maximum suppression.",
            "num_images": counts["images"],
            "num_annotations": labels.total(),
            "annotations_by_label": {name: labels[name] for name in self.names},
            "images_without_annotations": counts["without_annotations"],
            "annotations_left_out_by_max_per_image": counts["left_out"],
            "images_stored_as_png": counts["converted"],
        }
        if self.polygons:
            report["masks_without_exact_polygons"] = counts["masks_without_exact_polygons"]
        report |= {"num_failed": len(errors), "failed": [{"image": k, "error": text} for k, text in errors.items()]}
        write_atomically(self.folder / REPORT, json.dumps(report, indent=1) + "\n")

    def _rows(self, results: Iterator[tuple[ImageInput, dict]], counts: Counter[str]) -> "Iterator[_Row]":
        """The images of the dataset. Counts them, and those that are converted to PNG."""
        from samclip_hf.images import compress_rle

        annotation_id = 0
        for image_id, (image, result) in enumerate(results, start=1):
            annotations = []
            for segment in result["segments"]:
                annotation_id += 1
                annotations.append(
                    {
                        "id": annotation_id,
                        "image_id": image_id,
                        "category_id": segment["label_id"],
                        "bbox": segment["bbox"],
                        "area": segment["area"],
                        "segmentation": compress_rle(segment["segmentation"]),
                        "iscrowd": 0,
                        "score": segment["score"],
                    }
                )
            content, extension, is_converted = _read_content(image, (result["width"], result["height"]))
            counts["images"] += 1
            counts["converted"] += is_converted
            yield _Row(image_id, result, annotations, content, extension)

    def _open_coco(self, stack: contextlib.ExitStack, description: dict[str, Any]) -> "_CocoFile":
        from samclip_hf.files import atomic_path

        path = stack.enter_context(atomic_path(self.folder / DATA_SET_FORMATS["coco"][0]))
        file = stack.enter_context(path.open("w", encoding="utf-8"))
        return _CocoFile(file, self.names, description, self.polygons)

    def _shard_path(self, stack: contextlib.ExitStack, name: str, shard: int, extension: str) -> Path:
        from samclip_hf.files import atomic_path, remove_temporary_files

        path = self.folder / name / f"{shard:05d}.{extension}"
        path.parent.mkdir(exist_ok=True)
        self._shards.add(f"{name}/{path.name}")
        self._outputs.add([f"{name}/{path.name}"], SINGLE_PROCESS)
        remove_temporary_files(path)
        return stack.enter_context(atomic_path(path))

    def _open_parquet(self, stack: contextlib.ExitStack, shard: int) -> "_ParquetFile":
        path = self._shard_path(stack, "parquet", shard, "parquet")
        return _ParquetFile(stack, path, self.names, self.with_images)

    def _open_tar(self, stack: contextlib.ExitStack, shard: int) -> "_TarFile":
        path = self._shard_path(stack, "webdataset", shard, "tar")
        return _TarFile(stack.enter_context(tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)), self.names)

    def _contact_sheet(self, tiles: list[tuple[int, int, bytes, dict]]) -> "Image.Image":
        """Random images with their segments, labels and scores, in the order of the dataset."""
        from samclip_hf.visualization import arrange

        return arrange([self._tile(content, result) for _, _, content, result in sorted(tiles, key=lambda t: t[1])])

    def _tile(self, content: bytes, result: dict) -> "Image.Image":
        from PIL import Image

        from samclip_hf.images import decode_mask

        image = read_image(lambda: content, Image.MAX_IMAGE_PIXELS)
        masks = [decode_mask(own["segmentation"]) for own in result["segments"]]
        label_ids = [own["label_id"] for own in result["segments"]]
        legend = label_legend(self.names, label_ids, [own["score"] for own in result["segments"]], "segments")
        return draw_tile(image, masks, label_ids, legend, result["image"])


def draw_tile(
    image: "Image.Image",
    masks: "Sequence[np.ndarray]",
    color_numbers: Sequence[int],
    legend: Sequence[tuple[int | None, str]],
    key: str,
    opacity: float = 0.45,
) -> "Image.Image":
    """An image of a contact sheet. `masks` are `(height, width)` of type bool and have the size of the image, `key` is
    that of the image. See [`draw_segments`] for the other arguments."""
    import numpy as np
    from PIL import Image

    from samclip_hf.visualization import draw_segments

    scale = TILE_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    return draw_segments(image.resize(size), small, color_numbers, legend, Path(key).name, opacity=opacity)


class _Row(NamedTuple):
    """An image of a dataset: its id, its line in `results.jsonl`, its annotations as in COCO, and its file."""

    image_id: int
    result: dict[str, Any]
    annotations: list[dict[str, Any]]
    content: bytes
    extension: str


class _CocoFile:
    """A COCO file of instances, whose annotations are written one by one."""

    def __init__(self, file: io.TextIOBase, names: Sequence[str], description: dict[str, Any], polygons: bool):
        self.file, self.names, self.polygons = file, names, polygons
        self.images: list[dict[str, Any]] = []
        self.separator, self.num_inexact = "", 0
        info = {"description": "annotations of samclip annotate", "run": description}
        file.write(f'{{"info": {json.dumps(info)},\n"licenses": [],\n"annotations": [')

    def add(self, row: _Row) -> None:
        result = row.result
        self.images.append(
            {"id": row.image_id, "file_name": result["image"], "height": result["height"], "width": result["width"]}
        )
        for annotation in row.annotations:
            if self.polygons:
                polygons = exact_polygons(annotation["segmentation"])
                self.num_inexact += polygons is None
                if polygons is not None:
                    annotation = annotation | {"segmentation": polygons}
            self.file.write(f"{self.separator}\n{json.dumps(annotation)}")
            self.separator = ","

    def close(self) -> None:
        categories = [{"id": number, "name": name} for number, name in enumerate(self.names, start=1)]
        self.file.write(f'],\n"images": {json.dumps(self.images)},\n"categories": {json.dumps(categories)}}}\n')
        if self.num_inexact:
            log(f"{self.num_inexact} masks have no exact polygons and are run-length encodings in the COCO file.")


class _ParquetFile:
    """A table that `datasets` reads, with the types of its columns."""

    def __init__(self, stack: contextlib.ExitStack, path: Path, names: Sequence[str], with_images: bool):
        import datasets
        import pyarrow.parquet

        value = datasets.Value
        features: dict[str, Any] = {"image": datasets.Image()} if with_images else {}
        features |= {"image_id": value("int64"), "file_name": value("string")}
        features |= {"height": value("int32"), "width": value("int32")}
        features["objects"] = datasets.List(
            {
                "id": value("int64"),
                "category": datasets.ClassLabel(names=list(names)),
                "score": value("float64"),
                "bbox": datasets.List(value("int32"), length=4),
                "area": value("int64"),
                "segmentation": {"size": datasets.List(value("int32"), length=2), "counts": value("string")},
            }
        )
        self.schema, self.with_images = datasets.Features(features).arrow_schema, with_images
        self.writer = stack.enter_context(pyarrow.parquet.ParquetWriter(path, self.schema))
        self.rows: list[dict[str, Any]] = []

    def add(self, row: _Row) -> None:
        names, result = ("id", "score", "bbox", "area", "segmentation"), row.result
        values: dict[str, Any] = {"image_id": row.image_id, "file_name": result["image"]}
        values |= {"height": result["height"], "width": result["width"]}
        values["objects"] = [
            {name: own[name] for name in names} | {"category": own["category_id"] - 1} for own in row.annotations
        ]
        if self.with_images:
            values["image"] = {"bytes": row.content, "path": f"{row.image_id:09d}.{row.extension}"}
        self.rows.append(values)
        if len(self.rows) == ROWS_PER_GROUP:
            self.close()

    def close(self) -> None:
        """Writes the rows that are not written yet."""
        import pyarrow

        if self.rows:
            self.writer.write_table(pyarrow.Table.from_pylist(self.rows, schema=self.schema))
            self.rows = []


class _TarFile:
    """A tar in webdataset's layout, with annotations as in SA-1B: 000000001.jpg and 000000001.json."""

    def __init__(self, tar: tarfile.TarFile, names: Sequence[str]):
        self.tar, self.names = tar, names

    def add(self, row: _Row) -> None:
        size = {"height": row.result["height"], "width": row.result["width"]}
        description = {
            "image": {"image_id": row.image_id, "file_name": row.result["image"]} | size,
            "annotations": [own | {"category": self.names[own["category_id"] - 1]} for own in row.annotations],
        }
        for suffix, data in ((row.extension, row.content), ("json", json.dumps(description).encode())):
            member = tarfile.TarInfo(f"{row.image_id:09d}.{suffix}")
            member.size = len(data)
            self.tar.addfile(member, io.BytesIO(data))


def _read_content(image: ImageInput, size: tuple[int, int]) -> tuple[bytes, str, bool]:
    """
    The file of an image, its extension, and whether it was converted to PNG: images in other formats than
    `KEPT_FORMATS`, images that their EXIF orientation rotates, to which readers would not apply it, and images with 16
    bits per channel, which Pillow's conversion to RGB in readers makes white.

    Raises `CommandError` if the image cannot be read again, or if its size is not `size` (width and height).
    """
    from PIL import ExifTags
    from PIL import Image as PillowImage

    from samclip_hf.images import open_undecoded

    try:
        source = image.source() if callable(image.source) else image.source
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with open_undecoded(content, max_pixels=PillowImage.MAX_IMAGE_PIXELS) as header:
            is_upright = header.getexif().get(ExifTags.Base.Orientation, 1) == 1
            extension = KEPT_FORMATS.get(header.format or "") if not header.mode.startswith(DEEP_MODES) else None
            found = header.size
        if extension is not None and is_upright:
            data, is_converted = content, False
        else:
            upright = read_image(lambda: content, PillowImage.MAX_IMAGE_PIXELS)
            data, extension, is_converted, found = _png(upright), "png", True, upright.size
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise CommandError(
            f"{image.key} was annotated, but cannot be read again for the dataset: {first_line(error)} Restore it, "
            "and run the same command again."
        ) from error
    if found != size:
        raise CommandError(
            f"{image.key} has another size than when it was annotated. Pass another --output, or --overwrite to start "
            "again."
        )
    return data, extension, is_converted


def _png(image: "Image.Image", compress_level: int = 6) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=compress_level)
    return file.getvalue()


def _rank(key: str) -> int:
    """A number that is random, but the same in every run."""
    return int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8], "big")


def _keep_tile(tiles: list[tuple[int, int, bytes, dict]], num_tiles: int, tile: tuple[int, int, bytes, dict]) -> None:
    """Keeps the images of the lowest ranks."""
    entry = (-tile[0], *tile[1:])
    if len(tiles) < num_tiles:
        heapq.heappush(tiles, entry)
    else:
        heapq.heappushpop(tiles, entry)


def exact_polygons(segmentation: dict[str, Any]) -> list[list[int]] | None:
    """
    The polygons of a mask in COCO's format, along the edges of its pixels.

    segmentation (`dict`):
        A run-length encoding.

    Returns a list of x1, y1, x2, y2, ... in pixels, from which `pycocotools` rasterizes the same mask; `None` if it
    does not, or if the mask is empty.
    """
    import numpy as np

    from samclip_hf.images import decode_mask

    mask = decode_mask(segmentation)
    polygons = mask_to_polygons(mask)
    is_exact = bool(polygons) and np.array_equal(decode_mask(polygons, mask.shape), mask)
    return polygons if is_exact else None


def mask_to_polygons(mask: "np.ndarray") -> list[list[int]]:
    """The outlines of a mask `(height, width)` of type bool, as lists of x1, y1, x2, y2, ... in pixels. COCO's
    polygons have no holes, so parts with holes are divided by a vertical line through a hole."""
    import numpy as np
    from scipy import ndimage

    polygons = []
    parts, _ = ndimage.label(mask)
    for number, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
        pending = [(parts[rows, columns] == number, rows.start, columns.start)]
        while pending:
            part, top, left = pending.pop()
            holes = ndimage.binary_fill_holes(part, structure=np.ones((3, 3))) & ~part
            if not holes.any():
                polygons.append([n for x, y in _outline(part) for n in (x + left, y + top)])
                continue
            column = int(holes.any(axis=0).argmax())
            pieces, start = [(part[:, : column + 1], 0), (part[:, column + 1 :], column + 1)], left
            for piece, offset in pieces:
                labels, _ = ndimage.label(piece)
                for own, (r, c) in enumerate(ndimage.find_objects(labels), start=1):
                    pending.append((labels[r, c] == own, top + r.start, start + offset + c.start))
    return polygons


def _outline(part: "np.ndarray") -> list[tuple[int, int]]:
    """Corners `(x, y)` of the outline of a 4-connected region without holes, clockwise."""
    import numpy as np

    padded = np.pad(part, 1)

    def is_inside(x: int, y: int) -> bool:
        return bool(padded[y + 1, x + 1])

    # The pixels to the right and to the left of a step from the corner (x, y), by the direction of the step.
    directions = ((1, 0), (0, 1), (-1, 0), (0, -1))
    right = ((0, 0), (-1, 0), (-1, -1), (0, -1))
    x, y = int(part[0].argmax()), 0
    start, direction, corners = (x, y), 0, [(x, y)]
    while True:
        x, y = x + directions[direction][0], y + directions[direction][1]
        # Turning right first separates pixels that touch at a corner, which are not connected there.
        for turn in (1, 0, 3):
            new = (direction + turn) % 4
            ahead_right = is_inside(x + right[new][0], y + right[new][1])
            left = right[(new - 1) % 4]
            ahead_left = is_inside(x + left[0], y + left[1])
            if ahead_right and not ahead_left:
                break
        if (x, y) == start and new == 0:
            return corners
        if new != direction:
            corners.append((x, y))
        direction = new
