"""
Training streams: undecoded images, and masks in SA-1B's format, from tars, parquet files, folders, the Hub or the
miniature.

A stream has shards, and each shard can be read from any row, so that a resumed training does not read earlier rows
again. No dataset is loaded completely, and images are decoded one at a time.
"""

import json
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
from PIL import Image
from transformers.utils import logging

from ..images import RunLengthMask, read_mask
from .samples import LazyImage
from .shards import ACCEPTED_NAMES, BROKEN_IMAGE, REMEDIES, DataError, Shards, TarShards, open_shards

logger = logging.get_logger(__name__)

MAX_MASK_FRACTION = 0.9  # of the image; larger masks of SA-1B are background
MAX_PIXELS = 89_478_485  # from which on Pillow warns of a decompression bomb; 0.27 GB in RGB
UNREADABLE_SHARD = "unreadable shard"  # the cause that counts the rest of a shard as one sample
# Causes for which single annotations of a sample are skipped.
BROKEN_ANNOTATION, EMPTY_ANNOTATION = "broken annotation", "empty annotation"
OTHER_SIZE = "mask and image differ in size"
MAX_RETRIES = 5  # of a remote read, after 1, 2, 4, 8 and 16 s


class SkippedSampleError(ValueError):
    """A sample cannot be used. The message is the cause under which it is counted."""


class ShardEmbeddings(Protocol):
    """A teacher's embeddings of the samples of a stream."""

    def read(self, shard: int) -> tuple[list[str], np.ndarray]:
        """Returns the keys of a shard's samples in their order, and an array with one entry per sample."""


class Stream:
    r"""
    The samples of some shards: either those for training or those held out for evaluation. Whether a sample is held
    out depends on its key alone, so it is the same in every stage and run.

    shards ([`Shards`]):
        The source.
    eval_fraction (`float`, *optional*, defaults to 0.0):
        The fraction of the samples that is held out.
    held_out (`bool`, *optional*, defaults to `False`):
        Whether the stream contains the held-out samples instead of those for training.
    embeddings ([`ShardEmbeddings`], *optional*):
        Embeddings to add to each sample as `embeds`.
    """

    def __init__(
        self,
        shards: Shards,
        eval_fraction: float = 0.0,
        held_out: bool = False,
        embeddings: ShardEmbeddings | None = None,
    ):
        self.shards, self.eval_fraction, self.held_out = shards, eval_fraction, held_out
        self.embeddings = embeddings

    def complement(self) -> "Stream":
        """Returns a stream of the samples of the same shards that are not in this stream."""
        return Stream(self.shards, self.eval_fraction, not self.held_out, self.embeddings)

    def with_embeddings(self, embeddings: ShardEmbeddings) -> "Stream":
        """Returns a stream of the same samples with their embeddings."""
        return Stream(self.shards, self.eval_fraction, self.held_out, embeddings)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.shards.names)

    def is_wanted(self, key: str) -> bool:
        """Returns whether a sample with this key belongs to the stream."""
        return (zlib.crc32(key.encode()) < self.eval_fraction * 2**32) == self.held_out

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """
        Yields the row and the sample of each sample of a shard from row `start` on, see [`Shards`].

        A failed remote read is retried with exponential backoff from the row where it failed. If the rest of a shard
        cannot be read, it yields one sample without an image, whose `cause` is `UNREADABLE_SHARD`, and logs the error.

        Raises:
            DataError: The stored embeddings belong to other samples.
        """
        row, failures = start, 0
        keys, embeds = self.embeddings.read(shard) if self.embeddings is not None else ([], None)
        while True:
            try:
                for number, sample in self.shards.rows(shard, row, self.is_wanted):
                    if embeds is not None:
                        if number >= len(keys) or keys[number] != sample["key"]:
                            raise DataError(
                                f"Row {number} of {self.shards.names[shard]} is {sample['key']!r}, but its stored "
                                "embedding is that of another sample: the cache was computed for other data. "
                                "Compute it again."
                            )
                        sample["embeds"] = embeds[number]
                    yield number, sample
                    row, failures = number + 1, 0
                return
            except DataError:
                raise
            except Exception as error:  # tarfile, fsspec, HTTP clients and `datasets` raise different errors
                name = self.shards.names[shard]
                if self.shards.is_remote and failures < MAX_RETRIES:
                    logger.warning(f"Reading {name} failed at row {row}, retrying: {error!r}")
                    time.sleep(2**failures)
                    failures += 1
                    continue
                logger.warning(f"Reading {name} failed at row {row}: {error!r}")
                yield row, {"key": name, "image": None, "cause": UNREADABLE_SHARD}
                return


