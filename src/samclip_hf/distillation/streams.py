"""
Images and SA-1B-style masks as endless streams, from the miniature world, folders, globs, the Hub.

Nothing is loaded whole and nothing is decoded before its turn.
"""

import glob
import io
import json
import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import IterableDataset, load_dataset
from datasets.builder import Key
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Columns that hold the picture, by the names that webdataset tars, parquet files and image folders use.
IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "img")
# Formats that are streamed, by file ending.
BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}
PICTURES = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
MAX_MASK_SHARE = 0.9  # of the image; SA-1B's larger masks are background
WHAT_A_NAME_IS = (
    "Give a folder, a glob such as 'photos/*.tar', 'hf://datasets/owner/name/*.tar', a data set's name on the Hub, or "
    "'miniature'."
)


class SkippedSampleError(ValueError):
    """A sample that cannot be used; its message is the cause under which it is counted."""


class Tars(WebDataset):
    """`datasets`' webdataset reader, to which one bad file among many is no reason to stop: what cannot be read of a
    tar comes as a sample without a picture, and json stays text until its turn.

    A tar that was cut off between two of its files looks whole, to Python's `tarfile` too.
    """

    DECODERS = {ending: decode for ending, decode in WebDataset.DECODERS.items() if ending != "json"}

    def _generate_examples(self, tar_paths, tar_iterators):
        for number, (path, iterator) in enumerate(zip(tar_paths, tar_iterators, strict=True)):
            num_samples = 0
            try:
                for _, example in super()._generate_examples([path], [iterator]):
                    yield Key(number, num_samples), example
                    num_samples += 1
            except Exception as error:  # tarfile, gzip, the file system and the HTTP client have each their own
                logger.warning(f"{path} could not be read beyond {num_samples} samples: {error!r}")
                nothing = dict.fromkeys(self.info.features)
                yield Key(number, num_samples), nothing | {"__key__": f"{path}: {type(error).__name__}"}


def open_stream(name: str, split: str = "train", with_masks: bool = False) -> IterableDataset:
    r"""
    A sharded stream of undecoded pictures: columns `__key__` (if there is one), `image` and, with masks, `json`.

    name (`str`):
        "miniature"; a folder of `.tar` (webdataset, SA-1B's layout), `.parquet` or image files; a glob of such files,
        on this machine or on the Hub (`hf://datasets/owner/name/*.tar`); or the name of a data set on the Hub.
    split (`str`):
        Of a data set on the Hub.
    with_masks (`bool`):
        Whether a `json` column with SA-1B's `annotations` is needed.

    Raises `FileNotFoundError` where there is nothing, `ValueError` where it cannot be read, where there is no picture
    or no annotation.
    """
    try:
        stream = _undecoded(name, split, with_masks)
        first = next(iter(stream), None)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{name!r} could not be read: {error!r}. {WHAT_A_NAME_IS}") from error
    if first is None:
        raise FileNotFoundError(f"There is no sample in {name!r}. {WHAT_A_NAME_IS}")
    return stream


def _undecoded(name: str, split: str, with_masks: bool) -> IterableDataset:
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
    if os.path.isdir(name):
        for ending, builder in BUILDERS.items():
            if files := sorted(glob.glob(os.path.join(glob.escape(name), f"*{ending}"))):
                return _read(builder, files)
        return load_dataset("imagefolder", data_dir=name, split="train", streaming=True, drop_labels=True)
    if files := sorted(glob.glob(name, recursive=True)):
        endings = {Path(file).suffix for file in files}
        if len(endings) > 1:
            raise ValueError(f"{name!r} matches files of several kinds, {sorted(endings)}: name one kind.")
        ending = endings.pop()
        if ending not in BUILDERS and ending.lower() not in PICTURES:
            raise ValueError(f"{name!r} matches files of a kind that is not read, {ending!r}. {WHAT_A_NAME_IS}")
        return _read(BUILDERS.get(ending, "imagefolder"), files)

    ending = Path(name).suffix
    is_remote_file = "://" in name and ending in BUILDERS
    is_hub_name = ending not in BUILDERS and re.fullmatch(r"(hf://datasets/)?[\w.-]+(/[\w.-]+)?", name)
    if not is_remote_file and not is_hub_name:
        raise FileNotFoundError(f"No data at {name!r}: it is no folder and matches no file. {WHAT_A_NAME_IS}")
    try:
        if is_remote_file:
            return _read(BUILDERS[ending], name)
        return load_dataset(name.removeprefix("hf://datasets/"), split=split, streaming=True)
    except Exception as error:  # not found, no permission, no such split, or what the HTTP client says without network
        raise FileNotFoundError(
            f"No data at {name!r}: it is no folder, matches no file, and could not be opened on the Hub "
            f"({type(error).__name__}: {error}). {WHAT_A_NAME_IS}"
        ) from error


def _read(builder: str, files: str | list[str]) -> IterableDataset:
    if builder == "webdataset":
        return Tars(data_files=files).as_streaming_dataset(split="train")
    return load_dataset(builder, data_files=files, split="train", streaming=True)


def endless(stream: IterableDataset, seed: int, shuffle_buffer: int) -> Iterator[tuple[int, dict[str, Any]]]:
    r"""
    Pass after pass over a stream, each holding every sample once in an order of its own that follows from (seed,
    epoch): `(epoch, sample)` pairs. Inside a worker of a torch data loader, that worker's shards only.

    This is `stream.repeat(None).shuffle(seed)`, but the sample's epoch is known, and no pass leaks into the next.

    seed (`int`), shuffle_buffer (`int`):
        Shards are permuted, and samples drawn from a buffer of that many.
    """
    for epoch in count():
        # Not stream.set_epoch: data loader workers share that number, and are not in the same pass at the same time.
        order = np.random.default_rng((seed, epoch))
        sample = None
        for sample in stream.shuffle(generator=order, buffer_size=shuffle_buffer):
            yield epoch, sample
        if sample is None:
            raise ValueError("A stream holds no samples.")


def decode_image(sample: dict[str, Any]) -> Image.Image:
    """The sample's picture in RGB. Raises `SkippedSampleError` where there is none or it cannot be read."""
    stored = sample["image"]
    if stored is None:
        raise SkippedSampleError("no image")
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
        stored = sample["json"]
        if isinstance(stored, bytes | str):
            stored = json.loads(stored)
        annotations = [
            annotation
            for annotation in stored["annotations"]
            if 0 < annotation["area"] <= MAX_MASK_SHARE * float(np.prod(annotation["segmentation"]["size"]))
        ]
    except json.JSONDecodeError as error:
        raise SkippedSampleError("broken json") from error
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
