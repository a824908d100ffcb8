"""
The page of `examples/browser` in Chromium gives PyTorch's masks and scores. `make test-app` installs what it needs.
"""

import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from samclip_hf import SamClipForImageSegmentation, SamClipImageProcessorPil, SamClipProcessor
from samclip_hf.miniature.scenes import CLASS_NAMES, render

from .export.test_export import checkpoint, exported  # noqa: F401  # fixtures

EXAMPLE = Path(__file__).parents[1] / "examples" / "browser"
LABELS, BACKGROUND = CLASS_NAMES[:12], "an empty scene"
TIMEOUT = 120

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (EXAMPLE / "node_modules" / "onnxruntime-web").exists(),
        reason="onnxruntime-web is not installed in examples/browser (make test-app)",
    ),
    pytest.mark.skipif(shutil.which("chromedriver") is None, reason="Chromium is not installed (make test-app)"),
]


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address(exported, tmp_path_factory):  # noqa: F811
    """The page and an export, served on the loopback address."""
    folder = tmp_path_factory.mktemp("page")
    for path in EXAMPLE.glob("*.*"):
        shutil.copy(path, folder)
    (folder / "node_modules").symlink_to((EXAMPLE / "node_modules").resolve())
    (folder / "exported").symlink_to(exported)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Page:
    def __init__(self, address: str):
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,2000"):
            options.add_argument(argument)
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.driver.set_script_timeout(TIMEOUT)
        self.driver.get(address)

    def find(self, name: str):
        return self.driver.find_element(By.ID, name)

    def wait_for_status(self, start: str) -> str:
        WebDriverWait(self.driver, TIMEOUT, poll_frequency=0.05).until(
            lambda _: self.find("status").text.startswith((start, "Error"))
        )
        assert self.find("status").text.startswith(start), self.find("status").text
        return self.find("status").text

    def fill(self, name: str, text: str) -> None:
        self.find(name).clear()
        self.find(name).send_keys(text)

    def open_image(self, path: Path) -> None:
        self.find("file").send_keys(str(path))
        self.wait_for_status("Select Segment")

    def state(self) -> dict:
        """The number of runs of the image encoder, and the segments with lists of pixels."""
        script = """
            const done = arguments[0];
            import("./page.js").then(({ state }) => done({ runs: state.runs, segments: state.segments.map(
                ({ label, score, mask }) => ({ label, score, mask: Array.from(mask) })) }));
        """
        return self.driver.execute_async_script(script)


@pytest.fixture(scope="module")
def page(address):
    page = Page(f"{address}/?onnx=exported/")
    page.wait_for_status("Choose an image")
    yield page
    page.driver.quit()


@pytest.mark.parametrize("size", [(128, 128), (128, 77), (70, 128)])  # without resizing, which differs in browsers
def test_masks_and_scores_of_texts_and_points_equal_those_of_pytorch(size, page, checkpoint, tmp_path):  # noqa: F811
    image = Image.fromarray(render(0, 8).image).crop((0, 0, *size))
    image.save(tmp_path / "scene.png")
    model = SamClipForImageSegmentation.from_pretrained(checkpoint).eval()
    tokenizer = SamClipProcessor.from_pretrained(checkpoint).tokenizer
    processor = SamClipProcessor(SamClipImageProcessorPil.from_pretrained(checkpoint), tokenizer)
    runs = page.state()["runs"]
    page.open_image(tmp_path / "scene.png")
    page.fill("labels", ", ".join(LABELS))
    for background in (BACKGROUND, ""):
        page.fill("background", background)
        page.find("segment").click()
        page.wait_for_status("Segments: ")
        vocabulary = model.embed_vocabulary(list(LABELS), [background] if background else [], ["a {}"])
        with torch.no_grad():
            outputs = model(**processor(image), vocabulary=vocabulary)
        expected = processor.image_processor.post_process_semantic_segmentation(outputs, [size[::-1]])[0].numpy()
        probabilities = outputs.segment_logits[outputs.segment_scores > 0].softmax(dim=-1)
        if background:
            probabilities = probabilities[probabilities.argmax(dim=-1) > 0]
        segments = page.state()["segments"]
        scores = sorted(segment["score"] for segment in segments)
        np.testing.assert_allclose(scores, probabilities.amax(dim=-1).sort().values, atol=1e-4)
        labels = np.full(size[::-1], -1)
        for segment in segments:
            name = segment["label"]
            labels[np.reshape(segment["mask"], labels.shape) > 0] = LABELS.index(name) + bool(background)
        inside = labels >= 0  # without background, PyTorch labels all pixels
        assert inside.mean() > 0.02 and (labels[inside] == expected[inside]).mean() > 0.999
        if background:
            assert (expected[~inside] == 0).mean() > 0.999
        shown = [item.text for item in page.driver.find_elements(By.CSS_SELECTOR, "#segments li")]
        assert shown == [f"{segment['label']}: {segment['score']:.3f}" for segment in segments]

    canvas = page.find("canvas")
    ActionChains(page.driver).move_to_element(canvas).click().perform()
    page.wait_for_status("Mask of the point")
    (segment,) = page.state()["segments"]
    x, y = (float(part) for part in segment["label"].split("(")[1].split(")")[0].split(","))
    assert abs(x - size[0] / 2) < 2 and abs(y - size[1] / 2) < 2
    inputs = processor(image, input_points=[[[[x, y]]]])
    with torch.no_grad():
        outputs = model(**inputs, multimask_output=True)
    masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    best = outputs.iou_scores[0, 0].argmax()
    expected = masks[0][0, best].numpy()
    actual = np.reshape(segment["mask"], expected.shape) > 0
    assert abs(segment["score"] - outputs.iou_scores[0, 0, best].item()) < 0.02  # x and y are rounded in the label
    assert (actual == expected).mean() > 0.98 and actual.any()
    assert page.state()["runs"] == runs + 1  # for two vocabularies and a point


def test_invalid_input_is_reported(address, page, tmp_path):
    Image.fromarray(render(0, 8).image).save(tmp_path / "scene.png")
    page.open_image(tmp_path / "scene.png")
    for name, text, message in (
        ("template", "a photo", "Error: The template must contain {}"),
        ("labels", " , ", "Error: Enter a label."),
        ("labels", "red " * 80, "Error: A text has "),
    ):
        before = page.find(name).get_attribute("value")
        page.fill(name, text)
        page.find("segment").click()
        page.wait_for_status(message)
        page.fill(name, before)
    (tmp_path / "text.png").write_text("not an image")
    page.find("file").send_keys(str(tmp_path / "text.png"))
    page.wait_for_status("Error: ")
    assert not page.find("segment").is_enabled()
    page.driver.get(f"{address}/?onnx=nowhere/")
    page.wait_for_status("Error: nowhere/samclip.json cannot be loaded (404). Run samclip export.")
