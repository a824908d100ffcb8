"""Points and boxes from masks, as SAM was trained with them (Kirillov et al. 2023, appendix A)."""

import numpy as np

BOX_NOISE = 0.1  # standard deviation, as a share of the box's side


def point_from_mask(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""
    A uniformly random foreground pixel.

    mask (`np.ndarray` of type bool and shape `(height, width)`):
        With one pixel at least.

    Returns x and y `(2,)`.
    """
    pixels = np.flatnonzero(mask.T)  # column by column, as decoded run lengths lie in memory
    if len(pixels) == 0:
        raise ValueError("An empty mask has no point.")
    x, y = divmod(int(pixels[rng.integers(len(pixels))]), mask.shape[0])
    return np.array([x, y], dtype=np.float32)


def box_from_mask(mask: np.ndarray, rng: np.random.Generator, max_noise: float = 20.0) -> np.ndarray:
    r"""
    The mask's bounding box with noise: normal with a standard deviation of 10 % of the side, cut at `max_noise` and at
    the image's border.

    mask (`np.ndarray` of type bool and shape `(height, width)`):
        With one pixel at least.
    max_noise (`float`):
        In pixels of the mask. SAM's is 20 px at 1024 px.

    Returns x1, y1, x2, y2 `(4,)` with x1 <= x2 and y1 <= y2.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        raise ValueError("An empty mask has no box.")
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.float32)
    sides = np.tile(box[2:] - box[:2], 2)
    noise = np.clip(rng.standard_normal(4) * BOX_NOISE * sides, -max_noise, max_noise)
    height, width = mask.shape
    noisy = np.clip(box + noise, 0, np.array([width - 1, height - 1] * 2)).astype(np.float32)
    return np.concatenate([np.minimum(noisy[:2], noisy[2:]), np.maximum(noisy[:2], noisy[2:])])
