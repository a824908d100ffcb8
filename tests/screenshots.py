"""Screenshots of the app in `docs/images/`: `make screenshots`."""

import io
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium.webdriver import Keys

from samclip_hf.miniature.scenes import CLASS_NAMES, render

from .test_app import Page, Server, demo

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def save(page: Page, name: str, last: str) -> None:
    """Saves the page down to the element with the id `last`, without the durations, which differ in every run."""
    page.driver.execute_script("document.querySelector('#times').style.display = 'none'")
    page.pixels("input_image")  # waits until it is loaded
    page.pixels("result")
    time.sleep(0.5)  # transitions
    screenshot = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    box = page.find(f"#{last}").rect
    screenshot = screenshot.crop((0, 0, screenshot.width, round(box["y"] + box["height"] + 16)))
    screenshot = screenshot.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)  # a fifth of the file size
    IMAGES.mkdir(parents=True, exist_ok=True)
    screenshot.save(IMAGES / f"app-{name}.png", optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            page = Page(server.url(), Path(folder))
            page.resize(1280, 1600)  # the whole page
            try:
                page.choose_scene(1)
                save(page, "labels", "settings")
                scene = render(seed=0, index=demo.EXAMPLE_SCENES[0])
                page.choose_scene(0)
                word = CLASS_NAMES[scene.class_ids[0]]
                page.enter("labels", word, Keys.ENTER)
                page.until(lambda: set(page.rows()) == {word})
                page.click_object(0, 3)
                page.add_example("my object")
                page.until(lambda: "my object" in page.rows())
                Image.fromarray(scene.image[:, ::-1]).save(Path(folder) / "mirrored.png")
                page.upload(Path(folder) / "mirrored.png")
                page.until(lambda: page.alt().startswith("mirrored.png") and "my object" in page.rows())
                save(page, "find", "find")
                page.open(f"{server.url()}?__theme=dark")
                page.choose_scene(1)
                page.choose("mode", demo.BOX)
                page.click_image(0.42, 0.4)
                page.click_image(0.98, 0.98)
                save(page, "box", "settings")
                page.resize(390, 2400)
                page.open(server.url())
                page.click_object(0, 1)
                save(page, "phone", "download_json")
            finally:
                page.driver.quit()
        finally:
            server.stop()


if __name__ == "__main__":
    main()
