"""
From samples to optimizer steps: crops, prompts, batches.

Which samples meet in a step follows from the seed alone, whatever the number of processes and workers (`order.py`).
Everything random about a sample follows from (seed, epoch, its key), everything random about a step from (seed, step).
"""

import atexit
import math
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from transformers.utils import logging

from ..datasets.streams import UNREADABLE_SHARD, DataError, SkippedSampleError, Stream, decode_image, draw_masks
from .crops import STUDENT_FILTER, cut, draw_crop, sample_rng
from .embedding_cache import CacheDescription, as_it_is
from .prompts import box_from_mask, point_from_mask
from .sampling import Mixture, Position, lanes_of

logger = logging.get_logger(__name__)


@dataclass
class ClipBatches:
    r"""
    Images for the CLIP loss: the same random crop for the student, at the step's resolution, and for the teacher, at
    its own.

    streams (`list[Stream]`), shares (`list[float]`):
        From `open_stream`, mixed in proportion to their shares.
    image_sizes (`list[int]`):
        The student's resolutions in pixels; a step has one of them.
    teacher_image_size (`int`):
        The teacher's.
    batch_size (`int`):
        Images a process and step at the smallest of `image_sizes`; see `num_images` for larger ones.
    shuffle_buffer (`int`):
        Of each stream, see [`Mixture`].
    min_crop_scale (`float`):
        Smallest share of the image that a crop shows.
    teacher_filter (`PIL.Image.Resampling`):
        With which the teacher's images are resized; CLIP's by default.
    store (`CacheDescription`, *optional*):
        Of the stored embeddings that the streams' samples bring along, instead of images for the teacher.
    """

    streams: list[Stream]
    shares: list[float]
    image_sizes: list[int]
    teacher_image_size: int
    batch_size: int
    shuffle_buffer: int
    min_crop_scale: float
    teacher_filter: Image.Resampling = Image.Resampling.BICUBIC
    store: CacheDescription | None = None

    def step_rule(self, rng: np.random.Generator) -> dict[str, Any]:
        """The number of images of a step, and what its samples have in common: the resolution."""
        image_size = int(rng.choice(self.image_sizes))
        return {"num_samples": num_images(self.batch_size, self.image_sizes, image_size), "image_size": image_size}

    def sample(self, raw: dict[str, Any], seed: int, epoch: int, image_size: int) -> dict[str, np.ndarray]:
        """The student's `images` and the `teacher_images`, both uint8 `(size, size, 3)`, of one crop; with a store
        `teacher_embeds` `(projection_dim,)` instead of the latter."""
        image = decode_image(raw)
        if self.store is not None:  # whose crops are drawn again and again
            seed, epoch = self.store.seed, epoch % self.store.num_crops
        crop = draw_crop(image, self.min_crop_scale, sample_rng(seed, epoch, raw["key"]))
        sample = {"images": cut(image, crop, image_size, STUDENT_FILTER)}
        if self.store is None:
            return sample | {"teacher_images": cut(image, crop, self.teacher_image_size, self.teacher_filter)}
        teacher_embeds = raw["embeds"][epoch].astype(np.float32)
        if np.isnan(teacher_embeds).any():
            raise SkippedSampleError("no stored embedding")
        return sample | {"teacher_embeds": teacher_embeds}

    def blank(self, image_size: int) -> dict[str, np.ndarray]:
        """A sample of nothing, for a batch none of whose samples can be used."""
        sample = {"images": np.zeros((image_size, image_size, 3), dtype=np.uint8)}
        if self.store is None:
            size = self.teacher_image_size
            return sample | {"teacher_images": np.zeros((size, size, 3), dtype=np.uint8)}
        return sample | {"teacher_embeds": np.ones(self.store.projection_dim, dtype=np.float32)}


def num_images(batch_size: int, image_sizes: list[int], image_size: int) -> int:
    """How many images of a size have about as many pixels as `batch_size` of the smallest size (CVNets' variable batch
    sampler; paper, section 4). Rounded for a process: what processes have together can differ by that."""
    return max(1, int(batch_size * (min(image_sizes) / image_size) ** 2))


