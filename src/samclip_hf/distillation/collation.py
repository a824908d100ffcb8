"""
From samples to optimizer steps: crops, prompts, batches.

Everything random about a sample follows from (seed, epoch, its key), everything random about a step from (seed, step).
Which samples meet in a step also depends on the number of workers and processes, which read a shard each.
"""

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers.utils import logging

from .prompts import box_from_mask, point_from_mask
from .streams import SkippedSampleError, decode_image, draw_masks, endless

logger = logging.get_logger(__name__)

MIN_ASPECT = 3 / 4  # of a random crop; as torchvision's RandomResizedCrop
MAX_MISSES = 1000  # unusable samples in a row before training stops


@dataclass
class ClipBatches:
    r"""
    Images for the CLIP loss: the same random crop for the student, at the step's resolution, and for the teacher, at
    its own.

    streams (`list[IterableDataset]`):
        From `open_stream`; their samples come in turn.
    image_sizes (`list[int]`):
        The student's resolutions in pixels; a step has one of them.
    teacher_image_size (`int`):
        The teacher's.
    batch_size (`int`):
        Images a process and step at the smallest of `image_sizes`; at a larger one as many as have about the same
        number of pixels (CVNets' variable batch sampler; paper, section 4).
    min_crop (`float`):
        Smallest share of the image that a crop shows.
    """

    streams: list[IterableDataset]
    image_sizes: list[int]
    teacher_image_size: int
    batch_size: int
    min_crop: float

    def step_rule(self, rng: np.random.Generator) -> dict[str, Any]:
        """The number of images of a step, and what its samples have in common: the resolution."""
        image_size = int(rng.choice(self.image_sizes))
        num_samples = max(1, int(self.batch_size * (min(self.image_sizes) / image_size) ** 2))
        return {"num_samples": num_samples, "image_size": image_size}

    def sample(self, raw: dict[str, Any], rng: np.random.Generator, image_size: int) -> dict[str, np.ndarray]:
        """The student's `images` and the `teacher_images`, both uint8 `(size, size, 3)`, of one crop."""
        image = decode_image(raw)
        box = random_crop(image.width, image.height, self.min_crop, rng)
        # Each with the filter of its own image processor: bilinear for SAM's, bicubic for CLIP's.
        student_image = np.array(image.resize((image_size, image_size), Image.Resampling.BILINEAR, box))
        teacher_image = np.array(image.resize((self.teacher_image_size,) * 2, Image.Resampling.BICUBIC, box))
        if rng.random() < 0.5:
            student_image, teacher_image = student_image[:, ::-1], teacher_image[:, ::-1]
        return {"images": student_image, "teacher_images": teacher_image}


