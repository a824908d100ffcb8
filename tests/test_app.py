"""
The app in `demo/`: its callbacks, compared with the true masks of scenes and with transformers' pipelines, and the
page in Chromium. `make test-app` installs Chromium on Debian. Without it, the tests of the page are skipped.
"""

import argparse
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.ndimage import distance_transform_edt
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from transformers import pipeline

from samclip_cli import main as samclip_main
from samclip_cli.models import add_model_arguments, load_model, mask_generation_options
from samclip_hf import (
    SamClipForImageSegmentation,
    SamClipImageProcessorPil,
    SamClipModel,
    SamClipProcessor,
    miniature,
)
from samclip_hf.mask_generation_samclip import MASK_GENERATION_DEFAULTS, decode_rle
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, IMAGE_SIZE, render
from samclip_hf.visualization import color_of

from .scripts import load_script

DEMO = Path(__file__).parents[1] / "demo"
BACKGROUND = ", ".join(BACKGROUND_PROMPTS)


demo = load_script(DEMO / "app.py")


@pytest.fixture(scope="module")
def app():
    return start()


def start_arguments(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return parser.parse_args(arguments)


def start(*arguments: str):
    """The app with the arguments of the command line."""
    parsed = start_arguments(*arguments)
    loaded = load_model(parsed)
    return demo.App(loaded, mask_generation_options(loaded))


def fields(labels: str = "", **changes):
    """The page's fields."""
    return demo.Fields(demo.FOREGROUND, labels, BACKGROUND, "a {}", 0.5, 0.45, 0.6)._replace(**changes)


@pytest.fixture
def session(app):
    """The first example."""
    return app.choose(0, None, *fields())[0]


@pytest.fixture
def scene():
    return render(seed=0, index=demo.EXAMPLE_SCENES[0])


def at(x: float, y: float) -> SimpleNamespace:
    """A click."""
    return SimpleNamespace(index=(x, y))


def shrink(mask) -> np.ndarray:
    """Resizes a mask of the page to the size of the scenes."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.asarray(Image.fromarray(np.asarray(mask) > 0).resize(size, Image.Resampling.NEAREST))


def iou(mask, other) -> float:
    return (mask & other).sum() / (mask | other).sum()


def center(mask) -> tuple[float, float]:
    """x and y of the pixel that is farthest from the edge of the mask, in pixels of the displayed image."""
    row, column = np.unravel_index(distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1].argmax(), mask.shape)
    return tuple(4 * (int(side) + 0.5) for side in (column, row))


def true_names(scene) -> list[str]:
    return [CLASS_NAMES[class_id] for class_id in scene.class_ids]


def shown(app, session, threshold: float = 0.5):
    """The masks of the result in the size of the displayed image."""
    return app.segments(session, session.view, session.picture.size, threshold)


@pytest.fixture(autouse=True)
def images(monkeypatch, tmp_path):
    """Replaces the images of the page by their arguments, because Gradio writes images to files. Files in `tmp_path`
    count as uploaded."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(demo.gr, "Image", lambda value=None, **options: SimpleNamespace(value=value, **options))


# ---- files ----


def png_header(width: int, height: int) -> bytes:
    """A PNG with the given size in its header and almost no content."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


INVALID_FILES = {
    "text.png": (b"This is text, not an image.\n" * 20, "not an image"),
    "empty.png": (b"", "empty"),
    "large.png": (png_header(10_000, 10_000), "maximum is 50 megapixels"),
    "bomb.png": (png_header(60_000, 60_000), "maximum is 50 megapixels"),
    "cut.jpg": (encode(Image.effect_noise((300, 300), 90), "JPEG")[:9000], "is damaged"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image"),
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "not an image"),  # starts Ghostscript
}


@pytest.mark.parametrize("name", INVALID_FILES)
def test_an_invalid_file_shows_a_warning_and_keeps_the_previous_image(app, session, tmp_path, name):
    content, message = INVALID_FILES[name]
    (tmp_path / name).write_bytes(content)
    app.click(session, at(100, 100), *fields())
    with pytest.warns(UserWarning, match=message):
        kept, image, *_ = app.upload({"path": str(tmp_path / name), "orig_name": name}, session, *fields())
    assert kept is session and not session.is_replaced
    assert image.value.getpixel((106, 100)) == (0, 122, 31)  # the point
    with pytest.warns(UserWarning, match=message):
        none, image, *_ = app.upload({"path": str(tmp_path / name), "orig_name": name}, None, *fields())
    assert none is None and image.value is None  # there is no previous image


def test_a_large_image_is_rejected_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(encode(Image.new("L", (8000, 8000)), "PNG"))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="maximum is 50 megapixels"):
        demo.read_image(str(tmp_path / "large.png"))


@pytest.mark.parametrize(
    "name, default, wrong, message",
    [
        ("threshold", 0.5, ["0.5", 7, float("nan"), [1]], r'"Score threshold" must be a number from 0 to 1\.'),
        ("opacity", 0.45, [-1, {}], r'"Opacity of the masks" must be a number from 0 to 1\.'),
        ("labels", None, [5, ["cat"]], r'"Labels" must be a text\.'),
        ("background", BACKGROUND, [5], r'"Background" must be a text\.'),
        ("mode", demo.FOREGROUND, ["Line", [], 1], r'"A click in the image sets a" must be one of Foreground point, '),
        ("view", demo.BY_TEXT, ["all"], r'"Result of" must be one of Labels, Points and box, Everything\.'),
    ],
)
def test_a_wrong_value_of_a_request_is_an_error_that_names_the_field(app, monkeypatch, name, default, wrong, message):
    monkeypatch.setattr(demo.gr, "Image", demo.gr.components.Image)
    [field] = [block for block in app.build().blocks.values() if getattr(block, "elem_id", None) == name]
    for value in wrong:
        with pytest.raises(demo.gr.Error, match=message) as raised:
            field.preprocess(value)
        assert not raised.value.print_exception
    if default is not None:
        assert field.preprocess(None) == field.preprocess(default) == default


def test_an_example_that_was_deleted_shows_a_warning_and_keeps_the_previous_image(app, session, monkeypatch, tmp_path):
    monkeypatch.setattr(app, "scenes", [(str(tmp_path / "deleted.png"), "red dotted shape")])
    with pytest.warns(UserWarning, match="cannot be read: No such file or directory"):
        assert app.choose(0, session, *fields())[0] is session


def test_files_of_the_server_that_were_not_uploaded_are_not_opened(app, session, tmp_path):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    Image.new("RGB", (60, 30)).save(tmp_path / "private.png")
    (uploads / "link.png").symlink_to(tmp_path / "private.png")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", str(uploads))
        for path in (tmp_path / "private.png", uploads / ".." / "private.png", uploads / "link.png"):
            with pytest.warns(UserWarning, match="was not uploaded"):
                assert app.upload({"path": str(path)}, session, *fields())[0] is session
        shutil.copy(tmp_path / "private.png", uploads / "own.png")
        assert app.upload({"path": str(uploads / "own.png")}, session, *fields())[0] is not session


@pytest.mark.parametrize("place", [(-1, 5), (513, 5), (5, 1e9), (float("nan"), 5), ("a", 5), (None, 5)])
@pytest.mark.parametrize("mode", [demo.FOREGROUND, demo.BOX])
def test_a_point_outside_the_image_shows_a_warning_and_is_not_set(app, session, place, mode):
    with pytest.warns(UserWarning, match="outside the image"):
        assert app.click(session, at(*place), *fields(mode=mode)) == gr.skip()
    assert session.prompts == demo.Prompts()


@pytest.mark.parametrize("index", [-1, len(demo.EXAMPLE_SCENES), "0", 1.0, None])
def test_an_image_that_a_restarted_app_does_not_have_shows_a_warning(app, session, index):
    with pytest.warns(UserWarning, match="Reload the page"):
        kept, *_, labels = app.choose(index, session, *fields())
    assert kept is session and labels == gr.skip()


def test_the_image_has_the_name_of_its_file(app, session):
    _, image, *_ = app.choose(1, session, *fields())
    assert image.label == f"scene{demo.EXAMPLE_SCENES[1]}.png"
    _, image, *_ = app.remove(session, *fields())
    assert image.label == "Image"


@pytest.mark.parametrize("file", ["image.png", ["image.png"], {"path": 5}, {}])
def test_an_upload_of_another_type_shows_a_warning(app, session, file):
    with pytest.warns(UserWarning):
        assert app.upload(file, session, *fields())[0] is session


def test_an_upload_without_a_file_shows_a_warning(app):
    with pytest.warns(UserWarning, match="empty"):
        app.upload(None, None, *fields())


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [(name, mode) for name in demo.FORMATS for mode in ("RGB", "L", "P", "1") if (name, mode) != ("JPEG", "P")]
    + [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("PNG", "RGBA")],
)
def test_images_of_every_format_are_read(tmp_path, file_format, mode):
    path = tmp_path / "image"
    path.write_bytes(encode(Image.radial_gradient("L").resize((60, 30)).convert(mode), file_format))
    image = demo.to_display(demo.read_image(str(path)))
    assert image.mode == "RGB" and image.size == (512, 256)
    assert np.asarray(image)[128, 256].max() < 60 and np.asarray(image)[4, 4].min() > 190  # dark in the center


def test_16_bit_images_are_scaled_to_8_bits(tmp_path):
    pixels = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(64, axis=0)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    row = np.asarray(demo.read_image(str(tmp_path / "deep.png")))[32, :, 0]
    np.testing.assert_allclose(row, pixels[0] / 257, atol=1)


def test_the_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    path = tmp_path / "rotated.jpg"
    path.write_bytes(encode(Image.new("RGB", (60, 30)), "JPEG", exif=exif))
    assert demo.read_image(str(path)).size == (30, 60)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((60, 30), (512, 256)), ((700, 600), (700, 600)), ((4000, 3000), (1024, 768)), ((5000, 1), (1024, 1))],
)
def test_small_images_are_enlarged_and_large_ones_reduced_for_display(size, expected):
    assert demo.to_display(Image.new("RGB", size)).size == expected


def test_a_thin_image_works_everywhere(app, tmp_path):
    Image.new("RGB", (3000, 2)).save(tmp_path / "thin.png")
    session = app.upload({"path": str(tmp_path / "thin.png")}, None, *fields())[0]
    app.click(session, at(5, 0), *fields())
    app.segment(session, *fields("red solid shape"))
    app.segment_everything(session, *fields("red solid shape"))


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000)])
def test_an_example_in_a_thin_image_is_added(app, tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "thin.png")
    session = app.upload({"path": str(tmp_path / "thin.png")}, None, *fields())[0]
    width, height = session.picture.image.size
    app.click(session, at(width // 2, height // 2), *fields())
    mask = shown(app, session)[0].mask
    app.add_example(session, "part", *fields())
    (example,) = session.examples
    assert example.label == "part" and np.array_equal(example.mask, mask) and mask.any()
    assert "part" in session.by_text.vocabulary.id2label.values()


# ---- texts ----


@pytest.mark.parametrize("number", range(len(demo.EXAMPLE_SCENES)))
def test_labels_give_the_true_masks_with_their_names(app, number):
    scene = render(seed=0, index=demo.EXAMPLE_SCENES[number])
    session, *_, labels = app.choose(number, None, *fields())
    *_, view, classes = app.segment(session, *fields(labels))
    names = labels.split(", ")
    assert view == demo.BY_TEXT and set(names) == set(true_names(scene))
    found = shown(app, session)
    assert {segment.label for segment in found} == set(names)
    for name in names:
        true = np.any([m for m, own in zip(scene.masks, true_names(scene), strict=True) if own == name], axis=0)
        assert iou(shrink(np.any([one.mask for one in found if one.label == name], axis=0)), true) > 0.6
    assert set(classes) == {"background", *names} and sum(classes.values()) == pytest.approx(1)


@pytest.mark.parametrize("size", [(512, 512), (900, 600)])
def test_the_json_has_the_segments_of_the_pipeline_in_the_original_size(app, session, tmp_path, size):
    session.picture.image.resize(size).save(tmp_path / "photo.png")
    session = app.upload({"path": str(tmp_path / "photo.png"), "orig_name": "photo.png"}, None, *fields())[0]
    labels = app.scenes[0][1]
    app.segment(session, *fields(labels))
    path = app.download(".json", session, *fields(labels))
    record = json.loads(Path(path).read_text())
    assert Path(path).name == "photo_masks.json" and record["image"] == "photo.png"
    assert (record["width"], record["height"]) == size and "not on photographs" in record["model"]["note"]
    segmenter = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint())
    expected = segmenter(
        Image.open(tmp_path / "photo.png"),
        candidate_labels=labels.split(", "),
        background=list(BACKGROUND_PROMPTS),
        hypothesis_template="a {}",
    )
    assert len(expected) >= 3 and len(record["segments"]) == len(expected)
    for one, other in zip(record["segments"], expected, strict=True):
        assert one["label"] == other["label"] == labels.split(", ")[one["label_id"] - 1]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        assert np.array_equal(decode_rle(one["segmentation"]), np.asarray(other["mask"]) > 0)


def test_the_classification_is_that_of_the_pipeline(app, session):
    names = ["yellow solid shape", "green tiled shape", "red dotted shape"]
    classes = app.segment(session, *fields(",".join(names), background="", template="one {}"))[-1]
    classify = pipeline("zero-shot-image-classification", model=miniature.checkpoint())
    expected = classify(session.picture.image, candidate_labels=names, hypothesis_template="one {}")
    assert classes == pytest.approx({one["label"]: one["score"] for one in expected}, abs=1e-4)


def test_thresholds_and_opacity_change_the_result_without_a_pass_of_the_model(app, session, monkeypatch):
    alike = "yellow dotted shape, yellow meshed shape, yellow tiled shape, yellow fuzzy shape"
    app.segment(session, *fields(alike))
    for module in (app.model.vision_encoder, app.model.mask_decoder, app.model.clip_head, app.model.text_model):
        monkeypatch.setattr(module, "forward", lambda *_, **__: pytest.fail("a module runs"))
    results = [app.update(session, *fields(alike, threshold=least)) for least in (0, 0.6, 1)]
    rows = [result[2].count("<tr>") - 1 for result in results]
    assert rows[0] > rows[1] >= max(0, rows[2])
    assert all(segment.label_score >= 0.6 for segment in shown(app, session, 0.6))
    assert "Lower the score threshold" in results[2][2] or rows[2] > 0
    faint, strong = (app.update(session, *fields(alike, opacity=opacity))[1].value for opacity in (0.1, 0.9))
    assert np.abs(np.asarray(faint).astype(int) - np.asarray(strong)).mean() > 5
    download = Image.open(app.download(".png", session, *fields(alike, opacity=0.9)))
    assert np.array_equal(np.asarray(download)[:512, :512], np.asarray(strong))


@pytest.mark.parametrize(
    ("labels", "background", "template", "message"),
    [
        (" , ", BACKGROUND, "a {}", 'The field "Labels" is empty: enter comma-separated names'),
        ("", BACKGROUND, "a {}", 'The field "Labels" is empty: enter comma-separated names'),
        ("red dotted shape,red dotted shape", BACKGROUND, "a {}", '"Labels" has repeated names: red dotted shape.$'),
        ("a,,b", BACKGROUND, "a {}", '"Labels" has an empty name'),
        ("red dotted shape", "wall,,sky", "a {}", '"Background" has an empty name'),
        ("red dotted shape", BACKGROUND, "a shape", '"Prompt template" must contain {} once'),
        ("red dotted shape", BACKGROUND, "", '"Prompt template" must contain {} once'),
        ("red dotted shape, background", BACKGROUND, "a {}", "another name"),
        ("shape " * 200, BACKGROUND, "a {}", "at most [0-9]+ tokens"),
    ],
)
def test_invalid_texts_show_a_warning_and_change_nothing(app, session, labels, background, template, message):
    app.segment(session, *fields("yellow solid shape"))
    before = shown(app, session)
    values = fields(labels, background=background, template=template)
    with pytest.warns(UserWarning, match=message):
        assert app.segment(session, *values) == gr.skip()
    assert app.segment_changes(session, *values) == gr.skip()  # no second warning when the field loses focus
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(shown(app, session), before, strict=True))
    app.click(session, at(100, 100), *values)  # a click still gives a mask, without a label
    (segment,) = shown(app, session)
    assert segment.label == "" and segment.mask.any()


def test_names_with_the_same_tokens_show_a_warning_on_the_page(app, session):
    with pytest.warns(UserWarning, match="same tokens, so only the first of each is used: 'cat' and 'Cat'"):
        app.segment(session, *fields("cat, Cat, sofa"))
    assert list(session.by_text.vocabulary.id2label.values())[-3:] == ["cat", "Cat", "sofa"]


def test_texts_are_segmented_when_a_field_loses_focus_only_if_they_have_changed(app, session, monkeypatch):
    assert app.segment_changes(session, *fields("  ")) == gr.skip()  # no warning for a visitor who passes the field
    assert app.segment_changes(session, *fields("red dotted shape"))[5] == demo.BY_TEXT
    assert app.segment_changes(session, *fields("red dotted shape")) == gr.skip()
    assert app.segment_changes(None, *fields("red dotted shape")) == gr.skip()
    for changed in (fields("red dotted shape", background=""), fields("red dotted shape", template="one {}")):
        assert app.segment_changes(session, *changed) != gr.skip()
    app.click(session, at(100, 100), *changed)
    monkeypatch.setattr(app, "_segment", lambda *_: pytest.fail("segments again"))
    assert app.segment(session, *changed)[5] == demo.BY_TEXT  # the button shows the result that exists


def test_texts_are_embedded_once_per_visitor(app, session, monkeypatch):
    app.segment(session, *fields("red dotted shape"))
    monkeypatch.setattr(app.model, "embed_vocabulary", lambda *_, **__: pytest.fail("embeds again"))
    other = app.choose(1, session, *fields())[0]
    assert app.segment(other, *fields("red dotted shape"))[5] == demo.BY_TEXT
    assert app.choose(1, None, *fields())[0].vocabularies == {}  # another visitor


def test_synonyms_and_a_background_text_that_is_a_label(app, session):
    labels, background, _ = demo.parse_texts(fields("sky|clouds, cat", background="wall, sky"), ())
    assert labels == [["sky", "clouds"], ["cat"]] and background == ["wall"]


def test_one_label_without_background_is_explained(app, session):
    table = app.segment(session, *fields("yellow solid shape", background=""))[2]
    assert "the score is always 1" in table


def test_labels_are_escaped_in_the_table(app, session):
    table = app.segment(session, *fields("<b>yellow</b>", background="", threshold=0))[2]
    assert "&lt;b&gt;yellow" in table and "<b>" not in table


# ---- points and boxes ----


def test_the_image_encoder_runs_once_per_image(app):
    passes = []
    handle = app.model.vision_encoder.register_forward_hook(lambda *_: passes.append(1))
    try:
        session, *_, labels = app.choose(1, None, *fields())
        for mode in (demo.FOREGROUND, demo.BACKGROUND, demo.BOX, demo.BOX):
            app.click(session, at(99 + 9 * len(mode), 200 - 9 * len(mode)), *fields(labels, mode=mode))
            app.undo(session, *fields(labels))
        app.segment(session, *fields(labels))
        app.segment_everything(session, *fields(labels))
        app.download(".png", session, *fields(labels))
    finally:
        handle.remove()
    assert len(passes) == 1


def test_a_click_on_an_object_returns_its_mask_and_its_name(app, session, scene):
    named = 0
    for mask, name in zip(scene.masks, true_names(scene), strict=True):
        app.clear(session, *fields())
        image, result, table, times, _, view, _ = app.click(session, at(*center(mask)), *fields(app.scenes[0][1]))
        (segment,) = shown(app, session)
        assert view == demo.BY_PROMPTS and iou(shrink(segment.mask), mask) > 0.6
        named += segment.label == name
        assert f"{segment.label_score:.2f}" in table and f"Label scores of this mask: {segment.label}" in table
        assert re.match(r"Click to mask: \*\*\d+ ms\*\* \(mask decoder \d+, naming \d+, drawing \d+\)", times)
        assert "without the transfer" in times and re.search(r"Image encoder: once for this image, \*\*\d+", times)
        x, y = map(int, center(mask))
        assert image.value.getpixel((x + 6, y)) == (0, 122, 31) and "1 foreground point" in image.alt_text
        assert segment.label in result.alt_text
    assert named == len(scene.masks)


def test_a_mask_gets_its_name_when_labels_are_entered_after_the_click(app, session, scene):
    app.click(session, at(*center(scene.masks[0])), *fields())
    (segment,) = shown(app, session)
    assert (
        segment.label == "" and "Enter labels or add examples to name the masks" in app.update(session, *fields())[2]
    )
    app.segment(session, *fields(app.scenes[0][1]))
    app.choose_view(session, demo.BY_PROMPTS, *fields(app.scenes[0][1]))
    (segment,) = shown(app, session)
    assert segment.label == true_names(scene)[0]


def test_independent_scores_do_not_depend_on_other_labels_and_can_all_be_low(app, session, scene):
    (name, *_), texts = true_names(scene), []
    for labels in (name, f"{name}, red dotted shape", "red dotted shape, blue lined shape"):
        app.clear(session, *fields(labels))
        table = app.click(session, at(*center(scene.masks[0])), *fields(labels))[2]
        line = re.search(r"Independent of the other labels: (.*?)\.</p>", table)[1]
        texts.append({label: float(score) for label, score in re.findall(r"([a-z ]+) ([01]\.\d\d)", line)})
    scores = [{label.strip(): score for label, score in text.items()} for text in texts]
    assert [len(own) for own in scores] == [1, 2, 2]  # without the background
    assert scores[0][name] == scores[1][name] > 0.5
    assert max(scores[2][label] for label in ("red dotted shape", "blue lined shape")) < 0.5


def test_a_label_below_the_threshold_is_not_shown(app, session, scene):
    labels = "red dotted shape, red meshed shape, red tiled shape"
    app.click(session, at(*center(scene.masks[0])), *fields(labels, background=""))
    assert shown(app, session, 0)[0].label and not shown(app, session, 1)[0].label
    table = app.update(session, *fields(labels, threshold=1))[2]
    assert "no label reaches the threshold" in table and "Label scores of this mask: red" in table


@pytest.mark.parametrize("size", [(512, 512), (900, 600)])
def test_the_mask_of_prompts_is_that_of_the_model(app, session, tmp_path, size):
    original = session.picture.image.resize(size)
    original.save(tmp_path / "photo.png")
    session = app.upload({"path": str(tmp_path / "photo.png")}, None, *fields())[0]
    for mode, x, y in ((demo.FOREGROUND, 140, 90), (demo.BACKGROUND, 300, 300)):
        app.click(session, at(x, y), *fields(mode=mode))
    for with_box in (False, True):
        if with_box:
            app.click(session, at(260, 200), *fields(mode=demo.BOX))
            app.click(session, at(40, 10), *fields(mode=demo.BOX))
        (segment,) = app.segments(session, demo.BY_PROMPTS, session.picture.original_size, 0.5)
        model = SamClipModel.from_pretrained(miniature.checkpoint()).eval()
        processor = SamClipProcessor.from_pretrained(miniature.checkpoint())
        box = {"input_boxes": [[[40, 10, 260, 200]]]} if with_box else {}
        inputs = processor(original, input_points=[[[140, 90], [300, 300]]], input_labels=[[1, 0]], **box)
        with torch.inference_mode():
            outputs = model(**inputs, multimask_output=False)
        expected = processor.post_process_masks(
            outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )[0][0, 0]
        assert segment.mask.shape == size[::-1]
        assert (segment.mask != expected.numpy()).mean() < 1e-4  # coordinates are rounded differently


def test_a_box_has_two_corners_in_any_order(app, session):
    started = demo.Prompts().click(demo.BOX, 200, 30)
    assert started.box is None
    for x, y in ((20, 300), (300, 10)):
        box = started.click(demo.BOX, x, y).box
        assert box == (min(x, 200), min(y, 30), max(x, 200), max(y, 30))
    app.click(session, at(200, 30), *fields(mode=demo.BOX))
    assert shown(app, session) == []
    app.click(session, at(20, 300), *fields(mode=demo.BOX))
    assert len(shown(app, session)) == 1


@pytest.mark.parametrize("second", [(200, 30), (200, 90), (20, 30)])
def test_a_box_without_area_is_refused_and_its_first_corner_stays(app, session, second):
    app.click(session, at(200, 30), *fields(mode=demo.BOX))
    with pytest.warns(UserWarning, match="no area. Click on the opposite corner"):
        assert app.click(session, at(*second), *fields(mode=demo.BOX)) == gr.skip()
    assert session.prompts.corner == (200, 30)


def test_the_first_corner_of_a_box_is_visible_and_the_next_step_is_named(session):
    prompts, image = demo.Prompts(), session.picture.image
    assert prompts.next_step(demo.BOX) == "Click on a corner of the box in the image."
    started = prompts.click(demo.BOX, 200, 30)
    assert started.next_step(demo.BOX) == "Click on the opposite corner of the box in the image."
    changed = np.asarray(started.draw(image)) != np.asarray(image)
    rows, columns = np.nonzero(changed.any(axis=-1))
    assert rows.max() - rows.min() >= 30 and columns.max() - columns.min() >= 30
    assert started.draw(Image.new("RGB", (512, 512), "yellow")) != Image.new("RGB", (512, 512), "yellow")
    other = started.click(demo.FOREGROUND, 10, 10)  # a point in between ends the box
    assert other.corner is None and other.click(demo.BOX, 99, 99).corner == (99, 99)
    assert "select Background point" in other.next_step(demo.FOREGROUND)


def test_undo_returns_to_every_earlier_state_and_also_undoes_clearing(app, session):
    modes = (demo.FOREGROUND, demo.BACKGROUND, demo.BOX, demo.BOX)
    positions = ((140, 90), (300, 300), (20, 20), (400, 400))
    prompts, images = [session.prompts], []
    for mode, position in zip(modes, positions, strict=True):
        images.append(app.click(session, at(*position), *fields(mode=mode))[0].value)
        prompts.append(session.prompts)
    app.clear(session, *fields())
    assert session.prompts == demo.Prompts() and shown(app, session) == []
    for number in (4, 3, 2, 1):
        image = app.undo(session, *fields())[0]
        assert session.prompts == prompts[number] and image.value == images[number - 1]
    image = app.undo(session, *fields())[0]
    assert session.prompts == demo.Prompts() and image.value == session.picture.image
    assert app.undo(session, *fields()) == gr.skip()
    app.clear(session, *fields())
    assert app.undo(session, *fields()) == gr.skip()  # clearing nothing is no step


# ---- examples ----


def best_segment(app, session):
    return max(shown(app, session), key=lambda segment: segment.label_score)


def test_an_example_of_one_image_is_found_in_another(app, session, scene, tmp_path):
    app.click(session, at(*center(scene.masks[3])), *fields())
    *_, name, examples = app.add_example(session, " part <7> ", *fields())
    assert (name, examples) == ("", "<p>Examples: part &lt;7&gt; (1)</p>")
    assert session.view == demo.BY_TEXT
    found = best_segment(app, session)
    assert found.label == "part <7>" and iou(shrink(found.mask), scene.masks[3]) > 0.6

    Image.fromarray(scene.image[:, ::-1]).save(tmp_path / "mirrored.png")
    other = app.upload({"path": str(tmp_path / "mirrored.png")}, session, *fields())[0]
    assert app.list_examples(other) == examples
    app.segment_changes(other, *fields())
    found = best_segment(app, other)
    assert found.label == "part <7>" and iou(shrink(found.mask), scene.masks[3][:, ::-1]) > 0.6
    for word in true_names(scene)[:3]:
        app.segment_changes(other, *fields(word))
        assert {segment.label for segment in shown(app, other)} == {"part <7>", word}

    assert app.remove_examples(other, *fields())[-1] == "" and shown(app, other) == []
    app.segment(other, *fields(word))
    assert {segment.label for segment in shown(app, other)} == {word}


def test_the_vocabulary_of_examples_is_that_of_the_model(app, session, scene):
    app.click(session, at(*center(scene.masks[0])), *fields())
    (segment,) = shown(app, session)
    app.add_example(session, "part 7", *fields("red dotted shape"))
    words = app.model.embed_vocabulary(
        ["red dotted shape"], BACKGROUND_PROMPTS, ["a {}"], app.tokenizer, multi_label=True
    )
    with torch.inference_mode():
        expected = app.model.embed_examples(
            [demo.read_image(session.picture.path)],
            [["part 7"]],
            masks=[[segment.mask]],
            processor=app.processor,
            vocabulary=words,
        )
    own = session.by_text.vocabulary
    assert own.id2label == expected.id2label
    torch.testing.assert_close(own.class_embeds, expected.class_embeds)


@pytest.mark.parametrize(
    ("name", "clicks", "message"),
    [("part", 0, "Click on an object"), (" ", 1, "Enter a name"), ("background", 1, "another name")],
)
def test_an_example_without_a_mask_or_a_name_shows_a_warning(app, session, scene, name, clicks, message):
    for _ in range(clicks):
        app.click(session, at(*center(scene.masks[0])), *fields())
    with pytest.warns(UserWarning, match=message):
        assert app.add_example(session, name, *fields()) == gr.skip()
    assert session.examples == ()


def test_an_example_with_unusable_texts_changes_nothing(app, session, scene):
    app.click(session, at(*center(scene.masks[0])), *fields())
    with pytest.warns(UserWarning, match="must contain {} once"):
        assert app.add_example(session, "part", *fields(template="x")) == gr.skip()
    assert session.examples == ()


@pytest.mark.parametrize("labels", ["", "cat,,"])
def test_removed_examples_name_no_mask(app, session, scene, labels):
    app.click(session, at(*center(scene.masks[0])), *fields())
    app.add_example(session, "part", *fields())
    app.segment_everything(session, *fields())
    assert session.everything.labels is not None
    changes = app.remove_examples(session, *fields(labels))
    assert len(changes) == 8 and changes[-1] == ""
    assert session.examples == () and session.by_text is None and session.classes is None
    assert session.by_prompts.labels is None and session.everything.labels is None


def test_the_number_of_examples_is_limited(app, session, scene, monkeypatch):
    monkeypatch.setattr(demo, "MAX_EXAMPLES", 1)
    app.click(session, at(*center(scene.masks[0])), *fields())
    app.add_example(session, "part", *fields())
    with pytest.warns(UserWarning, match="the maximum"):
        app.add_example(session, "part", *fields())
    assert len(session.examples) == 1


# ---- everything mode ----


@pytest.mark.parametrize("size", [(512, 512), (700, 300), (90, 400)])
def test_segmenting_everything_gives_the_masks_of_the_pipeline(app, session, tmp_path, size):
    session.picture.image.resize(size).save(tmp_path / "other.png")
    session = app.upload({"path": str(tmp_path / "other.png")}, None, *fields())[0]
    *_, view, _ = app.segment_everything(session, *fields())
    found = shown(app, session)
    generate = pipeline("mask-generation", model=miniature.checkpoint())
    expected = generate(session.picture.image, **miniature.MASK_GENERATION)
    assert view == demo.EVERYTHING and len(expected["masks"]) >= 3 and len(found) == len(expected["masks"])
    for segment, mask, score in zip(found, expected["masks"], expected["scores"].tolist(), strict=True):
        # The encoder's input is the original image, and the pipeline's the displayed one.
        assert segment.iou_score == pytest.approx(score, abs=0.02) and iou(segment.mask, np.asarray(mask)) > 0.9


def test_masks_of_everything_mode_have_names_and_the_threshold_of_the_predicted_iou_is_used(app, session, scene):
    app.segment_everything(session, *fields(app.scenes[0][1]))
    found = shown(app, session)
    for mask, name in zip(scene.masks, true_names(scene), strict=True):
        best = max(found, key=lambda segment: iou(shrink(segment.mask), mask))
        assert best.label == name
    app.segment_everything(session, *fields(app.scenes[0][1], pred_iou_thresh=0.85))
    assert 0 < len(shown(app, session)) < len(found)
    assert all(segment.iou_score > 0.85 for segment in shown(app, session))
    table = app.segment_everything(session, *fields(app.scenes[0][1], pred_iou_thresh=1))[2]
    assert "No mask reaches the threshold of the predicted IoU" in table


def test_the_app_works_with_the_pillow_image_processor(app, monkeypatch):
    """The package uses this image processor if torchvision is not installed."""

    def use():
        session, *_, labels = app.choose(0, None, *fields())
        results = []
        for event in (app.segment, app.segment_everything):
            event(session, *fields(labels))
            results.append([segment.label for segment in shown(app, session)])
        app.click(session, at(99, 99), *fields(labels))
        return [*results, [segment.label for segment in shown(app, session)]]

    expected = use()
    monkeypatch.setattr(app, "image_processor", SamClipImageProcessorPil.from_pretrained(miniature.checkpoint()))
    assert use() == expected and all(expected)


# ---- downloads and colors ----


@pytest.mark.parametrize("view", [demo.BY_TEXT, demo.BY_PROMPTS, demo.EVERYTHING])
def test_downloads_contain_the_shown_masks(app, session, scene, view):
    values = fields(app.scenes[0][1])
    app.click(session, at(*center(scene.masks[0])), *values)
    app.segment_everything(session, *values)
    app.segment(session, *values)
    result = app.choose_view(session, view, *values)[1]
    record = json.loads(Path(app.download(".json", session, *values)).read_text())
    masks = record["segments" if view == demo.BY_TEXT else "masks"]
    found = shown(app, session)
    assert len(masks) == len(found) >= 1
    for one, segment in zip(masks, found, strict=True):
        assert np.array_equal(decode_rle(one["segmentation"]), segment.mask)
        assert one["area"] == segment.mask.sum() and (one["label"] or "") == segment.label
        label_score, score = ("score", None) if view == demo.BY_TEXT else ("label_score", segment.iou_score)
        assert one.get(label_score) == segment.label_score and (score is None or one["score"] == score)
        if view == demo.BY_PROMPTS:
            assert one["points"] == [list(center(scene.masks[0]))] and one["point_labels"] == [1]
    image = Image.open(app.download(".png", session, *values))
    assert np.array_equal(np.asarray(image)[:512, :512], np.asarray(result.value))
    assert image.height > 512  # a line about the miniature


def test_the_download_of_a_large_photograph_has_its_original_size(app, session, scene, tmp_path):
    session.picture.image.resize((1600, 1200)).save(tmp_path / "photo.jpg")
    values = fields(app.scenes[0][1])
    session = app.upload({"path": str(tmp_path / "photo.jpg"), "orig_name": "photo.jpg"}, None, *values)[0]
    assert session.picture.size == (768, 1024)
    app.segment_everything(session, *values)
    app.segment(session, *values)
    for view in (demo.BY_TEXT, demo.EVERYTHING):
        result = app.choose_view(session, view, *values)[1].value
        masks = [segment.mask for segment in app.segments(session, view, (1200, 1600), 0.5)]
        for large, segment in zip(masks, shown(app, session), strict=True):
            assert large.shape == (1200, 1600)
            small = np.asarray(Image.fromarray(large).resize((1024, 768), Image.Resampling.NEAREST))
            assert iou(small, segment.mask) > 0.95
        image = Image.open(app.download(".png", session, *values))
        assert image.width == 1600 and image.height >= 1200
        reduced = np.asarray(image.crop((0, 0, 1600, 1200)).resize((1024, 768))).astype(int)
        inside = np.any([segment.mask for segment in shown(app, session)], axis=0)
        differences = np.abs(reduced - np.asarray(result)).max(axis=-1)[inside]
        assert np.median(differences) < 12  # the same colors and opacity


def test_a_download_with_too_many_large_masks_shows_a_warning(app, session, monkeypatch):
    values = fields(app.scenes[0][1])
    app.segment(session, *values)
    count = len(shown(app, session))
    monkeypatch.setattr(demo, "MAX_MASK_BYTES", count * 512 * 512)
    assert app.download(".json", session, *values)
    monkeypatch.setattr(demo, "MAX_MASK_BYTES", count * 512 * 512 - 1)
    for suffix in (".json", ".png"):
        with pytest.warns(UserWarning, match=f"{count} masks in the original size need too much memory. Raise the"):
            assert app.download(suffix, session, *values) is None


def test_a_download_without_masks_shows_a_warning(app, session):
    with pytest.warns(UserWarning, match="no masks to download. Enter labels"):
        assert app.download(".png", session, *fields()) is None


def test_colors_of_masks_differ_from_the_image_and_from_each_other():
    rng = np.random.default_rng(0)
    masks = rng.random((6, 32, 48)) > 0.7
    for color in ("red", "yellow", "lime", "blue", "white", "black", "gray"):
        image = Image.new("RGB", (48, 32), color)
        colors = [np.array(color_of(number), float) for number in demo.contrasting_colors(image, masks[:, None])]
        assert np.linalg.norm(colors[0] - image.getpixel((0, 0))) > 180
        distances = [np.linalg.norm(a - b) for i, a in enumerate(colors) for b in colors[:i]]
        assert min(distances) > 60
    assert len(demo.contrasting_colors(image, [masks[:1]] * 60)) == 60  # more labels than colors


# ---- visitors ----


def test_callbacks_without_an_image_show_a_warning(app):
    for callback in (
        lambda: app.click(None, at(1, 1), *fields()),
        lambda: app.segment(None, *fields("red dotted shape")),
        lambda: app.segment_everything(None, *fields()),
    ):
        with pytest.warns(UserWarning, match="Open an image or choose an example"):
            assert callback() == gr.skip()
    assert app.clear(None, *fields()) == app.undo(None, *fields()) == app.update(None, *fields()) == gr.skip()
    with pytest.warns(UserWarning, match="Open an image or choose an example"):
        assert app.download(".png", None, *fields()) is None


def test_results_of_an_image_that_was_replaced_or_removed_are_not_shown(app, session):
    for replace_image in (app.remove, lambda *values: app.choose(1, *values)):
        old = app.choose(0, None, *fields())[0]
        replace_image(old, *fields())
        for event in (app.segment_everything, app.segment):
            assert event(old, *fields("red dotted shape")) == [gr.skip()] * 7


def test_text_embedding_is_serialized(app, monkeypatch):
    """Callbacks run in threads, and tokenizers are not thread-safe."""
    running, counts, embed = [], [], app.model.embed_vocabulary

    def embed_and_count(*arguments, **options):
        running.append(1)
        counts.append(len(running))
        time.sleep(0.05)
        vocabulary = embed(*arguments, **options)
        running.pop()
        return vocabulary

    sessions = [app.choose(0, None, *fields())[0] for _ in range(4)]
    monkeypatch.setattr(app.model, "embed_vocabulary", embed_and_count)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda session, name: app.segment(session, *fields(name)), sessions, CLASS_NAMES[:4]))
    assert counts == [1] * 4


def test_concurrent_sessions_do_not_mix(app):
    """Callbacks run in threads."""

    def visit(number):
        session, *_, labels = app.choose(number % 4, None, *fields())
        found = []
        for event in (lambda *values: app.click(values[0], at(150, 150), *values[1:]), app.segment):
            event(session, *fields(labels))
            found += shown(app, session)
        return found

    alone = [visit(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(visit, range(16)))
    for number, found in enumerate(together):
        for segment, expected in zip(found, alone[number % 4], strict=True):
            assert segment.label == expected.label and np.array_equal(segment.mask, expected.mask)


def test_events_of_one_visitor_at_the_same_time_keep_each_others_results(app):
    """A click on the image takes the focus from the field with the labels, and both events run in threads."""
    session, *_, labels = app.choose(0, None, *fields())
    with ThreadPoolExecutor(2) as pool:
        events = [
            pool.submit(app.segment_changes, session, *fields(labels)),
            pool.submit(app.click, session, at(99, 99), *fields(labels)),
        ]
        [event.result() for event in events]
    assert session.by_text is not None and session.by_prompts is not None


# ---- start ----


def test_models_of_the_command_line_are_described_in_the_page(app, tmp_path):
    assert "drawn scenes only" in app.describe() and "shipped miniature (2 million" in app.describe()
    SamClipModel.from_pretrained(miniature.checkpoint(), dtype=torch.bfloat16).save_pretrained(tmp_path)
    SamClipProcessor.from_pretrained(miniature.checkpoint()).save_pretrained(tmp_path)
    other = start("--model", str(tmp_path))
    assert str(tmp_path) in other.describe() and "miniature" not in other.describe()
    assert other.scenes == [] and other.mask_generation == MASK_GENERATION_DEFAULTS
    session = other.upload({"path": shutil.copy(app.scenes[0][0], tmp_path)}, None, *fields())[0]  # in bfloat16
    other.segment(session, *fields(app.scenes[0][1]))
    assert shown(other, session)
    other.click(session, at(99, 200), *fields(app.scenes[0][1]))
    assert shown(other, session)
    assert other.segment_everything(session, *fields())[3].startswith("Everything")


def test_an_unmerged_model_works(app, scene):
    other = start("--sam", miniature.sam_teacher(), "--clip", miniature.clip_teacher())
    session, *_, labels = other.choose(0, None, *fields())
    other.segment(session, *fields(labels))
    assert {segment.label for segment in shown(other, session)} == set(true_names(scene))
    other.click(session, at(*center(scene.masks[1])), *fields(labels))
    assert shown(other, session)[0].label == true_names(scene)[1]
    other.description.pop("note")
    other.is_miniature = False
    assert re.search(r"Masks by \*\*.*sam\*\*, labels by \*\*.*clip\*\*", other.describe())


def test_a_model_without_a_text_tower_shows_a_warning_for_labels(app, tmp_path):
    SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).drop_text_tower().save_pretrained(tmp_path)
    SamClipProcessor.from_pretrained(miniature.checkpoint()).save_pretrained(tmp_path)
    other = start("--model", str(tmp_path))
    session = other.upload({"path": shutil.copy(app.scenes[0][0], tmp_path)}, None, *fields())[0]
    with pytest.warns(UserWarning, match="no text tower"):
        assert other.segment(session, *fields("red dotted shape")) == gr.skip()
    other.click(session, at(99, 200), *fields("red dotted shape"))
    assert shown(other, session)


@pytest.fixture
def annotated(tmp_path, monkeypatch):
    """A folder with a dataset of `samclip annotate`, and the images to review in their order."""
    monkeypatch.chdir(tmp_path)
    Path("scenes").mkdir()
    for index in range(3):
        Image.fromarray(render(seed=0, index=index).image).save(f"scenes/{index}.png")
    labels = "red fuzzy shape|rug, green zigzag shape"
    command = ["annotate", "scenes", "--labels", labels, "--background", "an empty scene", "--template", "a {}"]
    assert samclip_main([*command, "--threshold", "0.3", "--review", "2", "--output", "annotated"]) == 0
    return [entry["image"] for entry in json.loads(Path("annotated/review.json").read_text())["images"]]


def test_uncertain_images_are_opened_with_the_options_of_the_data_set(app, annotated):
    review = demo.read_review("annotated/review.json")
    labels = "red fuzzy shape|rug, green zigzag shape"
    assert review[:5] == (annotated, labels, "an empty scene", "a {}", 0.3)
    reviewing = demo.App(load_model(start_arguments()), app.mask_generation, review)
    session, *_, own = reviewing.choose(0, None, *fields(labels))
    assert own == labels and session.picture.name == Path(annotated[0]).name
    reviewing.segment(session, *fields(labels, background="an empty scene", threshold=0.3))
    size = session.picture.original_size
    found = reviewing.segments(session, session.view, size, 0.3)
    results = [json.loads(line) for line in Path("annotated/results.jsonl").read_text().splitlines()]
    (expected,) = [line["segments"] for line in results if line.get("image") == annotated[0]]
    assert [segment.label for segment in found] == [segment["label"] for segment in expected]
    assert [segment.mask.sum() for segment in found] == [segment["area"] for segment in expected]
    with Image.open(demo.thumbnail(annotated[0])) as thumbnail:
        assert thumbnail.size == (IMAGE_SIZE, IMAGE_SIZE)


def test_an_image_of_a_review_that_was_changed_shows_a_warning(app, annotated, recwarn):
    reviewing = demo.App(load_model(start_arguments()), app.mask_generation, demo.read_review("annotated/review.json"))
    labels = fields("red fuzzy shape, green zigzag shape", threshold=0.0)
    session = reviewing.choose(0, None, *labels)[0]
    reviewing.segment(session, *labels)
    assert reviewing.download(".png", session, *labels) is not None
    assert not [warning for warning in recwarn if warning.category is UserWarning]
    Image.fromarray(render(seed=0, index=9).image).save(annotated[0])
    with pytest.warns(UserWarning, match=r"The file of the image has changed\. Open it again"):
        assert reviewing.download(".png", session, *labels) is None
    with pytest.warns(UserWarning, match=r"The file was changed after it was annotated"):
        assert reviewing.choose(0, session, *labels)[0] is not session
    Path(annotated[0]).unlink()
    with pytest.warns(UserWarning, match="cannot be read: No such file"):
        assert reviewing.choose(0, session, *labels)[0] is session


def test_images_of_a_review_that_the_app_cannot_open_are_left_out_and_named(annotated, monkeypatch, capsys):
    Path(annotated[0]).write_bytes(b"no image")
    assert demo.read_review("annotated/review.json").paths == annotated[1:]
    assert f"{annotated[0]} is left out" in capsys.readouterr().err
    monkeypatch.setattr(demo, "MAX_MEGAPIXELS", 0.001)
    with pytest.raises(ValueError, match="none of the 2 images can be opened"):
        demo.read_review("annotated/review.json")
    assert "too large" in capsys.readouterr().err


@pytest.mark.parametrize("option", [{"labels": 5}, {"template": None, "tile": None}])
def test_an_incomplete_report_of_a_review_is_refused(annotated, option):
    report = json.loads(Path("annotated/report.json").read_text())
    report["run"]["options"] |= option
    if "tile" in option:
        del report["run"]["options"]["tile"]
    Path("annotated/report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"must be the review\.json"):
        demo.read_review("annotated/review.json")


def test_a_review_without_images_is_refused(annotated):
    review = Path("annotated/review.json")
    review.write_text(json.dumps(json.loads(review.read_text()) | {"images": []}))
    with pytest.raises(ValueError, match=r"no image has annotations.*lower --threshold"):
        demo.read_review(str(review))


def test_reviews_that_cannot_be_opened_are_refused(app, annotated):
    for path in ("annotated/report.json", "annotated/no.json", "scenes/0.png"):
        with pytest.raises(ValueError, match=r"must be the review\.json"):
            demo.read_review(path)
    report = json.loads(Path("annotated/report.json").read_text())
    review = demo.read_review("annotated/review.json")
    report["run"]["options"]["tile"] = 64
    Path("annotated/report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="--tile"):
        demo.read_review("annotated/review.json")
    other = review._replace(model={"sam": "a", "clip": "b"})
    with pytest.raises(ValueError, match="pass --sam a and --clip b"):
        demo.App(load_model(start_arguments()), app.mask_generation, other)
    Path(annotated[1]).unlink()
    with pytest.raises(ValueError, match=r"is not a file\. Start the app in the folder"):
        demo.read_review("annotated/review.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", miniature.sam_teacher()], "--sam"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--sam", miniature.sam_teacher()], "--sam needs --clip"),
        (["--model", miniature.checkpoint(), "--sam", miniature.sam_teacher()], "pass either --model, or --sam"),
    ],
)
def test_other_models_and_missing_folders_exit_with_a_message(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    monkeypatch.setenv("SAMCLIP_CHECKPOINT", "/also/nowhere")
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert message in capsys.readouterr().err


def test_the_variable_is_used_without_an_argument_and_the_old_argument_warns(monkeypatch, capsys):
    monkeypatch.setenv("SAMCLIP_CHECKPOINT", "/nowhere/by-variable")
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert "/nowhere/by-variable" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["app.py", "/nowhere/by-argument"])
    with pytest.raises(SystemExit, match="2"), pytest.warns(FutureWarning, match="--model"):
        demo.main()
    assert "/nowhere/by-argument" in capsys.readouterr().err


def test_the_demo_folder_is_a_space():
    _, front, _ = (DEMO / "README.md").read_text().split("---\n", 2)
    space = yaml.safe_load(front)
    assert space["sdk"] == "gradio" and (DEMO / space["app_file"]).is_file()
    assert space["sdk_version"] == "6.31.0"
    requirements = (DEMO / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("samclip-hf") for line in requirements)


# ---- the page ----

TIMEOUT = 300  # seconds until a condition is an error, enough for a busy machine
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-quic",
)
needs_chromium = pytest.mark.skipif(
    shutil.which("chromedriver") is None or not (shutil.which("chromium") or shutil.which("google-chrome")),
    reason="the tests of the page need chromium and chromedriver, which `make test-app` installs on Debian as root",
)

# Python imports this at startup. Connections to other hosts raise an error, because the app must work offline.
NO_NETWORK = """
import ipaddress, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", None, "") and not ipaddress.ip_address(host).is_loopback:
            print("OUTSIDE", host, file=sys.stderr, flush=True)
            raise OSError("no network in the tests")

def hook(event, arguments):
    try:
        refuse(event, arguments)
    except ValueError:
        print("OUTSIDE", arguments, file=sys.stderr, flush=True)
        raise OSError("no network in the tests") from None

sys.addaudithook(hook)
"""


class Server:
    """Runs `python demo/app.py` in a new process, on a free port."""

    def __init__(self, folder: Path):
        (folder / "sitecustomize.py").write_text(NO_NETWORK)
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(folder)}
        for name in ("SAMCLIP_CHECKPOINT", "GRADIO_ANALYTICS_ENABLED", "GRADIO_SERVER_PORT"):
            environment.pop(name, None)
        self.log = folder / "log"
        with self.log.open("w") as log:
            command = [sys.executable, str(DEMO / "app.py")]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def url(self) -> str:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text()):
                return found[0]
            time.sleep(0.1)
        raise RuntimeError(f"The app did not start:\n{self.log.read_text()}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


class Page:
    """The page of the app in a new Chromium."""

    def __init__(self, url: str, folder: Path):
        options = webdriver.ChromeOptions()
        for option in (*OPTIONS, f"--user-data-dir={tempfile.mkdtemp(dir=folder)}"):
            options.add_argument(option)
        self.downloads = Path(tempfile.mkdtemp(dir=folder))
        options.add_experimental_option("prefs", {"download.default_directory": str(self.downloads)})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.resize(1280, 1100)
        self.driver.get("about:blank")
        self.driver.get_log("performance")  # discard the requests of the new tab
        self.open(url)

    def open(self, url: str) -> None:
        """Opens the page with a new session and waits for the masks of the first example."""
        self.driver.get(url)
        self.until(lambda: self.rows() and self.line().startswith("Labels to masks") and "no masks" not in self.alt())

    def resize(self, width: int, height: int) -> None:
        """Sets the size of the page, without the frame of the window."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 640}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def until(self, condition):
        """Waits for a condition and then for two frames, after which all outputs of the same event are shown."""
        wait = WebDriverWait(
            self.driver, TIMEOUT, poll_frequency=0.05, ignored_exceptions=[StaleElementReferenceException]
        )
        result = wait.until(lambda _: condition())
        frames = "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(arguments[0])))"
        self.driver.execute_async_script(frames)
        return result

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent.trim())"
        return self.driver.execute_script(script, selector)

    def rows(self) -> list[str]:
        """The first column of the table of masks."""
        return self.texts("#table td:first-child")

    def line(self) -> str:
        """The line of durations."""
        return " ".join(self.texts("#times p"))

    def durations_without_drawing(self) -> list[str]:
        """The durations of the text tower and the segmentation in the line."""
        return re.findall(r"(?:text tower|segmentation) \d+", self.line())

    def alt(self) -> str:
        """The text alternative of the result, which changes together with the result: "photo.jpg, 1 mask: cat"."""
        return self.find("#result img").get_attribute("alt")

    def next_step(self) -> str:
        return " ".join(self.texts("#next_step p"))

    def images(self, panel: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(image => image.src)"
        return self.driver.execute_script(script, f"#{panel} img")

    def pixels(self, panel: str) -> np.ndarray:
        """A screenshot of an image after it is loaded, with the pointer elsewhere."""
        ActionChains(self.driver, duration=0).move_to_element(self.find("h2")).perform()
        self.wait_for_image(panel)
        screenshot = self.find(f"#{panel} img").screenshot_as_png
        return np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB")).astype(int)

    def wait_for_image(self, panel: str) -> None:
        script = (
            "return (image => image && image.complete && image.naturalWidth)(document.querySelector(arguments[0]))"
        )
        self.until(lambda: self.driver.execute_script(script, f"#{panel} img"))

    def after(self, action, *panels: str) -> None:
        """Runs an action and waits until one of the images of the panels has changed."""
        before = [self.images(panel) for panel in panels]
        action()
        self.until(lambda: [self.images(panel) for panel in panels] != before)

    def click_image(self, x: float, y: float) -> None:
        """Clicks at x and y, as fractions of the image, and waits for the result."""
        self.wait_for_image("input_image")  # Gradio ignores clicks on an image that is not loaded yet
        image = self.find("#input_image img")
        offset = (round((x - 0.5) * image.size["width"]), round((y - 0.5) * image.size["height"]))
        click = ActionChains(self.driver, duration=0).move_to_element_with_offset(image, *offset).click()
        self.after(click.perform, "input_image")

    def click_object(self, scene_number: int, mask_number: int) -> None:
        mask = render(seed=0, index=demo.EXAMPLE_SCENES[scene_number]).masks[mask_number]
        self.click_image(*(side / 512 for side in center(mask)))

    def choose_scene(self, number: int) -> None:
        self.after(self.driver.find_elements(By.CSS_SELECTOR, "#scenes .gallery-item")[number].click, "input_image")
        names = {CLASS_NAMES[i] for i in render(seed=0, index=demo.EXAMPLE_SCENES[number]).class_ids}
        self.until(lambda: set(self.rows()) == names)

    def enter(self, field: str, text: str, key: str) -> None:
        element = self.find(f"#{field} :is(input, textarea)")
        element.send_keys(Keys.CONTROL, "a")
        element.send_keys(text, key)

    def press(self, button: str) -> None:
        self.find(f"#{button}").click()

    def add_example(self, name: str) -> None:
        """Opens the section and adds the clicked object."""
        self.find("#find button").click()
        self.until(lambda: self.find("#object_name :is(input, textarea)").is_displayed())
        self.enter("object_name", name, "")
        self.press("add_example")

    def open_settings(self) -> None:
        self.find("#settings button").click()
        self.until(lambda: self.find("#background :is(input, textarea)").is_displayed())

    def set_slider(self, name: str, value: float) -> None:
        script = """const range = document.querySelector(arguments[0] + " input[type=range]");
            range.value = arguments[1];
            range.dispatchEvent(new Event("input", {bubbles: true}))"""

        def is_set() -> bool:
            self.driver.execute_script(script, f"#{name}", value)
            return float(self.find(f"#{name} input[type=number]").get_attribute("value")) == value

        self.until(is_set)
        release = "document.querySelector(arguments[0]).dispatchEvent(new Event('pointerup', {bubbles: true}))"
        self.driver.execute_script(release, f"#{name} input[type=range]")

    def choose(self, radio: str, name: str) -> None:
        options = self.driver.find_elements(By.CSS_SELECTOR, f"#{radio} label")
        next(label for label in options if label.text == name).click()

    def checked(self, radio: str) -> str:
        return self.find(f"#{radio} label:has(input:checked)").text

    def remove_image(self) -> None:
        self.find("#input_image button[title='Remove Image']").click()
        self.until(lambda: not self.images("input_image"))

    def upload(self, path: Path) -> None:
        self.dismiss()
        self.find("#input_image input[type=file]").send_keys(str(path))

    def message(self) -> str:
        self.until(lambda: self.texts(".toast-message-text"))
        return " ".join(self.texts(".toast-message-text"))

    def dismiss(self) -> None:
        for button in self.driver.find_elements(By.CSS_SELECTOR, ".toast-close"):
            self.driver.execute_script("arguments[0].click()", button)
        self.until(lambda: not self.texts(".toast-body"))

    def download(self, button: str) -> Path:
        """Presses a button and waits for its file."""
        before = set(self.downloads.iterdir())
        self.press(button)

        def finished() -> Path | None:
            """Chromium writes a hidden file or one that ends in .crdownload first."""
            files = set(self.downloads.iterdir()) - before
            if any(file.name.startswith(".") or file.suffix == ".crdownload" for file in files):
                return None
            return next(iter(files), None)

        return self.until(finished)

    def external_requests(self) -> list[str]:
        """URLs that the page requested from other hosts."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        requested = (m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent")
        return [url for url in requested if url.startswith("http") and not url.startswith("http://127.0.0.1:")]

    def console_errors(self) -> list[dict]:
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def low_contrasts(self) -> list:
        """Visible texts with a contrast ratio below 4.5 to the color behind them: text, color, background, ratio."""
        return self.driver.execute_script(LOW_CONTRASTS)


NO_TRANSITION = "return !document.getAnimations().some(animation => animation instanceof CSSTransition)"
# WCAG 2.2, success criterion 1.4.3. Transparent backgrounds are blended with those of the parents.
LOW_CONTRASTS = """
const parse = (color) => {
  const parts = color.match(/[\\d.]+/g).map(Number);
  return color.startsWith("color(srgb") ? [...parts.slice(0, 3).map(part => 255 * part), parts[3] ?? 1]
    : [...parts.slice(0, 3), parts[3] ?? 1];
};
const luminance = (color) => {
  const [r, g, b] = color.map(part => part / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]);
const behind = (element) => {
  if (!element) return [255, 255, 255];
  return over(parse(getComputedStyle(element).backgroundColor), behind(element.parentElement));
};
const walker = document.createTreeWalker(document.querySelector("gradio-app") ?? document.body, NodeFilter.SHOW_TEXT);
const found = [];
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const element = node.parentElement, text = node.textContent.trim(), box = element.getBoundingClientRect();
  if (!text || ["SCRIPT", "STYLE"].includes(element.tagName) || box.width < 2 || !element.checkVisibility()) continue;
  const background = behind(element), color = over(parse(getComputedStyle(element).color), background);
  const [low, high] = [luminance(color), luminance(background)].sort((a, b) => a - b);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < 4.5) found.push([text.slice(0, 40), color, background, ratio]);
}
return found;
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()
    log = server.log.read_text()
    assert "OUTSIDE" not in log and "Traceback" not in log, log


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    page = Page(server.url(), tmp_path_factory.mktemp("browser"))
    yield page
    page.driver.quit()


