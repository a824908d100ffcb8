"""
Training streams: undecoded images, and masks in SA-1B's format, from tars, parquet files, folders, the Hub or the
miniature.

A stream has shards, and each shard can be read from any row, so that a resumed training does not read earlier rows
again. No dataset is loaded completely, and images are decoded one at a time.
"""

import glob
import json
import math
import os
import re
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import datasets
import fsspec
import numpy as np
from datasets import IterableDataset, load_dataset
from PIL import Image
from transformers.utils import logging

from ..images import decode_mask
from .layouts import IMAGE_EXTENSIONS
from .samples import read_image
from .tar import SampleFile, image_rank, iterate_files, open_tar, sample_key

logger = logging.get_logger(__name__)

# Names of the image column in webdataset tars, parquet files and image folders.
IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "images", "img")
# Builders of `datasets` by extension. Tars are read by `TarShards`.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
SHARD_EXTENSIONS = (".tar", *BUILDERS)
MAX_MASK_FRACTION = 0.9  # of the image; larger masks of SA-1B are background
MAX_PIXELS = 89_478_485  # from which on Pillow warns of a decompression bomb; 0.27 GB in RGB
UNREADABLE_SHARD = "unreadable shard"  # the cause that counts the rest of a shard as one sample
# Causes for which samples of tars cannot be used, and what to do.
SEVERAL_IMAGES, SCATTERED_FILES, LINK = "several images", "scattered files", "link in a tar"
REMEDIES = {
    SEVERAL_IMAGES: "It has several images. Name the one to use KEY.jpg or KEY.png, with no other dot in the name.",
    SCATTERED_FILES: "Its files do not follow each other in the tar. Write the tar again with GNU tar's --sort=name.",
    LINK: "It is a link. Write the tar again with GNU tar's --dereference --hard-dereference.",
}
MAX_RETRIES = 5  # of a remote read, after 1, 2, 4, 8 and 16 s
ACCEPTED_NAMES = (
    "Pass a folder, a glob such as 'photos/*.tar', 'hf://datasets/owner/name/*.tar', the name of a dataset on the "
    "Hub, or 'miniature'."
)


class DataError(ValueError):
    """The data cannot be used for training."""


class SkippedSampleError(ValueError):
    """A sample cannot be used. The message is the cause under which it is counted."""


