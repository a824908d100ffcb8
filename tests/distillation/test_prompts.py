"""Point, box and mask prompts from masks."""

import numpy as np
import pytest
import torch

from samclip_hf.distillation.prompts import box_from_mask, class_probabilities, point_from_mask
from samclip_hf.images import RunLengthMask
from samclip_hf.segmentation_samclip import to_mask_prompts


@pytest.fixture
def mask() -> np.ndarray:
    """A ring of 40 x 60 px in an image of 100 x 200 px, whose center is background."""
    mask = np.zeros((100, 200), dtype=bool)
    mask[30:70, 80:140] = True
    mask[40:60, 90:130] = False
    return mask


def test_points_are_uniform_in_the_mask(mask):
    rng = np.random.default_rng(0)
    points = np.array([point_from_mask(mask, rng) for _ in range(2000)]).astype(int)
    assert mask[points[:, 1], points[:, 0]].all()
    left_half = (points[:, 0] < 110).mean()
    assert 0.45 < left_half < 0.55  # the ring is symmetric


def test_box_noise_is_a_tenth_of_the_side_and_clipped(mask):
    rng = np.random.default_rng(0)
    exact = np.array([80, 30, 139, 69])
    noise = np.array([box_from_mask(mask, rng) for _ in range(2000)]) - exact
    assert np.abs(noise).max() <= 20
    np.testing.assert_allclose(noise.std(axis=0), [5.9, 3.9, 5.9, 3.9], rtol=0.1)
    np.testing.assert_array_equal(box_from_mask(mask, rng, max_noise=0), exact)
    assert np.abs(box_from_mask(mask, rng, max_noise=1.5) - exact).max() <= 1.5


def test_boxes_are_inside_the_image_and_ordered():
    mask = np.zeros((8, 8), dtype=bool)
    mask[0, 7] = True
    for seed in range(50):
        x1, y1, x2, y2 = box_from_mask(mask, np.random.default_rng(seed))
        assert 0 <= x1 <= x2 <= 7
        assert 0 <= y1 <= y2 <= 7


def test_prompts_depend_on_the_generator_only(mask):
    for prompt in (point_from_mask, box_from_mask):
        first, again, other = (prompt(mask, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert (first == again).all()
        assert (first != other).any()


def test_mask_prompts_are_confident_outside_of_the_mask_and_miss_patches_inside():
    coverage = np.zeros((16, 16), dtype=np.float32)
    coverage[4:12, 4:12] = 1
    coverage[4:12, 12] = 0.5
    rng = np.random.default_rng(0)
    drawn = np.stack([class_probabilities(coverage, rng) for _ in range(400)])
    assert drawn.dtype == np.float32
    assert (drawn[:, coverage == 0] == 0).all() and drawn[:, 4:12, 12].max() <= 0.5
    logits = torch.from_numpy(drawn[:, 4:12, 4:12]).double().logit(eps=1e-6).numpy()
    means = logits.mean(axis=(1, 2))
    assert means.mean() == pytest.approx(4, abs=0.3)  # the middle of -1 and 9
    assert means.min() < 0 and means.max() > 8
    np.testing.assert_allclose((logits - means[:, None, None]).std(), 4, rtol=0.1)
    assert (logits < 0).mean() > 0.1

    prompts = to_mask_prompts(torch.from_numpy(drawn[:2, None]), (64, 64))
    assert prompts.shape == (2, 1, 64, 64)
    assert (prompts[:, :, :8] + np.log(1e4 - 1)).abs().max() < 1e-2
    assert prompts.max().item() <= np.log((1 - 1e-4) / 1e-4) + 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_prompts_of_run_lengths_are_those_of_the_decoded_mask(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 30, size=2)) < rng.uniform(0.01, 1)
    mask[rng.integers(mask.shape[0]), rng.integers(mask.shape[1])] = True
    runs = RunLengthMask.encode(mask)
    x, y = point_from_mask(runs, np.random.default_rng(seed))
    # The definition: a uniform index of the foreground pixels, column by column.
    pixels = np.flatnonzero(mask.T)
    assert (x, y) == divmod(pixels[np.random.default_rng(seed).integers(len(pixels))], len(mask))
    for prompt in (point_from_mask, box_from_mask):
        of_runs, of_mask = (prompt(form, np.random.default_rng(seed)) for form in (runs, mask))
        assert np.array_equal(of_runs, of_mask) and of_runs.dtype == np.float32


def test_an_empty_mask_raises():
    for prompt in (point_from_mask, box_from_mask):
        for mask in (np.zeros((4, 4), dtype=bool), RunLengthMask((4, 4), [16])):
            with pytest.raises(ValueError, match="empty mask"):
                prompt(mask, np.random.default_rng(0))
