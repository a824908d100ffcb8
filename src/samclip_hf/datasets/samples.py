"""
What protocols judge by: images and what is known about them. Nothing is decoded before it is asked for, so that a
process can pass over what another one judges.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

IGNORED = 255  # of label maps: pixels that do not count


@dataclass(frozen=True)
class Sample:
    """
    key (`str`):
        Names the sample in messages and pictures: a file's name, or a number.
    image (`Callable[[], PIL.Image.Image]`):
        Reads it, in RGB.
    """

    key: str
    image: Callable[[], Image.Image]


@dataclass(frozen=True)
class LabelledImage(Sample):
    """
    label (`int`):
        The class's place in the data set's names.
    """

    label: int


@dataclass(frozen=True)
class CaptionedImage(Sample):
    """
    captions (`tuple[str, ...]`):
        One or more.
    """

    captions: tuple[str, ...]


@dataclass(frozen=True)
class SegmentedImage(Sample):
    """
    label_map (`Callable[[], numpy.ndarray]`):
        Reads `(height, width)` integers: places in the data set's names, or `IGNORED`.
    """

    label_map: Callable[[], np.ndarray]


@dataclass(frozen=True)
class ImageWithObjects(Sample):
    """
    objects (`Callable[[], list[dict]]`):
        Annotations in COCO's format: `"segmentation"` (polygons or run lengths), `"bbox"` (x, y, width, height in
        pixels), `"category_id"`, `"area"`, `"iscrowd"`, `"id"`.
    detections (`list[dict]`):
        Of a detector, in COCO's result format: `"bbox"`, `"category_id"`, `"score"`. Empty where there is none.
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
        As on the command line, such as "voc21".
    samples (`Iterable[SampleType]`):
        In a fixed order; may be iterated more than once. Has a length where it is known beforehand.
    names (`list[list[str]]`, *optional*):
        Of each class its synonyms, the first of which is the label; `None` where there are no classes.
    background (`list[str]`, *optional*):
        Where label 0 is background: texts that describe it. `names[0]` is then `["background"]`.
    description (`dict`):
        What of it belongs in the results: where it comes from, which split, the source of names.
    """

    name: str
    samples: Iterable[SampleType]
    names: list[list[str]] | None = None
    background: list[str] | None = None
    description: dict[str, Any] = field(default_factory=dict)
