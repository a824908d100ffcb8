"""
From samples to optimizer steps: crops, prompts, batches.

Everything random about a sample follows from (seed, epoch, its key), everything random about a step from (seed, step),
so that neither workers nor processes change what is learnt from.
"""

import zlib
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

from .prompts import box_from_mask, point_from_mask
from .streams import SkipCounter, SkippedSampleError, decode_image, draw_masks, endless

MIN_ASPECT = 3 / 4  # of a random crop; as torchvision's RandomResizedCrop
MAX_MISSES = 1000  # unusable samples in a row: this is no longer bad luck


@dataclass
class ImageFormat:
    """How a model sees images: `size` px, and `mean` and `std` of each channel in [0, 1]."""

    size: int
    mean: list[float]
    std: list[float]

    def to_tensor(self, image: Image.Image) -> Tensor:
        """Normalised pixels `(3, height, width)`."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


@dataclass
class ClipBatches:
    r"""
    Images for the CLIP loss: the same random crop for the student, at the step's resolution, and for the teacher, at
    its own.

    batch_size (`int`):
        Images a process and step at the smallest of `sizes`; at size s, as many as have about the same number of pixels
        (CVNets' variable batch sampler; paper, section 4).
    min_crop (`float`):
        Smallest share of the image that a crop shows. The paper does not state its augmentation.
    """

    streams: list[IterableDataset]
    student: ImageFormat
    teacher: ImageFormat
    sizes: list[int]
    batch_size: int
    min_crop: float

    def step_rule(self, rng: np.random.Generator) -> dict[str, Any]:
        """The resolution of a step, and its number of images."""
        size = int(rng.choice(self.sizes))
        return {"size": size, "num_samples": max(1, int(self.batch_size * (min(self.sizes) / size) ** 2))}

    def sample(self, raw: dict[str, Any], rng: np.random.Generator, size: int) -> dict[str, Tensor]:
        image = decode_image(raw)
        box = random_crop(image.width, image.height, self.min_crop, rng)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            box = (image.width - box[2], box[1], image.width - box[0], box[3])
        teacher_image = image.resize((self.teacher.size,) * 2, Image.Resampling.BICUBIC, box)
        student_image = image.resize((size, size), Image.Resampling.BICUBIC, box)
        return {
            "pixel_values": self.student.to_tensor(student_image),
            "teacher_pixel_values": self.teacher.to_tensor(teacher_image),
        }


@dataclass
class SamBatches:
    r"""
    Images and prompts for the SAM loss: longest edge resized to the model's size and padded, as SAM's processor does;
    prompts from randomly drawn masks.

    All prompts of a step are points or all are boxes, with equal probability (SAM's own recipe; the paper says
    neither): points ask the decoder for three masks and boxes for one.
    """

    streams: list[IterableDataset]
    student: ImageFormat
    batch_size: int
    masks_per_image: int

    def step_rule(self, rng: np.random.Generator) -> dict[str, Any]:
        """The kind of prompt of a step, and its number of images."""
        return {"prompt": "point" if rng.random() < 0.5 else "box", "num_samples": self.batch_size}

    def sample(self, raw: dict[str, Any], rng: np.random.Generator, prompt: str) -> dict[str, Tensor]:
        image = decode_image(raw)
        masks = draw_masks(raw, self.masks_per_image, rng)
        if any(mask.shape != (image.height, image.width) for mask in masks):
            raise SkippedSampleError("mask and image differ in size")
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            masks = [mask[:, ::-1] for mask in masks]
        scale = self.student.size / max(image.size)
        width, height = int(image.width * scale + 0.5), int(image.height * scale + 0.5)
        ratio = np.array([width / image.width, height / image.height], dtype=np.float32)
        pixels = self.student.to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
        padded = torch.zeros(3, self.student.size, self.student.size)
        padded[:, :height, :width] = pixels
        if prompt == "point":
            points = np.stack([point_from_mask(mask, rng) for mask in masks]) * ratio
            return {
                "pixel_values": padded,
                "input_points": torch.from_numpy(points)[:, None],
                "input_labels": torch.ones(len(masks), 1, dtype=torch.long),
            }
        boxes = np.stack([box_from_mask(mask, rng) for mask in masks]) * np.tile(ratio, 2)
        return {"pixel_values": padded, "input_boxes": torch.from_numpy(boxes)}


def random_crop(width: int, height: int, min_share: float, rng: np.random.Generator) -> tuple[float, ...]:
    """A random box (left, upper, right, lower) of between `min_share` and all of the image, whose aspect differs from
    a square's by up to 3:4."""
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
    Endless optimizer steps: dictionaries that hold, for each task ("clip", "sam"), one micro-batch, and under "skipped"
    the samples left out on the way, by cause.

    tasks (`dict[str, ClipBatches | SamBatches]`):
        What a step consists of.
    rank, world_size (`int`):
        This process among all. Every process, and every worker of its data loader, reads its own shards; a step's rule
        is the same in all processes.
    """

    def __init__(
        self, tasks: dict[str, ClipBatches | SamBatches], seed: int, shuffle_buffer: int, rank: int = 0, world_size: int = 1
    ):
        self.tasks, self.seed, self.shuffle_buffer = tasks, seed, shuffle_buffer
        self.rank, self.world_size = rank, world_size

    @property
    def max_workers(self) -> int:
        """More workers than this would find no shard to read."""
        return min(max(s.num_shards // self.world_size, 1) for task in self.tasks.values() for s in task.streams)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        skipped = SkipCounter()
        samples = {}
        for name, task in self.tasks.items():
            streams = task.streams
            if self.world_size > 1:
                streams = [split_dataset_by_node(s, self.rank, self.world_size) for s in streams]
            samples[name] = endless(streams, self.seed, self.shuffle_buffer)
        for step in count(first, stride):
            batches = {}
            for index, (name, task) in enumerate(self.tasks.items()):
                rule = task.step_rule(np.random.default_rng((self.seed, step, index)))
                batches[name] = self._batch(samples[name], task, skipped, **rule)
            yield {**batches, "skipped": skipped.take()}

    def _batch(self, samples, task, skipped: SkipCounter, num_samples: int, **rule) -> dict[str, Tensor]:
        batch: list[dict[str, Tensor]] = []
        misses = 0
        while len(batch) < num_samples:
            item = next(samples, None)
            if item is None:
                raise ValueError("A stream holds no samples at all.")
            epoch, raw = item
            key = raw.get("__key__") or raw["image"].get("path") or raw["image"]["bytes"][:4096]
            digest = zlib.crc32(key if isinstance(key, bytes) else str(key).encode())
            try:
                batch.append(task.sample(raw, np.random.default_rng((self.seed, epoch, digest)), **rule))
                misses = 0
            except SkippedSampleError as error:
                skipped[str(error)] += 1
                misses += 1
                if misses == MAX_MISSES:
                    raise ValueError(
                        f"{MAX_MISSES} samples in a row could not be used, by cause: {dict(skipped)}. Is this the right data?"
                    ) from error
        return {name: torch.stack([sample[name] for sample in batch]) for name in batch[0]}
