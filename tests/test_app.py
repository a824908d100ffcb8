"""
The app in `demo/`: its callbacks, compared with the true masks of scenes and with transformers' pipelines, and the
page in Chromium. `make test-app` installs Chromium on Debian. Without it, the tests of the page are skipped.
"""

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
from dataclasses import replace
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

from samclip_hf import (
    SamClipForImageSegmentation,
    SamClipImageProcessorPil,
    SamClipModel,
    SamClipProcessor,
    miniature,
)
from samclip_hf.mask_generation_samclip import MASK_GENERATION_DEFAULTS
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, IMAGE_SIZE, render

from .scripts import load_script

DEMO = Path(__file__).parents[1] / "demo"
BACKGROUND = ", ".join(BACKGROUND_PROMPTS)


demo = load_script(DEMO / "app.py")


@pytest.fixture(scope="module")
def app():
    return demo.App(miniature.checkpoint())


@pytest.fixture
def encoded(app):
    """The first example, encoded."""
    return app.load(app.scenes[0][0], None, demo.Prompts())[1]


@pytest.fixture
def scene():
    return render(seed=0, index=demo.EXAMPLE_SCENES[0])


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


def masks_of(panel: SimpleNamespace) -> dict[str, np.ndarray]:
    """The masks of a panel, by their legend."""
    return {text: mask for mask, text in panel.value[1]}


@pytest.fixture(autouse=True)
def panels(monkeypatch):
    """Replaces `AnnotatedImage` by its arguments, because Gradio writes images to files."""

    def panel(value, color_map):
        assert set(color_map) == {text for _, text in value[1]}
        return SimpleNamespace(value=value, colors=color_map)

    monkeypatch.setattr(demo.gr, "AnnotatedImage", panel)


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
def test_an_invalid_file_shows_a_warning_and_keeps_the_previous_image(app, encoded, tmp_path, name):
    content, message = INVALID_FILES[name]
    (tmp_path / name).write_bytes(content)
    prompts = demo.Prompts().click(demo.FOREGROUND, 100, 100)
    with pytest.warns(UserWarning, match=message):
        shown, *others = app.upload({"path": str(tmp_path / name)}, encoded, prompts)
    assert np.array_equal(np.asarray(shown), np.asarray(prompts.draw(encoded.image)))
    assert len(others) == 7 and all(update == gr.skip() for update in others)
    with pytest.warns(UserWarning, match=message):
        assert app.load(str(tmp_path / name), None, demo.Prompts())[0] is None  # there is no previous image


def test_a_large_image_is_rejected_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(encode(Image.new("L", (8000, 8000)), "PNG"))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="maximum is 50 megapixels"):
        demo.read_image(str(tmp_path / "large.png"), 512)


def test_an_upload_without_a_file_shows_a_warning(app):
    with pytest.warns(UserWarning, match="empty"):
        app.upload(None, None, demo.Prompts())


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [(name, mode) for name in demo.FORMATS for mode in ("RGB", "L", "P", "1") if (name, mode) != ("JPEG", "P")]
    + [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("PNG", "RGBA")],
)
def test_images_of_every_format_are_read(tmp_path, file_format, mode):
    path = tmp_path / "image"
    path.write_bytes(encode(Image.radial_gradient("L").resize((60, 30)).convert(mode), file_format))
    image = demo.read_image(str(path), 512)
    assert image.mode == "RGB" and image.size == (512, 256)
    assert np.asarray(image)[128, 256].max() < 60 and np.asarray(image)[4, 4].min() > 190  # dark in the center


def test_16_bit_images_are_scaled_to_8_bits(tmp_path):
    pixels = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(64, axis=0)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    row = np.asarray(demo.read_image(str(tmp_path / "deep.png"), 64))[32, :, 0]
    np.testing.assert_allclose(row, pixels[0] / 257, atol=1)


