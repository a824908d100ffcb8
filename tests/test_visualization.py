"""Overlays, texts and panels."""

import numpy as np
import pytest
from PIL import Image

from samclip_hf.visualization import (
    color_of,
    draw_prompts,
    draw_text,
    overlay_labels,
    overlay_masks,
    save_panel,
)

GRAY = np.full((60, 80, 3), 100, dtype=np.uint8)


@pytest.mark.parametrize("height, width", [(300, 200), (40, 60), (100, 900)])
def test_text_is_wrapped_inside_the_image(height, width):
    image = draw_text(np.zeros((height, width, 3), dtype=np.uint8), ["0.35 a man on a bicycle with a dog"] * 3)
    assert image.any() and not image[:, -2:].any() and not image[-2:].any()


def test_consecutive_colors_differ():
    colors = np.array([color_of(number) for number in range(20)])
    assert (np.abs(np.diff(colors.astype(int), axis=0)).sum(axis=1) > 150).all()


def test_smaller_masks_are_drawn_on_larger_ones():
    large, small = np.ones((60, 80), dtype=bool), np.zeros((60, 80), dtype=bool)
    small[10:20, 10:20] = True
    image = overlay_masks(GRAY, [small, large])
    for position, number in (((15, 15), 0), ((40, 40), 1)):
        expected = np.array(color_of(number)) * 0.6 + 100 * 0.4
        assert image[position].tolist() == expected.astype(np.uint8).tolist()


def test_background_and_ignored_pixels_are_dark():
    label_map = np.zeros((60, 80), dtype=np.uint8)
    label_map[:, 40:] = 1
    label_map[50:] = 255
    image = overlay_labels(GRAY, label_map, ["background", "a"], has_background=True)
    assert image[10, 10].tolist() == image[55, 60].tolist() == [40, 40, 40]
    assert image[5, 78].max() > 100
    assert overlay_labels(GRAY, label_map, ["a", "b"], has_background=False)[5, 2].max() > 100


def test_prompts_are_drawn_on_a_copy():
    image = draw_prompts(GRAY, points=np.array([[20, 30]]), boxes=np.array([[40, 10, 70, 50]]))
    lime = [0, 255, 0]
    assert image[30, 20].tolist() == image[10, 55].tolist() == image[50, 40].tolist() == lime
    assert (GRAY == 100).all()


def test_panels_accept_rows_of_different_lengths_and_captions_with_dollar_signs(tmp_path):
    rows = [[("$5 or $x^{", GRAY), ("b$", GRAY)], [("c", GRAY)]]
    save_panel(tmp_path / "panel.png", rows, "a$b_{c$")
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.width > 500
