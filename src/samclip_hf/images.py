"""Functions for images and masks: opening, boxes of masks, run-length encoding and normalization."""

import io
import operator
import warnings
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from .image_processing_samclip import convert_to_rgb
from .mask_generation_samclip import decode_rle, encode_rle, mask_to_box

MAX_COORDINATE = 2**20  # of polygons, in pixels: pycocotools walks along their edges


def open_image(
    source: str | PathLike[str] | bytes | BinaryIO,
    *,
    apply_orientation: bool = True,
    max_pixels: int | None = None,
    formats: list[str] | tuple[str, ...] | None = None,
) -> Image.Image:
    r"""
    Reads and decodes an image.

    Args:
        source (`str`, `PathLike`, `bytes` or a binary file):
            A path, the content of a file, or an open file.
        apply_orientation (`bool`, *optional*, defaults to `True`):
            Whether to rotate and flip the image according to its EXIF orientation.
        max_pixels (`int`, *optional*):
            The largest accepted width times height. It is checked before the image is decoded and replaces Pillow's
            warning about decompression bombs.
        formats (`list[str]` or `tuple[str, ...]`, *optional*):
            The accepted formats, by Pillow's names, such as `"JPEG"`. All of Pillow's by default.

    Returns:
        `PIL.Image.Image`: The image in RGB, see [`convert_to_rgb`].

    Raises:
        PIL.Image.DecompressionBombError: The image has more than `max_pixels` pixels, or more than Pillow accepts.
        PIL.UnidentifiedImageError: The content is not an image, or not in one of `formats`.
        OSError: The file cannot be read, or the image is truncated. Pillow's decoders raise other errors, too.
    """
    with open_undecoded(source, max_pixels=max_pixels, formats=formats) as image:
        return convert_to_rgb(image, apply_orientation)