def test_the_exif_orientation_is_applied_and_each_side_has_at_least_one_pixel(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    path = tmp_path / "rotated.jpg"
    path.write_bytes(encode(Image.new("RGB", (60, 30)), "JPEG", exif=exif))
    assert demo.read_image(str(path), 512).size == (256, 512)
    path.write_bytes(encode(Image.new("RGB", (5000, 1)), "PNG"))
    assert demo.read_image(str(path), 512).size == (512, 1)


def test_a_thin_image_works_everywhere(app, tmp_path):
    Image.new("RGB", (3000, 2)).save(tmp_path / "thin.png")
    encoded = app.load(str(tmp_path / "thin.png"), None, demo.Prompts())[1]
    app.predict_mask(encoded, demo.Prompts().click(demo.FOREGROUND, 5, 0))
    app.segment(encoded, "red solid shape", BACKGROUND, "a {}", 0.3)
    app.segment_everything(encoded)


# ---- callbacks ----


def test_the_image_encoder_runs_once_per_image(app):
    passes = []
    handle = app.model.vision_encoder.register_forward_hook(lambda *_: passes.append(1))
    try:
        encoded = app.choose(1, None, demo.Prompts())[1]
        for mode in (demo.FOREGROUND, demo.BACKGROUND, demo.BOX, demo.BOX):
            app.click(encoded, demo.Prompts(), mode, SimpleNamespace(index=(99, 200)))
        app.segment(encoded, app.scenes[1][1], BACKGROUND, "a {}", 0.3)
        app.segment_everything(encoded)
    finally:
        handle.remove()
    assert len(passes) == 1


def test_a_click_on_an_object_returns_its_mask(app, encoded, scene):
    for mask in scene.masks:
        point = SimpleNamespace(index=center(mask))
        shown, prompts, panel, line = app.click(encoded, demo.Prompts(), demo.FOREGROUND, point)
        ((text, drawn),) = masks_of(panel).items()
        assert iou(shrink(drawn), mask) > 0.6
        assert re.fullmatch(r"predicted IoU [01]\.\d\d", text)
        assert re.fullmatch(r"Points and box \*\*\d+ ms\*\*", line)
        assert prompts.points == (point.index,) and prompts.labels == (1,)
        x, y = map(int, point.index)
        assert shown.getpixel((x, y)) == (0, 255, 0) and encoded.image.getpixel((x, y)) != (0, 255, 0)


def test_the_mask_of_prompts_is_that_of_the_model(app, encoded):
    prompts = demo.Prompts().click(demo.FOREGROUND, 140, 90).click(demo.BACKGROUND, 300, 300)
    for more in (prompts, prompts.click(demo.BOX, 260, 200).click(demo.BOX, 40, 10)):
        drawn = next(iter(masks_of(app.predict_mask(encoded, more)[2]).values()))
        model = SamClipModel.from_pretrained(miniature.checkpoint()).eval()
        processor = SamClipProcessor.from_pretrained(miniature.checkpoint())
        box = {"input_boxes": [[[40, 10, 260, 200]]]} if more.box else {}
        inputs = processor(encoded.image, input_points=[[[140, 90], [300, 300]]], input_labels=[[1, 0]], **box)
        with torch.inference_mode():
            outputs = model(**inputs, multimask_output=False)
        expected = processor.post_process_masks(
            outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )[0][0, 0]
        assert np.array_equal(drawn > 0, expected.numpy())


def test_a_box_has_two_corners_in_any_order(app, encoded):
    started = demo.Prompts().click(demo.BOX, 200, 30)
    assert started.box is None and masks_of(app.predict_mask(encoded, started)[2]) == {}
    for x, y in ((20, 300), (300, 10)):
        box = started.click(demo.BOX, x, y).box
        assert box == (min(x, 200), min(y, 30), max(x, 200), max(y, 30))
    assert len(masks_of(app.predict_mask(encoded, started.click(demo.BOX, 20, 300))[2])) == 1


@pytest.mark.parametrize("second", [(200, 30), (200, 90), (20, 30)])
def test_a_box_without_area_is_refused_and_its_first_corner_stays(app, encoded, second):
    started = demo.Prompts().click(demo.BOX, 200, 30)
    with pytest.warns(UserWarning, match="no area. Click on the opposite corner"):
        assert app.click(encoded, started, demo.BOX, SimpleNamespace(index=second)) == gr.skip()


def test_the_first_corner_of_a_box_is_visible_and_the_next_step_is_named(encoded):
    prompts = demo.Prompts()
    assert prompts.next_step(demo.BOX) == "Click on a corner of the box in the image."
    started = prompts.click(demo.BOX, 200, 30)
    assert started.next_step(demo.BOX) == "Click on the opposite corner of the box in the image."
    changed = np.asarray(started.draw(encoded.image)) != np.asarray(encoded.image)
    rows, columns = np.nonzero(changed.any(axis=-1))
    assert rows.max() - rows.min() >= 30 and columns.max() - columns.min() >= 30  # 14 pixels on the screen
    assert started.draw(Image.new("RGB", (512, 512), "yellow")) != Image.new("RGB", (512, 512), "yellow")
    other = started.click(demo.FOREGROUND, 10, 10)  # a point in between ends the box
    assert other.corner is None and other.click(demo.BOX, 99, 99).corner == (99, 99)
    assert {prompts.next_step(mode) for mode in (demo.FOREGROUND, demo.BACKGROUND)}.isdisjoint(
        {prompts.next_step(demo.BOX), started.next_step(demo.BOX)}
    )


def test_clearing_the_prompts_keeps_the_image(app, encoded):
    shown, prompts, panel, line = app.clear(encoded)
    assert shown == encoded.image and prompts == demo.Prompts() and masks_of(panel) == {} and line == ""


@pytest.mark.parametrize("number", range(len(demo.EXAMPLE_SCENES)))
def test_labels_give_the_true_masks(app, number):
    scene = render(seed=0, index=demo.EXAMPLE_SCENES[number])
    *loaded, labels = app.choose(number, None, demo.Prompts())
    by_clip_head, by_both_heads, classes, line, _ = app.segment(loaded[1], labels, BACKGROUND, "a {}", 0.3)
    names = labels.split(", ")
    assert set(names) == {CLASS_NAMES[class_id] for class_id in scene.class_ids}
    assert set(masks_of(by_clip_head)) == set(names)
    found = {text.rsplit(" ", 1)[0]: mask for text, mask in masks_of(by_both_heads).items()}
    for name in names:
        true = np.any([m for m, c in zip(scene.masks, scene.class_ids, strict=True) if CLASS_NAMES[c] == name], axis=0)
        assert iou(shrink(found[name]), true) > 0.7
        assert by_clip_head.colors[name] == next(c for t, c in by_both_heads.colors.items() if t.startswith(name))
    assert set(classes) == {"background", *names} and sum(classes.values()) == pytest.approx(1)
    assert re.fullmatch(r"Text tower .* ms\*\*, CLIP head .* ms\*\*, both heads .* ms\*\*, classification .*", line)


def test_the_classification_is_that_of_the_pipeline(app, encoded):
    names = ["yellow solid shape", "green tiled shape", "red dotted shape"]
    classes = app.segment(encoded, ",".join(names), "", "one {}", 0.3)[2]
    classify = pipeline("zero-shot-image-classification", model=miniature.checkpoint())
    expected = classify(encoded.image, candidate_labels=names, hypothesis_template="one {}")
    assert classes == pytest.approx({one["label"]: one["score"] for one in expected}, abs=1e-4)


def test_masks_below_the_score_threshold_are_left_out(app, encoded):
    alike = "yellow dotted shape, yellow meshed shape, yellow tiled shape, yellow fuzzy shape"
    shown = [masks_of(app.segment(encoded, alike, BACKGROUND, "a {}", least)[1]) for least in (0, 0.6, 1)]
    assert len(shown[0]) > len(shown[1]) >= len(shown[2])
    assert all(float(text.rsplit(" ", 1)[1]) >= 0.6 for text in shown[1])


@pytest.mark.parametrize(
    ("labels", "background", "template", "message"),
    [
        (" , ", BACKGROUND, "a {}", 'The field "Labels" is empty'),
        ("red dotted shape,red dotted shape", BACKGROUND, "a {}", "each label once.* red dotted shape.$"),
        ("red dotted shape", BACKGROUND, "a shape", '"Prompt template" must contain {} once'),
        ("red dotted shape", BACKGROUND, "", '"Prompt template" must contain {} once'),
        ("red dotted shape, background", BACKGROUND, "a {}", "another name"),
        ("shape " * 200, BACKGROUND, "a {}", "at most [0-9]+ tokens"),
    ],
)
def test_invalid_labels_show_a_warning_and_change_nothing(app, encoded, labels, background, template, message):
    with pytest.warns(UserWarning, match=message):
        *results, request = app.segment(encoded, labels, background, template, 0.3)
    assert results == [gr.skip()] * 4
    assert app.segment_changes(request, *request) == gr.skip()  # no second warning when the field loses focus


def test_texts_are_segmented_again_only_if_something_has_changed(app, encoded):
    inputs = (encoded, "red dotted shape", BACKGROUND, "a {}", 0.3)
    *results, request = app.segment_changes(None, *inputs)
    assert "red dotted shape" in results[2]
    assert app.segment_changes(request, *inputs) == gr.skip()
    for changed in ((encoded, "red solid shape", *inputs[2:]), (replace(encoded), *inputs[1:]), (*inputs[:4], 0.5)):
        assert app.segment_changes(request, *changed)[-1] == changed
    assert app.segment_changes(request, None, *inputs[1:]) == gr.skip()


@pytest.mark.parametrize("size", [(512, 512), (700, 300), (90, 400)])
def test_segmenting_everything_gives_the_masks_of_the_pipeline(app, encoded, tmp_path, size):
    encoded.image.resize(size).save(tmp_path / "other.png")
    encoded = app.load(str(tmp_path / "other.png"), None, demo.Prompts())[1]
    panel, line = app.segment_everything(encoded)
    generate = pipeline("mask-generation", model=miniature.checkpoint())
    expected = generate(encoded.image, **miniature.MASK_GENERATION)
    assert len(expected["masks"]) >= 3 and line.endswith(f"{len(expected['masks'])} masks")
    for number, (text, mask) in enumerate(masks_of(panel).items()):
        assert text == f"{number + 1}: {expected['scores'][number]:.2f}"
        assert np.array_equal(mask > 0, np.asarray(expected["masks"][number]))


def test_the_app_works_with_the_pillow_image_processor(app, encoded, monkeypatch):
    """The package uses this image processor if torchvision is not installed."""
    expected = [masks_of(app.segment_everything(encoded)[0]), masks_of(app.clear(encoded)[2])]
    image_processor = SamClipImageProcessorPil.from_pretrained(miniature.checkpoint())
    monkeypatch.setattr(app, "processor", SamClipProcessor(image_processor, app.processor.tokenizer))
    encoded = app.load(app.scenes[0][0], None, demo.Prompts())[1]
    actual = [masks_of(app.segment_everything(encoded)[0]), masks_of(app.clear(encoded)[2])]
    assert [list(masks) for masks in actual] == [list(masks) for masks in expected]
    app.predict_mask(encoded, demo.Prompts().click(demo.FOREGROUND, 99, 99))
    assert masks_of(app.segment(encoded, app.scenes[0][1], BACKGROUND, "a {}", 0.3)[1])


def test_callbacks_without_an_image_show_a_warning(app):
    for callback in (
        lambda: app.click(None, demo.Prompts(), demo.FOREGROUND, SimpleNamespace(index=(1, 1))),
        lambda: app.segment(None, "red dotted shape", "", "a {}", 0.3),
        lambda: app.segment_everything(None),
    ):
        with pytest.warns(UserWarning, match="Choose an example"):
            assert callback() == gr.skip()
    assert app.clear(None) == gr.skip()


def test_text_embedding_is_serialized(app, encoded, monkeypatch):
    """Callbacks run in threads, and tokenizers are not thread-safe."""
    running, counts, embed = [], [], app.model.embed_vocabulary

    def embed_and_count(*arguments):
        running.append(1)
        counts.append(len(running))
        time.sleep(0.05)
        vocabulary = embed(*arguments)
        running.pop()
        return vocabulary

    monkeypatch.setattr(app.model, "embed_vocabulary", embed_and_count)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda labels: app.segment(encoded, labels, BACKGROUND, "a {}", 0.3), CLASS_NAMES[:4]))
    assert counts == [1] * 4


