"""
Images and SA-1B-style masks, undecoded, from the miniature world, folders, globs, the Hub.

A stream is a number of shards, each a sequence of samples that can be read from any row on: what was read up to some
row needs no reading again after an interruption. Nothing is loaded whole and nothing is decoded before its turn.
"""

import glob
import io
import json
import os
import re
import tarfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets
import fsspec
import numpy as np
from datasets import IterableDataset, load_dataset
from PIL import Image
from pycocotools import mask as coco_mask
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Columns that hold the picture, by the names that webdataset tars, parquet files and image folders use.
IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "images", "img")
# Formats that `datasets` streams, by file ending; tars are read here.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
KINDS = (".tar", *BUILDERS)
PICTURES = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
MAX_MASK_SHARE = 0.9  # of the image; SA-1B's larger masks are background
MAX_PIXELS = 89_478_485  # of an image; what Pillow warns of as a decompression bomb, a quarter of a gigabyte in RGB
UNREADABLE_SHARD = "unreadable shard"  # the cause under which the rest of one is counted, as one sample
MAX_RETRIES = 5  # of a remote read, after 1, 2, 4, 8 and 16 s
WHAT_A_NAME_IS = (
    "Give a folder, a glob such as 'photos/*.tar', 'hf://datasets/owner/name/*.tar', a data set's name on the Hub, or "
    "'miniature'."
)


class DataError(ValueError):
    """Data with which training cannot go on."""


class SkippedSampleError(ValueError):
    """A sample that cannot be used; its message is the cause under which it is counted."""


