"""Random crops of training images. The student, the teacher and the embedding cache use the same crop of a sample."""

import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..datasets.samples import LazyImage

STUDENT_FILTER = Image.Resampling.BILINEAR  # as in SAM's image processor
MIN_ASPECT_RATIO = 3 / 4  # as in torchvision's RandomResizedCrop; the largest is its inverse
MAX_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Returns the random generator of a sample in an epoch. It does not depend on the samples that were read
    before."""
    return np.random.default_rng((seed, epoch, zlib.crc32(key.encode())))


@dataclass
class Crop:
    """
    A part of an image that is resized to a square.

    Args:
        box (`tuple[float, float, float, float]`):
            Left, upper, right and lower edge in pixels of the image.
        is_flipped (`bool`):
            Whether the part is flipped horizontally.
    """

    box: tuple[float, float, float, float]
    is_flipped: bool


def draw_crop(image: Image.Image | LazyImage, min_scale: float, rng: np.random.Generator) -> Crop:
    """Draws a crop, see [`random_crop_box`], which is flipped with probability 0.5."""
    return Crop(random_crop_box(image.width, image.height, min_scale, rng), rng.random() < 0.5)


def cut(image: Image.Image | LazyImage, crop: Crop, size: int, resample: Image.Resampling) -> np.ndarray:
    """Returns the crop, resized to `size` pixels, as a uint8 array of shape `(size, size, 3)`."""
    pixels = np.array(image.resize((size, size), resample, crop.box))
    return pixels[:, ::-1] if crop.is_flipped else pixels


def random_crop_box(
    width: int, height: int, min_scale: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """
    Draws a box with the distribution of torchvision's RandomResizedCrop; the paper does not state its augmentation.

    The area is uniform between `min_scale` and 1 times the area of the image, the aspect ratio between 3:4 and 4:3 is
    uniform on a logarithmic scale. If no such box is found in an image with an extreme aspect ratio, the box is the
    largest square, at a random position.

    Returns:
        `tuple[float, float, float, float]`: Left, upper, right and lower edge in pixels.
    """
    for _ in range(MAX_ATTEMPTS):
        area = width * height * rng.uniform(min_scale, 1.0)
        aspect_ratio = np.exp(rng.uniform(np.log(MIN_ASPECT_RATIO), -np.log(MIN_ASPECT_RATIO)))
        crop_width, crop_height = np.sqrt(area * aspect_ratio), np.sqrt(area / aspect_ratio)
        if crop_width <= width and crop_height <= height:
            left, upper = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
            return left, upper, left + crop_width, upper + crop_height
    side = min(width, height)
    left, upper = rng.uniform(0, width - side), rng.uniform(0, height - side)
    return left, upper, left + side, upper + side