class Shards(Protocol):
    """
    The shards of a stream.

    names (`list[str]`):
        A name for each shard.
    is_remote (`bool`):
        Whether the shards are read over a network. Failed reads are then retried.
    """

    names: list[str]
    is_remote: bool

    def rows(self, shard: int, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        """
        Yields the row and the sample of each sample from row `start` on whose key is `wanted`. A sample has `key`,
        unique in the shard; `image`, a dict of `bytes` and `path`, or `None`; and `json`, SA-1B's annotations, or
        `None`. A sample without an image may have the `cause`.
        """


class ShardEmbeddings(Protocol):
    """A teacher's embeddings of the samples of a stream."""

    def read(self, shard: int) -> tuple[list[str], np.ndarray]:
        """Returns the keys of a shard's samples in their order, and an array with one entry per sample."""


class TarShards:
    """
    Tars in webdataset's layout, such as SA-1B's. Consecutive files with one name up to the first dot are a sample, and
    [`image_rank`] says which of them is the image. Skipped rows of a local tar are not read; a remote tar is read from
    its start.

    A tar that is truncated between two files cannot be distinguished from a complete one, as in Python's `tarfile`.
    """

    def __init__(self, names: list[str], with_masks: bool):
        self.names, self.with_masks = names, with_masks
        self.is_remote = any("://" in name for name in names)

    def rows(self, shard: int, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        path = self.names[shard]
        names: set[str] = set()
        with fsspec.open(path, "rb") as stream, open_tar(stream) as tar:
            for row, (name, files) in enumerate(groupby(iterate_files(tar), key=attrgetter("sample"))):
                key, is_known = sample_key(path, name), name in names
                names.add(name)
                if row < start or not wanted(key):
                    continue  # without reading the files
                if is_known:
                    yield row, {"key": key, "image": None, "json": None, "cause": SCATTERED_FILES}
                else:
                    yield row, {"key": key, **self._read_files(tar, files)}

    def _read_files(self, tar: tarfile.TarFile, files: Iterable[SampleFile]) -> dict[str, Any]:
        """Reads the image and the annotations of a sample."""
        sample: dict[str, Any] = {"image": None, "json": None}
        lowest_rank = math.inf
        for _, extension, member in files:
            rank = image_rank(extension)
            if rank == lowest_rank:
                sample |= {"image": None, "cause": SEVERAL_IMAGES}
            is_image = rank is not None and rank < lowest_rank
            if not (is_image or (extension == "json" and self.with_masks)):
                continue
            if not member.isfile():
                return {"image": None, "json": None, "cause": LINK}
            content = _read_member(tar, member)
            if rank is None:
                sample["json"] = content
            else:
                lowest_rank = rank
                sample = {"image": {"bytes": content, "path": None}, "json": sample["json"]}
        return sample


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # `member` is a regular file
    return file.read()


class DatasetShards:
    """Shards of a streaming dataset of `datasets`: parquet and image files, datasets on the Hub, the miniature.
    Skipped rows are read and discarded."""

    def __init__(self, stream: IterableDataset, name: str, with_masks: bool, is_remote: bool = False):
        self.is_remote = is_remote
        columns = list(stream.features or next(iter(stream), {}))
        image_column = next((column for column in IMAGE_COLUMNS if column in columns), None)
        if image_column is None:
            raise ValueError(f"{name!r} has no image column: found {columns}, expected one of {list(IMAGE_COLUMNS)}.")
        if with_masks and "json" not in columns:
            raise ValueError(f"{name!r} has no column 'json' with SA-1B's annotations: found {columns}.")
        kept = {"__key__", image_column} | ({"json"} if with_masks else set())
        stream = stream.select_columns([column for column in columns if column in kept])
        self.stream = stream.cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.names = [f"{Path(name).name} {shard}" for shard in range(stream.num_shards)]

    def rows(self, shard: int, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        samples = self.stream.shard(num_shards=len(self.names), index=shard).skip(start)
        # `iter(samples)` would yield only a part of the shard in a data loader's worker.
        for row, batch in enumerate(samples.iter(batch_size=1), start):
            sample = {column: values[0] for column, values in batch.items()}
            image = sample[self.image_column]
            path = Path(image["path"]).name if image and image.get("path") else ""
            folder = Path(image["path"]).parent.name if path else ""
            # The folder distinguishes `cat/1.jpg` from `dog/1.jpg`. In parquet, all rows may have the same bare name.
            key = sample.get("__key__") or (f"{folder}/{path}" if folder else f"{shard}/{row}/{path}")
            if wanted(key):
                if image and not image.get("bytes") and "://" in (image.get("path") or ""):  # a file of a zip
                    content = _read_url(image["path"])
                    image = None if content is None else {"bytes": content, "path": path or None}
                yield row, {"key": key, "image": image, "json": sample.get("json")}


def _read_url(url: str) -> bytes | None:
    """Returns the content of a URL, which may point into an archive; `None` if there is no such file."""
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


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
            "miniature"; a folder of `.tar` files (webdataset, such as SA-1B), `.parquet` files or images; a glob of
            such files, local or on the Hub (`hf://datasets/owner/name/*.tar`); or the name of a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            The split of a dataset on the Hub.
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
        shards = _find_shards(name, split, with_masks)
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
        shards.names = [shards.names[shard] for shard in sorted(order[:kept])]
    return Stream(shards, eval_fraction)


def _first(shards: Shards, shard: int) -> list[dict[str, Any]]:
    """Returns the first samples of a shard, at most 8. Errors are raised for the last shard only: reading the stream
    counts unreadable shards."""
    samples: list[dict[str, Any]] = []
    try:
        for _, sample in islice(shards.rows(shard, 0, lambda key: True), 8):
            samples.append(sample)
    except Exception:
        if not samples and shard == len(shards.names) - 1:
            raise
    return samples


def _has_no_annotations(sample: dict[str, Any]) -> bool:
    try:
        _annotations(sample)
    except SkippedSampleError as error:
        return str(error) == "no annotations"  # and not, for example, "broken json"
    return False


def _find_shards(name: str, split: str, with_masks: bool) -> Shards:
    if name == "miniature":
        from ..miniature import streams as miniature

        return DatasetShards(miniature.masks() if with_masks else miniature.images(), name, with_masks)
    if os.path.isdir(name):
        for extension in SHARD_EXTENSIONS:
            if paths := sorted(glob.glob(os.path.join(glob.escape(name), f"*{extension}"))):
                return _open_files(paths, extension, name, with_masks)
        stream = load_dataset("imagefolder", data_dir=name, split="train", streaming=True, drop_labels=True)
        return DatasetShards(stream, name, with_masks)
    if paths := sorted(glob.glob(name, recursive=True)):
        extensions = {Path(path).suffix for path in paths}
        if len(extensions) > 1:
            raise ValueError(f"{name!r} matches files with several extensions, {sorted(extensions)}. Choose one.")
        extension = extensions.pop()
        if extension not in SHARD_EXTENSIONS and extension.lower() not in IMAGE_EXTENSIONS:
            raise ValueError(f"{name!r} matches files with the unsupported extension {extension!r}. {ACCEPTED_NAMES}")
        return _open_files(paths, extension, name, with_masks)

    extension = Path(name).suffix
    is_remote_file = "://" in name and extension in SHARD_EXTENSIONS
    is_hub_name = extension not in SHARD_EXTENSIONS and re.fullmatch(r"(hf://datasets/)?[\w.-]+(/[\w.-]+)?", name)
    if not is_remote_file and not is_hub_name:
        raise FileNotFoundError(f"No data at {name!r}: it is not a folder and matches no file. {ACCEPTED_NAMES}")
    try:
        if is_remote_file:
            file_system, pattern = fsspec.core.url_to_fs(name)
            found = sorted(file_system.glob(pattern)) if glob.has_magic(name) else [pattern]
            if not found:
                raise FileNotFoundError("it matches no file")
            return _open_files([file_system.unstrip_protocol(path) for path in found], extension, name, with_masks)
        stream = load_dataset(name.removeprefix("hf://datasets/"), split=split, streaming=True)
    except Exception as error:  # missing, private or without this split, or any error of the HTTP client
        raise FileNotFoundError(
            f"No data at {name!r}: it is not a folder, matches no file, and could not be opened on the Hub "
            f"({type(error).__name__}: {error}). {ACCEPTED_NAMES}"
        ) from error
    return DatasetShards(stream, name, with_masks, is_remote=True)


def _open_files(paths: list[str], extension: str, name: str, with_masks: bool) -> Shards:
    if extension == ".tar":
        return TarShards(paths, with_masks)
    builder = BUILDERS.get(extension, "imagefolder")
    stream = load_dataset(builder, data_files=paths, split="train", streaming=True)
    return DatasetShards(stream, name, with_masks, is_remote="://" in paths[0])


def decode_image(sample: dict[str, Any]) -> Image.Image:
    """Decodes a sample's image to RGB. Raises `SkippedSampleError` if it is missing, too large or corrupt."""
    stored = sample["image"]
    if stored is None:
        raise SkippedSampleError(sample.get("cause", "no image"))
    try:
        return read_image(stored["bytes"] if stored.get("bytes") else stored["path"], max_pixels=MAX_PIXELS)
    except Image.DecompressionBombError as error:
        raise SkippedSampleError("image too large") from error
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise SkippedSampleError("broken image") from error


def draw_masks(
    sample: dict[str, Any], num_masks: int, rng: np.random.Generator, size: tuple[int, int]
) -> list[np.ndarray]:
    r"""
    Draws `num_masks` of a sample's masks at random, without repetition if there are enough. Masks that are empty or
    cover more than 90 % of the image are excluded. Only the drawn masks are decoded.

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
        `list[numpy.ndarray]`: Masks of shape `(height, width)` and type bool.

    Raises:
        SkippedSampleError: There is no mask, or a drawn one is corrupt.
    """
    annotations = _annotations(sample)
    chosen = rng.permutation(len(annotations))[:num_masks]
    if len(chosen) < num_masks:
        chosen = np.concatenate([chosen, rng.integers(len(annotations), size=num_masks - len(chosen))])
    decoded: dict[int, np.ndarray] = {}
    for index in set(chosen.tolist()):
        segmentation = annotations[index]["segmentation"]
        if tuple(segmentation["size"]) != size:  # before decoding, which allocates memory for this size
            raise SkippedSampleError("mask and image differ in size")
        try:
            decoded[index] = decode_mask(segmentation)
        except Exception as error:  # pycocotools raises many kinds of errors
            raise SkippedSampleError("broken mask") from error
        if not decoded[index].any():
            raise SkippedSampleError("broken mask")
    return [decoded[index] for index in chosen.tolist()]


def _annotations(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the annotations of masks that are not empty and cover at most 90 % of the image. Raises
    `SkippedSampleError` if there are none."""
    try:
        stored = sample["json"]
        if isinstance(stored, bytes | str):
            stored = json.loads(stored)
        annotations = [
            annotation
            for annotation in stored["annotations"]
            if 0 < annotation["area"] <= MAX_MASK_FRACTION * float(np.prod(annotation["segmentation"]["size"]))
        ]
    except ValueError as error:  # not JSON, or not UTF-8
        raise SkippedSampleError("broken json") from error
    except (KeyError, TypeError) as error:
        raise SkippedSampleError("no annotations") from error
    if not annotations:
        raise SkippedSampleError("no usable mask")
    return annotations