def open_stream(
    name: str,
    split: str = "train",
    with_masks: bool = False,
    shard_fraction: float = 1.0,
    eval_fraction: float = 0.0,
) -> Stream:
    r"""
    Opens training data.

    Args:
        name (`str`):
            "miniature"; a folder, with subfolders, of `.tar` files (webdataset, such as SA-1B), `.parquet` files,
            images or zip archives of images; a glob of such files; tars or parquet files on the Hub
            (`hf://datasets/owner/name/*.tar`); a folder of `Dataset.save_to_disk`; or the name of a dataset on the
            Hub.
        split (`str`, *optional*, defaults to `"train"`):
            The split of a dataset on the Hub, or of a folder with several splits.
        with_masks (`bool`, *optional*, defaults to `False`):
            Whether samples need SA-1B's annotations.
        shard_fraction (`float`, *optional*, defaults to 1.0):
            The fraction of the tars to use, at least one tar. They are chosen at random, but always the same ones. The
            paper uses 5.7 % of SA-1B.
        eval_fraction (`float`, *optional*, defaults to 0.0):
            The fraction of the samples that is held out, see [`Stream`]. `stream.complement()` contains them.

    Raises:
        FileNotFoundError: There is no data.
        ValueError: The data cannot be read, or has no images or no annotations.
    """
    try:
        shards = open_shards(name, split, with_masks)
        first = next((samples for shard in range(len(shards.names)) if (samples := _first(shards, shard))), None)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{name!r} could not be read: {error!r}. {ACCEPTED_NAMES}") from error
    if first is None:
        raise FileNotFoundError(f"{name!r} has no samples. {ACCEPTED_NAMES}")
    if all(sample["image"] is None for sample in first):
        remedies = [REMEDIES[sample["cause"]] for sample in first if sample.get("cause") in REMEDIES]
        if remedies:
            raise ValueError(f"{name!r} has no usable images, such as {first[0]['key']!r}: {remedies[0]}")
        raise ValueError(f"{name!r} has no images: its first samples, such as {first[0]['key']!r}, have none.")
    if with_masks and all(_has_no_annotations(sample) for sample in first):
        raise ValueError(
            f"{name!r} has no json files with SA-1B's annotations: its first samples, such as {first[0]['key']!r}, "
            "have none. The files of a sample must follow each other in a tar, which GNU tar's --sort=name does."
        )
    if shard_fraction < 1:
        if not isinstance(shards, TarShards):
            raise ValueError(f"A fraction of the shards can be chosen for tars only, not for {name!r}.")
        kept = max(1, round(shard_fraction * len(shards.names)))
        order = np.random.default_rng(0).permutation(len(shards.names))
        logger.warning(f"{name!r}: {kept} of {len(shards.names)} tars are used, a fraction of {shard_fraction}.")
        shards.names = [shards.names[shard] for shard in sorted(order[:kept])]
    return Stream(shards, eval_fraction)


def _first(shards: Shards, shard: int) -> list[dict[str, Any]]:
    """Returns the first samples of a shard, at most 8. Errors are raised for the last shard only: reading the stream
    counts unreadable shards."""
    samples: list[dict[str, Any]] = []
    try:
        for _, sample in islice(shards.rows(shard, 0, lambda key: True), 8):
            samples.append(sample)
    except DataError:
        raise
    except Exception:
        if not samples and shard == len(shards.names) - 1:
            raise
    return samples


def _has_no_annotations(sample: dict[str, Any]) -> bool:
    try:
        read_annotations(sample["json"])
    except SkippedSampleError as error:
        return str(error) == "no annotations"  # and not, for example, "broken json"
    return False


class SampleImage(LazyImage):
    """The image of a sample. Raises `SkippedSampleError` if it is missing, too large or corrupt, also when it is
    resized."""

    def __init__(self, sample: dict[str, Any]):
        stored = sample["image"]
        if stored is None:
            raise SkippedSampleError(sample.get("cause", "no image"))
        source = stored["bytes"] if stored.get("bytes") else stored["path"]
        with _skip_unreadable():
            super().__init__(source, sample.get("key"), partial(_annotated_size, sample), MAX_PIXELS)

    def decode(self, reduction: int = 1) -> Image.Image:
        with _skip_unreadable():
            return super().decode(reduction)


@contextmanager
def _skip_unreadable() -> Iterator[None]:
    """Context manager that replaces the error of an image that cannot be read by a `SkippedSampleError`."""
    try:
        yield
    except ValueError as error:
        is_too_large = isinstance(error.__cause__, Image.DecompressionBombError)
        raise SkippedSampleError("image too large" if is_too_large else BROKEN_IMAGE) from error