@dataclass
class SamBatches:
    r"""
    Images and prompts for the SAM loss: longest edge resized to the model's size and padded, as SAM's processor does;
    prompts from randomly drawn masks.

    All prompts of a step are points or all are boxes, with equal probability (SAM's own recipe, there per mask; the
    paper says neither). SAM answers a point with three masks and a box with one.

    streams (`list[Stream]`), shares (`list[float]`):
        From `open_stream` with masks, mixed in proportion to their shares.
    image_size (`int`):
        The teacher's, in pixels.
    student_sizes (`list[int]`):
        The student's resolutions; a step has one of them.
    batch_size (`int`):
        Images a process and step.
    masks_per_image (`int`):
        Prompts of each image; masks are drawn twice where an image has fewer.
    max_box_noise (`float`):
        In pixels of the model's input.
    shuffle_buffer (`int`):
        Of each stream, see [`Mixture`].
    """

    streams: list[Stream]
    shares: list[float]
    image_size: int
    student_sizes: list[int]
    batch_size: int
    masks_per_image: int
    max_box_noise: float
    shuffle_buffer: int

    def step_rule(self, rng: np.random.Generator) -> dict[str, Any]:
        """Number of images of a step, and what its samples have in common: kind of prompt, student's resolution."""
        prompt = "point" if rng.random() < 0.5 else "box"
        return {"num_samples": self.batch_size, "prompt": prompt, "student_size": int(rng.choice(self.student_sizes))}

    def sample(
        self, raw: dict[str, Any], seed: int, epoch: int, prompt: str, student_size: int
    ) -> dict[str, np.ndarray]:
        """One padded image, uint8 `(image_size, image_size, 3)`, the `content_sizes` `(2,)` of the picture in it, and
        its prompts in pixels of the padded image; where the student's size is another one, also its
        `student_images`."""
        image = decode_image(raw)
        rng = sample_rng(seed, epoch, raw["key"])
        masks = draw_masks(raw, self.masks_per_image, rng, (image.height, image.width))
        return self._prompt(image, masks, rng, prompt, student_size)

    def blank(self, prompt: str, student_size: int) -> dict[str, np.ndarray]:
        """A sample of nothing, for a batch none of whose samples can be used."""
        masks = [np.ones((8, 8), bool)] * self.masks_per_image
        return self._prompt(Image.new("RGB", (8, 8)), masks, np.random.default_rng(0), prompt, student_size)

    def _prompt(
        self, image: Image.Image, masks: list[np.ndarray], rng: np.random.Generator, prompt: str, student_size: int
    ) -> dict[str, np.ndarray]:
        scale = self.image_size / max(image.size)
        padded, (height, width) = _pad(image, self.image_size)
        sample = {"images": padded, "content_sizes": np.array([height, width])}
        if student_size != self.image_size:
            sample["student_images"], _ = _pad(image, student_size)

        to_input = np.array([width / image.width, height / image.height], dtype=np.float32)
        if prompt == "point":
            sample["input_points"] = np.stack([point_from_mask(mask, rng) * to_input for mask in masks])[:, None]
            sample["input_labels"] = np.ones((len(masks), 1), dtype=np.int64)
        else:
            boxes = [box_from_mask(mask, rng, self.max_box_noise / scale) for mask in masks]
            sample["input_boxes"] = np.stack(boxes) * np.tile(to_input, 2)
        return sample


