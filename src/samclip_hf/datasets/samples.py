"""
Samples of evaluation sets: images and their annotations. Files are read and decoded only when the functions of a
sample are called, so that a process can skip the samples of other processes at no cost.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..images import RunLengthMask, convert_to_rgb, open_undecoded

IGNORE_INDEX = 255  # in label maps: pixels that are not evaluated
# A JPEG is decoded at a reduced size if this size is at least so many times that to which it is resized. Pixels then
# differ from those of the full size about as much as bilinear from bicubic resizing (`benchmarks/loader.py`).
MIN_OVERSAMPLING = 1.25
MIRRORED = {"x": (2, 3, 6, 7), "y": (3, 4, 7, 8)}  # EXIF orientations that count the displayed axis from its end


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
    objects (`Callable[[], list[tuple[RunLengthMask, int]]]`, *optional*):
        Reads the masks of the objects, which may overlap, and their labels. `None` for label maps, in which objects of
        a class are not separate. `label_map(objects)` draws them without reading them again.
    """

    label_map: Callable[..., np.ndarray]
    objects: Callable[[], list[tuple[RunLengthMask, int]]] | None = None


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
    return LazyImage(source, name, annotated_size, max_pixels).decode()


class LazyImage:
    r"""
    An image of a dataset, of which the header is read at first, and the pixels when it is resized. A JPEG of which
    much smaller images are needed is decoded at a reduced size, which is faster.

    The pixels of a resized image depend only on the file, the part of the image and the new size, not on what else the
    image was resized to.

    Args:
        source, name, annotated_size, max_pixels:
            See [`read_image`].

    Raises:
        ValueError: The header or, when it is resized, the image cannot be read. The message has its name, the cause is
            the error of Pillow.
    """

    def __init__(
        self,
        source: str | Path | bytes,
        name: str | None = None,
        annotated_size: tuple[int, int] | Callable[[], tuple[int, int] | None] | None = None,
        max_pixels: int | None = None,
    ):
        self.name = name or os.fsdecode(source)
        with name_errors(self.name, "an image"):
            self._content = source if isinstance(source, bytes) else Path(source).read_bytes()
            self._undecoded: Image.Image | None = open_undecoded(self._content, max_pixels=max_pixels)
            self.format = self._undecoded.format
            displayed, stored, self.orientation = _read_header(self._undecoded)
            if displayed != stored and annotated_size is not None:
                size = annotated_size() if callable(annotated_size) else annotated_size
                if size == stored:
                    displayed, self.orientation = stored, 1
        self.height, self.width = displayed
        self._decoded: dict[int, Image.Image] = {}

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, with the EXIF orientation applied."""
        return self.width, self.height

    def decode(self, reduction: int = 1) -> Image.Image:
        """Returns the image in RGB, with its EXIF orientation applied. With a `reduction` of 2, 4 or 8, a JPEG has
        this fraction of its size, rounded up."""
        with (
            name_errors(self.name, "an image"),
            self._undecoded or open_undecoded(self._content, max_pixels=sys.maxsize) as image,
        ):
            self._undecoded = None  # an opened image can be decoded at one size only
            if reduction > 1:
                image.draft(None, (max(1, image.width // reduction), max(1, image.height // reduction)))
            return convert_to_rgb(image, apply_orientation=self.orientation != 1)

    def resize(
        self, size: tuple[int, int], resample: Image.Resampling, box: tuple[float, float, float, float] | None = None
    ) -> Image.Image:
        """As `resize` of `PIL.Image.Image`: `box` is in pixels of the full image."""
        left, top, right, bottom = box or (0, 0, self.width, self.height)
        oversampling = min((right - left) / size[0], (bottom - top) / size[1])
        reductions = (8, 4, 2) if self.format in ("JPEG", "MPO") else ()
        reduction = next((r for r in reductions if oversampling >= MIN_OVERSAMPLING * r), 1)
        if reduction not in self._decoded:
            self._decoded[reduction] = self.decode(reduction)
        image = self._decoded[reduction]
        if reduction == 1:
            return image.resize(size, resample, box)
        # The last pixel of a reduced row or column is incomplete; mirrored, it is the first one.
        x = image.width - self.width / reduction if self.orientation in MIRRORED["x"] else 0.0
        y = image.height - self.height / reduction if self.orientation in MIRRORED["y"] else 0.0
        right, bottom = min(image.width, right / reduction + x), min(image.height, bottom / reduction + y)
        return image.resize(size, resample, (left / reduction + x, top / reduction + y, right, bottom))


def read_sizes(source: str | Path | bytes, name: str | None = None) -> list[tuple[int, int]]:
    """Returns the height and width of an image without decoding it: first with its EXIF orientation, then as it is
    stored. Annotations may have either size. Raises `ValueError` as [`read_image`] does."""
    with name_errors(name or os.fsdecode(source), "an image"), open_undecoded(source) as image:
        displayed, stored, _ = _read_header(image)
        return [displayed, stored]


def _read_header(image: Image.Image) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Returns the height and width of an image that is not rotated yet, with and without its EXIF orientation, and the
    orientation."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    stored = (image.height, image.width)
    return stored[::-1] if orientation in (5, 6, 7, 8) else stored, stored, orientation


@contextmanager
def name_errors(name: str, kind: str) -> Iterator[None]:
    """Context manager that replaces all errors by a `ValueError` with the name of the file that cannot be read."""
    try:
        yield
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        # Pillow names an object in memory instead of the file.
        cause = "unknown format or damaged header" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name} cannot be read as {kind}: {cause}") from error