def test_concurrent_sessions_do_not_mix(app):
    """Callbacks run in threads."""
    encoded_images = [app.choose(number, None, demo.Prompts())[1] for number in range(4)]

    def answer(number):
        encoded, labels = encoded_images[number % 4], app.scenes[number % 4][1]
        prompted = app.predict_mask(encoded, demo.Prompts().click(demo.FOREGROUND, 100 + 50 * (number % 4), 150))[2]
        return [masks_of(panel) for panel in (prompted, *app.segment(encoded, labels, BACKGROUND, "a {}", 0.3)[:2])]

    alone = [answer(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, range(24)))
    for number, answers in enumerate(together):
        for actual, expected in zip(answers, alone[number % 4], strict=True):
            assert list(actual) == list(expected)
            assert all(np.array_equal(actual[text], expected[text]) for text in expected)


# ---- start ----


def test_a_bfloat16_checkpoint_works_and_is_named_in_the_page(app, tmp_path):
    SamClipModel.from_pretrained(miniature.checkpoint(), dtype=torch.bfloat16).save_pretrained(tmp_path)
    app.processor.save_pretrained(tmp_path)
    other = demo.App(str(tmp_path))
    assert str(tmp_path) in other.describe() and "miniature" not in other.describe()
    assert "**the shipped miniature**, 2 million" in app.describe()
    assert other.mask_generation == MASK_GENERATION_DEFAULTS
    *loaded, labels = other.choose(0, None, demo.Prompts())
    assert masks_of(other.segment(loaded[1], labels, BACKGROUND, "a {}", 0.3)[1])
    assert masks_of(other.click(*loaded[1:3], demo.FOREGROUND, SimpleNamespace(index=(99, 200)))[2])
    assert other.segment_everything(loaded[1])[1].startswith("Everything")


