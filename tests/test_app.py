"""
The app in `demo/`: its callbacks against the scenes' true masks and the stock pipelines, and the page in a real
Chromium as its users have it. `make test-app` installs Debian's where it can; without one, the page's tests skip.
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
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, IMAGE_SIZE, render

from .scripts import load_script

DEMO = Path(__file__).parents[1] / "demo"
BACKGROUND = ", ".join(BACKGROUND_PROMPTS)


def load_module():
    return load_script(DEMO / "app.py")


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


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [(name, mode) for name in demo.FORMATS for mode in ("RGB", "L", "P", "1") if (name, mode) != ("JPEG", "P")]
    + [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("PNG", "RGBA")],
)
def test_pictures_of_every_format_are_read(tmp_path, file_format, mode):
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


def test_words_are_embedded_one_after_the_other(app, picture, monkeypatch):
    """Tokenizers keep the padding of their last call, and callbacks run in threads."""
    inside, most, embed = [], [], app.model.embed_vocabulary

    def watched(*arguments):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        vocabulary = embed(*arguments)
        inside.pop()
        return vocabulary

    monkeypatch.setattr(app.model, "embed_vocabulary", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda words: app.segment(picture, words, BACKGROUND, "a {}", 0.3), CLASS_NAMES[:4]))
    assert most == [1] * 4


def test_pages_that_ask_at_once_get_their_own_answers(app):
    """Callbacks run in threads."""
    pictures = [app.choose(number, None, demo.Prompts())[1] for number in range(4)]

    def answer(number):
        picture, words = pictures[number % 4], app.scenes[number % 4][1]
        prompted = app.prompt(picture, demo.Prompts().click(demo.INSIDE, 100 + 50 * (number % 4), 150))[2]
        return [masks_of(panel) for panel in (prompted, *app.segment(picture, words, BACKGROUND, "a {}", 0.3)[:2])]

    alone = [answer(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, range(24)))
    for number, answers in enumerate(together):
        for actual, expected in zip(answers, alone[number % 4], strict=True):
            assert list(actual) == list(expected)
            assert all(np.array_equal(actual[text], expected[text]) for text in expected)


# ---- how it is started ----


def test_any_other_checkpoint_is_named_in_the_page_and_answers(app, picture, tmp_path):
    """Here one in half precision."""
    SamClipModel.from_pretrained(miniature.checkpoint(), dtype=torch.bfloat16).save_pretrained(tmp_path)
    app.processor.save_pretrained(tmp_path)
    other = demo.App(str(tmp_path))
    assert str(tmp_path) in other.describe() and "miniature" not in other.describe()
    assert "**the shipped miniature**, 2 million" in app.describe()
    assert other.generation == demo.GENERATION  # the stock pipeline's own
    *loaded, words = other.choose(0, None, demo.Prompts())
    assert masks_of(other.segment(loaded[1], words, BACKGROUND, "a {}", 0.3)[1])
    assert masks_of(other.click(*loaded[1:3], demo.INSIDE, SimpleNamespace(index=(99, 200)))[2])
    assert other.draw_everything(loaded[1])[1].startswith("Everything")


def test_a_checkpoint_without_a_text_tower_says_so_where_words_are_asked_for(app, tmp_path):
    SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).drop_text_tower().save_pretrained(tmp_path)
    app.processor.save_pretrained(tmp_path)
    other = demo.App(str(tmp_path))
    *loaded, words = other.choose(0, None, demo.Prompts())
    with pytest.warns(UserWarning, match="no text tower"):
        assert other.segment(loaded[1], words, BACKGROUND, "a {}", 0.3) == gr.skip()
    assert masks_of(other.click(*loaded[1:3], demo.INSIDE, SimpleNamespace(index=(99, 200)))[2])


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


# ---- the page ----

OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-quic",
)
needs_chromium = pytest.mark.skipif(
    shutil.which("chromedriver") is None or not (shutil.which("chromium") or shutil.which("google-chrome")),
    reason="the page's tests need chromium and chromedriver: `make test-app` as root on Debian installs them",
)

# Python runs this first: the app, like everything else here, must do without a network.
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
    """`python demo/app.py` in a process of its own, on a free port."""

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
    """The app in a Chromium of its own."""

    def __init__(self, url: str, folder: Path):
        options = webdriver.ChromeOptions()
        for option in (*OPTIONS, f"--user-data-dir={tempfile.mkdtemp(dir=folder)}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        # Of the page itself, whatever the window's frame takes.
        size = {"width": 1280, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")
        self.driver.get_log("performance")  # of the new tab's own page
        self.driver.get(url)
        self.until(lambda: self.legend("by_both_heads") and self.line("Text tower"))

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
        """The part of the line of times that starts so, "" if there is none."""
        return next((text for text in self.texts("#timers p") if text.startswith(start)), "")

    def pixels(self, panel: str) -> np.ndarray:
        """What a panel's picture looks like, when all of it is there and no pointer on it."""
        ActionChains(self.driver, duration=0).move_to_element(self.find("h3")).perform()
        script = """return [...document.querySelectorAll(arguments[0])].every(image => image.complete
            && image.naturalWidth && image.getAnimations().length == 0)"""
        self.until(lambda: self.driver.execute_script(script, f"#{panel} img"))
        element = "img" if panel == "photograph" else ".image-container"
        screenshot = self.find(f"#{panel} {element}").screenshot_as_png
        return np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB")).astype(int)

    def click_picture(self, x: float, y: float) -> None:
        """At x and y, as shares of the picture; returns when the mask is there."""
        before = self.images("by_prompts") + self.images("photograph")
        image = self.find("#photograph img")
        offset = (round((x - 0.5) * image.size["width"]), round((y - 0.5) * image.size["height"]))
        ActionChains(self.driver, duration=0).move_to_element_with_offset(image, *offset).click().perform()
        self.until(lambda: self.images("by_prompts") + self.images("photograph") != before)

    def images(self, panel: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(image => image.src)"
        return self.driver.execute_script(script, f"#{panel} img")

    def choose_scene(self, number: int) -> None:
        before, words = self.images("by_both_heads"), self.find("#words input").get_attribute("value")
        self.driver.find_elements(By.CSS_SELECTOR, "#scenes .gallery-item")[number].click()
        self.until(lambda: self.find("#words input").get_attribute("value") != words)
        self.until(lambda: self.images("by_both_heads") != before)

    def type_words(self, words: str) -> None:
        field = self.find("#words input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(words, Keys.ENTER)

    def upload(self, path: Path) -> None:
        self.dismiss()
        self.find("#photograph input[type=file]").send_keys(str(path))

    def message(self) -> str:
        self.until(lambda: self.texts(".toast-message-text"))
        return " ".join(self.texts(".toast-message-text"))

    def dismiss(self) -> None:
        for button in self.driver.find_elements(By.CSS_SELECTOR, ".toast-close"):
            self.driver.execute_script("arguments[0].click()", button)
        self.until(lambda: not self.texts(".toast-body"))

    def choose_mode(self, name: str) -> None:
        labels = self.driver.find_elements(By.CSS_SELECTOR, "#mode label")
        next(label for label in labels if label.text == name).click()

    def set_opacity(self, opacity: float) -> None:
        script = """arguments[0].value = arguments[1];
            arguments[0].dispatchEvent(new Event("input", {bubbles: true}))"""
        self.driver.execute_script(script, self.find("#opacity input[type=range]"), opacity)
        style = "return document.documentElement.style.getPropertyValue('--mask-opacity')"
        self.until(lambda: float(self.driver.execute_script(style) or -1) == opacity)

    def drawn(self, panel: str) -> np.ndarray:
        """Which of a scene's pixels are seen to be covered by masks, `(128, 128)`."""
        looks = []
        for opacity in (0, 1):
            self.set_opacity(opacity)
            looks.append(self.pixels(panel))
        covered = np.abs(looks[1] - looks[0]).max(axis=-1) > 16
        height, width = covered.shape  # the scene is a square in the middle, as high as the panel
        return shrink(covered[:, (width - height) // 2 : (width + height) // 2])

    def outside(self) -> list[str]:
        """Addresses, other than the app's, that the page asked for."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        asked = (m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent")
        return [url for url in asked if url.startswith("http") and not url.startswith("http://127.0.0.1:")]

    def complaints(self) -> list[dict]:
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
    """A page of a new user, in the same browser."""
    browser.driver.get(server.url())
    browser.complaints()  # of the page before, that it was left
    browser.until(lambda: browser.legend("by_both_heads") and browser.line("Text tower"))
    yield browser
    assert browser.outside() == []
    assert browser.complaints() == []


@pytest.mark.browser
@needs_chromium
class TestPage:
    def test_it_opens_with_a_scene_and_says_that_this_is_the_miniature(self, page, app):
        assert "the shipped miniature, 2 million parameters" in page.find("body").text
        names = app.scenes[0][1].split(", ")
        assert page.legend("by_clip_head") == names
        assert {text.rsplit(" ", 1)[0] for text in page.legend("by_both_heads")} == set(names)
        assert re.fullmatch(r"Image encoder \d+ ms, once for this picture", page.line("Image encoder"))
        assert len(page.driver.find_elements(By.CSS_SELECTOR, "#scenes .gallery-item")) == len(app.scenes)

    def test_a_click_is_seen_to_draw_what_was_clicked_on(self, page):
        page.choose_scene(1)
        encoder, untouched = page.line("Image encoder"), page.images("photograph")
        masks = render(seed=0, index=demo.SCENES[1]).masks
        for mask in (masks[0], masks[3]):
            page.click_picture(*(side / demo.SMALLEST_VIEW for side in centre(mask)))
            assert re.fullmatch(r"predicted IoU [01]\.\d\d", page.legend("by_prompts")[0])
            assert re.fullmatch(r"Points and box \d+ ms", page.line("Points and box"))
            assert iou(page.drawn("by_prompts"), mask) > 0.6
            page.find("#clear").click()
            page.until(lambda: not page.legend("by_prompts"))
            assert not page.drawn("by_prompts").any() and page.images("photograph") == untouched
        assert page.line("Image encoder") == encoder  # nothing was encoded again

    def test_points_outside_and_boxes_change_the_mask_and_are_seen(self, page):
        page.click_picture(0.53, 0.4)
        once = page.drawn("by_prompts")
        page.choose_mode(demo.OUTSIDE)
        page.click_picture(0.2, 0.75)
        page.choose_mode(demo.BOX)
        page.click_picture(0.9, 0.95)
        page.click_picture(0.1, 0.1)
        assert page.legend("by_prompts") and (page.drawn("by_prompts") != once).mean() > 0.01
        seen = page.pixels("photograph")
        for colour in ((0, 255, 0), (255, 0, 0), (255, 255, 0)):
            assert (np.abs(seen - colour).max(axis=-1) < 70).sum() > 10

    def test_words_are_found_and_named_in_the_legend(self, page):
        page.choose_scene(1)
        scene = render(seed=0, index=demo.SCENES[1])
        names = [CLASS_NAMES[class_id] for class_id in scene.class_ids]
        for asked in (names[:2], [*reversed(names), "red dotted shape"]):
            before = page.images("by_both_heads")
            page.type_words(",".join(asked))
            page.until(lambda before=before: page.images("by_both_heads") != before)
            wanted = set(asked) & set(names)
            assert wanted <= {re.sub(r" [01]\.\d\d$", "", text) for text in page.legend("by_both_heads")} <= set(asked)
            assert wanted <= set(page.legend("by_clip_head")) <= set(asked)
            things = np.any([mask for mask, name in zip(scene.masks, names, strict=True) if name in wanted], axis=0)
            for panel in ("by_clip_head", "by_both_heads"):
                assert (page.drawn(panel) & things).sum() > 0.8 * things.sum()
            shown = page.find("#classes").text
            assert sum(name in shown for name in (*asked, "background")) == min(5, len(asked) + 1)

    def test_words_that_cannot_be_asked_for_get_a_message_and_change_nothing(self, page):
        legend = page.legend("by_both_heads")
        page.type_words("green tiled shape, green tiled shape")
        assert "more than once" in page.message()
        page.dismiss()
        page.type_words(" , ")
        assert "at least one name" in page.message()
        assert page.legend("by_both_heads") == legend and "Error" not in page.find("body").text

    def test_opacity_is_that_of_the_slider(self, page):
        looks = {}
        for opacity in (0, 0.3, 0.9):
            page.set_opacity(opacity)
            looks[opacity] = page.pixels("by_both_heads")
        faint, strong = (np.abs(looks[opacity] - looks[0]).sum() for opacity in (0.3, 0.9))
        assert 2.5 < strong / faint < 3.5

    def test_everything_is_drawn(self, page, app):
        page.choose_scene(5)
        page.find("#draw_everything").click()
        page.until(lambda: page.line("Everything"))
        page.until(lambda: page.legend("everything"))
        assert page.line("Everything").endswith(f"{len(page.legend('everything'))} masks")
        things = np.any(render(seed=0, index=demo.SCENES[5]).masks, axis=0)
        assert (page.drawn("everything") & things).sum() > 0.7 * things.sum()

    @pytest.mark.parametrize("name", [*BAD, "notes.txt"])
    def test_a_bad_file_gets_a_message_and_nothing_is_lost(self, page, tmp_path, name):
        content, message = BAD.get(name, (b"words", "Invalid file type"))  # that one Gradio itself refuses
        (tmp_path / name).write_bytes(content)
        page.click_picture(0.53, 0.4)
        legends = [page.legend(panel) for panel in ("by_prompts", "by_both_heads")]
        photograph, encoder = page.images("photograph"), page.line("Image encoder")
        page.upload(tmp_path / name)
        assert message in page.message()
        page.until(lambda: page.images("photograph") == photograph)
        assert [page.legend(panel) for panel in ("by_prompts", "by_both_heads")] == legends
        assert "Traceback" not in page.driver.page_source and page.line("Image encoder") == encoder
        page.click_picture(0.2, 0.75)  # all goes on
        assert page.legend("by_prompts") and page.images("photograph") != photograph

    def test_a_bad_file_after_the_picture_was_taken_away_brings_it_back(self, page, tmp_path):
        (tmp_path / "empty.png").write_bytes(b"")
        photograph = page.images("photograph")
        page.find("#photograph button[title='Remove Image']").click()
        page.until(lambda: not page.images("photograph"))
        page.upload(tmp_path / "empty.png")
        assert "empty" in page.message()
        page.until(lambda: page.images("photograph") == photograph)

    def test_a_photograph_is_encoded_and_answers(self, page, tmp_path):
        page.type_words("purple solid shape")
        Image.fromarray(render(seed=0, index=demo.SCENES[3]).image).resize((900, 600)).save(tmp_path / "photo.jpg")
        before = page.images("by_both_heads")
        page.upload(tmp_path / "photo.jpg")
        page.until(lambda: page.images("by_both_heads")[:1] != before[:1])
        page.until(lambda: page.legend("by_clip_head") == ["purple solid shape"])
        assert not page.legend("by_prompts") and page.line("Image encoder") and not page.line("Points and box")
        page.click_picture(0.5, 0.5)
        assert page.legend("by_prompts")

    def test_two_users_at_once_do_not_mix(self, page, server, tmp_path):
        other = Page(server.url(), tmp_path)
        try:

            def use(user, number):
                """What one sees who chooses a scene, clicks on every object and draws everything."""
                user.choose_scene(number)
                looks = []
                for mask in render(seed=0, index=demo.SCENES[number]).masks[:2]:
                    user.click_picture(*(side / demo.SMALLEST_VIEW for side in centre(mask)))
                    looks.append(user.drawn("by_prompts"))
                user.find("#draw_everything").click()
                user.until(lambda: user.legend("everything"))
                return [*looks, *map(user.drawn, ("by_both_heads", "everything"))], user.legend("everything")

            alone = [use(page, 1), use(other, 5)]
            assert alone[0][1] != alone[1][1]
            with ThreadPoolExecutor(2) as pool:
                together = list(pool.map(use, (page, other), (5, 1)))
            for (looks, legend), expected in zip(together, reversed(alone), strict=True):
                assert legend == expected[1]
                assert all(np.array_equal(*pair) for pair in zip(looks, expected[0], strict=True))
        finally:
            other.driver.quit()
