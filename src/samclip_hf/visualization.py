"""Draws masks, label maps, prompts, texts and legends on images, and panels of images."""

import bisect
import colorsys
import functools
import math
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from .files import atomic_path

NO_LABEL = 255  # in 8-bit label maps: ignored pixels
MIN_LEGEND_LENGTH = 48  # characters in a row of a legend below a narrow image
# Fonts of Linux, Windows and macOS with many alphabets. The first one with all characters of a text is used.
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "PingFang.ttc",
)


def color_of(number: int, saturation: float = 0.8) -> tuple[int, int, int]:
    """Returns red, green and blue, 0 to 255. Consecutive numbers have very different hues (golden ratio)."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, saturation, 1)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_text(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """
    Draws lines of text on a darkened image. Long lines are wrapped, small images are enlarged.

    Args:
        image (`numpy.ndarray` of shape `(height, width, 3)` and type uint8).
        lines (`Sequence[str]`).

    Returns:
        `numpy.ndarray` of shape `(new_height, new_width, 3)` and type uint8, at least 256 pixels high and wide.
    """
    canvas = Image.fromarray((image * 0.45).astype(np.uint8))
    scale = max(1.0, 256 / min(canvas.size))
    canvas = canvas.resize((round(canvas.width * scale), round(canvas.height * scale)))
    font = ImageFont.load_default(size=max(10, min(canvas.size) // 16))
    line_length = max(1, int((canvas.width - 8) / font.getlength("abcdefghij ") * 11))  # in characters of mean width
    text = "\n".join(textwrap.fill(line, line_length, subsequent_indent="  ") for line in lines)
    ImageDraw.Draw(canvas).multiline_text((4, 4), text, fill="white", font=font)
    return np.asarray(canvas)


def overlay_labels(image: np.ndarray, label_map: np.ndarray, names: Sequence[str], has_background: bool) -> np.ndarray:
    """
    Colors an image by its label map and writes the names of the 8 largest labels on it.

    Args:
        image (`numpy.ndarray` of shape `(height, width, 3)` and type uint8).
        label_map (`numpy.ndarray` of shape `(height, width)` and an integer type):
            Labels. Pixels with a label without a name, such as ignored pixels, are dark.
        names (`Sequence[str]`):
            The names of the labels, at most 255.
        has_background (`bool`):
            Whether label 0 is background, which is dark, too.

    Returns:
        `numpy.ndarray` of shape `(height, width, 3)` and type uint8.
    """
    colors = np.zeros((NO_LABEL + 1, 3), dtype=np.float32)
    for label in range(int(has_background), min(len(names), NO_LABEL)):
        colors[label] = color_of(label, 0.55 + 0.45 * (label % 2))
    shown = np.where((label_map < 0) | (label_map >= len(names)), NO_LABEL, label_map).clip(0, NO_LABEL)
    canvas = Image.fromarray((image * 0.4 + colors[shown] * 0.6).astype(np.uint8))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=max(9, canvas.height // 24))
    labels, counts = np.unique(shown, return_counts=True)
    for label in labels[counts.argsort()[::-1]][:8]:
        if label == NO_LABEL or (has_background and label == 0):
            continue
        rows, columns = np.nonzero(shown == label)
        center = np.hypot(rows - rows.mean(), columns - columns.mean()).argmin()
        half_width = draw.textlength(names[label], font=font) / 2 + 1
        x = min(max(columns[center], half_width), max(half_width, canvas.width - half_width))  # inside the image
        position = (int(x), int(rows[center]))
        draw.text(position, names[label], fill="white", stroke_width=1, stroke_fill="black", anchor="mm", font=font)
    return np.asarray(canvas)


def overlay_masks(image: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """
    Draws each mask in its own color on a darkened image, smaller masks on top of larger ones.

    Args:
        image (`numpy.ndarray` of shape `(height, width, 3)` and type uint8).
        masks (`Sequence[numpy.ndarray]` of shape `(height, width)` and type bool).

    Returns:
        `numpy.ndarray` of shape `(height, width, 3)` and type uint8.
    """
    result = image * 0.5
    for number in sorted(range(len(masks)), key=lambda number: -masks[number].sum()):
        result[masks[number]] = image[masks[number]] * 0.4 + np.array(color_of(number)) * 0.6
    return result.astype(np.uint8)


def draw_prompts(image: np.ndarray, points: np.ndarray | None = None, boxes: np.ndarray | None = None) -> np.ndarray:
    """
    Draws prompts on an image.

    Args:
        image (`numpy.ndarray` of shape `(height, width, 3)` and type uint8).
        points (`numpy.ndarray` of shape `(num_points, 2)`, *optional*):
            x and y in pixels.
        boxes (`numpy.ndarray` of shape `(num_boxes, 4)`, *optional*):
            x1, y1, x2, y2 in pixels.

    Returns:
        `numpy.ndarray` of shape `(height, width, 3)` and type uint8.
    """
    canvas = Image.fromarray(image)
    draw, width = ImageDraw.Draw(canvas), max(1, min(canvas.size) // 150)
    for x, y in [] if points is None else points:
        radius = 3 * width
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill="lime", outline="black", width=width)
    for box in [] if boxes is None else boxes:
        draw.rectangle(tuple(map(float, box)), outline="lime", width=width)
    return np.asarray(canvas)


def draw_segments(
    image: Image.Image,
    masks: Sequence[np.ndarray],
    color_numbers: Sequence[int],
    legend: Sequence[tuple[int | None, str]],
    caption: str | None = None,
    names: Sequence[str] | None = None,
    opacity: float = 0.45,
) -> Image.Image:
    """
    Tints and outlines each mask, smaller masks on top of larger ones, and draws a legend below the image. An outline
    is a line in the color of the mask with a black line around it, which contrast with dark and bright images. The
    result is wider than a narrow image, so that the legend has room for about 48 characters.

    Args:
        image (`PIL.Image.Image`):
            An image in RGB.
        masks (`Sequence[numpy.ndarray]` of shape `(height, width)` and type bool).
        color_numbers (`Sequence[int]`):
            The color of each mask, see [`color_of`].
        legend (`Sequence[tuple[int | None, str]]`):
            For each entry, a color number, or `None` for no color, and a text. Characters without a glyph in the
            fonts of Pillow and of the system are written without accents or as escapes, such as `\\u732b`.
        caption (`str`, *optional*):
            A text below the legend.
        names (`Sequence[str]`, *optional*):
            A text to write into each mask, the larger masks first. A text that would cover another is left out.
        opacity (`float`, *optional*, defaults to 0.45):
            Opacity of the tint, from 0 to 1.
    """
    canvas = image.copy()
    thickness = max(1, min(image.size) // 200)
    order = sorted(range(len(masks)), key=lambda index: -np.count_nonzero(masks[index]))
    for index in order:
        mask = Image.fromarray(masks[index].astype(np.uint8) * 255)
        box = mask.getbbox()
        if box is None:
            continue
        left, top, right, bottom = box
        # The margin is the radius of the blur below, so that no outline is drawn along the edges of the image.
        box = (
            max(0, left - thickness),
            max(0, top - thickness),
            min(image.width, right + thickness),
            min(image.height, bottom + thickness),
        )
        mask, crop = mask.crop(box), canvas.crop(box)
        color = Image.new("RGB", crop.size, color_of(color_numbers[index]))
        crop.paste(Image.blend(crop, color, opacity), mask=mask)
        # The blur darkens pixels of the mask near its edge, and brightens pixels of the background near the mask.
        blurred = mask.filter(ImageFilter.BoxBlur(thickness))
        crop.paste("black", mask=ImageChops.subtract(blurred, mask).point([0] + [255] * 255))
        crop.paste(color, mask=ImageChops.subtract(mask, blurred).point([0] + [255] * 255))
        canvas.paste(crop, box)
    if names is not None:
        _draw_names(canvas, [(names[index], masks[index]) for index in order])
    return _add_legend(canvas, [*legend, *([] if caption is None else [(None, f"\n{caption}")])])


def _draw_names(image: Image.Image, named_masks: Sequence[tuple[str, np.ndarray]]) -> None:
    """Writes each name at the pixel of its mask `(height, width)` nearest to the center of the mask, unless it would
    cover the name of an earlier mask."""
    draw, size = ImageDraw.Draw(image), max(12, min(image.size) // 24)
    stroke = max(1, size // 10)
    written: list[tuple[float, float, float, float]] = []
    for name, mask in named_masks:
        rows, columns = np.nonzero(mask)
        if not len(rows):
            continue
        text, font = _drawable(name, size)
        center = np.hypot(rows - rows.mean(), columns - columns.mean()).argmin()
        half_width, half_height = font.getlength(text) / 2 + stroke, size / 2 + stroke
        x = min(max(columns[center], half_width), max(half_width, image.width - half_width))  # inside the image
        y = min(max(rows[center], half_height), max(half_height, image.height - half_height))
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in written):
            draw.text((x, y), text, fill="white", stroke_width=stroke, stroke_fill="black", anchor="mm", font=font)
            written.append(box)


def _add_legend(image: Image.Image, legend: Sequence[tuple[int | None, str]]) -> Image.Image:
    """Adds rows of colored squares and texts below an image. Long texts are wrapped. A text that begins with a line
    break begins a row."""
    size = max(12, min(image.size) // 24)
    line_height, gap = round(1.5 * size), size // 2
    width = max(image.width, MIN_LEGEND_LENGTH * size // 2)
    rows: list[tuple[int, int, int | None, int, str, ImageFont.FreeTypeFont]] = []
    x, row = gap, 0
    for number, entry in legend:
        text, font = _drawable(entry, size)
        square = 0 if number is None else size + gap
        for position, line in enumerate(_wrap(text, font, width - 2 * gap - square)):
            length = square + round(font.getlength(line)) + 2 * gap
            if x > gap and (position or x + length > width or entry.startswith("\n")):
                x, row = gap, row + 1
            rows.append((x, row, None if position else number, square, line, font))
            x += length
    height = image.height + (line_height * (row + 1) + gap if legend else 0)
    result = Image.new("RGB", (width if legend else image.width, height), "white")
    result.paste(image)
    draw = ImageDraw.Draw(result)
    for x, row, number, square, text, font in rows:
        y = image.height + gap + line_height * row
        if number is not None:
            draw.rectangle((x, y, x + size - 1, y + size - 1), fill=color_of(number), outline="black")
        draw.text((x + square, y + size / 2), text, fill="black", anchor="lm", font=font)
    return result


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces where possible."""
    lines = [text]
    while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
        line = lines.pop()
        lengths = [font.getlength(line[:end]) for end in range(1, len(line))]
        fits = max(1, bisect.bisect(lengths, width))
        end = line.rfind(" ", 1, fits + 1)
        end = fits if end < 1 else end
        lines += [line[:end].rstrip(), line[end:].lstrip()]
    return lines


