"""
Samples of evaluation sets: images and their annotations. Files are read and decoded only when the functions of a
sample are called, so that a process can skip the samples of other processes at no cost.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import ExifTags, Image

from ..images import open_image

IGNORE_INDEX = 255  # in label maps: pixels that are not evaluated


@dataclass(frozen=True)
class Sample:
    """
    key (`str`):
        Identifies the sample in messages and panels: a file's name, or a number.
    image (`Callable[[], PIL.Image.Image]`):
        Reads the image, in RGB.
    """

    key: str
    image: Callable[[], Image.Image]


@dataclass(frozen=True)
class LabeledImage(Sample):
    """
    label (`int`):
        Index of the class in the dataset's `names`.
    """

    label: int


@dataclass(frozen=True)
class CaptionedImage(Sample):
    """
    captions (`tuple[str, ...]`):
        One or more captions.
    """

    captions: tuple[str, ...]


@dataclass(frozen=True)
class SegmentedImage(Sample):
    """
    label_map (`Callable[[], numpy.ndarray]`):
        Reads integers of shape `(height, width)`: indices in the dataset's `names`, or `IGNORE_INDEX`.
    """

    label_map: Callable[[], np.ndarray]


@dataclass(frozen=True)
class ImageWithObjects(Sample):
    """
    objects (`Callable[[], list[dict]]`):
        Reads annotations in COCO's format: `"segmentation"` (polygons or run-length encoding), `"bbox"` (left, top,
        width, height in pixels), `"category_id"`, `"area"`, `"iscrowd"`, `"id"`.
    detections (`list[dict]`):
        Detections of a detector in COCO's result format: `"bbox"`, `"category_id"`, `"score"`. Empty without a
        detector.
    image_info (`dict`):
        The image's entry in the annotation file: `"id"`, `"height"`, `"width"`, and LVIS's `"neg_category_ids"` and
        `"not_exhaustive_category_ids"`.
    """

    objects: Callable[[], list[dict]]
    detections: list[dict] = field(default_factory=list)
    image_info: dict = field(default_factory=dict)


SampleType = TypeVar("SampleType", bound=Sample)


@dataclass(frozen=True)
class DataSet(Generic[SampleType]):
    """
    name (`str`):
        The name on the command line, such as "voc21".
    samples (`Iterable[SampleType]`):
        The samples in a fixed order. Can be iterated repeatedly. Has a length if the length is known.
    names (`list[list[str]]`, *optional*):
        The synonyms of each class; the first one is the label. `None` for data without classes.
    background (`list[str]`, *optional*):
        Texts that describe the background, if label 0 is background. `names[0]` is then `["background"]`.
    description (`dict`):
        Description of the data for the results: path, split, source of the names.
    """

    name: str
    samples: Iterable[SampleType]
    names: list[list[str]] | None = None
    background: list[str] | None = None
    description: dict[str, Any] = field(default_factory=dict)


def read_image(
    source: str | Path | bytes,
    name: str | None = None,
    annotated_size: tuple[int, int] | Callable[[], tuple[int, int] | None] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    r"""
    Reads an image of a dataset. All readers, of training and of evaluation, use this function.

    Args:
        source (`str`, `Path` or `bytes`):
            A file or its content.
        name (`str`, *optional*):
            The name of the image in the error, by default that of the file.
        annotated_size (`tuple[int, int]` or `Callable`, *optional*):
            Height and width of the image's annotations, or a function that returns them, which is called only if the
            EXIF orientation exchanges the sides. If the annotations have the size of the stored pixels then, the image
            is not rotated.
        max_pixels (`int`, *optional*):
            The largest accepted width times height, see [`open_image`].

    Returns:
        `PIL.Image.Image`: The image in RGB, with its EXIF orientation applied.

    Raises:
        ValueError: The image cannot be read. The message has its name, the cause is the error of Pillow.
    """
    name = name or os.fsdecode(source)
    with name_errors(name, "an image"):
        apply_orientation = True
        if annotated_size is not None:
            displayed, stored = read_sizes(source, name)
            if displayed != stored:
                size = annotated_size() if callable(annotated_size) else annotated_size
                apply_orientation = size != stored
        return open_image(source, apply_orientation=apply_orientation, max_pixels=max_pixels)


def read_sizes(source: str | Path | bytes, name: str | None = None) -> list[tuple[int, int]]:
    """Returns the height and width of an image without decoding it: first with its EXIF orientation, then as it is
    stored. Annotations may have either size. Raises `ValueError` as [`read_image`] does."""
    with name_errors(name or os.fsdecode(source), "an image"):
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = image.size
        return [(width, height) if 5 <= orientation <= 8 else (height, width), (height, width)]


@contextmanager
def name_errors(name: str, kind: str) -> Iterator[None]:
    """Context manager that replaces all errors by a `ValueError` with the name of the file that cannot be read."""
    try:
        yield
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise ValueError(f"{name} cannot be read as {kind}: {error}") from error
