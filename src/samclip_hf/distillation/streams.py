"""
Images and SA-1B-style masks as endless streams, from the miniature world, folders, globs, the Hub.

Nothing is loaded whole and nothing is decoded before its turn.
"""

import glob
import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import IterableDataset, load_dataset
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask

# Columns that hold the picture, by the names that webdataset tars, parquet files and image folders use.
IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "img")
# Formats that load_dataset streams, by file ending.
BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}
MAX_MASK_SHARE = 0.9  # of the image; SA-1B's larger masks are background


class SkippedSampleError(ValueError):
    """A sample that cannot be used; its message is the cause under which it is counted."""


def open_stream(name: str, split: str = "train", with_masks: bool = False) -> IterableDataset:
    r"""
    A sharded stream with undecoded images, in the columns `__key__` (if there is one), `image` and, with masks, `json`.

    name (`str`):
        "miniature"; a folder of `.tar` (webdataset, SA-1B's layout), `.parquet` or image files; a glob of such files,
        on this machine or on the Hub (`hf://datasets/owner/name/*.tar`); or the name of a data set on the Hub.
    with_masks (`bool`):
        Whether a `json` column with SA-1B's `annotations` is needed.

    Raises `FileNotFoundError` where there is nothing, `ValueError` where there is no picture or no annotation.
    """
    if name == "miniature":
        from ..miniature import streams as miniature

        stream = miniature.masks() if with_masks else miniature.images()
    else:
        stream = _load(name, split)
    columns = list(stream.features or next(iter(stream), {}))
    image_column = next((column for column in IMAGE_COLUMNS if column in columns), None)
    if image_column is None:
        raise ValueError(f"{name!r} has no column of pictures: found {columns}, looked for {list(IMAGE_COLUMNS)}.")
    if with_masks and "json" not in columns:
        raise ValueError(f"{name!r} has no column 'json' with SA-1B's annotations: found {columns}.")
    kept = {"__key__", image_column} | ({"json"} if with_masks else set())
    stream = stream.select_columns([column for column in columns if column in kept])
    stream = stream.cast_column(image_column, datasets.Image(decode=False))
    return stream if image_column == "image" else stream.rename_column(image_column, "image")


def _load(name: str, split: str) -> IterableDataset:
    if "://" in name:
        return load_dataset(BUILDERS.get(Path(name).suffix, "webdataset"), data_files=name, split="train", streaming=True)
    if os.path.isdir(name):
        for ending, builder in BUILDERS.items():
            if files := sorted(glob.glob(os.path.join(glob.escape(name), f"*{ending}"))):
                return load_dataset(builder, data_files=files, split="train", streaming=True)
        return load_dataset("imagefolder", data_dir=name, split=split, streaming=True, drop_labels=True)
    if files := sorted(glob.glob(name, recursive=True)):
        endings = {Path(file).suffix for file in files}
        if len(endings) > 1:
            raise ValueError(f"{name!r} matches files of several kinds, {sorted(endings)}: name one kind.")
        builder = BUILDERS.get(endings.pop(), "imagefolder")
        return load_dataset(builder, data_files=files, split="train", streaming=True)
    looks_like_hub_name = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and "*" not in name
    if not looks_like_hub_name:
        raise FileNotFoundError(
            f"No data at {name!r}: it is no folder and matches no file. Give a folder, a glob such as "
            "'photos/*.tar', 'hf://datasets/owner/name/*.tar', a data set's name on the Hub, or 'miniature'."
        )
    try:
        return load_dataset(name, split=split, streaming=True)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        raise FileNotFoundError(
            f"No data at {name!r}: it is no folder here, matches no file, and could not be opened as a data set on the "
            f"Hub ({type(error).__name__}: {error})."
        ) from error


def endless(streams: list[IterableDataset], seed: int, shuffle_buffer: int) -> Iterator[tuple[int, dict[str, Any]]]:
    r"""
    Samples of all streams, one after another in turn, each stream shuffled anew in every pass: `(epoch, sample)` pairs.
    A pass over a stream holds each of its samples once. Inside a worker of a torch data loader, that worker's share.

    seed (`int`), shuffle_buffer (`int`):
        Shards are permuted; samples are drawn from a buffer of that many.
    """
    shuffled = [stream.shuffle(seed=seed, buffer_size=shuffle_buffer) for stream in streams]

    def passes(stream: IterableDataset) -> Iterator[tuple[int, dict[str, Any]]]:
        epoch, empty = 0, False
        while not empty:
            stream.set_epoch(epoch)
            empty = True
            for sample in stream:
                empty = False
                yield epoch, sample
            epoch += 1

    turns = [passes(stream) for stream in shuffled]
    while turns:
        for turn in list(turns):
            item = next(turn, None)
            if item is None:  # a worker beyond this stream's shards
                turns.remove(turn)
            else:
                yield item


def decode_image(sample: dict[str, Any]) -> Image.Image:
    """The sample's picture in RGB. Raises `SkippedSampleError` where it cannot be read."""
    stored = sample["image"]
    try:
        source = io.BytesIO(stored["bytes"]) if stored.get("bytes") else stored["path"]
        image = Image.open(source)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError) as error:
        raise SkippedSampleError("broken image") from error
    except Image.DecompressionBombError as error:
        raise SkippedSampleError("image too large") from error
    return image.convert("RGB")


def draw_masks(sample: dict[str, Any], num_masks: int, rng: np.random.Generator) -> list[np.ndarray]:
    r"""
    `num_masks` of the sample's masks at random, each bool of shape `(height, width)`, without repetition where there
    are enough. Only those drawn are decoded; empty ones and those above 90 % of the image are left out.

    Raises `SkippedSampleError` where there is none, or a broken one.
    """
    try:
        annotations = [
            annotation
            for annotation in sample["json"]["annotations"]
            if 0 < annotation["area"] <= MAX_MASK_SHARE * float(np.prod(annotation["segmentation"]["size"]))
        ]
    except (KeyError, TypeError) as error:
        raise SkippedSampleError("no annotations") from error
    if not annotations:
        raise SkippedSampleError("no usable mask")
    chosen = rng.permutation(len(annotations))[:num_masks]
    if len(chosen) < num_masks:
        chosen = np.concatenate([chosen, rng.integers(len(annotations), size=num_masks - len(chosen))])
    decoded: dict[int, np.ndarray] = {}
    for index in set(chosen.tolist()):
        segmentation = annotations[index]["segmentation"]
        try:
            decoded[index] = coco_mask.decode(segmentation).astype(bool)
        except Exception as error:  # pycocotools raises whatever its C code meets
            raise SkippedSampleError("broken mask") from error
        if not decoded[index].any():
            raise SkippedSampleError("broken mask")
    return [decoded[index] for index in chosen.tolist()]


class SkipCounter(Counter):
    """Causes of skipped samples, and how many of each."""

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        counted = dict(self)
        self.clear()
        return counted