def _drawable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """A text and a font of `size` pixels that has glyphs for all of its characters. Pillow's font has few characters
    outside ASCII, so system fonts are tried, too. Without a font for the whole text, accents are removed and other
    characters are replaced by escapes."""
    text = " ".join(text.split())
    for name in (None, *SYSTEM_FONTS):
        font = _font(name, size)
        if font is not None and all(_has_glyph(name, character) for character in text):
            return text, font
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    font = _font(None, size)
    assert font is not None
    escaped = "".join(c if _has_glyph(None, c) else c.encode("ascii", "backslashreplace").decode() for c in plain)
    return escaped, font


@functools.lru_cache(maxsize=64)
def _font(name: str | None, size: int) -> ImageFont.FreeTypeFont | None:
    """A system font, or Pillow's for `None`. `None` if the system has no such font."""
    if name is None:
        return ImageFont.load_default(size=size)  # type: ignore[return-value]  # of Pillow with FreeType
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@functools.lru_cache(maxsize=4096)
def _has_glyph(name: str | None, character: str) -> bool:
    """Whether a font draws a character differently from one that does not exist."""
    if character == " ":
        return True
    font = _font(name, 20)
    assert font is not None
    glyph, missing = font.getmask(character), font.getmask("\uffff")
    return glyph.size != missing.size or bytes(glyph) != bytes(missing)


