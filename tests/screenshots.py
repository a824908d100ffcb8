"""Screenshots of the app in `docs/images/`: `make screenshots`."""

import io
import tempfile
from pathlib import Path

from PIL import Image

from .test_app import Page, Server, demo

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def save(page: Page, name: str) -> None:
    for panel in ("input_image", "by_prompts", "everything", "by_clip_head", "by_both_heads"):
        page.pixels(panel)  # waits until all images are loaded
    screenshot = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    last_row = page.find("#timers").rect
    screenshot = screenshot.crop((0, 0, screenshot.width, round(last_row["y"] + last_row["height"] + 16)))
    screenshot = screenshot.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)  # a fifth of the file size
    IMAGES.mkdir(parents=True, exist_ok=True)
    screenshot.save(IMAGES / f"app-{name}.png", optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            page = Page(server.url(), Path(folder))
            page.resize(1250)  # the whole page
            try:
                page.click_image(0.17, 0.7)
                page.find("#segment_everything").click()
                page.until(lambda: page.legend("everything"))
                save(page, "point")
                page.choose_scene(1)
                page.choose_mode(demo.BOX)
                page.click_image(0.42, 0.4)
                page.click_image(0.98, 0.98)
                page.choose_mode(demo.BACKGROUND)
                page.click_image(0.25, 0.78)
                page.find("#segment_everything").click()
                page.until(lambda: page.legend("everything"))
                save(page, "box")
            finally:
                page.driver.quit()
        finally:
            server.stop()


if __name__ == "__main__":
    main()
