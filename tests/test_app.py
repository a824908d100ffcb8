"""
The app in `demo/`: its callbacks against the scenes' true masks and the stock pipelines, and the page in a real
Chromium as its users have it. `make test-app` installs Debian's where it can; without one, the page's tests skip.
"""

import importlib.util
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
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from transformers import pipeline

from samclip_hf import SamClipImageProcessorPil, SamClipModel, SamClipProcessor, miniature
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, IMAGE_SIZE, render

DEMO = Path(__file__).parents[1] / "demo"
BACKGROUND = ", ".join(BACKGROUND_PROMPTS)


def load_module():
    spec = importlib.util.spec_from_file_location("demo_app", DEMO / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = load_module()


@pytest.fixture(scope="module")
def app():
    return demo.App(miniature.checkpoint())


@pytest.fixture
def picture(app):
    """The first scene, encoded."""
    return app.load(app.scenes[0][0], None, demo.Prompts())[1]


@pytest.fixture
def scene():
    return render(seed=0, index=demo.SCENES[0])


def shrink(mask) -> np.ndarray:
    """A mask of the page's size at the scene's."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.asarray(Image.fromarray(np.asarray(mask) > 0).resize(size, Image.Resampling.NEAREST))


def iou(mask, other) -> float:
    return (mask & other).sum() / (mask | other).sum()


def centre(mask) -> tuple[float, float]:
    """x and y of the pixel deepest inside, in pixels of the page's picture."""
    row, column = np.unravel_index(distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1].argmax(), mask.shape)
    return tuple(4 * (int(side) + 0.5) for side in (column, row))


def masks_of(panel: SimpleNamespace) -> dict[str, np.ndarray]:
    """What a panel is told to show, by its legend."""
    return {text: mask for mask, text in panel.value[1]}


@pytest.fixture(autouse=True)
def panels(monkeypatch):
    """Panels as what they were made of: Gradio would write their pictures to files."""

    def panel(value, color_map):
        assert set(color_map) == {text for _, text in value[1]}
        return SimpleNamespace(value=value, colours=color_map)

    monkeypatch.setattr(demo.gr, "AnnotatedImage", panel)


# ---- files ----


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


BAD = {
    "text.png": (b"These are words and no picture.\n" * 20, "no picture"),
    "empty.png": (b"", "empty"),
    "large.png": (png_header(10_000, 10_000), "at most 50 megapixels"),
    "bomb.png": (png_header(60_000, 60_000), "at most 50 megapixels"),
    "cut.jpg": (encoded(Image.effect_noise((300, 300), 90), "JPEG")[:9000], "broken"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "no picture"),
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "no picture"),  # starts Ghostscript
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own, in the log
@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_says_why_and_leaves_everything_as_it_was(app, picture, tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    prompts = demo.Prompts().click(demo.INSIDE, 100, 100)
    with pytest.warns(UserWarning, match=message):
        shown, *others = app.upload({"path": str(tmp_path / name)}, picture, prompts)
    assert np.array_equal(np.asarray(shown), np.asarray(prompts.draw(picture.image)))
    assert len(others) == 7 and all(update == gr.skip() for update in others)
    with pytest.warns(UserWarning, match=message):
        assert app.load(str(tmp_path / name), None, demo.Prompts())[0] is None  # there was none before


def test_a_large_file_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(encoded(Image.new("L", (8000, 8000)), "PNG"))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="at most 50 megapixels"):
        demo.read_picture(str(tmp_path / "large.png"), 512)


def test_no_file_is_an_empty_one(app):
    with pytest.warns(UserWarning, match="empty"):
        app.upload(None, None, demo.Prompts())