def draw_masks(
    sample: dict[str, Any], num_masks: int, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[list[RunLengthMask], Counter[str]]:
    r"""
    Draws `num_masks` of a sample's masks at random, without repetition if there are enough. Masks that are empty,
    corrupt or of another size than the image are skipped, and masks that cover more than 90 % of the image are left
    out. Only the drawn masks and those of annotations without an area are read, as run lengths.

    Args:
        sample (`dict`):
            A sample of a stream that was opened with `with_masks`.
        num_masks (`int`):
            Number of masks.
        rng (`numpy.random.Generator`):
            The source of randomness.
        size (`tuple[int, int]`):
            The image's height and width.

    Returns:
        `tuple[list[RunLengthMask], Counter[str]]`: Masks of shape `(height, width)`, and the number of skipped
        annotations by cause, as far as they were read.

    Raises:
        SkippedSampleError: There are no annotations, or none of them can be used.
    """
    annotations = read_annotations(sample["json"])
    skipped: Counter[str] = Counter()
    usable = [annotation for annotation in annotations if _is_usable(annotation, size, skipped)]
    masks: dict[int, RunLengthMask] = {}
    for index in rng.permutation(len(usable)).tolist():
        if len(masks) == num_masks:
            break
        mask = _read_mask(usable[index], size)
        if mask is None:
            skipped[BROKEN_ANNOTATION] += 1
        elif mask.area == 0:
            skipped[EMPTY_ANNOTATION] += 1
        elif mask.area <= MAX_MASK_FRACTION * size[0] * size[1]:
            masks[index] = mask
    if not masks:
        raise SkippedSampleError(max(skipped, key=skipped.__getitem__) if skipped else "no usable mask")
    chosen = list(masks)
    if len(chosen) < num_masks:
        chosen += np.array(sorted(masks))[rng.integers(len(masks), size=num_masks - len(chosen))].tolist()
    return [masks[index] for index in chosen], skipped


def read_annotations(content: bytes | str | dict[str, Any] | list | None) -> list[Any]:
    """
    Returns the annotations in a json file: the list `"annotations"`, as in SA-1B, the list `"masks"`, as `samclip
    masks` writes it, or a list, as SAM's mask generator returns it. Raises `SkippedSampleError` if there is no list.
    """
    try:
        if isinstance(content, bytes | str):
            content = json.loads(content)
    except ValueError as error:  # not JSON, or not UTF-8
        raise SkippedSampleError("broken json") from error
    if isinstance(content, dict):
        content = content.get("annotations", content.get("masks"))
    if not isinstance(content, list):
        raise SkippedSampleError("no annotations")
    return content


def _annotated_size(sample: dict[str, Any]) -> tuple[int, int] | None:
    """Returns the height and width of a sample's first run-length encoding, if it has annotations."""
    try:
        annotations = read_annotations(sample.get("json"))
        height, width = next(a["segmentation"]["size"] for a in annotations if isinstance(a["segmentation"], dict))
    except (SkippedSampleError, KeyError, TypeError, ValueError, StopIteration):
        return None
    return height, width


def _is_usable(annotation: Any, size: tuple[int, int], skipped: Counter[str]) -> bool:
    """Returns whether an annotation has a mask of this size that is not too large. Counts annotations without a mask,
    or with one of another size. The mask is read only if the annotation has no area, or one that is larger than the
    image."""
    segmentation = annotation.get("segmentation") if isinstance(annotation, dict) else None
    if not segmentation or not isinstance(segmentation, dict | list):
        skipped[BROKEN_ANNOTATION] += 1
        return False
    # Polygons have no size.
    if isinstance(segmentation, dict) and list(segmentation.get("size") or []) != list(size):
        skipped[OTHER_SIZE] += 1
        return False
    area = annotation.get("area")
    if not isinstance(area, int | float) or not 0 < area <= size[0] * size[1]:
        mask = _read_mask(annotation, size)
        area = 0 if mask is None else mask.area  # whether it is corrupt or empty is counted when it is drawn
    return area <= MAX_MASK_FRACTION * size[0] * size[1]


def _read_mask(annotation: dict[str, Any], size: tuple[int, int]) -> RunLengthMask | None:
    """Returns the mask of an annotation, or `None` if it is corrupt."""
    try:
        return read_mask(annotation["segmentation"], size)
    except Exception:  # numpy and pycocotools raise many kinds of errors
        return None