@pytest.fixture
def page(browser, server):
    """A page with a new session, in the same browser."""
    browser.resize(1280, 1100)
    browser.open(server.url())
    browser.console_errors()  # discard those of the previous page
    yield browser
    assert browser.external_requests() == []
    assert browser.console_errors() == []


def image_names(number: int) -> list[str]:
    return true_names(render(seed=0, index=demo.EXAMPLE_SCENES[number]))


@pytest.mark.browser
@needs_chromium
class TestPage:
    def test_the_page_opens_with_an_example_and_says_what_the_miniature_can_do(self, page, app):
        assert "This model works on drawn scenes only" in page.find("#note").text
        assert "--sam facebook/sam-vit-base --clip openai/clip-vit-base-patch16" in page.find("#note").text
        assert set(page.rows()) == set(image_names(0))
        assert re.search(r"Image encoder: once for this image, \d+ ms. Measured on the server", page.line())
        assert len(page.driver.find_elements(By.CSS_SELECTOR, "#scenes .gallery-item")) == len(app.scenes)

    def test_a_click_on_an_object_shows_its_mask_and_its_name_in_both_images(self, page):
        page.choose_scene(1)
        encoder = page.line().partition("Image encoder")[2]
        untouched, result = page.pixels("input_image"), page.pixels("result")
        page.click_object(1, 0)
        assert page.rows() == [image_names(1)[0]] and page.checked("view") == demo.BY_PROMPTS
        assert re.match(r"Click to mask: \d+ ms \(mask decoder \d+, naming \d+, drawing \d+\)", page.line())
        assert page.line().partition("Image encoder")[2] == encoder  # the image was not encoded again
        assert (np.abs(page.pixels("input_image") - untouched).max(axis=-1) > 60).mean() > 0.02
        assert (np.abs(page.pixels("result") - result).max(axis=-1) > 60).mean() > 0.02
        page.choose("view", demo.BY_TEXT)
        page.until(lambda: set(page.rows()) == set(image_names(1)))

    def test_undo_and_clear_change_the_image_back(self, page):
        untouched = page.pixels("input_image")
        page.click_image(0.53, 0.4)
        one = page.pixels("input_image")
        page.choose("mode", demo.BACKGROUND)
        page.click_image(0.2, 0.75)
        for expected in (one, untouched):
            page.after(lambda: page.press("undo"), "input_image")
            assert np.abs(page.pixels("input_image") - expected).max() < 30  # JPEG
        page.click_image(0.53, 0.4)
        page.after(lambda: page.press("clear"), "input_image")
        assert np.abs(page.pixels("input_image") - untouched).max() < 30
        page.until(lambda: "Click on an object" in page.texts("#table")[0])

    def test_labels_take_effect_on_enter_with_the_button_and_when_the_field_loses_focus(self, page):
        page.choose_scene(1)
        names = list(dict.fromkeys(image_names(1)))
        page.enter("labels", names[0], Keys.ENTER)
        page.until(lambda: set(page.rows()) == {names[0]})
        page.enter("labels", ", ".join(names[:2]), Keys.TAB)
        page.until(lambda: set(page.rows()) == set(names[:2]))
        page.click_object(1, 0)
        page.enter("labels", ", ".join(names), "")
        page.press("segment")
        page.until(lambda: set(page.rows()) == set(names) and page.checked("view") == demo.BY_TEXT)
        # The button draws the result of the field's event again, but does not compute it again.
        durations = page.durations_without_drawing()
        page.find("#labels :is(input, textarea)").click()
        page.find("h2").click()  # nothing has changed
        page.choose("mode", demo.BOX)  # a later event
        page.until(lambda: "on a corner" in page.next_step())
        assert page.durations_without_drawing() == durations
        scores = page.texts("#table td")
        page.open_settings()
        page.enter("template", "one {} in a picture", Keys.TAB)
        page.until(lambda: page.texts("#table td") != scores)

    def test_invalid_labels_show_a_message_and_change_nothing(self, page):
        rows = page.rows()
        page.enter("labels", "green tiled shape, green tiled shape", Keys.ENTER)
        assert "has repeated names: green tiled shape" in page.message()
        page.dismiss()
        page.enter("labels", " , ", Keys.ENTER)
        assert 'The field "Labels" is empty: enter comma-separated names' in page.message()
        assert page.rows() == rows and "Error" not in page.find("body").text

    def test_the_score_threshold_and_the_opacity_change_the_result(self, page):
        names = {"yellow dotted shape", "yellow meshed shape", "yellow tiled shape"}
        assert not set(page.rows()) <= names
        page.enter("labels", ", ".join(sorted(names)), Keys.ENTER)
        page.until(lambda: set(page.rows()) <= names)
        page.set_slider("threshold", 1)
        page.until(lambda: not page.rows() and "no masks" in page.alt())
        page.set_slider("threshold", 0)
        page.until(lambda: page.rows() and "no masks" not in page.alt())
        page.open_settings()
        screenshots = {}
        for opacity in (0.01, 0.3, 0.9):
            page.after(lambda opacity=opacity: page.set_slider("opacity", opacity), "result")
            screenshots[opacity] = page.pixels("result")
        faint, strong = (np.abs(screenshots[opacity] - screenshots[0.01]).sum() for opacity in (0.3, 0.9))
        assert 2 < strong / faint < 4

    def test_the_keyboard_changes_the_sliders(self, page):
        page.find("#threshold input[type=range]").send_keys(Keys.END)
        page.until(lambda: "Lower the score threshold" in page.texts("#table")[0])
        number = page.find("#threshold input[type=number]")
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys("0.3", Keys.ENTER)
        page.until(lambda: set(page.rows()) == set(image_names(0)))

    def test_a_cleared_number_field_of_a_slider_has_its_default(self, page, server):
        page.find("#threshold input[type=range]").send_keys(Keys.END)
        page.until(lambda: "Lower the score threshold" in page.texts("#table")[0])
        number = page.find("#threshold input[type=number]")
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys(Keys.DELETE, Keys.ENTER)
        page.until(lambda: set(page.rows()) == set(image_names(0)))
        assert "Traceback" not in server.log.read_text()

    def test_a_clicked_object_is_found_in_another_image(self, page, tmp_path):
        word = true_names(render(seed=0, index=demo.EXAMPLE_SCENES[0]))[0]
        page.enter("labels", word, Keys.ENTER)
        page.until(lambda: set(page.rows()) == {word})
        page.click_object(0, 3)
        page.add_example("part 7")
        page.until(lambda: set(page.rows()) == {"part 7", word})
        page.until(lambda: page.texts("#examples p") == ["Examples: part 7 (1)"])
        Image.fromarray(render(seed=0, index=demo.EXAMPLE_SCENES[0]).image[:, ::-1]).save(tmp_path / "mirrored.png")
        page.upload(tmp_path / "mirrored.png")
        page.until(lambda: page.alt().startswith("mirrored.png") and "part 7" in page.rows())
        page.press("remove_examples")
        page.until(lambda: set(page.rows()) == {word} and not page.texts("#examples p"))
        page.press("add_example")
        assert "Click on an object first" in page.message()

    def test_segmenting_everything_shows_named_masks(self, page):
        page.choose_scene(5)
        page.press("segment_everything")
        page.until(lambda: page.line().startswith("Everything") and set(image_names(5)) <= set(page.rows()))
        assert page.checked("view") == demo.EVERYTHING

    def test_downloads_contain_the_shown_masks(self, page, app):
        session, *_, labels = app.choose(0, None, *fields())
        app.segment(session, *fields(labels))
        record = json.loads(page.download("download_json").read_text())
        found = shown(app, session)
        assert [one["label"] for one in record["segments"]] == page.rows() == [segment.label for segment in found]
        for one, segment in zip(record["segments"], found, strict=True):
            assert np.array_equal(decode_rle(one["segmentation"]), segment.mask)
        file = page.download("download_png")
        assert file.name == f"scene{demo.EXAMPLE_SCENES[0]}_masks.png"
        result = page.pixels("result")
        image = Image.open(file).convert("RGB").crop((0, 0, 512, 512)).resize(result.shape[1::-1])
        assert np.abs(np.asarray(image) - result).mean() < 6  # the page has a JPEG
        page.choose("view", demo.EVERYTHING)
        page.until(lambda: "Press Segment everything" in page.texts("#table")[0])
        page.press("download_json")
        assert "There are no masks to download" in page.message()

    @pytest.mark.parametrize("name", [*INVALID_FILES, "notes.txt"])
    def test_an_invalid_file_shows_a_message_and_changes_nothing(self, page, tmp_path, name):
        content, message = INVALID_FILES.get(name, (b"text", "Invalid file type"))  # Gradio rejects notes.txt
        (tmp_path / name).write_bytes(content)
        page.click_image(0.53, 0.4)
        rows, encoder = page.rows(), page.line().partition("Image encoder")[2]
        page.upload(tmp_path / name)
        assert message in page.message()
        page.until(lambda: page.images("input_image"))
        assert page.rows() == rows and page.line().partition("Image encoder")[2] == encoder
        assert "Traceback" not in page.driver.page_source
        page.click_image(0.2, 0.75)
        assert page.rows()

    def test_removing_the_image_removes_it_everywhere(self, page, tmp_path):
        page.click_image(0.53, 0.4)
        page.remove_image()
        page.until(lambda: not any(map(page.images, ("input_image", "result"))))
        page.until(lambda: not page.rows() and not page.line() and not page.texts("#classes dd"))
        page.until(lambda: "Drop an image" in page.next_step())
        for button in ("segment_everything", "segment", "download_png"):
            page.press(button)
            assert "Open an image or choose an example" in page.message()
            page.dismiss()
        (tmp_path / "empty.png").write_bytes(b"")
        page.upload(tmp_path / "empty.png")
        assert "empty" in page.message()
        page.until(lambda: not any(map(page.images, ("input_image", "result"))))
        page.choose_scene(0)
        page.until(lambda: page.images("input_image") and page.images("result"))

    def test_results_of_an_image_that_was_removed_are_not_shown(self, page):
        page.press("segment_everything")
        page.remove_image()
        time.sleep(4)  # longer than everything mode takes
        assert not page.images("result") and not page.line()

    def test_removing_the_image_cancels_all_events_that_draw_its_results(self, page):
        config = page.driver.execute_script("return window.gradio_config")
        (result,) = [one["id"] for one in config["components"] if one["props"].get("elem_id") == "result"]
        (session,) = [one["id"] for one in config["components"] if one["type"] == "state"]
        (cancelled,) = [event["cancels"] for event in config["dependencies"] if event["cancels"]]
        drawing = [event for event in config["dependencies"] if result in event["outputs"]]
        # Events that open or remove an image replace the session, so that results of the previous one are not shown.
        left = [event["api_name"] for event in drawing if event["id"] not in cancelled]
        assert len(left) < len(drawing)
        assert left == [event["api_name"] for event in drawing if session in event["outputs"]]

    def test_the_page_says_where_to_click_next(self, page):
        page.until(lambda: "Click on an object" in page.next_step())
        page.choose("mode", demo.BACKGROUND)
        page.until(lambda: "outside the object" in page.next_step())
        page.choose("mode", demo.BOX)
        page.until(lambda: "on a corner" in page.next_step())
        before = page.pixels("input_image")
        page.click_image(0.3, 0.3)
        page.until(lambda: "on the opposite corner" in page.next_step())
        assert (np.abs(page.pixels("input_image") - before).max(axis=-1) > 100).sum() > 20
        offset = (round(-0.2 * page.find("#input_image img").size["width"]),) * 2
        ActionChains(page.driver, duration=0).move_to_element_with_offset(
            page.find("#input_image img"), *offset
        ).click().perform()
        assert "no area" in page.message() and not page.rows()
        page.dismiss()
        page.click_image(0.8, 0.8)
        page.until(lambda: "on a corner" in page.next_step() and page.rows())

    def test_an_uploaded_photograph_is_encoded_and_segmented_with_the_labels(self, page, tmp_path):
        page.enter("labels", "purple solid shape", Keys.ENTER)
        image = Image.fromarray(render(seed=0, index=demo.EXAMPLE_SCENES[3]).image)
        image.resize((900, 600)).save(tmp_path / "photo.jpg")
        page.upload(tmp_path / "photo.jpg")
        page.until(lambda: page.alt() == "photo.jpg, 1 mask: purple solid shape")
        assert page.rows() == ["purple solid shape"]
        page.click_image(0.5, 0.5)
        assert page.rows() and "1 foreground point" in page.find("#input_image img").get_attribute("alt")

    def test_the_image_can_be_used_with_the_keyboard_alone(self, page):
        page.choose_scene(1)
        frame = page.find("#input_image .image-frame")
        assert frame.get_attribute("tabindex") == "0" and "Arrow keys" in frame.get_attribute("aria-label")
        for _ in range(30):  # from the start of the page
            page.driver.switch_to.active_element.send_keys(Keys.TAB)
            if page.driver.switch_to.active_element == frame:
                break
        assert page.driver.switch_to.active_element == frame and page.find("#cursor").is_displayed()
        page.wait_for_image("input_image")
        mask = render(seed=0, index=demo.EXAMPLE_SCENES[1]).masks[0]
        x, y = (round(100 * side / 512) for side in center(mask))
        keys = ActionChains(page.driver, duration=0)
        for start, end, (less, more) in ((50, x, (Keys.LEFT, Keys.RIGHT)), (50, y, (Keys.UP, Keys.DOWN))):
            for _ in range(abs(end - start)):
                keys.send_keys(more if end > start else less)
        keys.perform()
        assert f"{x} % from the left, {y} % from the top" in page.find("#cursor_position").get_attribute("textContent")
        page.after(lambda: page.driver.switch_to.active_element.send_keys(Keys.ENTER), "input_image")
        page.until(lambda: page.rows() == [image_names(1)[0]])
        frame = page.find("#input_image .image-frame")
        assert page.driver.switch_to.active_element == frame  # the focus stays in the image
        page.after(lambda: frame.send_keys(Keys.BACKSPACE), "input_image")
        page.until(lambda: not page.rows())
        frame.send_keys(Keys.SHIFT + Keys.RIGHT)
        assert f"{x + 10} % from the left" in page.find("#cursor_position").get_attribute("textContent")

    def test_on_a_phone_controls_are_above_the_results_and_nothing_is_cut_off(self, page):
        page.resize(390, 844)
        page.open(page.driver.current_url)
        widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
        assert page.driver.execute_script(widths) == [390, 390]
        order = ("input_image", "labels", "segment", "mode", "undo", "threshold", "result", "table", "download_png")
        tops = [page.find(f"#{name}").rect["y"] for name in order]
        assert tops == sorted(tops)
        for name in order:
            box = page.find(f"#{name}").rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        assert page.find("#labels").rect["y"] < 844  # the first labels are on the first screen
        page.click_object(0, 0)
        assert page.rows() == [image_names(0)[0]]

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_texts_contrast_with_their_background(self, page, server, theme):
        page.open(f"{server.url()}?__theme={theme}")
        page.open_settings()
        page.find("#whole button").click()
        page.click_image(0.53, 0.4)
        page.until(lambda: page.driver.execute_script(NO_TRANSITION))
        assert page.low_contrasts() == []
        assert page.driver.execute_script("return document.body.classList.contains('dark')") == (theme == "dark")

    def test_two_concurrent_visitors_do_not_mix(self, page, server, tmp_path):
        other = Page(server.url(), tmp_path)
        try:

            def visit(visitor, number):
                """Chooses an example, clicks on two objects and segments everything. Returns what the page shows."""
                visitor.choose_scene(number)
                found = []
                for mask in range(2):
                    visitor.click_object(number, mask)
                    found.append(visitor.rows())
                visitor.press("segment_everything")
                visitor.until(lambda: visitor.line().startswith("Everything"))
                return [*found, visitor.rows()], visitor.pixels("result")

            alone = [visit(page, 1), visit(other, 5)]
            with ThreadPoolExecutor(2) as pool:
                together = list(pool.map(visit, (page, other), (5, 1)))
            assert alone[0][0] != alone[1][0]
            for (rows, pixels), expected in zip(together, reversed(alone), strict=True):
                assert rows == expected[0]
                assert np.abs(pixels - expected[1]).max() < 30
        finally:
            other.driver.quit()