class Shards(Protocol):
    """Where a stream's samples come from."""

    names: list[str]  # of the shards
    is_remote: bool  # so that a read that fails may succeed the next time

    def rows(self, shard: int, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The samples of a shard from row `start` on whose keys are wanted, with their rows: `key`, unique in the
        shard; `image`, `{"bytes", "path"}` or `None`; `json` with SA-1B's annotations, where masks are asked for."""


class Embeds(Protocol):
    """What a teacher says about the samples of a stream."""

    def read(self, shard: int) -> tuple[list[str], np.ndarray]:
        """Keys of a shard's samples, in order, and an array with as many rows."""


class TarShards:
    """Tars in webdataset's layout, also SA-1B's: what stands in a row under one name, up to its first dot, is one
    sample. On this machine what lies before the row is not read at all, over a network at most its own tar.

    A tar that was cut off between two of its files looks whole, to Python's `tarfile` too.
    """

    def __init__(self, names: list[str], with_masks: bool):
        self.names, self.with_masks = names, with_masks
        self.is_remote = any("://" in name for name in names)

    def rows(self, shard: int, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        name = self.names[shard]
        row, stem = -1, None
        sample: dict[str, Any] | None = None  # the one being read, if it is wanted
        with fsspec.open(name, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it remembers all of them
                if not member.isfile():
                    continue
                folder, _, file_name = member.name.rpartition("/")
                own_stem, _, ending = file_name.partition(".")
                if (folder, own_stem) != stem:
                    if sample is not None:
                        yield row, sample
                    row, stem = row + 1, (folder, own_stem)
                    key = f"{Path(name).stem}/{own_stem}"
                    is_wanted = row >= start and wanted(key)
                    sample = {"key": key, "image": None, "json": None} if is_wanted else None
                if sample is None:  # passed over without reading
                    continue
                if f".{ending.lower()}" in PICTURES:
                    sample["image"] = {"bytes": _read_member(tar, member), "path": None}
                elif ending == "json" and self.with_masks:
                    sample["json"] = _read_member(tar, member)
            if sample is not None:
                yield row, sample


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # `member` is a file
    return file.read()


class DatasetShards:
    """What `datasets` streams: parquet and image files, data sets on the Hub, the miniature world. Rows before the
    first are read and thrown away."""

    def __init__(self, stream: IterableDataset, name: str, with_masks: bool, is_remote: bool = False):
        self.is_remote = is_remote
        columns = list(stream.features or next(iter(stream), {}))
        image_column = next((column for column in IMAGE_COLUMNS if column in columns), None)
        if image_column is None:
            raise ValueError(f"{name!r} has no column of pictures: found {columns}, looked for {list(IMAGE_COLUMNS)}.")
        if with_masks and "json" not in columns:
            raise ValueError(f"{name!r} has no column 'json' with SA-1B's annotations: found {columns}.")
        kept = {"__key__", image_column} | ({"json"} if with_masks else set())
        stream = stream.select_columns([column for column in columns if column in kept])
        self.stream = stream.cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.names = [f"{Path(name).name} {shard}" for shard in range(stream.num_shards)]

    def rows(self, shard: int, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        samples = self.stream.shard(num_shards=len(self.names), index=shard).skip(start)
        # Not `iter(samples)`, which in a data loader's worker would hand out that worker's part alone.
        for row, batch in enumerate(samples.iter(batch_size=1), start):
            sample = {column: values[0] for column, values in batch.items()}
            image = sample[self.image_column]
            path = Path(image["path"]).name if image and image.get("path") else ""
            folder = Path(image["path"]).parent.name if path else ""
            # A bare name, as parquet has it, may be that of every row; a folder's name tells `cat/1` from `dog/1`.
            key = sample.get("__key__") or (f"{folder}/{path}" if folder else f"{shard}/{row}/{path}")
            if wanted(key):
                if image and not image.get("bytes") and "://" in (image.get("path") or ""):  # on the Hub, in a zip
                    content = _read_address(image["path"])
                    image = None if content is None else {"bytes": content, "path": path or None}
                yield row, {"key": key, "image": image, "json": sample.get("json")}


def _read_address(address: str) -> bytes | None:
    """What is at an address, also in an archive; none where there is nothing, which another read will not change."""
    try:
        with fsspec.open(address, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


class Stream:
    r"""
    Shards, without the samples that are held out for validation, or those alone. Which ones follows from their keys,
    so that they are the same in every stage and run.

    shards ([`Shards`]):
        The source.
    eval_fraction (`float`):
        How many are held out.
    held_out (`bool`):
        Whether this stream holds those rather than the others.
    """

    def __init__(self, shards: Shards, eval_fraction: float = 0.0, held_out: bool = False):
        self.shards, self.eval_fraction, self.held_out = shards, eval_fraction, held_out
        self.embeds: Embeds | None = None  # with which every sample comes, see `store.py`

    def complement(self) -> "Stream":
        """The samples of the same shards that are not in this stream."""
        other = Stream(self.shards, self.eval_fraction, not self.held_out)
        other.embeds = self.embeds
        return other

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.shards.names)

    def is_wanted(self, key: str) -> bool:
        """Whether a sample of this key belongs to the stream."""
        return (zlib.crc32(key.encode()) < self.eval_fraction * 2**32) == self.held_out

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """The samples of a shard from row `start` on, with their rows.

        A remote read that fails is tried again with back-off, from where it failed. Where the rest of a shard stays
        unreadable, it comes as one sample without an image, and the log says why."""
        row, failures = start, 0
        keys, embeds = self.embeds.read(shard) if self.embeds is not None else ([], None)
        while True:
            try:
                for number, sample in self.shards.rows(shard, row, self.is_wanted):
                    if embeds is not None:
                        if number >= len(keys) or keys[number] != sample["key"]:
                            raise DataError(
                                f"Row {number} of {self.shards.names[shard]} is {sample['key']!r}, but its stored "
                                "embedding is of another sample: the data changed since. Make the store anew."
                            )
                        sample["embeds"] = embeds[number]
                    yield number, sample
                    row, failures = number + 1, 0
                return
            except DataError:
                raise
            except Exception as error:  # tarfile, the file system, the HTTP client and `datasets` have each their own
                name = self.shards.names[shard]
                if self.shards.is_remote and failures < MAX_RETRIES:
                    logger.warning(f"{name} could not be read from row {row} on, trying again: {error!r}")
                    time.sleep(2**failures)
                    failures += 1
                    continue
                logger.warning(f"{name} could not be read from row {row} on: {error!r}")
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
    name (`str`):
        "miniature"; a folder of `.tar` (webdataset, SA-1B's layout), `.parquet` or image files; a glob of such files,
        on this machine or on the Hub (`hf://datasets/owner/name/*.tar`); or the name of a data set on the Hub.
    split (`str`):
        Of a data set on the Hub.
    with_masks (`bool`):
        Whether SA-1B's annotations are needed.
    shard_fraction (`float`):
        Of the tars, at random but always the same ones: the paper uses 5.7 % of SA-1B's. At least one.
    eval_fraction (`float`):
        See [`Stream`]; its complement holds the held-out samples.

    Raises `FileNotFoundError` where there is nothing, `ValueError` where it cannot be read, where there is no picture
    or no annotation.
    """
    try:
        shards = _find(name, split, with_masks)
        first = next((samples for shard in range(len(shards.names)) if (samples := _first(shards, shard))), None)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{name!r} could not be read: {error!r}. {WHAT_A_NAME_IS}") from error
    if first is None:
        raise FileNotFoundError(f"There is no sample in {name!r}. {WHAT_A_NAME_IS}")
    if all(sample["image"] is None for sample in first):
        raise ValueError(f"{name!r} has no pictures: its first samples, such as {first[0]['key']!r}, hold none.")
    if with_masks and all(_is_without_annotations(sample) for sample in first):
        raise ValueError(f"{name!r} has no json with SA-1B's annotations: {first[0]['key']!r} is without.")
    if shard_fraction < 1:
        if not isinstance(shards, TarShards):
            raise ValueError(f"A share of the shards can be had of tars alone, not of {name!r}.")
        kept = max(1, round(shard_fraction * len(shards.names)))
        order = np.random.default_rng(0).permutation(len(shards.names))
        shards.names = [shards.names[shard] for shard in sorted(order[:kept])]
    return Stream(shards, eval_fraction)


def _first(shards: Shards, shard: int) -> list[dict[str, Any]]:
    """A shard's first few samples; a broken shard among others is found out when its turn comes."""
    samples: list[dict[str, Any]] = []
    try:
        for _, sample in islice(shards.rows(shard, 0, lambda key: True), 8):
            samples.append(sample)
    except Exception:
        if not samples and shard == len(shards.names) - 1:
            raise
    return samples


def _is_without_annotations(sample: dict[str, Any]) -> bool:
    try:
        _annotations(sample)
    except SkippedSampleError as error:
        return str(error) == "no annotations"  # rather than broken ones
    return False


def _find(name: str, split: str, with_masks: bool) -> Shards:
    if name == "miniature":
        from ..miniature import streams as miniature

        return DatasetShards(miniature.masks() if with_masks else miniature.images(), name, with_masks)
    if os.path.isdir(name):
        for ending in KINDS:
            if files := sorted(glob.glob(os.path.join(glob.escape(name), f"*{ending}"))):
                return _open_files(files, ending, name, with_masks)
        stream = load_dataset("imagefolder", data_dir=name, split="train", streaming=True, drop_labels=True)
        return DatasetShards(stream, name, with_masks)
    if files := sorted(glob.glob(name, recursive=True)):
        endings = {Path(file).suffix for file in files}
        if len(endings) > 1:
            raise ValueError(f"{name!r} matches files of several kinds, {sorted(endings)}: name one kind.")
        ending = endings.pop()
        if ending not in KINDS and ending.lower() not in PICTURES:
            raise ValueError(f"{name!r} matches files of a kind that is not read, {ending!r}. {WHAT_A_NAME_IS}")
        return _open_files(files, ending, name, with_masks)

    ending = Path(name).suffix
    is_remote_file = "://" in name and ending in KINDS
    is_hub_name = ending not in KINDS and re.fullmatch(r"(hf://datasets/)?[\w.-]+(/[\w.-]+)?", name)
    if not is_remote_file and not is_hub_name:
        raise FileNotFoundError(f"No data at {name!r}: it is no folder and matches no file. {WHAT_A_NAME_IS}")
    try:
        if is_remote_file:
            file_system, pattern = fsspec.core.url_to_fs(name)
            found = sorted(file_system.glob(pattern)) if glob.has_magic(name) else [pattern]
            if not found:
                raise FileNotFoundError("it matches no file")
            return _open_files([file_system.unstrip_protocol(path) for path in found], ending, name, with_masks)
        stream = load_dataset(name.removeprefix("hf://datasets/"), split=split, streaming=True)
    except Exception as error:  # not found, no permission, no such split, or what the HTTP client says without network
        raise FileNotFoundError(
            f"No data at {name!r}: it is no folder, matches no file, and could not be opened on the Hub "
            f"({type(error).__name__}: {error}). {WHAT_A_NAME_IS}"
        ) from error
    return DatasetShards(stream, name, with_masks, is_remote=True)


def _open_files(files: list[str], ending: str, name: str, with_masks: bool) -> Shards:
    if ending == ".tar":
        return TarShards(files, with_masks)
    builder = BUILDERS.get(ending, "imagefolder")
    stream = load_dataset(builder, data_files=files, split="train", streaming=True)
    return DatasetShards(stream, name, with_masks, is_remote="://" in files[0])


def decode_image(sample: dict[str, Any]) -> Image.Image:
    """The sample's picture in RGB. Raises `SkippedSampleError` where there is none or it cannot be read."""
    stored = sample["image"]
    if stored is None:
        raise SkippedSampleError(sample.get("cause", "no image"))
    try:
        source = io.BytesIO(stored["bytes"]) if stored.get("bytes") else stored["path"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it gets its answer below
            image = Image.open(source)
        if image.width * image.height > MAX_PIXELS:
            raise SkippedSampleError("image too large")
        return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise SkippedSampleError("image too large") from error
    except SkippedSampleError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise SkippedSampleError("broken image") from error


def draw_masks(
    sample: dict[str, Any], num_masks: int, rng: np.random.Generator, size: tuple[int, int]
) -> list[np.ndarray]:
    r"""
    `num_masks` of the sample's masks at random, each bool of shape `size`, the image's height and width, without
    repetition where there are enough. Only those drawn are decoded; empty ones and those above 90 % of the image are
    left out.

    Raises `SkippedSampleError` where there is none, or a broken one.
    """
    annotations = _annotations(sample)
    chosen = rng.permutation(len(annotations))[:num_masks]
    if len(chosen) < num_masks:
        chosen = np.concatenate([chosen, rng.integers(len(annotations), size=num_masks - len(chosen))])
    decoded: dict[int, np.ndarray] = {}
    for index in set(chosen.tolist()):
        segmentation = annotations[index]["segmentation"]
        if tuple(segmentation["size"]) != size:  # before decoding, which takes the memory that it says
            raise SkippedSampleError("mask and image differ in size")
        try:
            decoded[index] = coco_mask.decode(segmentation).view(bool)
        except Exception as error:  # pycocotools raises whatever its C code meets
            raise SkippedSampleError("broken mask") from error
        if not decoded[index].any():
            raise SkippedSampleError("broken mask")
    return [decoded[index] for index in chosen.tolist()]


def _annotations(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the masks that are neither empty nor above 90 % of the image. Raises `SkippedSampleError` where there is
    none."""
    try:
        stored = sample["json"]
        if isinstance(stored, bytes | str):
            stored = json.loads(stored)
        annotations = [
            annotation
            for annotation in stored["annotations"]
            if 0 < annotation["area"] <= MAX_MASK_SHARE * float(np.prod(annotation["segmentation"]["size"]))
        ]
    except ValueError as error:  # no json, or no text
        raise SkippedSampleError("broken json") from error
    except (KeyError, TypeError) as error:
        raise SkippedSampleError("no annotations") from error
    if not annotations:
        raise SkippedSampleError("no usable mask")
    return annotations
