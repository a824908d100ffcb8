"""Overlays, texts and panels."""

import numpy as np
import pytest
from PIL import Image

from samclip_hf import visualization
from samclip_hf.visualization import (
    color_of,
    draw_prompts,
    draw_segments,
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


@pytest.mark.parametrize("gray", [0, 255])
def test_an_outline_has_a_colored_and_a_black_line(gray):
    image = Image.new("RGB", (90, 60), (gray, gray, gray))
    mask = np.zeros((60, 90), dtype=bool)
    mask[20:40, 30:60] = True
    drawn = np.asarray(draw_segments(image, [mask], [3], []))
    assert drawn.shape == (60, 90, 3)
    color = np.array(color_of(3))
    row = drawn[30]
    assert (row[30] == color).all() and (row[59] == color).all()
    assert (row[[29, 60]] == 0).all() and (row[[27, 62]] == gray).all()
    assert np.abs(row[45] - (0.55 * gray + 0.45 * color)).max() <= 1
    assert np.array_equal(np.asarray(draw_segments(image, [mask], [3], [], opacity=0))[30, 45], [gray] * 3)


def test_no_outline_is_drawn_along_the_edges_of_the_image():
    full = np.asarray(draw_segments(Image.new("RGB", (90, 60)), [np.ones((60, 90), dtype=bool)], [1], []))
    assert len(np.unique(full.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("size", [(1, 1), (8, 5), (2000, 20), (700, 500)])
def test_legends_of_any_length_stay_inside(size):
    legend = [(number, "word " * number) for number in range(1, 40)] + [(None, "x" * 300)]
    drawn = draw_segments(Image.new("RGB", size), [], [], legend, "the caption")
    ink = (np.asarray(drawn)[size[1] :] < 255).any(axis=2)
    assert ink.any() and not ink[:, -2:].any() and not ink[-2:].any()
    longer = draw_segments(Image.new("RGB", size), [], [], legend)
    assert longer.height < drawn.height  # the caption has a row of its own


def test_names_are_written_into_the_masks():
    image, mask = Image.new("RGB", (200, 100), "gray"), np.zeros((100, 200), dtype=bool)
    mask[10:90, 10:190] = True
    plain, named = (np.asarray(draw_segments(image, [mask], [1], [], names=names)) for names in (None, ["cat"]))
    changed = np.argwhere((plain != named).any(axis=2))
    assert np.abs(changed.mean(axis=0) - [50, 100]).max() < 5 and named[tuple(changed.T)].max() == 255


def test_names_do_not_cover_names_of_larger_masks():
    image, masks = Image.new("RGB", (200, 100), "gray"), np.zeros((3, 100, 200), dtype=bool)
    masks[0, 40:60, 80:120], masks[1, 10:90, 10:190], masks[2, 1:8, 1:8] = True, True, True
    both, one = (
        np.asarray(draw_segments(image, masks, [1, 2, 3], [], names=[first, "b", "c"])) for first in ("a", "")
    )
    assert np.array_equal(both, one)


def test_texts_without_a_font_have_no_empty_boxes(monkeypatch):
    monkeypatch.setattr(visualization, "SYSTEM_FONTS", ("no such font",))
    for text, expected in {
        "cat": "cat",
        "caf\u00e9  noir": "cafe noir",
        "wei\u00df": "wei\\xdf",
        "\u732b 0.93": "\\u732b 0.93",
        "\U0001f600": "\\U0001f600",
    }.items():
        assert visualization._drawable(text, 12)[0] == expected


def test_the_first_font_with_all_characters_is_used(monkeypatch):
    monkeypatch.setattr(visualization, "SYSTEM_FONTS", ("poor", "rich"))
    default = visualization._font(None, 12)
    monkeypatch.setattr(visualization, "_font", lambda name, size: default)
    monkeypatch.setattr(visualization, "_has_glyph", lambda name, character: name == "rich" or character == "a")
    assert visualization._drawable("a\u732b", 12) == ("a\u732b", default)
