"""
Micro-batches from samples: crops, prompts, batches.

The samples of an optimizer step depend on the seed alone, not on the number of processes and data loader workers (see
`sampling.py`). The random decisions about a sample depend on (seed, epoch, key of the sample), those about a step on
(seed, step).
"""

import atexit
import math
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from transformers.utils import logging

from ..datasets.samples import LazyImage
from ..datasets.shards import REMEDIES
from ..datasets.streams import UNREADABLE_SHARD, DataError, SampleImage, SkippedSampleError, Stream, draw_masks
from ..images import RunLengthMask
from ..segmentation_samclip import POINTS_PER_CLASS
from .crops import STUDENT_FILTER, cut, draw_crop, sample_rng
from .embedding_cache import CacheDescription, RegionCacheDescription, no_collation
from .prompts import box_from_mask, class_probabilities, point_from_mask
from .sampling import Mixture, Position, count_readers

logger = logging.get_logger(__name__)

SKIPPED_ANNOTATIONS = "skipped_annotations"  # in the result of `TaskBatches.sample`


class TaskBatches(Protocol):
    """
    Interface of the batches of a task. [`ClipBatches`] and [`SamBatches`] implement it. The trainer has a loss for
    each task. An implementation must be a dataclass, because the evaluation replaces its `streams` and
    `shuffle_buffer`.
    """

    streams: list[Stream]
    weights: list[float]
    shuffle_buffer: int

    def step_settings(self, rng: np.random.Generator) -> dict[str, Any]:
        """Draws the settings of an optimizer step: `num_samples`, the number of samples for each process, and the
        settings that all samples of the step have in common, which are passed to `sample` and `placeholder`."""

    def sample(self, raw: dict[str, Any], seed: int, epoch: int, *args: Any, **settings: Any) -> dict[str, Any]:
        """Returns the arrays of a sample of the stream by name. One of them is `images`. Arrays whose names end in
        `images` have the channels last. Raises [`SkippedSampleError`] if the sample cannot be used."""

    def placeholder(self, *args: Any, **settings: Any) -> dict[str, np.ndarray]:
        """Returns arrays with the same names and shapes for a batch without usable samples. Their loss is multiplied
        by zero."""


@dataclass
class ClipBatches:
    r"""
    Batches for the CLIP loss: a random crop of each image, at the student's and at the teacher's resolution.

    Args:
        streams (`list[Stream]`), weights (`list[float]`):
            Streams of [`open_stream`] and their weights in the mixture.
        image_sizes (`list[int]`):
            Resolutions of the student in pixels. One is drawn for each optimizer step.
        teacher_image_size (`int`):
            Resolution of the teacher in pixels.
        batch_size (`int`):
            Number of images for each process and micro-batch at the smallest of `image_sizes`, see [`num_images`].
        shuffle_buffer (`int`):
            Number of samples of a stream that are shuffled together, see [`Mixture`].
        min_crop_scale (`float`):
            Smallest area of a crop, relative to the image.
        teacher_filter (`PIL.Image.Resampling`):
            Resampling filter for the teacher's images. By default CLIP's.
        cache (`CacheDescription`, *optional*):
            Description of the embedding cache. The samples of the streams then contain the teacher's embeddings, which
            replace the images for the teacher.
    """

    streams: list[Stream]
    weights: list[float]
    image_sizes: list[int]
    teacher_image_size: int
    batch_size: int
    shuffle_buffer: int
    min_crop_scale: float
    teacher_filter: Image.Resampling = Image.Resampling.BICUBIC
    cache: CacheDescription | None = None

    def step_settings(self, rng: np.random.Generator) -> dict[str, Any]:
        """Draws the resolution of a step, which determines the number of images."""
        image_size = int(rng.choice(self.image_sizes))
        return {"num_samples": num_images(self.batch_size, self.image_sizes, image_size), "image_size": image_size}

    def sample(self, raw: dict[str, Any], seed: int, epoch: int, image_size: int) -> dict[str, np.ndarray]:
        """Returns a crop as `images` and `teacher_images`, uint8 arrays of shape `(size, size, 3)`. With an embedding
        cache, `teacher_embeds` `(projection_dim,)` replaces `teacher_images`."""
        image = SampleImage(raw)
        if self.cache is not None:
            seed, epoch = self.cache.seed, epoch % self.cache.num_crops
        crop = draw_crop(image, self.min_crop_scale, sample_rng(seed, epoch, raw["key"]))
        sample = {"images": cut(image, crop, image_size, STUDENT_FILTER)}
        if self.cache is None:
            return sample | {"teacher_images": cut(image, crop, self.teacher_image_size, self.teacher_filter)}
        teacher_embeds = raw["embeds"][epoch].astype(np.float32)
        if np.isnan(teacher_embeds).any():
            raise SkippedSampleError("no cached embedding")
        return sample | {"teacher_embeds": teacher_embeds}

    def placeholder(self, image_size: int) -> dict[str, np.ndarray]:
        """Returns a black image and the teacher's input or embedding for it."""
        sample = {"images": np.zeros((image_size, image_size, 3), dtype=np.uint8)}
        if self.cache is None:
            size = self.teacher_image_size
            return sample | {"teacher_images": np.zeros((size, size, 3), dtype=np.uint8)}
        return sample | {"teacher_embeds": np.ones(self.cache.projection_dim, dtype=np.float32)}


