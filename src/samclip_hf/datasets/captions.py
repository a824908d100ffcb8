"""Evaluation sets for retrieval."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import List, Value
from PIL import Image

from .hub import HubSamples, open_hub, read_hub_image
from .layouts import HUB_PREFIX, LAYOUTS, find_tars, get, raise_missing, read_json, require
from .samples import CaptionedImage, DataSet, read_image
from .tar import index_samples

CAPTION_TARS = "webdataset tars with jpg and txt (one caption per line)"
CAPTION_COLUMNS = ("caption", "captions", "sentences", "text", "alt_text")


def open_captions(name: str, root: str | Path) -> DataSet[CaptionedImage]:
    """
    Opens images with captions.

    Args:
        name (`str`):
            - "flickr30k" or "coco-captions", below `root`: the test images of Karpathy's splits with all captions;
            - "hf://owner/name", with one column of images and one of captions;
            - a folder or a glob of webdataset tars with jpg and txt files, one caption per line.
        root (`str` or `Path`):
            The folder that contains the named datasets and that relative paths refer to.

    Raises:
        FileNotFoundError: A file is missing. The message states the expected layout.
        ValueError: An image has no caption.
    """
    if name.startswith(HUB_PREFIX):
        return _open_hub(name)
    if name in ("flickr30k", "coco-captions"):
        return _open_karpathy_split(name, root)
    tars = find_tars(name, root)
    if not tars:
        raise_missing(name, f"{CAPTION_TARS}; {HUB_PREFIX}owner/name; or one of flickr30k, coco-captions")
    samples = [
        _build_sample(sample.key, sample.image_reader(), sample.read("txt").decode().splitlines(), sample.path)
        for sample in index_samples(tars)
    ]
    return DataSet(name, samples, description={"path": name, "images": len(samples)})


def _open_karpathy_split(name: str, root: str | Path) -> DataSet[CaptionedImage]:
    is_flickr = name == "flickr30k"
    folder = Path(root, "flickr30k" if is_flickr else "coco")
    file = require(folder / ("dataset_flickr30k.json" if is_flickr else "dataset_coco.json"), LAYOUTS[name])
    samples = []
    for entry in get(read_json(file), "images", file):
        if get(entry, "split", file) == "test":
            subfolder = "flickr30k-images" if is_flickr else get(entry, "filepath", file)
            path = require(folder / subfolder / get(entry, "filename", file), LAYOUTS[name])
            captions = [get(sentence, "raw", file) for sentence in get(entry, "sentences", file)]
            samples.append(_build_sample(path.name, partial(read_image, path), captions, file))
    if not samples:
        raise ValueError(f"{file} has no images of the split test.")
    samples.sort(key=lambda sample: sample.key)
    description = {"path": str(file), "split": "Karpathy's test", "images": len(samples)}
    return DataSet(name, samples, description=description)


def _build_sample(
    key: str, image: Callable[[], Image.Image], captions: Iterable[str], source: str | Path
) -> CaptionedImage:
    stripped = tuple(filter(None, map(str.strip, captions)))
    if not stripped:
        raise ValueError(f"{source}: {key!r} has no caption.")
    return CaptionedImage(key, image, stripped)


def _open_hub(name: str) -> DataSet[CaptionedImage]:
    split = open_hub(name)
    image_column = split.single_image_column()
    columns = [column for column, feature in split.rows.features.items() if _is_text(feature)]
    columns = [column for column in columns if column in CAPTION_COLUMNS] or columns
    if len(columns) != 1:
        raise ValueError(f"{name} must have one column of captions, such as caption; it has {columns or 'none'}.")
    samples: Any = HubSamples(split, partial(_build_hub_sample, image_column, columns[0]))
    return DataSet(name, samples, description=split.description)


def _is_text(feature: Any) -> bool:
    """Whether a column contains a text or a list of texts."""
    inner = feature.feature if isinstance(feature, List) else feature
    return isinstance(inner, Value) and inner.dtype in ("string", "large_string")


def _build_hub_sample(image_column: str, caption_column: str, key: str, row: dict[str, Any]) -> CaptionedImage:
    captions = [row[caption_column]] if isinstance(row[caption_column], str) else row[caption_column] or []
    return _build_sample(key, partial(read_hub_image, row[image_column], key), captions, key)