@dataclass
class SamBatches:
    r"""
    Images and prompts for the SAM loss: longest edge resized to the model's size and padded, as SAM's processor does;
    prompts from randomly drawn masks.

    All prompts of a step are points or all are boxes, with equal probability (SAM's own recipe, there per mask; the
    paper says neither). SAM answers a point with three masks and a box with one.

    streams (`list[IterableDataset]`):
        From `open_stream` with masks; their samples come in turn.
    image_size (`int`):
        The teacher's and the student's, in pixels.
    batch_size (`int`):
        Images a process and step.
    masks_per_image (`int`):
        Prompts of each image; masks are drawn twice where an image has fewer.
    max_box_noise (`float`):
        In pixels of the model's input.
    """

    streams: list[IterableDataset]
    image_size: int
    batch_size: int
    masks_per_image: int
    max_box_noise: float

    def step_rule(self, rng: np.random.Generator) -> dict[str, Any]:
        """The number of images of a step, and what its samples have in common: the kind of prompt."""
        return {"num_samples": self.batch_size, "prompt": "point" if rng.random() < 0.5 else "box"}

    def sample(self, raw: dict[str, Any], rng: np.random.Generator, prompt: str) -> dict[str, np.ndarray]:
        """One padded image, uint8 `(image_size, image_size, 3)`, the `content_sizes` `(2,)` of the picture in it, and
        its prompts in pixels of the padded image."""
        image = decode_image(raw)
        masks = draw_masks(raw, self.masks_per_image, rng)
        if any(mask.shape != (image.height, image.width) for mask in masks):
            raise SkippedSampleError("mask and image differ in size")
        scale = self.image_size / max(image.size)
        width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
        padded = np.zeros((self.image_size, self.image_size, 3), dtype=np.uint8)
        padded[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        sample = {"images": padded, "content_sizes": np.array([height, width])}

        to_input = np.array([width / image.width, height / image.height], dtype=np.float32)
        if prompt == "point":
            sample["input_points"] = np.stack([point_from_mask(mask, rng) * to_input for mask in masks])[:, None]
            sample["input_labels"] = np.ones((len(masks), 1), dtype=np.int64)
        else:
            boxes = [box_from_mask(mask, rng, self.max_box_noise / scale) for mask in masks]
            sample["input_boxes"] = np.stack(boxes) * np.tile(to_input, 2)
        return sample


def random_crop(
    width: int, height: int, min_share: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A random box (left, upper, right, lower) of between `min_share` and all of the image, with an aspect between 3:4
    and 4:3, to be resized to a square. The paper does not state its augmentation; this is torchvision's
    RandomResizedCrop."""
    for _ in range(10):
        area = width * height * rng.uniform(min_share, 1.0)
        aspect = np.exp(rng.uniform(np.log(MIN_ASPECT), -np.log(MIN_ASPECT)))
        crop_width, crop_height = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if crop_width <= width and crop_height <= height:
            left, upper = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
            return left, upper, left + crop_width, upper + crop_height
    side = min(width, height)  # a long image: the largest square, somewhere
    left, upper = rng.uniform(0, width - side), rng.uniform(0, height - side)
    return left, upper, left + side, upper + side


class StepStream(torch.utils.data.IterableDataset):
    r"""
    Endless steps: dictionaries that hold, for each task ("clip", "sam"), one micro-batch, and under "skipped" the
    samples left out on the way, by cause.

    tasks (`dict[str, ClipBatches | SamBatches]`):
        What a step consists of.
    seed (`int`), shuffle_buffer (`int`):
        See `endless`.
    gradient_accumulation_steps (`int`):
        So many items make an optimizer step, and share its rule.
    rank, world_size (`int`):
        This process among all. Every process, and every worker of its data loader, reads its own shards; a step's rule
        is the same in all processes.
    """

    def __init__(
        self,
        tasks: dict[str, ClipBatches | SamBatches],
        seed: int,
        shuffle_buffer: int,
        gradient_accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.tasks, self.seed, self.shuffle_buffer = tasks, seed, shuffle_buffer
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        uneven = [stream.num_shards for task in tasks.values() for stream in task.streams]
        if uneven := [number for number in uneven if number % world_size]:
            logger.warning(
                f"{world_size} processes do not divide streams of {uneven} shards: each will read all of those to use "
                "its share. Leave some shards out, or split them further."
            )

    @property
    def max_workers(self) -> int:
        """More data loader workers a process than this would find no shard to read."""
        shards = [stream.num_shards for task in self.tasks.values() for stream in task.streams]
        return max(1, min(shards) // self.world_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        samples = {}
        for name, task in self.tasks.items():
            own_parts = [split_dataset_by_node(stream, self.rank, self.world_size) for stream in task.streams]
            passes = [endless(stream, self.seed, self.shuffle_buffer) for stream in own_parts]
            samples[name] = (sample for in_turn in zip(*passes, strict=True) for sample in in_turn)
        for item in count(first, stride):
            step = item // self.gradient_accumulation_steps
            skipped: Counter[str] = Counter()
            batches = {}
            for index, (name, task) in enumerate(self.tasks.items()):
                rule = task.step_rule(np.random.default_rng((self.seed, step, index)))
                batches[name] = self._batch(samples[name], task, skipped, **rule)
            yield {**batches, "skipped": dict(skipped)}

    def _batch(self, samples, task, skipped: Counter[str], num_samples: int, **rule) -> dict[str, Tensor]:
        batch: list[dict[str, np.ndarray]] = []
        misses = 0
        while len(batch) < num_samples:
            epoch, raw = next(samples)
            # Where a source names no key, its picture's bytes stand for it.
            stored = raw["image"] or {}
            name = raw.get("__key__") or stored.get("path")
            key = name.encode() if name else stored.get("bytes", b"")
            rng = np.random.default_rng((self.seed, epoch, zlib.crc32(key)))
            try:
                batch.append(task.sample(raw, rng, **rule))
                misses = 0
            except SkippedSampleError as error:
                if str(error) not in skipped:
                    logger.warning(f"Skipped {key[:80]!r}: {error}. The log counts such samples.")
                skipped[str(error)] += 1
                misses += 1
                if misses == MAX_MISSES:
                    raise ValueError(
                        f"{MAX_MISSES} samples in a row could not be used, by cause: {dict(skipped)}. Is this the "
                        "right data?"
                    ) from error
        tensors = {name: torch.from_numpy(np.stack([sample[name] for sample in batch])) for name in batch[0]}
        return {name: t.permute(0, 3, 1, 2) if name.endswith("images") else t for name, t in tensors.items()}