def num_images(batch_size: int, image_sizes: list[int], image_size: int) -> int:
    """Returns the number of images of `image_size` that have about as many pixels as `batch_size` images of the
    smallest size (CVNets' variable batch sampler; paper, section 4). It is rounded down, for each process."""
    return max(1, int(batch_size * (min(image_sizes) / image_size) ** 2))


@dataclass
class SamBatches:
    r"""
    Batches for the SAM loss: images whose longest edge is resized to the model's resolution, padded as SAM's image
    processor does, and prompts from randomly drawn masks.

    The prompts of a step are either all points or all boxes, with equal probability. SAM draws the type for each mask;
    the paper does not state it. SAM predicts three masks for a point and one for a box. With `mask_prompt_fraction`,
    the prompts of some steps are all masks with three points, as in the paper's composition (section 5).

    Args:
        streams (`list[Stream]`), weights (`list[float]`):
            Streams of [`open_stream`] with masks, and their weights in the mixture.
        image_size (`int`):
            Resolution of the teacher in pixels.
        student_image_sizes (`list[int]`):
            Resolutions of the student in pixels. One is drawn for each optimizer step.
        batch_size (`int`):
            Number of images for each process and micro-batch.
        masks_per_image (`int`):
            Number of prompts for each image. If an image has fewer masks, they are repeated.
        max_box_noise (`float`):
            Largest noise of a box in pixels of the model's input.
        shuffle_buffer (`int`):
            Number of samples of a stream that are shuffled together, see [`Mixture`].
        regions_per_image (`int`):
            Number of the masks that are also regions for the region loss. 0 without that loss.
        mask_size (`int`):
            Side of the regions' masks in pixels, for the padded image: four times the teacher's patch grid.
        region_cache (`RegionCacheDescription`, *optional*):
            Description of the cache of regions. The samples of the streams then contain the teacher's embeddings.
        mask_prompt_fraction (`float`):
            Fraction of the steps with mask prompts.
    """

    streams: list[Stream]
    weights: list[float]
    image_size: int
    student_image_sizes: list[int]
    batch_size: int
    masks_per_image: int
    max_box_noise: float
    shuffle_buffer: int
    regions_per_image: int = 0
    mask_size: int = 0
    region_cache: RegionCacheDescription | None = None
    mask_prompt_fraction: float = 0.0

    def step_settings(self, rng: np.random.Generator) -> dict[str, Any]:
        """Draws the type of the prompts ("point", "box" or "mask") and the resolution of the student for a step."""
        prompt = "point" if rng.random() < 0.5 else "box"
        student_image_size = int(rng.choice(self.student_image_sizes))
        if self.mask_prompt_fraction and rng.random() < self.mask_prompt_fraction:
            prompt = "mask"
        return {"num_samples": self.batch_size, "prompt": prompt, "student_image_size": student_image_size}

    def sample(
        self, raw: dict[str, Any], seed: int, epoch: int, prompt: str, student_image_size: int
    ) -> dict[str, Any]:
        """
        Returns the arrays of an image with its prompts, and the number of skipped annotations by cause.

        `images` is the padded image, uint8 `(image_size, image_size, 3)`; `content_sizes` `(2,)` are height and width
        without the padding. `input_points` `(masks_per_image, num_points, 2)` with `input_labels`, or `input_boxes`
        `(masks_per_image, 4)`, are in pixels of the padded image. With mask prompts, `class_probabilities`
        `(masks_per_image, grid_height, grid_width)` are those of [`class_probabilities`] at the teacher's patches, and
        there are three points instead of one. `student_images` is the padded image at the student's resolution, if
        that is not `image_size`. `region_masks` `(regions_per_image, mask_size, mask_size)` are the regions' masks on
        the padded image, uint8 from 0 to 255; of a mask that is drawn several times, all but the first are empty. With
        a cache of regions, `teacher_regions` `(regions_per_image, projection_dim)` are the teacher's embeddings, and
        masks are drawn as for the cache.
        """
        image = SampleImage(raw)
        rng = mask_rng = sample_rng(seed, epoch, raw["key"])
        if self.region_cache is not None:
            epoch %= self.region_cache.num_crops
            mask_rng = sample_rng(self.region_cache.seed, epoch, raw["key"])
        masks, skipped = draw_masks(raw, self.masks_per_image, mask_rng, (image.height, image.width))
        sample = self._with_prompts(image, masks, rng, prompt, student_image_size)
        if self.region_cache is not None:
            sample["teacher_regions"] = raw["embeds"][epoch].astype(np.float32)
            is_stored = ~np.isnan(sample["teacher_regions"]).any(axis=1)
            if (sample["region_masks"].any(axis=(1, 2)) & ~is_stored).any():
                raise SkippedSampleError("no cached embedding")
            sample["teacher_regions"][~is_stored] = 0
        return sample | {SKIPPED_ANNOTATIONS: skipped}

    def regions(self, raw: dict[str, Any], seed: int, epoch: int) -> tuple[dict[str, np.ndarray], Counter[str]]:
        """Returns `images`, `content_sizes` and `region_masks` of a sample, see `sample`, and the number of skipped
        annotations by cause."""
        image = SampleImage(raw)
        rng = sample_rng(seed, epoch, raw["key"])
        masks, skipped = draw_masks(raw, self.regions_per_image, rng, (image.height, image.width))
        padded, (height, width) = _pad(image, self.image_size)
        sizes = np.array([height, width])
        masks_of_regions = self._region_masks(masks, height, width)
        return {"images": padded, "content_sizes": sizes, "region_masks": masks_of_regions}, skipped

    def placeholder(self, prompt: str, student_image_size: int) -> dict[str, np.ndarray]:
        """Returns a black image with masks of the whole image."""
        masks = [RunLengthMask((8, 8), [0, 64])] * self.masks_per_image
        rng = np.random.default_rng(0)
        sample = self._with_prompts(Image.new("RGB", (8, 8)), masks, rng, prompt, student_image_size)
        if self.region_cache is not None:
            shape = (self.regions_per_image, self.region_cache.projection_dim)
            sample["teacher_regions"] = np.ones(shape, dtype=np.float32)
        return sample

    def _with_prompts(
        self,
        image: Image.Image | LazyImage,
        masks: list[RunLengthMask],
        rng: np.random.Generator,
        prompt: str,
        student_image_size: int,
    ) -> dict[str, np.ndarray]:
        scale = self.image_size / max(image.size)
        padded, (height, width) = _pad(image, self.image_size)
        sample = {"images": padded, "content_sizes": np.array([height, width])}
        if student_image_size != self.image_size:
            sample["student_images"], _ = _pad(image, student_image_size)

        to_input = np.array([width / image.width, height / image.height], dtype=np.float32)
        if prompt == "box":
            boxes = [box_from_mask(mask, rng, self.max_box_noise / scale) for mask in masks]
            sample["input_boxes"] = np.stack(boxes) * np.tile(to_input, 2)
        else:
            num_points = POINTS_PER_CLASS if prompt == "mask" else 1
            points = [[point_from_mask(mask, rng) * to_input for _ in range(num_points)] for mask in masks]
            sample["input_points"] = np.array(points, dtype=np.float32)
            sample["input_labels"] = np.ones((len(masks), num_points), dtype=np.int64)
        if prompt == "mask":
            cells = self._on_padded_image(masks, height, width).astype(np.float32) / 255
            side = self.mask_size // 4  # patches
            coverage = cells.reshape(-1, side, 4, side, 4).mean(axis=(2, 4))
            sample["class_probabilities"] = np.stack([class_probabilities(mask, rng) for mask in coverage])
        if self.regions_per_image:
            sample["region_masks"] = self._region_masks(masks, height, width)
        return sample

    def _region_masks(self, masks: list[RunLengthMask], height: int, width: int) -> np.ndarray:
        """The masks of `_on_padded_image` for the regions. Of a mask that is drawn several times, all but the first
        are empty."""
        region_masks = self._on_padded_image(masks[: self.regions_per_image], height, width)
        for number, mask in enumerate(masks[: self.regions_per_image]):
            if any(mask is earlier for earlier in masks[:number]):
                region_masks[number] = 0
        return region_masks

    def _on_padded_image(self, masks: list[RunLengthMask], height: int, width: int) -> np.ndarray:
        """Masks of the image -> masks of the padded image, whose content has this height and width: uint8 from 0 to
        255, `(num_masks, mask_size, mask_size)`."""
        scale = self.mask_size / self.image_size
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        padded = np.zeros((len(masks), self.mask_size, self.mask_size), dtype=np.uint8)
        for number, mask in enumerate(masks):
            padded[number, :height, :width] = np.rint(255 * mask.coverage(width, height))
        return padded


