"""What panels and the command line show: pixels with labels, masks, prompts and words on them."""

import colorsys
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont


def colour_of(number: int, saturation: float = 0.8) -> tuple[int, int, int]:
    """Red, green and blue from 0 to 255; neighbouring numbers are far apart on the wheel of hues."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, saturation, 1)
    return round(red * 255), round(green * 255), round(blue * 255)


def captioned(pixels: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """The image `(height, width, 3)`, darkened, with lines of text over it, wrapped where they are longer."""
    image = Image.fromarray((pixels * 0.45).astype(np.uint8))
    scale = max(1.0, 256 / min(image.size))  # letters need pixels
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    font = ImageFont.load_default(size=max(10, min(image.size) // 16))
    letters = max(1, int((image.width - 8) / font.getlength("abcdefghij ") * 11))  # in a line, of the usual width
    text = "\n".join(textwrap.fill(line, letters, subsequent_indent="  ") for line in lines)
    ImageDraw.Draw(image).multiline_text((4, 4), text, fill="white", font=font)
    return np.asarray(image)


def with_labels(pixels: np.ndarray, label_map: np.ndarray, names: Sequence[str], background: bool) -> np.ndarray:
    """
    Label colours half-transparent over the image, and the names of the largest labels.

    pixels (`numpy.ndarray` of shape `(height, width, 3)`), label_map (`(height, width)`):
        Labels without a name, ignored ones, are dark; so is label 0 with a `background`.
    """
    colours = np.zeros((256, 3), dtype=np.float32)  # label maps are of 8 bits here: 255 is ignored
    for label in range(int(background), min(len(names), 255)):
        colours[label] = colour_of(label, 0.55 + 0.45 * (label % 2))
    shown = np.where((label_map < 0) | (label_map >= len(names)), 255, label_map).clip(0, 255)
    image = Image.fromarray((pixels * 0.4 + colours[shown] * 0.6).astype(np.uint8))
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
        result[masks[number]] = pixels[masks[number]] * 0.4 + np.array(colour_of(number)) * 0.6
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


def annotated(
    image: Image.Image,
    masks: Sequence[np.ndarray],
    numbers: Sequence[int],
    legend: Sequence[tuple[int | None, str]],
) -> Image.Image:
    """
    The image at its own size with every mask tinted and outlined, the smaller on top, over a legend, which makes the
    picture wider where a word of it needs more room than the image has.

    image (`PIL.Image.Image`):
        In RGB.
    masks (sequence of `numpy.ndarray` of shape `(height, width)` and type bool), numbers (sequence of `int`):
        The masks and the numbers of their colours: masks of one number look alike.
    legend (sequence of `tuple[int | None, str]`):
        Numbers of colours, or `None` for none, and words.
    """
    shown = image.copy()
    thickness = max(1, min(image.size) // 300)
    for index in sorted(range(len(masks)), key=lambda index: -np.count_nonzero(masks[index])):
        mask = Image.fromarray(masks[index].astype(np.uint8) * 255)
        box = mask.getbbox()
        if box is None:
            continue
        left, top, right, bottom = box
        # With what surrounds it, as far as an outline sees. Beyond the image's edges there is nothing to see.
        box = (
            max(0, left - thickness),
            max(0, top - thickness),
            min(image.width, right + thickness),
            min(image.height, bottom + thickness),
        )
        mask, part = mask.crop(box), shown.crop(box)
        colour = Image.new("RGB", part.size, colour_of(numbers[index]))
        part.paste(Image.blend(part, colour, 0.45), mask=mask)
        # Inside, and less than white once blurred: so near is something else.
        edge = ImageChops.subtract(mask, mask.filter(ImageFilter.BoxBlur(thickness)))
        part.paste(colour, mask=edge.point([0] + [255] * 255))
        shown.paste(part, box)
    return _with_legend(shown, legend)


def _with_legend(image: Image.Image, legend: Sequence[tuple[int | None, str]]) -> Image.Image:
    """The image over rows of coloured squares with words."""
    size = max(12, min(image.size) // 32)
    font, line, gap = ImageFont.load_default(size=size), round(1.5 * size), size // 2
    places, x, row, width = [], gap, 0, image.width
    for number, words in legend:
        square = 0 if number is None else size + gap
        length = square + round(font.getlength(words)) + 2 * gap
        if x > gap and x + length > image.width:
            x, row = gap, row + 1
        places.append((x, row, square))
        x += length
        width = max(width, x)
    height = image.height + (line * (row + 1) + gap if legend else 0)
    result = Image.new("RGB", (width, height), "white")
    result.paste(image)
    draw = ImageDraw.Draw(result)
    for (number, words), (x, row, square) in zip(legend, places, strict=True):
        y = image.height + gap + line * row
        if number is not None:
            draw.rectangle((x, y, x + size - 1, y + size - 1), fill=colour_of(number), outline="black")
        draw.text((x + square, y + size / 2), words, fill="black", anchor="lm", font=font)
    return result