def _pad(image: Image.Image, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Longest edge resized to `size`, the rest black, as SAM's processor does; and the picture's height and width."""
    width, height = (max(1, int(side * size / max(image.size) + 0.5)) for side in image.size)
    padded = np.zeros((size, size, 3), dtype=np.uint8)
    padded[:height, :width] = np.asarray(image.resize((width, height), STUDENT_FILTER))
    return padded, (height, width)


class StepStream(torch.utils.data.IterableDataset):
    r"""
    Endless micro-batches, in parts: every data loader worker makes its part of each, which [`StepLoader`] puts
    together.

    tasks (`dict[str, ClipBatches | SamBatches]`):
        What a step consists of.
    seed (`int`), num_lanes (`int`):
        See [`Mixture`].
    gradient_accumulation_steps (`int`):
        So many micro-batches make an optimizer step, and share its rule.
    rank, world_size (`int`):
        This process among all.
    """

    def __init__(
        self,
        tasks: dict[str, ClipBatches | SamBatches],
        seed: int,
        num_lanes: int = 16,
        gradient_accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.tasks, self.seed, self.num_lanes = tasks, seed, num_lanes
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        self._causes: set[str] = set()  # for which a sample was skipped, as far as this reader knows
        # Where to begin: micro-batches so far, samples of each task that they drew in all processes, and where lanes
        # stand. [`StepLoader`] keeps one like it.
        self.start: dict[str, Any] = {
            "item": 0,
            "drawn": dict.fromkeys(tasks, 0),
            "lanes": {name: {} for name in tasks},
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # Every process has an equal share of a micro-batch, and every worker of that: samples are dealt in turn.
        own, readers = self.rank + self.world_size * worker, self.world_size * num_workers
        mixtures = {
            name: Mixture(
                task.streams, task.shares, self.seed, self.num_lanes, task.shuffle_buffer, self.start["lanes"][name]
            )
            for name, task in self.tasks.items()
        }
        drawn = dict(self.start["drawn"])
        for item in count(self.start["item"]):
            step = item // self.gradient_accumulation_steps
            skipped: Counter[str] = Counter()
            part: dict[str, Any] = {"tasks": {}, "lanes": {}}
            for index, (name, task) in enumerate(self.tasks.items()):
                rule = task.step_rule(np.random.default_rng((self.seed, step, index)))
                num_samples = rule.pop("num_samples") * self.world_size
                first = drawn[name] + (own - drawn[name]) % readers
                numbers = range(first, drawn[name] + num_samples, readers)
                samples = {number: self._sample(task, mixtures[name], number, skipped, rule) for number in numbers}
                drawn[name] += num_samples
                part["tasks"][name] = {
                    "samples": _stack({number: sample for number, sample in samples.items() if sample is not None}),
                    "rule": rule,
                    "planned": len(numbers),
                }
                part["lanes"][name] = mixtures[name].positions
            yield part | {"item": item + 1, "drawn": dict(drawn), "skipped": dict(skipped)}

    def _sample(self, task, mixture: Mixture, number: int, skipped: Counter[str], rule: dict[str, Any]):
        epoch, raw = mixture.sample(number)
        try:
            return task.sample(raw, self.seed, epoch, **rule)
        except SkippedSampleError as error:
            if str(error) not in self._causes:
                self._causes.add(str(error))
                logger.warning(f"Skipped {raw['key']!r}: {error}. From now on the log counts such samples.")
            skipped[str(error)] += 1
            return None


class StepLoader:
    r"""
    One micro-batch after the other: dictionaries that hold for each task ("clip", "sam") its tensors, and under
    "shares" how many of the samples planned for it could be used.

    stream ([`StepStream`]):
        Where its parts come from.
    max_corrupt_fraction (`float`):
        When more of a task's last thousand samples or so cannot be used, or of the shards begun so far, reading stops
        with a [`DataError`]; and when none of its first fifty can.
    """

    MIN_SEEN = 1000  # samples, before a share means something
    MIN_SEEN_IF_NONE = 50  # before it means something that none can be used

    def __init__(self, stream: StepStream, max_corrupt_fraction: float, num_workers: int = 0, **kwargs):
        self.parts: DataLoader = DataLoader(
            stream,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=num_workers,
            worker_init_fn=_leave_signals_to_the_trainer,
            **kwargs,
        )
        self.stream, self.max_corrupt_fraction = stream, max_corrupt_fraction
        # After the micro-batches given out so far; what was seen and skipped is this process's own.
        self.state: dict[str, Any] = {**stream.start, "seen": 0, "skipped": {}}
        # Of each task samples seen and skipped, by micro-batch. SAM's few are not to vanish among CLIP's many.
        self._recent: dict[str, deque[tuple[int, int]]] = {name: deque() for name in stream.tasks}
        warn_of_shared_lanes(stream, num_workers)

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where a loader with this `state`, or what JSON makes of it, stood, of any number of processes and
        workers."""
        lanes = {task: {name: Position(*p) for name, p in of.items()} for task, of in state["lanes"].items()}
        self.state = state | {"lanes": lanes}
        self.stream.start = {name: self.state[name] for name in ("item", "drawn", "lanes")}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        earlier = multiprocessing.active_children()
        parts = iter(self.parts)
        workers = [process for process in multiprocessing.active_children() if process not in earlier]
        atexit.register(_kill, workers)
        while True:
            of_workers = tuple(next(parts) for _ in range(max(1, self.parts.num_workers)))
            self._take_stock(of_workers)
            yield self._join([part["tasks"] for part in of_workers])

    def _take_stock(self, parts: tuple[dict[str, Any], ...]) -> None:
        seen = sum(task["planned"] for part in parts for task in part["tasks"].values())
        skipped = sum((Counter(part["skipped"]) for part in parts), Counter())
        self.state = {
            "item": parts[0]["item"],
            "drawn": parts[0]["drawn"],
            "lanes": furthest([self.state["lanes"], *(part["lanes"] for part in parts)]),
            "seen": self.state["seen"] + seen,
            "skipped": dict(Counter(self.state["skipped"]) + skipped),
        }
        for name, recent in self._recent.items():
            of_task = [part["tasks"][name] for part in parts]
            planned = sum(part["planned"] for part in of_task)
            used = sum(len(part["samples"]["numbers"]) for part in of_task if part["samples"])
            recent.append((planned, planned - used))
            while sum(seen for seen, _ in recent) - recent[0][0] >= self.MIN_SEEN:
                recent.popleft()
            self._judge(name)
        self._judge_shards()

    def _judge(self, task: str) -> None:
        seen, bad = (sum(numbers) for numbers in zip(*self._recent[task], strict=True))
        if seen < (self.MIN_SEEN_IF_NONE if bad == seen else self.MIN_SEEN):
            return
        if bad > self.max_corrupt_fraction * seen:
            raise DataError(
                f"{bad} of the last {seen} samples of {task}_data could not be used. That is more than max_corrupt_fraction, "
                f"{self.max_corrupt_fraction}: is this the right data? So far, by cause: {self.state['skipped']}."
            )

    def _judge_shards(self) -> None:
        if self.state["seen"] < self.MIN_SEEN:
            return
        unreadable = self.state["skipped"].get(UNREADABLE_SHARD, 0)
        begun = sum(position.shards + 1 for lanes in self.state["lanes"].values() for position in lanes.values())
        if unreadable > self.max_corrupt_fraction * begun:
            raise DataError(
                f"{unreadable} of {begun} shards could not be read to their ends, as the log says one by one. That is "
                f"more than max_corrupt_fraction, {self.max_corrupt_fraction}."
            )

    def _join(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        batches: dict[str, Any] = {}
        shares: dict[str, float] = {}
        for name, task in self.stream.tasks.items():
            rule = parts[0][name]["rule"]
            stacked = [part[name]["samples"] for part in parts if part[name]["samples"]]
            if not stacked:  # a process must take part in the step all the same
                stacked = [_stack({0: task.blank(**rule)})]
                shares[name] = 0.0
            batch = {field: torch.cat([samples[field] for samples in stacked]) for field in stacked[0]}
            order = batch.pop("numbers").argsort()  # whichever worker made them
            batches[name] = {field: values[order] for field, values in batch.items()}
            shares.setdefault(name, len(order) / sum(part[name]["planned"] for part in parts))
        return {**batches, "shares": shares}


def furthest(states: list[dict[str, dict[str, Position]]]) -> dict[str, dict[str, Position]]:
    """Of every lane of every task its furthest position: what one reader knows of another's lanes may be old."""
    merged: dict[str, dict[str, Position]] = {name: {} for name in states[0]}
    for state in states:
        for task, lanes in state.items():
            for lane, position in lanes.items():
                if lane not in merged[task] or position.samples > merged[task][lane].samples:
                    merged[task][lane] = position
    return merged


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Launchers and schedulers signal every process of a job; workers are needed to the end of the step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _kill(workers: list[multiprocessing.process.BaseProcess]) -> None:
    """When an error ends this process: by SIGTERM, which they do not heed, Python would ask them to end, and wait for
    ever."""
    for worker in workers:
        worker.kill()


def _stack(samples: dict[int, dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Numbered samples as one tensor a field, channels first, and their `numbers`."""
    if not samples:
        return {}
    fields = next(iter(samples.values()))
    stacked = {field: torch.from_numpy(np.stack([sample[field] for sample in samples.values()])) for field in fields}
    stacked = {field: t.permute(0, 3, 1, 2) if field.endswith("images") else t for field, t in stacked.items()}
    return {**stacked, "numbers": torch.tensor(list(samples))}


def warn_of_shared_lanes(stream: StepStream, num_workers: int) -> None:
    """Says where several processes or workers read the same shards, each to use its share of them."""
    readers = stream.world_size * max(1, num_workers)
    for name, task in stream.tasks.items():
        for number, source in enumerate(task.streams):
            lanes = lanes_of(source, stream.num_lanes)
            if shared := readers // math.gcd(readers, lanes) - 1:
                logger.warning(
                    f"{readers} readers (processes x workers) share the {lanes} lanes of {name} stream {number}, "
                    f"which has {source.num_shards} shards: each of them is read {shared + 1} times over. Let the "
                    "number of readers divide the lanes, see num_readers, or split the data into more shards."
                )
