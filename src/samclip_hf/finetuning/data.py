"""Labeled images as a task of the trainer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..datasets import (
    IGNORE_INDEX,
    DataError,
    DataSet,
    SegmentedImage,
    Stream,
    open_coco_segmentation,
    open_segmentation,
)
from ..datasets.layouts import HUB_PREFIX, Split
from ..distillation.crops import sample_rng
from ..image_processing_samclip import SamClipImageProcessor
from ..segmentation_samclip import MAX_LOSS_MASKS


def open_data(
    name: str, split: Split, images: str | None = None, background: Sequence[str] = ()
) -> DataSet[SegmentedImage]:
    """
    Opens labeled images.

    Args:
        name (`str`):
            A COCO file, which ends in `.json`, or one of the other names of [`open_segmentation`]. Datasets that are
            known by name are in the folder `data`.
        split (`"train"` or `"val"`):
            The split of a dataset that is known by name.
        images (`str`, *optional*), background (`Sequence[str]`):
            For COCO files, see [`open_coco_segmentation`].

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Images and labels do not match, or `images` or `background` is passed for label maps.
    """
    if name.endswith(".json") and not name.startswith(HUB_PREFIX):
        return open_coco_segmentation(name, images, background)
    for argument, value in (("images", images), ("background", background)):
        if value:
            raise ValueError(
                f"{argument} is for COCO files. {name} has label maps: their folder states where the images are, and "
                'classes.json, as {"names": ["background", ...], "background": ["a wall"]}, describes the background.'
            )
    return open_segmentation(name, "data", split)


def hold_out(data: DataSet[SegmentedImage], eval_fraction: float) -> tuple[DataSet[SegmentedImage], ...]:
    """Splits a dataset into one for training and one for evaluation, at random with a fixed seed. Raises `ValueError`
    if one of them is empty."""
    samples = list(data.samples)
    num_eval = round(eval_fraction * len(samples))
    if not 0 < num_eval < len(samples):
        raise ValueError(
            f"{data.name} has {len(samples)} images, of which eval_fraction {eval_fraction} holds out {num_eval}. "
            "Pass eval_data, or another eval_fraction."
        )
    held_out = set(np.random.default_rng(0).permutation(len(samples))[:num_eval].tolist())
    parts = [[sample for i, sample in enumerate(samples) if (i in held_out) == side] for side in (False, True)]
    descriptions = [f"all but {num_eval} of {len(samples)} images", f"{num_eval} of {len(samples)} images"]
    return tuple(
        replace(data, samples=part, description=data.description | {"only": only})
        for part, only in zip(parts, descriptions, strict=True)
    )


def check_labels(data: DataSet[SegmentedImage]) -> list[list[str]]:
    """
    Reads all images and label maps once, so that wrong ones are found before the training and not in the middle of it.

    Returns the classes without a labeled pixel, as in `data.names`, without background.

    Raises:
        OSError: A file cannot be read.
        ValueError: An image or a label map cannot be used, or no pixel has a class.
    """
    assert data.names is not None
    found: set[int] = set()
    for sample in data.samples:
        sample.image()
        found.update(np.unique(sample.label_map()).tolist())
    first = int(data.background is not None)
    missing = [names for label, names in enumerate(data.names) if label >= first and label not in found]
    if len(missing) == len(data.names) - first:
        advice = " Pass eval_data, or another eval_fraction." if "only" in data.description else ""
        raise ValueError(f"{data.name} has no pixel of a class: {data.description.get('only', 'all images')}.{advice}")
    return missing


class _SampleShards:
    """The samples of a dataset as one shard, see [`Shards`]."""

    is_remote = False

    def __init__(self, data: DataSet[SegmentedImage]):
        self.samples = list(data.samples)
        self.names = [f"{data.name}, {len(self.samples)} images"]

    def rows(self, shard: int, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, sample in enumerate(self.samples[start:], start):
            yield row, {"key": sample.key, "image": None, "sample": sample}


class _LabelledStream(Stream):
    """A stream of labeled images whose complement is another dataset."""

    def __init__(self, data: DataSet[SegmentedImage], eval_data: DataSet[SegmentedImage]):
        super().__init__(_SampleShards(data))
        self.data, self.eval_data = data, eval_data

    def complement(self) -> Stream:
        return _LabelledStream(self.eval_data, self.data)


def map_content_size(
    content_size: Sequence[int], map_size: Sequence[int], image_size: Sequence[int]
) -> tuple[int, int]:
    """Returns height and width, without padding, of a padded map of an image whose content and padded sizes are
    `content_size` and `image_size` (height, width)."""
    height, width = (
        max(1, round(side * size / full)) for side, size, full in zip(content_size, map_size, image_size, strict=True)
    )
    return height, width


@dataclass
class LabelMapBatches:
    """
    Batches of images with label maps, as the image processor prepares them, but before normalization.

    Args:
        data, eval_data (`DataSet`):
            Images for training and for evaluation, with the same classes.
        image_processor ([`SamClipImageProcessor`]):
            The model's.
        batch_size (`int`):
            Images for each process and micro-batch.
        with_objects (`bool`):
            Whether to return the masks of objects, which all samples must have.

    `streams`, `weights` and `shuffle_buffer` are those of [`TaskBatches`].
    """

    data: DataSet[SegmentedImage]
    eval_data: DataSet[SegmentedImage]
    image_processor: SamClipImageProcessor
    batch_size: int
    with_objects: bool = False
    streams: list[Stream] = field(default_factory=list)
    weights: list[float] = field(default_factory=lambda: [1.0])
    shuffle_buffer: int = 0

    def __post_init__(self) -> None:
        if not self.streams:
            stream = _LabelledStream(self.data, self.eval_data)
            self.streams, self.shuffle_buffer = [stream], len(stream.shards.samples)  # type: ignore[attr-defined]

    def step_settings(self, rng: np.random.Generator) -> dict[str, Any]:
        """Returns the number of images of a step."""
        return {"num_samples": self.batch_size}

    def sample(self, raw: dict[str, Any], seed: int, epoch: int) -> dict[str, np.ndarray]:
        """Returns `images`, the padded image, uint8 `(image_size, image_size, 3)`; `content_sizes` `(2,)`, its height
        and width without padding; and `label_maps` `(map_size, map_size)`. With objects, also `object_masks`, bool
        `(MAX_LOSS_MASKS, map_size, map_size)`, and `object_labels` `(MAX_LOSS_MASKS,)`: a random choice of the
        objects. Where there are fewer, masks are empty and labels are `IGNORE_INDEX`. Raises [`DataError`] if the
        image or its labels cannot be read: labeled images are few, so none is skipped."""
        try:
            image = raw["sample"].image()
            objects = raw["sample"].objects() if self.with_objects else []
            label_map = raw["sample"].label_map(objects) if self.with_objects else raw["sample"].label_map()
            inputs = self.image_processor(
                image, segmentation_maps=label_map, do_rescale=False, do_normalize=False, return_tensors="np"
            )
        except (OSError, ValueError) as error:
            raise DataError(f"{raw['key']} cannot be used: {error}") from error
        sample = {
            "images": np.rint(inputs["pixel_values"][0]).clip(0, 255).astype(np.uint8).transpose(1, 2, 0),
            "content_sizes": np.asarray(inputs["reshaped_input_sizes"][0], dtype=np.int64),
            "label_maps": np.asarray(inputs["labels"][0], dtype=np.int64),
        }
        if self.with_objects:
            map_size, image_size = sample["label_maps"].shape, sample["images"].shape[:2]
            height, width = map_content_size(sample["content_sizes"].tolist(), map_size, image_size)
            masks = np.zeros((MAX_LOSS_MASKS, *map_size), dtype=bool)
            labels = np.full(MAX_LOSS_MASKS, IGNORE_INDEX, dtype=np.int64)
            objects = [(mask, label) for mask, label in objects if label != IGNORE_INDEX and mask.area]
            order = sample_rng(seed, epoch, raw["key"]).permutation(len(objects))
            for number, index in enumerate(order[:MAX_LOSS_MASKS]):
                mask, labels[number] = objects[index]
                coverage = mask.coverage(width, height)
                masks[number, :height, :width] = coverage >= min(0.5, coverage.max())  # small ones keep a cell
            sample |= {"object_masks": masks, "object_labels": labels}
        return sample

    def placeholder(self) -> dict[str, np.ndarray]:
        """Not used: no sample is skipped."""
        raise AssertionError("a batch without labeled images")
