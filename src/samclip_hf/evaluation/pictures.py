"""What panels show: pixels with labels, masks, prompts and words on them."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def captioned(pixels: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """The image `(height, width, 3)`, darkened, with lines of text over it."""
    image = Image.fromarray((pixels * 0.45).astype(np.uint8))
    scale = max(1.0, 256 / min(image.size))  # letters need pixels
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    font = ImageFont.load_default(size=max(10, image.height // 16))
    ImageDraw.Draw(image).multiline_text((4, 4), "\n".join(lines), fill="white", font=font)
    return np.asarray(image)


def with_labels(pixels: np.ndarray, label_map: np.ndarray, names: Sequence[str], background: bool) -> np.ndarray:
    """
    Label colours half-transparent over the image, and the names of the largest labels.

    pixels (`numpy.ndarray` of shape `(height, width, 3)`), label_map (`(height, width)`):
        Labels without a name, ignored ones, are dark; so is label 0 with a `background`.
    """
    colours = np.zeros((256, 3), dtype=np.float32)  # label maps are of 8 bits here: 255 is ignored
    for label in range(int(background), min(len(names), 255)):
        colours[label] = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.55 + 0.45 * (label % 2), 1)
    shown = np.where((label_map < 0) | (label_map >= len(names)), 255, label_map).clip(0, 255)
    image = Image.fromarray((pixels * 0.4 + colours[shown] * 255 * 0.6).astype(np.uint8))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=max(9, image.height // 24))
    labels, counts = np.unique(shown, return_counts=True)
    for label in labels[counts.argsort()[::-1]][:8]:
        if label == 255 or (background and label == 0):
            continue
        rows, columns = np.nonzero(shown == label)
        middle = np.hypot(rows - rows.mean(), columns - columns.mean()).argmin()
        half = draw.textlength(names[label], font=font) / 2 + 1
        x = min(max(columns[middle], half), max(half, image.width - half))  # names stay in the picture
        position = (int(x), int(rows[middle]))
        draw.text(position, names[label], fill="white", stroke_width=1, stroke_fill="black", anchor="mm", font=font)
    return np.asarray(image)


def with_masks(pixels: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Every mask `(height, width)` of type bool in a colour of its own, the smaller on top."""
    result = pixels * 0.5
    order = sorted(range(len(masks)), key=lambda number: -masks[number].sum())
    for number in order:
        colour = np.array(colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.8, 1)) * 255
        result[masks[number]] = pixels[masks[number]] * 0.4 + colour * 0.6
    return result.astype(np.uint8)


def with_prompts(pixels: np.ndarray, points: np.ndarray | None = None, boxes: np.ndarray | None = None) -> np.ndarray:
    """Points `(number, 2)` and boxes `(number, 4)`, in pixels, drawn on the image."""
    image = Image.fromarray(pixels)
    draw, width = ImageDraw.Draw(image), max(1, min(image.size) // 150)
    for x, y in [] if points is None else points:
        radius = 3 * width
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill="lime", outline="black", width=width)
    for box in [] if boxes is None else boxes:
        draw.rectangle(tuple(map(float, box)), outline="lime", width=width)
    return np.asarray(image)