@pytest.mark.parametrize("file_format", demo.FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1"])
def test_pictures_of_every_format_are_read(tmp_path, file_format, mode):
    if (file_format, mode) in {("JPEG", "P"), *((other, "CMYK") for other in ("PNG", "WEBP", "GIF", "BMP"))}:
        pytest.skip("there is no such file")
    path = tmp_path / "picture"
    path.write_bytes(encoded(Image.radial_gradient("L").resize((60, 30)).convert(mode), file_format))
    image = demo.read_picture(str(path), 512)
    assert image.mode == "RGB" and image.size == (512, 256)
    assert np.asarray(image)[128, 256].max() < 60 and np.asarray(image)[4, 4].min() > 190  # dark inside


def test_sixteen_bits_are_not_cut_off(tmp_path):
    pixels = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(64, axis=0)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    row = np.asarray(demo.read_picture(str(tmp_path / "deep.png"), 64))[32, :, 0]
    np.testing.assert_allclose(row, pixels[0] / 257, atol=1)


def test_photographs_are_turned_and_thin_ones_keep_a_pixel(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = tmp_path / "turned.jpg"
    path.write_bytes(encoded(Image.new("RGB", (60, 30)), "JPEG", exif=exif))
    assert demo.read_picture(str(path), 512).size == (256, 512)
    path.write_bytes(encoded(Image.new("RGB", (5000, 1)), "PNG"))
    assert demo.read_picture(str(path), 512).size == (512, 1)


def test_a_thin_picture_passes_everything(app, tmp_path):
    Image.new("RGB", (3000, 2)).save(tmp_path / "thin.png")
    picture = app.load(str(tmp_path / "thin.png"), None, demo.Prompts())[1]
    app.prompt(picture, demo.Prompts().click(demo.INSIDE, 5, 0))
    app.segment(picture, "red solid shape", BACKGROUND, "a {}", 0.3)
    app.draw_everything(picture)


# ---- what is answered ----


def test_one_pass_of_the_encoder_serves_everything(app):
    passes = []
    handle = app.model.vision_encoder.register_forward_hook(lambda *_: passes.append(1))
    try:
        picture = app.choose(1, None, demo.Prompts())[1]
        for mode in (demo.INSIDE, demo.OUTSIDE, demo.BOX, demo.BOX):
            app.click(picture, demo.Prompts(), mode, SimpleNamespace(index=(99, 200)))
        app.segment(picture, app.scenes[1][1], BACKGROUND, "a {}", 0.3)
        app.draw_everything(picture)
    finally:
        handle.remove()
    assert len(passes) == 1


def test_a_click_draws_what_was_clicked_on(app, picture, scene):
    for mask in scene.masks:
        point = SimpleNamespace(index=centre(mask))
        shown, prompts, panel, line = app.click(picture, demo.Prompts(), demo.INSIDE, point)
        ((text, drawn),) = masks_of(panel).items()
        assert iou(shrink(drawn), mask) > 0.6
        assert re.fullmatch(r"predicted IoU [01]\.\d\d", text)
        assert re.fullmatch(r"Points and box \*\*\d+ ms\*\*", line)
        assert prompts.points == (point.index,) and prompts.labels == (1,)
        x, y = map(int, point.index)
        assert shown.getpixel((x, y)) == (0, 255, 0) and picture.image.getpixel((x, y)) != (0, 255, 0)


def test_prompts_give_what_the_model_gives_by_itself(app, picture):
    prompts = demo.Prompts().click(demo.INSIDE, 140, 90).click(demo.OUTSIDE, 300, 300)
    for more in (prompts, prompts.click(demo.BOX, 260, 200).click(demo.BOX, 40, 10)):
        drawn = next(iter(masks_of(app.prompt(picture, more)[2]).values()))
        model = SamClipModel.from_pretrained(miniature.checkpoint()).eval()
        processor = SamClipProcessor.from_pretrained(miniature.checkpoint())
        box = {"input_boxes": [[[40, 10, 260, 200]]]} if more.box else {}
        inputs = processor(picture.image, input_points=[[[140, 90], [300, 300]]], input_labels=[[1, 0]], **box)
        with torch.inference_mode():
            outputs = model(**inputs, multimask_output=False)
        expected = processor.post_process_masks(
            outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )[0][0, 0]
        assert np.array_equal(drawn > 0, expected.numpy())


def test_a_box_is_two_corners_in_any_order(app, picture):
    started = demo.Prompts().click(demo.BOX, 200, 30)
    assert started.box is None and masks_of(app.prompt(picture, started)[2]) == {}
    for x, y in ((20, 300), (200, 30)):
        box = started.click(demo.BOX, x, y).box
        assert box == (min(x, 200), min(y, 30), max(x, 200), max(y, 30))
    assert len(masks_of(app.prompt(picture, started.click(demo.BOX, 20, 300))[2])) == 1


def test_clearing_leaves_the_picture_alone(app, picture):
    shown, prompts, panel, line = app.clear(picture)
    assert shown == picture.image and prompts == demo.Prompts() and masks_of(panel) == {} and line == ""


@pytest.mark.parametrize("number", range(len(demo.SCENES)))
def test_words_find_the_true_masks(app, number):
    scene = render(seed=0, index=demo.SCENES[number])
    *loaded, words = app.choose(number, None, demo.Prompts())
    by_clip_head, by_both_heads, classes, line = app.segment(loaded[1], words, BACKGROUND, "a {}", 0.3)
    names = words.split(", ")
    assert set(names) == {CLASS_NAMES[class_id] for class_id in scene.class_ids}
    assert set(masks_of(by_clip_head)) == set(names)
    found = {text.rsplit(" ", 1)[0]: mask for text, mask in masks_of(by_both_heads).items()}
    for name in names:
        true = np.any([m for m, c in zip(scene.masks, scene.class_ids, strict=True) if CLASS_NAMES[c] == name], axis=0)
        assert iou(shrink(found[name]), true) > 0.7
        assert by_clip_head.colours[name] == next(c for t, c in by_both_heads.colours.items() if t.startswith(name))
    assert set(classes) == {"background", *names} and sum(classes.values()) == pytest.approx(1)
    assert re.fullmatch(r"Text tower .* ms\*\*, CLIP head .* ms\*\*, both heads .* ms\*\*, whole picture .*", line)


def test_bars_are_those_of_the_stock_pipeline(app, picture):
    names = ["yellow solid shape", "green tiled shape", "red dotted shape"]
    classes = app.segment(picture, ",".join(names), "", "one {}", 0.3)[2]
    classify = pipeline("zero-shot-image-classification", model=miniature.checkpoint())
    expected = classify(picture.image, candidate_labels=names, hypothesis_template="one {}")
    assert classes == pytest.approx({one["label"]: one["score"] for one in expected}, abs=1e-4)


def test_masks_below_the_least_score_are_left_out(app, picture):
    alike = "yellow dotted shape, yellow meshed shape, yellow tiled shape, yellow fuzzy shape"
    shown = [masks_of(app.segment(picture, alike, BACKGROUND, "a {}", least)[1]) for least in (0, 0.6, 1)]
    assert len(shown[0]) > len(shown[1]) >= len(shown[2])
    assert all(float(text.rsplit(" ", 1)[1]) >= 0.6 for text in shown[1])


@pytest.mark.parametrize(
    ("words", "background", "sentence", "message"),
    [
        (" , ", BACKGROUND, "a {}", "at least one name"),
        ("red dotted shape,red dotted shape", BACKGROUND, "a {}", "more than once"),
        ("red dotted shape", BACKGROUND, "a shape", "contain {}"),
        ("red dotted shape, background", BACKGROUND, "a {}", "another name"),
        ("shape " * 200, BACKGROUND, "a {}", "tokens at most"),
    ],
)
def test_words_that_cannot_be_asked_for_say_why_and_change_nothing(app, picture, words, background, sentence, message):
    with pytest.warns(UserWarning, match=message):
        assert app.segment(picture, words, background, sentence, 0.3) == gr.skip()


@pytest.mark.parametrize("size", [(512, 512), (700, 300), (90, 400)])
def test_everything_is_what_the_stock_pipeline_draws(app, picture, tmp_path, size):
    picture.image.resize(size).save(tmp_path / "other.png")
    picture = app.load(str(tmp_path / "other.png"), None, demo.Prompts())[1]
    panel, line = app.draw_everything(picture)
    options = dict(app.generation)
    options["points_per_crop"] = options.pop("points_per_side")
    expected = pipeline("mask-generation", model=miniature.checkpoint())(picture.image, **options)
    assert len(expected["masks"]) >= 3 and line.endswith(f"{len(expected['masks'])} masks")
    for number, (text, mask) in enumerate(masks_of(panel).items()):
        assert text == f"{number + 1}: {expected['scores'][number]:.2f}"
        assert np.array_equal(mask > 0, np.asarray(expected["masks"][number]))


def test_it_does_without_torchvision(app, picture, monkeypatch):
    """As the package does, with Pillow's image processor."""
    expected = [masks_of(app.draw_everything(picture)[0]), masks_of(app.clear(picture)[2])]
    slow = SamClipProcessor(SamClipImageProcessorPil.from_pretrained(miniature.checkpoint()), app.processor.tokenizer)
    monkeypatch.setattr(app, "processor", slow)
    picture = app.load(app.scenes[0][0], None, demo.Prompts())[1]
    actual = [masks_of(app.draw_everything(picture)[0]), masks_of(app.clear(picture)[2])]
    assert [list(masks) for masks in actual] == [list(masks) for masks in expected]
    app.prompt(picture, demo.Prompts().click(demo.INSIDE, 99, 99))
    assert masks_of(app.segment(picture, app.scenes[0][1], BACKGROUND, "a {}", 0.3)[1])


def test_without_a_picture_everything_asks_for_one(app):
    for ask in (
        lambda: app.click(None, demo.Prompts(), demo.INSIDE, SimpleNamespace(index=(1, 1))),
        lambda: app.segment(None, "red dotted shape", "", "a {}", 0.3),
        lambda: app.draw_everything(None),
    ):
        with pytest.warns(UserWarning, match="Choose a scene"):
            assert ask() == gr.skip()
    assert app.clear(None) == gr.skip()


def test_pages_that_ask_at_once_get_their_own_answers(app):
    """Callbacks run in threads."""
    pictures = [app.choose(number, None, demo.Prompts())[1] for number in range(4)]

    def answer(number):
        picture, words = pictures[number % 4], app.scenes[number % 4][1]
        prompted = app.prompt(picture, demo.Prompts().click(demo.INSIDE, 100 + 50 * (number % 4), 150))[2]
        return [masks_of(panel) for panel in (prompted, *app.segment(picture, words, BACKGROUND, "a {}", 0.3)[:2])]

    alone = [answer(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, range(16)))
    for number, answers in enumerate(together):
        for actual, expected in zip(answers, alone[number % 4], strict=True):
            assert list(actual) == list(expected)
            assert all(np.array_equal(actual[text], expected[text]) for text in expected)


# ---- how it is started ----


def test_any_other_checkpoint_is_named_in_the_page(app, tmp_path, monkeypatch):
    app.model.save_pretrained(tmp_path)
    app.processor.save_pretrained(tmp_path)
    other = demo.App(str(tmp_path))
    assert str(tmp_path) in other.describe() and "miniature" not in other.describe()
    assert "**the shipped miniature**, 2 million" in app.describe()
    assert other.generation == demo.GENERATION  # the stock pipeline's own


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [(miniature.sam_teacher(), 'type "sam", not a SAM-CLIP'), ("/nowhere/model", "/nowhere/model")],
)
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_what_is_no_samclip_is_refused_by_name(monkeypatch, capsys, checkpoint, message, by):
    monkeypatch.setattr(sys, "argv", ["app.py", checkpoint] if by == "argument" else ["app.py"])
    monkeypatch.setenv("SAMCLIP_CHECKPOINT", checkpoint if by == "variable" else "/also/nowhere")
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert message in capsys.readouterr().err


def test_the_folder_is_a_space():
    _, front, _ = (DEMO / "README.md").read_text().split("---\n", 2)
    space = yaml.safe_load(front)
    assert space["sdk"] == "gradio" and (DEMO / space["app_file"]).is_file()
    assert space["sdk_version"] == "6.31.0"
    requirements = (DEMO / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("samclip-hf") for line in requirements)