def test_a_checkpoint_without_a_text_tower_shows_a_warning_for_labels(app, tmp_path):
    SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).drop_text_tower().save_pretrained(tmp_path)
    app.processor.save_pretrained(tmp_path)
    other = demo.App(str(tmp_path))
    *loaded, labels = other.choose(0, None, demo.Prompts())
    with pytest.warns(UserWarning, match="no text tower"):
        assert other.segment(loaded[1], labels, BACKGROUND, "a {}", 0.3)[:4] == (gr.skip(),) * 4
    assert masks_of(other.click(*loaded[1:3], demo.FOREGROUND, SimpleNamespace(index=(99, 200)))[2])


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [(miniature.sam_teacher(), 'type "sam", not a SAM-CLIP'), ("/nowhere/model", "/nowhere/model")],
)
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_other_models_and_missing_folders_exit_with_a_message(monkeypatch, capsys, checkpoint, message, by):
    monkeypatch.setattr(sys, "argv", ["app.py", checkpoint] if by == "argument" else ["app.py"])
    monkeypatch.setenv("SAMCLIP_CHECKPOINT", checkpoint if by == "variable" else "/also/nowhere")
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert message in capsys.readouterr().err


def test_the_demo_folder_is_a_space():
    _, front, _ = (DEMO / "README.md").read_text().split("---\n", 2)
    space = yaml.safe_load(front)
    assert space["sdk"] == "gradio" and (DEMO / space["app_file"]).is_file()
    assert space["sdk_version"] == "6.31.0"
    requirements = (DEMO / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("samclip-hf") for line in requirements)