def arrange(tiles: Sequence[Image.Image]) -> Image.Image:
    """Arranges images in a square grid on white, row by row. Without images, the result is a white square."""
    if not tiles:
        return Image.new("RGB", (320, 320), "white")
    columns = math.isqrt(len(tiles) - 1) + 1
    width, height = (max(tile.size[axis] for tile in tiles) + 8 for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width + 4, number // columns * height + 4))
    return sheet


def save_panel(path: Path, rows: Sequence[Sequence[tuple[str, np.ndarray]]], title: str) -> None:
    """
    Saves images in rows as one figure. Needs `matplotlib`, which the extra `train` installs.

    Args:
        path (`Path`):
            The file to write, such as a PNG.
        rows (`Sequence[Sequence[tuple[str, numpy.ndarray]]]`):
            For each row, captions and images `(height, width, 3)`, uint8.
        title (`str`):
            The title of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(len(rows), num_columns, figsize=(3.2 * num_columns, 3.4 * len(rows)), squeeze=False)
    for row_axes, row in zip(axes, rows, strict=True):
        for axis in row_axes:
            axis.axis("off")
        for axis, (caption, image) in zip(row_axes, row, strict=False):
            axis.imshow(image)
            axis.set_title(caption, fontsize=8, parse_math=False)  # names may contain a dollar sign
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format=path.suffix.removeprefix("."))
    plt.close(figure)