def open_undecoded(
    source: str | PathLike[str] | bytes | BinaryIO,
    *,
    max_pixels: int | None = None,
    formats: list[str] | tuple[str, ...] | None = None,
) -> ImageFile.ImageFile:
    """Reads the header of an image. Pillow decodes the image when it needs the pixels. Arguments and errors as in
    [`open_image`]."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        if max_pixels is not None:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file, formats=formats)
    if max_pixels is not None and image.width * image.height > max_pixels:
        image.close()
        raise Image.DecompressionBombError(
            f"The image has {image.width} x {image.height} pixels, more than {max_pixels}."
        )
    return image


def mask_to_prompt_box(mask: "np.ndarray | RunLengthMask") -> tuple[int, int, int, int]:
    """
    Returns the bounding box of a mask `(height, width)` of type bool in the format of SAM's prompts: x1, y1, x2, y2,
    the first and the last column and row with a foreground pixel, both inclusive. Raises `ValueError` for an empty
    mask.
    """
    box = mask.box() if isinstance(mask, RunLengthMask) else mask_to_box(mask)
    if box is None:
        raise ValueError("An empty mask has no box.")
    left, top, right, bottom = box
    return left, top, right - 1, bottom - 1


def mask_to_coco_box(mask: np.ndarray) -> list[int]:
    """
    Returns the bounding box of a mask `(height, width)` of type bool in the format of COCO's annotations: left, top,
    width, height in pixels. All are 0 for an empty mask.
    """
    left, top, right, bottom = mask_to_box(mask) or (0, 0, 0, 0)
    return [left, top, right - left, bottom - top]


def encode_mask(mask: np.ndarray, compressed: bool = False) -> dict[str, Any]:
    r"""
    Returns the run-length encoding of a mask in the format of COCO's annotations: `"size"` (height, width) and
    `"counts"`, the lengths of alternating background and foreground runs, column by column.

    Args:
        mask (`numpy.ndarray` of shape `(height, width)` and type bool).
        compressed (`bool`, *optional*, defaults to `False`):
            Whether `"counts"` is the string that `pycocotools` reads and writes instead of a list of integers.
    """
    encoding = encode_rle(mask)
    return compress_rle(encoding) if compressed else encoding


def compress_rle(encoding: dict[str, Any]) -> dict[str, Any]:
    r"""
    Compresses a run-length encoding as `pycocotools` does.

    Args:
        encoding (`dict`):
            `"size"` and the list `"counts"`, see [`encode_mask`].

    Returns:
        `dict`: `"size"` and `"counts"`, a string, see [`decode_mask`].
    """
    # The inverse of `_decompress_counts`, which describes the format.
    counts = np.array(encoding["counts"], dtype=np.int64)
    numbers = counts.copy()
    numbers[3:] -= counts[1:-2]
    shifts = 5 * np.arange(13)  # 13 characters have more bits than 64
    remainders = numbers[:, None] >> shifts
    # A character is the last one if the remainder is the repetition of its highest bit.
    is_last = (remainders >= -16) & (remainders < 16)
    num_characters = is_last.argmax(axis=1) + 1
    characters = (remainders & 31) + np.where(is_last, 0, 32) + 48
    used = np.arange(len(shifts)) < num_characters[:, None]
    return {"size": list(encoding["size"]), "counts": characters[used].astype(np.uint8).tobytes().decode("ascii")}


class RunLengthMask:
    r"""
    A mask as run lengths, from which points, boxes and low-resolution maps are computed without decoding it.

    Args:
        shape (`tuple[int, int]`):
            Height and width in pixels.
        counts (`Sequence[int]`):
            The lengths of alternating background and foreground runs, column by column, see [`encode_mask`].

    Raises:
        TypeError: The shape does not consist of integers.
        ValueError: The counts are not a list of integers, are negative, or do not add up to the shape.
    """

    def __init__(self, shape: Sequence[int], counts: Sequence[int] | np.ndarray):
        height, width = map(operator.index, shape)
        self.shape = (height, width)
        self.counts = np.asarray(counts)
        if self.counts.ndim != 1 or not len(self.counts) or self.counts.dtype.kind not in "iu":
            raise ValueError(f"The counts of a mask are a list of integers; got {str(counts)[:200]}.")
        # Larger counts could overflow the sum.
        if not (self.counts.min() >= 0 and self.counts.max() <= height * width == self.counts.sum()):
            raise ValueError(f"The counts of a mask of {height} x {width} pixels do not add up to its size.")

    @classmethod
    def encode(cls, mask: np.ndarray) -> "RunLengthMask":
        """Encodes a mask `(height, width)` of type bool."""
        encoding = encode_rle(mask)
        return cls(encoding["size"], encoding["counts"])

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray]:
        """First pixel of each foreground run, and of the background run after it, counted column by column."""
        ends = self.counts.cumsum()
        return ends[:-1:2], ends[1::2]

    @cached_property
    def area(self) -> int:
        """Number of foreground pixels."""
        return int(self.counts[1::2].sum())

    def decode(self) -> np.ndarray:
        """Returns the mask `(height, width)` of type bool."""
        return decode_rle({"size": self.shape, "counts": self.counts})

    def pixel(self, index: int) -> tuple[int, int]:
        """Returns x and y of a foreground pixel. `index` counts them column by column, from 0 to `area - 1`."""
        starts, _ = self._runs
        ends = self.counts[1::2].cumsum()  # foreground pixels up to the end of each run
        run = int(np.searchsorted(ends, index, side="right"))
        x, y = divmod(int(starts[run] + index - ends[run] + self.counts[2 * run + 1]), self.shape[0])
        return x, y

    def box(self) -> tuple[int, int, int, int] | None:
        """Returns the bounding box as left, top, right and bottom in pixels, right and bottom exclusive; `None` if the
        mask is empty, see [`mask_to_box`]."""
        starts, ends = self._runs
        is_run = ends > starts
        if not is_run.any():
            return None
        (left, top), (right, bottom) = (np.divmod(of_run[is_run], self.shape[0]) for of_run in (starts, ends - 1))
        if (left != right).any():  # a run that continues in the next column has pixels in the last and the first row
            return int(left[0]), 0, int(right[-1]) + 1, self.shape[0]
        return int(left[0]), int(top.min()), int(right[-1]) + 1, int(bottom.max()) + 1

    def coverage(self, width: int, height: int) -> np.ndarray:
        """Returns the part of each cell of a grid that is foreground, from 0 to 1, float `(height, width)`: the mask,
        resized with a box filter."""
        rows, columns = self.shape
        covered = np.zeros((height, width))
        if (box := self.box()) is None:
            return covered
        left, _, right, _ = box
        # The number of foreground pixels before a position in column order is linear between the ends of runs.
        positions = np.concatenate([[0], self.counts.cumsum()])
        numbers = np.zeros(len(positions), dtype=np.int64)
        numbers[1:] = np.where(np.arange(len(self.counts)) % 2 == 1, self.counts, 0).cumsum()
        edges = np.arange(left, right)[:, None] * rows + np.arange(height + 1) * rows / height
        of_columns = np.diff(np.interp(edges, positions, numbers), axis=1)  # (right - left, height)
        # In the same way, the sum of columns up to an edge of the grid.
        sums = np.concatenate([np.zeros((1, height)), of_columns.cumsum(axis=0)])
        edges = (np.arange(width + 1) * columns / width).clip(left, right) - left
        whole = np.minimum(edges.astype(int), right - left - 1)
        sums = sums[whole] + (edges - whole)[:, None] * of_columns[whole]
        return np.diff(sums, axis=0).T * (width * height / (rows * columns))


def read_mask(segmentation: dict[str, Any] | list, size: tuple[int, int] | None = None) -> RunLengthMask:
    r"""
    Returns the mask of a COCO annotation's `"segmentation"` as run lengths. Arguments and errors as in
    [`decode_mask`].
    """
    if isinstance(segmentation, dict):
        try:
            shape, counts = segmentation["size"], segmentation["counts"]
            height, width = map(operator.index, shape)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                'A run-length encoding has "counts" and a "size", height and width in pixels; got '
                f"{str(segmentation)[:200]}."
            ) from error
        counts = _decompress_counts(counts) if isinstance(counts, str | bytes) else counts
        return RunLengthMask((height, width), counts)

    from pycocotools import mask as coco_mask

    if size is None:
        raise ValueError("Polygons need the size of their image.")
    for polygon in segmentation:
        if not _is_polygon(polygon):
            raise ValueError(
                "A polygon is a list of at least three points, x1, y1, x2, y2, ..., of finite numbers up to "
                f"{MAX_COORDINATE} pixels; got {str(polygon)[:200]}."
            )
    encoding = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    return RunLengthMask(encoding["size"], _decompress_counts(encoding["counts"]))


def decode_mask(segmentation: dict[str, Any] | list, size: tuple[int, int] | None = None) -> np.ndarray:
    r"""
    Returns the mask `(height, width)` of type bool of a COCO annotation's `"segmentation"`.

    Args:
        segmentation (`dict` or `list`):
            A run-length encoding, compressed or not, or a list of polygons. `pycocotools`, which the extra `train`
            installs, rasterizes polygons.
        size (`tuple[int, int]`, *optional*):
            Height and width of the image. Required for polygons.

    Raises:
        ValueError: Run lengths are incomplete or do not add up to the size, a polygon is invalid, or polygons have no
            size. `pycocotools` would return uninitialized memory for run lengths that are too short, ignore the last
            of an odd number of coordinates, and not return for coordinates that are not finite.
    """
    return read_mask(segmentation, size).decode()


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list | tuple) or len(polygon) < 6 or len(polygon) % 2:
        return False
    return all(isinstance(number, int | float) and abs(number) <= MAX_COORDINATE for number in polygon)


def _decompress_counts(text: str | bytes) -> np.ndarray:
    """
    Returns the run lengths of COCO's compressed run-length encoding, see `rleFrString` in
    https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c: each character
    encodes five bits of a number, lowest first, and a bit that is set if more characters of the number follow. From
    the fourth number on, numbers are differences from the run length two places before.
    """
    characters = np.frombuffer(text.encode("ascii") if isinstance(text, str) else text, np.uint8).astype(np.int64) - 48
    is_last = characters & 32 == 0
    if not len(characters) or characters.min() < 0 or characters.max() > 63 or not is_last[-1]:
        raise ValueError("A compressed run-length encoding is invalid.")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 5 * (np.arange(len(characters)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((characters & 31) << shifts, starts)
    is_negative = characters[ends] & 16 > 0
    numbers -= is_negative.astype(np.int64) << (shifts[ends] + 5)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def mean_and_std(image_processor: Any) -> tuple[list[float], list[float]]:
    r"""
    Returns the `mean` and `std` with which [`normalize`] returns the same pixel values as an image processor, even if
    `do_normalize` or `do_rescale` of the processor is `False` or its `rescale_factor` is not 1/255.

    Args:
        image_processor ([`BaseImageProcessor`]):
            An image processor of transformers.

    Returns:
        `tuple[list[float], list[float]]`: Three values each, for channels in [0, 1].
    """
    # pixel_values = (factor * image - mean) / std = (image / 255 - mean * scale) / (std * scale)
    scale = 1 / (255 * image_processor.rescale_factor) if image_processor.do_rescale else 1 / 255
    if not image_processor.do_normalize:
        return [0.0] * 3, [scale] * 3
    mean, std = (np.broadcast_to(v, 3) for v in (image_processor.image_mean, image_processor.image_std))
    return (mean * scale).tolist(), (std * scale).tolist()


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], content_sizes: Tensor | None = None
) -> Tensor:
    r"""
    Normalizes images as a model's image processor does after resizing, on their device.

    Args:
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)` and type uint8):
            Images at the model's size.
        mean, std (`Sequence[float]`):
            Mean and standard deviation of each channel, for channels in [0, 1], from [`mean_and_std`].
        content_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*):
            Height and width of each image without its padding, which is at the bottom and on the right. After
            normalization, padding is 0, as in SAM.

    Returns:
        `torch.Tensor`: `pixel_values` of the same shape.
    """
    mean_, std_ = (torch.tensor(values, device=images.device)[:, None, None] * 255 for values in (mean, std))
    pixel_values = (images - mean_) / std_
    if content_sizes is not None:
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        inside = (rows < content_sizes[:, :1])[:, :, None] & (columns < content_sizes[:, 1:])[:, None, :]
        pixel_values = pixel_values * inside[:, None]
    return pixel_values