# ---- the page ----

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
        deadline = time.monotonic() + 120
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
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.resize(1100)
        self.driver.get("about:blank")
        self.driver.get_log("performance")  # discard the requests of the new tab
        self.driver.get(url)
        self.until(lambda: self.legend("by_both_heads") and self.line("Text tower"))

    def resize(self, height: int) -> None:
        """Sets the size of the page, without the frame of the window."""
        size = {"width": 1280, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def until(self, condition):
        return WebDriverWait(self.driver, 60, poll_frequency=0.05).until(lambda _: condition())

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent.trim())"
        return self.driver.execute_script(script, selector)

    def legend(self, panel: str) -> list[str]:
        return self.texts(f"#{panel} .legend-item")

    def line(self, start: str) -> str:
        """The line of durations that starts with `start`, or ""."""
        return next((text for text in self.texts("#timers p") if text.startswith(start)), "")

    def pixels(self, panel: str) -> np.ndarray:
        """A screenshot of a panel after all images are loaded, with the pointer elsewhere."""
        ActionChains(self.driver, duration=0).move_to_element(self.find("h3")).perform()
        script = """return [...document.querySelectorAll(arguments[0])].every(image => image.complete
            && image.naturalWidth && image.getAnimations().length == 0)"""
        self.until(lambda: self.driver.execute_script(script, f"#{panel} img"))
        element = "img" if panel == "input_image" else ".image-container"
        screenshot = self.find(f"#{panel} {element}").screenshot_as_png
        return np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB")).astype(int)

    def click_image(self, x: float, y: float) -> None:
        """Clicks at x and y, as fractions of the image, and waits for the mask."""
        before = self.images("by_prompts") + self.images("input_image")
        # Gradio ignores clicks on an image that is not loaded yet.
        script = "return (image => image.complete && image.naturalWidth)(document.querySelector('#input_image img'))"
        self.until(lambda: self.driver.execute_script(script))
        image = self.find("#input_image img")
        offset = (round((x - 0.5) * image.size["width"]), round((y - 0.5) * image.size["height"]))
        ActionChains(self.driver, duration=0).move_to_element_with_offset(image, *offset).click().perform()
        self.until(lambda: self.images("by_prompts") + self.images("input_image") != before)

    def images(self, panel: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(image => image.src)"
        return self.driver.execute_script(script, f"#{panel} img")

    def choose_scene(self, number: int) -> None:
        before, labels = self.images("by_both_heads"), self.find("#labels input").get_attribute("value")
        self.driver.find_elements(By.CSS_SELECTOR, "#scenes .gallery-item")[number].click()
        self.until(lambda: self.find("#labels input").get_attribute("value") != labels)
        self.until(lambda: self.images("by_both_heads") != before)

    def enter_labels(self, labels: str) -> None:
        field = self.find("#labels input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(labels, Keys.ENTER)

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

    def choose_mode(self, name: str) -> None:
        options = self.driver.find_elements(By.CSS_SELECTOR, "#mode label")
        next(label for label in options if label.text == name).click()

    def set_opacity(self, opacity: float) -> None:
        script = """arguments[0].value = arguments[1];
            arguments[0].dispatchEvent(new Event("input", {bubbles: true}))"""
        self.driver.execute_script(script, self.find("#opacity input[type=range]"), opacity)
        style = "return document.documentElement.style.getPropertyValue('--mask-opacity')"
        self.until(lambda: float(self.driver.execute_script(style) or -1) == opacity)

    def covered(self, panel: str) -> np.ndarray:
        """The pixels of a scene that masks cover on the screen, `(128, 128)`."""
        screenshots = []
        for opacity in (0, 1):
            self.set_opacity(opacity)
            screenshots.append(self.pixels(panel))
        covered = np.abs(screenshots[1] - screenshots[0]).max(axis=-1) > 16
        height, width = covered.shape  # the scene is a centered square with the height of the panel
        return shrink(covered[:, (width - height) // 2 : (width + height) // 2])

    def external_requests(self) -> list[str]:
        """URLs that the page requested from other hosts."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        requested = (m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent")
        return [url for url in requested if url.startswith("http") and not url.startswith("http://127.0.0.1:")]

    def console_errors(self) -> list[dict]:
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


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
    browser.driver.get(server.url())
    browser.console_errors()  # discard those of the previous page
    browser.until(lambda: browser.legend("by_both_heads") and browser.line("Text tower"))
    yield browser
    assert browser.external_requests() == []
    assert browser.console_errors() == []


@pytest.mark.browser
@needs_chromium
class TestPage:
    def test_the_page_opens_with_an_example_and_names_the_miniature(self, page, app):
        assert "the shipped miniature, 2 million parameters" in page.find("body").text
        names = app.scenes[0][1].split(", ")
        assert page.legend("by_clip_head") == names
        assert {text.rsplit(" ", 1)[0] for text in page.legend("by_both_heads")} == set(names)
        assert re.fullmatch(r"Image encoder \d+ ms, once per image", page.line("Image encoder"))
        assert len(page.driver.find_elements(By.CSS_SELECTOR, "#scenes .gallery-item")) == len(app.scenes)

    def test_a_click_on_an_object_shows_its_mask(self, page):
        page.choose_scene(1)
        encoder, untouched = page.line("Image encoder"), page.images("input_image")
        masks = render(seed=0, index=demo.EXAMPLE_SCENES[1]).masks
        for mask in (masks[0], masks[3]):
            page.click_image(*(side / demo.MIN_DISPLAY_SIZE for side in center(mask)))
            assert re.fullmatch(r"predicted IoU [01]\.\d\d", page.legend("by_prompts")[0])
            assert re.fullmatch(r"Points and box \d+ ms", page.line("Points and box"))
            assert iou(page.covered("by_prompts"), mask) > 0.6
            page.find("#clear").click()
            page.until(lambda: not page.legend("by_prompts"))
            assert not page.covered("by_prompts").any() and page.images("input_image") == untouched
        assert page.line("Image encoder") == encoder  # the image was not encoded again

    def test_background_points_and_boxes_are_drawn_and_change_the_mask(self, page):
        page.click_image(0.53, 0.4)
        before = page.covered("by_prompts")
        page.choose_mode(demo.BACKGROUND)
        page.click_image(0.2, 0.75)
        page.choose_mode(demo.BOX)
        page.click_image(0.9, 0.95)
        page.click_image(0.1, 0.1)
        assert page.legend("by_prompts") and (page.covered("by_prompts") != before).mean() > 0.01
        pixels = page.pixels("input_image")
        for color in ((0, 255, 0), (255, 0, 0), (255, 255, 0)):
            assert (np.abs(pixels - color).max(axis=-1) < 70).sum() > 10

    def test_labels_are_segmented_and_named_in_the_legend(self, page):
        page.choose_scene(1)
        scene = render(seed=0, index=demo.EXAMPLE_SCENES[1])
        names = [CLASS_NAMES[class_id] for class_id in scene.class_ids]
        for labels in (names[:2], [*reversed(names), "red dotted shape"]):
            before = page.images("by_both_heads")
            page.enter_labels(",".join(labels))
            page.until(lambda before=before: page.images("by_both_heads") != before)
            present = set(labels) & set(names)
            by_both_heads = {re.sub(r" [01]\.\d\d$", "", text) for text in page.legend("by_both_heads")}
            assert present <= by_both_heads <= set(labels)
            assert present <= set(page.legend("by_clip_head")) <= set(labels)
            objects = np.any([mask for mask, name in zip(scene.masks, names, strict=True) if name in present], axis=0)
            for panel in ("by_clip_head", "by_both_heads"):
                assert (page.covered(panel) & objects).sum() > 0.8 * objects.sum()
            shown = page.find("#classes").text
            assert sum(name in shown for name in (*labels, "background")) == min(5, len(labels) + 1)

    def test_invalid_labels_show_a_message_and_change_nothing(self, page):
        legend = page.legend("by_both_heads")
        page.enter_labels("green tiled shape, green tiled shape")
        assert "each label once" in page.message()
        page.dismiss()
        page.enter_labels(" , ")
        assert 'The field "Labels" is empty' in page.message()
        assert page.legend("by_both_heads") == legend and "Error" not in page.find("body").text

    def test_the_slider_sets_the_opacity_of_masks(self, page):
        screenshots = {}
        for opacity in (0, 0.3, 0.9):
            page.set_opacity(opacity)
            screenshots[opacity] = page.pixels("by_both_heads")
        faint, strong = (np.abs(screenshots[opacity] - screenshots[0]).sum() for opacity in (0.3, 0.9))
        assert 2.5 < strong / faint < 3.5

    def test_segmenting_everything_shows_all_masks(self, page, app):
        page.choose_scene(5)
        page.find("#segment_everything").click()
        page.until(lambda: page.line("Everything"))
        page.until(lambda: page.legend("everything"))
        assert page.line("Everything").endswith(f"{len(page.legend('everything'))} masks")
        objects = np.any(render(seed=0, index=demo.EXAMPLE_SCENES[5]).masks, axis=0)
        assert (page.covered("everything") & objects).sum() > 0.7 * objects.sum()

    @pytest.mark.parametrize("name", [*INVALID_FILES, "notes.txt"])
    def test_an_invalid_file_shows_a_message_and_changes_nothing(self, page, tmp_path, name):
        content, message = INVALID_FILES.get(name, (b"text", "Invalid file type"))  # Gradio rejects notes.txt
        (tmp_path / name).write_bytes(content)
        page.click_image(0.53, 0.4)
        legends = [page.legend(panel) for panel in ("by_prompts", "by_both_heads")]
        image, encoder = page.images("input_image"), page.line("Image encoder")
        page.upload(tmp_path / name)
        assert message in page.message()
        page.until(lambda: page.images("input_image") == image)
        assert [page.legend(panel) for panel in ("by_prompts", "by_both_heads")] == legends
        assert "Traceback" not in page.driver.page_source and page.line("Image encoder") == encoder
        page.click_image(0.2, 0.75)
        assert page.legend("by_prompts") and page.images("input_image") != image

    def test_removing_the_image_removes_it_everywhere(self, page, tmp_path):
        page.click_image(0.53, 0.4)
        page.find("#segment_everything").click()
        page.until(lambda: page.legend("everything"))
        page.remove_image()
        panels = ("input_image", "by_prompts", "everything", "by_clip_head", "by_both_heads")
        page.until(lambda: not any(map(page.images, panels)))
        assert not any(page.legend(panel) for panel in panels) and not page.texts("#classes dd")
        assert not any(page.texts("#timers p"))
        for button in ("segment_everything", "clear"):
            page.find(f"#{button}").click()
        assert "Choose an example" in page.message()
        page.dismiss()
        (tmp_path / "empty.png").write_bytes(b"")
        page.upload(tmp_path / "empty.png")
        assert "empty" in page.message() and "Choose an example" not in page.message()
        assert not any(map(page.images, panels))
        page.find("#scenes .gallery-item").click()
        page.until(lambda: page.legend("by_both_heads") and page.images("input_image"))
        assert not page.legend("by_prompts") and not page.legend("everything")

    def test_results_of_an_image_that_was_removed_are_not_shown(self, page):
        page.find("#segment_everything").click()
        page.remove_image()
        time.sleep(4)  # longer than everything mode takes
        assert not page.images("everything") and not page.line("Everything")

    def test_labels_are_used_when_the_field_loses_focus(self, page):
        page.choose_scene(1)
        field = page.find("#labels input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys("cyan tiled shape, green tiled shape", Keys.TAB)
        page.until(lambda: set(page.legend("by_clip_head")) == {"cyan tiled shape", "green tiled shape"})
        images, line = page.images("by_both_heads"), page.line("Text tower")
        field.click()
        page.find("h3").click()  # nothing has changed
        time.sleep(1)
        assert page.line("Text tower") == line
        page.find("#template input").send_keys(" in a picture", Keys.TAB)
        page.until(lambda: page.line("Text tower") != line)
        page.until(lambda: page.images("by_both_heads") != images)

    def test_the_page_says_where_to_click_next(self, page):
        page.until(lambda: "on the object" in page.find("#next_step").text)
        page.choose_mode(demo.BACKGROUND)
        page.until(lambda: "outside the object" in page.find("#next_step").text)
        page.choose_mode(demo.BOX)
        page.until(lambda: "on a corner" in page.find("#next_step").text)
        before = page.pixels("input_image")
        page.click_image(0.3, 0.3)
        page.until(lambda: "on the opposite corner" in page.find("#next_step").text)
        assert (np.abs(page.pixels("input_image") - before).max(axis=-1) > 100).sum() > 20
        offset = (round(-0.2 * page.find("#input_image img").size["width"]),) * 2
        ActionChains(page.driver, duration=0).move_to_element_with_offset(
            page.find("#input_image img"), *offset
        ).click().perform()
        assert "no area" in page.message() and not page.legend("by_prompts")
        page.dismiss()
        page.click_image(0.8, 0.8)
        page.until(lambda: "on a corner" in page.find("#next_step").text)
        assert page.legend("by_prompts")

    def test_an_uploaded_image_is_encoded_and_segmented(self, page, tmp_path):
        page.enter_labels("purple solid shape")
        image = Image.fromarray(render(seed=0, index=demo.EXAMPLE_SCENES[3]).image)
        image.resize((900, 600)).save(tmp_path / "photo.jpg")
        before = page.images("by_both_heads")
        page.upload(tmp_path / "photo.jpg")
        page.until(lambda: page.images("by_both_heads")[:1] != before[:1])
        page.until(lambda: page.legend("by_clip_head") == ["purple solid shape"])
        assert not page.legend("by_prompts") and page.line("Image encoder") and not page.line("Points and box")
        page.click_image(0.5, 0.5)
        assert page.legend("by_prompts")

    def test_two_concurrent_users_do_not_mix(self, page, server, tmp_path):
        other = Page(server.url(), tmp_path)
        try:

            def use(user, number):
                """Chooses an example, clicks on two objects and segments everything. Returns what the page shows."""
                user.choose_scene(number)
                masks = []
                for mask in render(seed=0, index=demo.EXAMPLE_SCENES[number]).masks[:2]:
                    user.click_image(*(side / demo.MIN_DISPLAY_SIZE for side in center(mask)))
                    masks.append(user.covered("by_prompts"))
                user.find("#segment_everything").click()
                user.until(lambda: user.legend("everything"))
                return [*masks, *map(user.covered, ("by_both_heads", "everything"))], user.legend("everything")

            alone = [use(page, 1), use(other, 5)]
            assert alone[0][1] != alone[1][1]
            with ThreadPoolExecutor(2) as pool:
                together = list(pool.map(use, (page, other), (5, 1)))
            for (masks, legend), expected in zip(together, reversed(alone), strict=True):
                assert legend == expected[1]
                assert all(np.array_equal(*pair) for pair in zip(masks, expected[0], strict=True))
        finally:
            other.driver.quit()
