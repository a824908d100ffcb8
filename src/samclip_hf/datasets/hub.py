"""Evaluation sets on the Hub, or in folders of the Hub's formats, streamed."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import fsspec
from datasets import Image as ImageFeature
from datasets import IterableDataset, load_dataset
from PIL import Image

from .layouts import HUB_PREFIX
from .samples import Sample, read_image


class HubSplit(NamedTuple):
    """
    A split of a dataset on the Hub.

    name (`str`):
        The name that it was opened with.
    path (`str`):
        The name without prefix and options.
    rows (`IterableDataset`):
        The rows of the split, with undecoded images.
    image_columns (`list[str]`):
        The columns with images.
    options (`dict[str, str]`):
        The options in the name: `config`, `split` and `classes`.
    description (`dict`):
        Description of the data for the results.
    """

    name: str
    path: str
    rows: IterableDataset
    image_columns: list[str]
    options: dict[str, str]
    description: dict[str, Any]

    def single_image_column(self) -> str:
        """Returns the only column with images. Raises `ValueError` if there are none or several."""
        if len(self.image_columns) != 1:
            raise ValueError(f"{self.name} must have one image column; it has {self.image_columns or 'none'}.")
        return self.image_columns[0]


class HubSamples:
    """The samples of a split: `build(key, row)` for each row. Each iteration streams the rows again."""

    def __init__(self, split: HubSplit, build: Callable[[str, dict[str, Any]], Sample]):
        self.rows, self.path, self.build = split.rows, split.path, build

    def __iter__(self) -> Iterator[Sample]:
        for number, row in enumerate(self.rows):
            yield self.build(f"{self.path} {number}", row)


def open_hub(name: str) -> HubSplit:
    """
    Opens a split of a dataset on the Hub.

    Args:
        name (`str`):
            "hf://owner/name", or "hf://" and a folder, with options after a question mark: `config`; `split`, required
            if there are several; and `classes`, a json file of class names, required for segmentation.

    Raises:
        ValueError: There is no such dataset or split, or an option is unknown.
    """
    path, _, query = name.removeprefix(HUB_PREFIX).partition("?")
    options = dict(parse_qsl(query))
    if unknown := sorted(options.keys() - {"config", "split", "classes"}):
        raise ValueError(f"{name} has unknown options: {', '.join(unknown)}. Known: config, split, classes.")
    try:
        splits = load_dataset(path, options.get("config"), streaming=True)
    except Exception as error:  # `datasets` raises many kinds of errors
        raise ValueError(f"{name} could not be opened: {error}") from error
    split = options.get("split") or (next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        raise ValueError(f"{name}: choose a split with ?split=. Available: {', '.join(splits)}.")
    rows = splits[split]
    if rows.features is None:
        raise ValueError(f"{name} does not declare the types of its columns.")
    image_columns = [column for column, feature in rows.features.items() if isinstance(feature, ImageFeature)]
    for column in image_columns:
        rows = rows.cast_column(column, ImageFeature(decode=False))
    description = {"path": f"{path}, {options.get('config', 'default')}", "split": split}
    return HubSplit(name, path, rows, image_columns, options, description)


def image_source(cell: dict[str, Any] | None, key: str, kind: str = "image") -> bytes | str:
    """Returns an undecoded image's content, or its path. Files on the Hub and in archives are read. Raises
    `ValueError` for an empty cell."""
    if cell is None:
        raise ValueError(f"{key} has no {kind}.")
    if cell["bytes"] is not None:
        return cell["bytes"]
    if "://" in cell["path"]:
        with fsspec.open(cell["path"], "rb") as file:
            return file.read()
    return cell["path"]


def read_hub_image(
    cell: dict[str, Any] | None, key: str, annotated_size: Callable[[], tuple[int, int]] | None = None
) -> Image.Image:
    """Reads an undecoded image, see [`read_image`]."""
    return read_image(image_source(cell, key), key, annotated_size)