def _pad(image: Image.Image | LazyImage, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Resizes the longest edge to `size` and pads with black, as SAM's image processor does. Returns the padded image
    and the height and width of its content."""
    width, height = (max(1, int(side * size / max(image.size) + 0.5)) for side in image.size)
    padded = np.zeros((size, size, 3), dtype=np.uint8)
    padded[:height, :width] = np.asarray(image.resize((width, height), STUDENT_FILTER))
    return padded, (height, width)


class StepStream(torch.utils.data.IterableDataset):
    r"""
    An endless stream of micro-batches in parts: every data loader worker yields its part of each micro-batch, and
    [`StepLoader`] joins the parts.

    Args:
        tasks (`dict[str, TaskBatches]`):
            The tasks of a step by name.
        seed (`int`), num_readers (`int`):
            See [`Mixture`].
        gradient_accumulation_steps (`int`):
            Number of micro-batches of an optimizer step. They have the same settings.
        rank, world_size (`int`):
            Index of this process and number of processes.
    """

    def __init__(
        self,
        tasks: dict[str, Any],
        seed: int,
        num_readers: int = 16,
        gradient_accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.tasks: dict[str, TaskBatches] = tasks
        self.seed, self.num_readers = seed, num_readers
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        self._logged_causes: set[str] = set()  # why samples were skipped, in this worker
        # Where iteration starts: the number of earlier micro-batches, the number of samples that they contain by task,
        # in all processes, and the positions of the readers by task.
        self.start: dict[str, Any] = {
            "micro_batches": 0,
            "drawn": dict.fromkeys(tasks, 0),
            "readers": {name: {} for name in tasks},
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # Consecutive samples are assigned to the processes in turn, and those of a process to its workers in turn.
        consumer, num_consumers = self.rank + self.world_size * worker, self.world_size * num_workers
        mixtures = {
            name: Mixture(
                task.streams,
                task.weights,
                self.seed,
                self.num_readers,
                task.shuffle_buffer,
                self.start["readers"][name],
            )
            for name, task in self.tasks.items()
        }
        drawn = dict(self.start["drawn"])
        for micro_batch in count(self.start["micro_batches"]):
            step = micro_batch // self.gradient_accumulation_steps
            skipped: Counter[str] = Counter()
            part: dict[str, Any] = {"tasks": {}, "readers": {}}
            for index, (name, task) in enumerate(self.tasks.items()):
                settings = task.step_settings(np.random.default_rng((self.seed, step, index)))
                num_samples = settings.pop("num_samples") * self.world_size
                first = drawn[name] + (consumer - drawn[name]) % num_consumers
                numbers = range(first, drawn[name] + num_samples, num_consumers)
                samples = {number: self._sample(task, mixtures[name], number, skipped, settings) for number in numbers}
                drawn[name] += num_samples
                part["tasks"][name] = {
                    "samples": _stack({number: sample for number, sample in samples.items() if sample is not None}),
                    "settings": settings,
                    "planned": len(numbers),
                }
                part["readers"][name] = mixtures[name].positions
            yield part | {"micro_batches": micro_batch + 1, "drawn": dict(drawn), "skipped": dict(skipped)}

    def _sample(
        self, task: TaskBatches, mixture: Mixture, number: int, skipped: Counter[str], settings: dict[str, Any]
    ) -> dict[str, np.ndarray] | None:
        epoch, raw = mixture.sample(number)
        try:
            sample: dict[str, Any] = task.sample(raw, self.seed, epoch, **settings)
        except SkippedSampleError as error:
            self._log_first(str(error), f"Skipped {raw['key']!r}")
            skipped[str(error)] += 1
            return None
        for cause, count_of_cause in sample.pop(SKIPPED_ANNOTATIONS, {}).items():
            self._log_first(cause, f"Skipped an annotation of {raw['key']!r}")
            skipped[cause] += count_of_cause
        return sample

    def _log_first(self, cause: str, message: str) -> None:
        """Logs the first sample or annotation in this worker that is skipped for a cause."""
        if cause not in self._logged_causes:
            self._logged_causes.add(cause)
            remedy = f" {REMEDIES[cause]}" if cause in REMEDIES else ""
            logger.warning(f"{message}: {cause}.{remedy} All of them are counted in the training log.")


class StepLoader:
    r"""
    Iterates over the micro-batches of a process. A micro-batch is a dictionary with a dictionary of tensors for each
    task, and with `usable_fractions`: for each task, the fraction of its samples that could be used.

    Args:
        stream ([`StepStream`]):
            The stream of parts of micro-batches.
        max_corrupt_fraction (`float`):
            Iteration raises [`DataError`] if more than this fraction of the last 1000 samples of a task, or of all
            opened shards, cannot be used, or if none of the first 50 samples of a task can be used.
        num_workers (`int`):
            Number of data loader workers.
        kwargs:
            Further arguments of `torch.utils.data.DataLoader`.
    """

    MIN_SEEN = 1000  # samples, before `max_corrupt_fraction` applies
    MIN_SEEN_IF_NONE = 50  # samples, if none of them can be used

    def __init__(self, stream: StepStream, max_corrupt_fraction: float, num_workers: int = 0, **kwargs):
        self.parts: DataLoader = DataLoader(
            stream,
            batch_size=None,
            collate_fn=no_collation,
            num_workers=num_workers,
            worker_init_fn=_ignore_signals,
            **kwargs,
        )
        self.stream, self.max_corrupt_fraction = stream, max_corrupt_fraction
        # The state after the micro-batches that were yielded so far. `seen` and `skipped` count samples of this
        # process.
        self.state: dict[str, Any] = {**stream.start, "seen": 0, "skipped": {}}
        # Samples seen and skipped in each micro-batch, by task: the CLIP loss has many more samples than the SAM loss.
        self._recent: dict[str, deque[tuple[int, int]]] = {name: deque() for name in stream.tasks}
        warn_of_shared_readers(stream, num_workers)

    def load_state(self, state: dict[str, Any]) -> None:
        """Resumes from the `state` of a loader, which may have been written to JSON. The number of processes or
        workers may be different."""
        readers = {
            task: {name: Position(*position) for name, position in positions.items()}
            for task, positions in state["readers"].items()
        }
        self.state = state | {"readers": readers}
        self.stream.start = {name: self.state[name] for name in ("micro_batches", "drawn", "readers")}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        other_processes = multiprocessing.active_children()
        parts = iter(self.parts)
        workers = [process for process in multiprocessing.active_children() if process not in other_processes]
        atexit.register(_kill, workers)
        while True:
            of_workers = tuple(next(parts) for _ in range(max(1, self.parts.num_workers)))
            self._update_state(of_workers)
            yield self._join([part["tasks"] for part in of_workers])

    def _update_state(self, parts: tuple[dict[str, Any], ...]) -> None:
        seen = sum(task["planned"] for part in parts for task in part["tasks"].values())
        skipped = sum((Counter(part["skipped"]) for part in parts), Counter())
        self.state = {
            "micro_batches": parts[0]["micro_batches"],
            "drawn": parts[0]["drawn"],
            "readers": furthest_positions([self.state["readers"], *(part["readers"] for part in parts)]),
            "seen": self.state["seen"] + seen,
            "skipped": dict(Counter(self.state["skipped"]) + skipped),
        }
        for name, recent in self._recent.items():
            task_parts = [part["tasks"][name] for part in parts]
            planned = sum(part["planned"] for part in task_parts)
            used = sum(len(part["samples"]["numbers"]) for part in task_parts if part["samples"])
            recent.append((planned, planned - used))
            while sum(seen for seen, _ in recent) - recent[0][0] >= self.MIN_SEEN:
                recent.popleft()
            self._check_samples(name)
        self._check_shards()

    def _check_samples(self, task: str) -> None:
        seen, skipped = (sum(numbers) for numbers in zip(*self._recent[task], strict=True))
        if seen < (self.MIN_SEEN_IF_NONE if skipped == seen else self.MIN_SEEN):
            return
        if skipped > self.max_corrupt_fraction * seen:
            raise DataError(
                f"{skipped} of the last {seen} samples of {task}_data cannot be used, more than max_corrupt_fraction "
                f"({self.max_corrupt_fraction}) allows. Check that {task}_data names the right data. Skipped samples "
                f"by cause: {self.state['skipped']}."
            )

    def _check_shards(self) -> None:
        if self.state["seen"] < self.MIN_SEEN:
            return
        unreadable = self.state["skipped"].get(UNREADABLE_SHARD, 0)
        opened = sum(
            position.shards + 1 for positions in self.state["readers"].values() for position in positions.values()
        )
        if unreadable > self.max_corrupt_fraction * opened:
            raise DataError(
                f"{unreadable} of {opened} shards cannot be read completely, more than max_corrupt_fraction "
                f"({self.max_corrupt_fraction}) allows. The log names each of them."
            )

    def _join(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        batches: dict[str, Any] = {}
        usable_fractions: dict[str, float] = {}
        for name, task in self.stream.tasks.items():
            stacked = [part[name]["samples"] for part in parts if part[name]["samples"]]
            if not stacked:  # every process must take part in every step
                stacked = [_stack({0: task.placeholder(**parts[0][name]["settings"])})]
                usable_fractions[name] = 0.0
            batch = {field: torch.cat([samples[field] for samples in stacked]) for field in stacked[0]}
            order = batch.pop("numbers").argsort()  # independent of the number of workers
            batches[name] = {field: values[order] for field, values in batch.items()}
            usable_fractions.setdefault(name, len(order) / sum(part[name]["planned"] for part in parts))
        return {**batches, "usable_fractions": usable_fractions}


def furthest_positions(states: list[dict[str, dict[str, Position]]]) -> dict[str, dict[str, Position]]:
    """Returns the furthest position of every reader of every task. The positions that a worker has of readers of other
    workers are outdated."""
    merged: dict[str, dict[str, Position]] = {name: {} for name in states[0]}
    for state in states:
        for task, positions in state.items():
            for reader, position in positions.items():
                if reader not in merged[task] or position.samples > merged[task][reader].samples:
                    merged[task][reader] = position
    return merged


def _ignore_signals(worker: int) -> None:
    """Ignores SIGTERM and SIGINT in a worker. Launchers and schedulers send them to all processes of a job, and the
    trainer needs the workers until the end of the step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _kill(workers: list[multiprocessing.process.BaseProcess]) -> None:
    """Kills the workers when this process ends with an error. Python would send SIGTERM, which they ignore, and wait
    for them forever."""
    for worker in workers:
        worker.kill()


def _stack(samples: dict[int, dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stacks samples to one tensor for each field, images with their channels first, and adds their `numbers`."""
    if not samples:
        return {}
    fields = next(iter(samples.values()))
    stacked = {field: torch.from_numpy(np.stack([sample[field] for sample in samples.values()])) for field in fields}
    stacked = {field: t.permute(0, 3, 1, 2) if field.endswith("images") else t for field, t in stacked.items()}
    return {**stacked, "numbers": torch.tensor(list(samples))}


def warn_of_shared_readers(stream: StepStream, num_workers: int) -> None:
    """Logs a warning if several workers need samples of the same reader, because each of them then reads its
    shards."""
    num_consumers = stream.world_size * max(1, num_workers)
    for name, task in stream.tasks.items():
        for number, source in enumerate(task.streams):
            num_readers = count_readers(source, stream.num_readers)
            if repeats := num_consumers // math.gcd(num_consumers, num_readers) - 1:
                logger.warning(
                    f"{num_consumers} data loader workers in all processes share the {num_readers} readers of {name} "
                    f"stream {number}, which has {source.num_shards} shards: every shard is read {repeats + 1} times. "
                    "Set num_readers to a multiple of processes x dataloader_num_workers, or split the data into more "
                    "shards."
                )
