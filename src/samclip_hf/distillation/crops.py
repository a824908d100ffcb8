"""Which part of an image a sample shows: the same for the student, for the teacher and for the teacher's store."""

import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

STUDENT_FILTER = Image.Resampling.BILINEAR  # SAM's image processor's
MIN_ASPECT = 3 / 4  # of a random crop; as torchvision's RandomResizedCrop


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """What decides over all that is random about a sample, whoever reads it and whatever was read before."""
    return np.random.default_rng((seed, epoch, zlib.crc32(key.encode())))


@dataclass
class Crop:
    """A part of an image, to be resized to a square."""

    box: tuple[float, float, float, float]  # left, upper, right, lower
    is_flipped: bool


def draw_crop(image: Image.Image, min_share: float, rng: np.random.Generator) -> Crop:
    """A random part, in half of the cases flipped; see [`random_crop`]."""
    return Crop(random_crop(image.width, image.height, min_share, rng), rng.random() < 0.5)


def cut(image: Image.Image, crop: Crop, size: int, resample: Image.Resampling) -> np.ndarray:
    """The crop, uint8 `(size, size, 3)`."""
    pixels = np.array(image.resize((size, size), resample, crop.box))
    return pixels[:, ::-1] if crop.is_flipped else pixels


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
