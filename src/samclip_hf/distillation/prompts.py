"""
Prompts from masks: points and boxes as in SAM's training (Kirillov et al. 2023, appendix A), and mask prompts as in
SAM-CLIP's composition of both heads (paper, section 5).
"""

import numpy as np

from ..images import RunLengthMask, mask_to_prompt_box
from ..segmentation_samclip import add_box_noise

# Logits of a class at the patches of its objects: the mean differs between masks, the noise between patches. Similar
# to the CLIP head of the miniature, which misses many of the patches of an object and has few errors outside.
CLASS_LOGIT_RANGE = (-1.0, 9.0)
CLASS_LOGIT_NOISE = 4.0  # standard deviation


def point_from_mask(mask: np.ndarray | RunLengthMask, rng: np.random.Generator) -> np.ndarray:
    r"""
    Draws a foreground pixel of a mask with uniform probability.

    Args:
        mask (`np.ndarray` of type bool, or `RunLengthMask`, of shape `(height, width)`):
            A mask with at least one foreground pixel.

    Returns:
        `np.ndarray` of type float32 and shape `(2,)`: x and y in pixels.

    Raises:
        ValueError: If the mask is empty.
    """
    runs = mask if isinstance(mask, RunLengthMask) else RunLengthMask.encode(mask)
    if runs.area == 0:
        raise ValueError("An empty mask has no point.")
    return np.array(runs.pixel(int(rng.integers(runs.area))), dtype=np.float32)


def box_from_mask(mask: np.ndarray | RunLengthMask, rng: np.random.Generator, max_noise: float = 20.0) -> np.ndarray:
    r"""
    Returns the bounding box of a mask with normal noise, whose standard deviation is 10 % of the side. The noise is
    clipped to `max_noise`, the box to the image.

    Args:
        mask (`np.ndarray` of type bool, or `RunLengthMask`, of shape `(height, width)`):
            A mask with at least one foreground pixel.
        max_noise (`float`):
            Largest noise in pixels of the mask. SAM uses 20 px at 1024 px.

    Returns:
        `np.ndarray` of type float32 and shape `(4,)`: x1, y1, x2, y2 in pixels with x1 <= x2 and y1 <= y2.

    Raises:
        ValueError: If the mask is empty.
    """
    box = np.array(mask_to_prompt_box(mask), dtype=np.float32)
    sides = np.tile(box[2:] - box[:2], 2)
    height, width = mask.shape
    noisy = add_box_noise(box, sides, rng.standard_normal(4), max_noise)
    noisy = np.clip(noisy, 0, np.array([width - 1, height - 1] * 2)).astype(np.float32)
    return np.concatenate([np.minimum(noisy[:2], noisy[2:]), np.maximum(noisy[:2], noisy[2:])])


def class_probabilities(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""
    Draws probabilities of a class at patches, such as the CLIP head finds for the objects of a mask. With
    [`to_mask_prompts`], they are mask prompts like those of the paper's composition.

    SAM's own mask prompts are the logits of its previous prediction. The composition's are coarser and have errors.

    Args:
        coverage (`np.ndarray` of type float32 and shape `(grid_height, grid_width)`):
            The part of each patch that is inside the mask, from 0 to 1.

    Returns:
        `np.ndarray` of type float32 and shape `(grid_height, grid_width)`: Probabilities, at most `coverage`.
    """
    logits = rng.uniform(*CLASS_LOGIT_RANGE) + CLASS_LOGIT_NOISE * rng.standard_normal(coverage.shape)
    return (coverage / (1 + np.exp(-logits))).astype(np.float32)
