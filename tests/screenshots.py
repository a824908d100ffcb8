"""
The pictures of the app in `docs/pictures/`: `make screenshots`.
"""

import io
import tempfile
from pathlib import Path

from PIL import Image

from .test_app import Page, Server, demo

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def save(page: Page, name: str) -> None:
    for panel in ("photograph", "by_prompts", "everything", "by_clip_head", "by_both_heads"):
        page.pixels(panel)  # when all of them are there
    screenshot = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    lowest = page.find("#timers").rect
    screenshot = screenshot.crop((0, 0, screenshot.width, round(lowest["y"] + lowest["height"] + 16)))
    screenshot = screenshot.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)  # a fifth of the bytes, no colour off
    PICTURES.mkdir(parents=True, exist_ok=True)
    screenshot.save(PICTURES / f"app-{name}.png", optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            page = Page(server.url(), Path(folder))
            try:
                page.click_picture(0.17, 0.7)
                page.find("#draw_everything").click()
                page.until(lambda: page.legend("everything"))
                save(page, "point")
                page.choose_scene(1)
                page.choose_mode(demo.BOX)
                page.click_picture(0.42, 0.4)
                page.click_picture(0.98, 0.98)
                page.choose_mode(demo.OUTSIDE)
                page.click_picture(0.25, 0.78)
                page.find("#draw_everything").click()
                page.until(lambda: page.legend("everything"))
                save(page, "box")
            finally:
                page.driver.quit()
        finally:
            server.stop()


if __name__ == "__main__":
    main()
