"""
Samples of evaluation sets: images and their annotations. Files are read and decoded only when the functions of a
sample are called, so that a process can skip the samples of other processes at no cost.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

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


def read_image(source, max_pixels: int | None = None) -> Image.Image:
    """Reads an image of a dataset as [`open_image`] does, without its EXIF orientation: annotations are of the pixels
    as they are stored."""
    return open_image(source, apply_orientation=False, max_pixels=max_pixels)
