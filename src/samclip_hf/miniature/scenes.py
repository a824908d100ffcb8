"""
Procedural scenes with exact masks and captions, drawn with NumPy in about 1 ms each.

The class of an object is a pair of *pattern* and *color*; its silhouette is random. The class is therefore visible in
local texture, as it often is in photographs, and patch features can segment by text. A scene depends only on the pair
(seed, index), not on the process or on earlier scenes:

>>> scene = render(seed=0, index=7)
>>> scene.image.shape, scene.masks.shape[0] == len(scene.class_ids)
((128, 128, 3), True)
"""

import colorsys
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 128
PATTERNS = ("solid", "lined", "dotted", "tiled", "meshed", "fuzzy", "zigzag", "marbled")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
BACKGROUNDS = ("plain", "gradient", "noisy", "striped", "checkered")

# Class id = pattern index * len(COLOURS) + color index. In label maps, 0 is background and class i is i + 1.
CLASS_NAMES = tuple(f"{color} {pattern} shape" for pattern in PATTERNS for color in COLOURS)
# One color of each pattern is held out: captions never name it. Each pattern and color occurs in other classes.
HELD_OUT = tuple(pattern * len(COLOURS) + (pattern * 5 + 2) % len(COLOURS) for pattern in range(len(PATTERNS)))
SEEN = tuple(class_id for class_id in range(len(CLASS_NAMES)) if class_id not in HELD_OUT)

# Prompt templates and background prompts in the wording of the captions.
TEMPLATES = ("a {}", *(f"a {{}} on a {background} background" for background in BACKGROUNDS))
BACKGROUND_PROMPTS = ("an empty scene", *(f"a {background} background" for background in BACKGROUNDS))

MIN_AREA = 0.035  # minimum visible area of an object, as a fraction of the image

_MIN_VISIBLE_FRACTION = 0.4  # of the objects in `render_cluttered`
_LUMINANCE = (0.3, 0.59, 0.11)  # of red, green and blue
_HUES = (0.0, 0.36, 0.63, 0.145, 0.79, 0.5)
_PERIODS = (0.0, 9.0, 11.5, 12.0, 11.0, 0.0, 10.0, 0.0)  # pixels; half of that at the 64 px of the miniature CLIP
_NUM_ANGLES = 720
_ANGLES = np.arange(_NUM_ANGLES) * (2 * np.pi / _NUM_ANGLES)

# Polar coordinates of all offsets from a center, which are compared with a table of radii by angle to draw a
# silhouette.
_offsets = np.arange(-IMAGE_SIZE, IMAGE_SIZE, dtype=np.float32)
_RADIUS = np.hypot(_offsets[:, None], _offsets[None, :])
_ANGLE = (np.arctan2(_offsets[:, None], _offsets[None, :]) * (_NUM_ANGLES / (2 * np.pi))).astype(
    np.int16
) % _NUM_ANGLES
_COORDINATES = np.arange(IMAGE_SIZE, dtype=np.float32)


@dataclass
class Scene:
    """
    An image and its annotations.

    Attributes:
        image (`np.ndarray` of shape `(128, 128, 3)` and type uint8): The image in RGB.
        masks (`np.ndarray` of shape `(num_objects, 128, 128)` and type bool): The visible pixels of each object. Masks
            are disjoint and not empty.
        class_ids (`tuple[int, ...]`): The index of each object's class in `CLASS_NAMES`.
        background (`str`): One of `BACKGROUNDS`.
        caption (`str`, *optional*): `None` if the scene contains a held-out class.
    """

    image: np.ndarray
    masks: np.ndarray
    class_ids: tuple[int, ...]
    background: str
    caption: str | None

    @property
    def label_map(self) -> np.ndarray:
        """Label map of shape `(128, 128)` and type int64: 0 for background, `class_id + 1` for objects."""
        labels = np.asarray(self.class_ids, dtype=np.int64).reshape(-1, 1, 1) + 1
        return (self.masks * labels).sum(axis=0)


def render(
    seed: int,
    index: int,
    num_objects: int | None = None,
    class_id: int | None = None,
    held_out: bool = True,
    min_visible_fraction: float = 0.65,
) -> Scene:
    """
    Draws a scene.

    Args:
        seed (`int`), index (`int`): Determine the scene.
        num_objects (`int`, *optional*): Number of objects, 0 to 4. Default: random, and 0 in 4 % of the scenes. The
            scene has fewer objects if one would hide too much of the others.
        class_id (`int`, *optional*): Class of the first object. The other classes are random.
        held_out (`bool`): Whether held-out classes may occur. Set it to `False` if every scene needs a caption.
        min_visible_fraction (`float`): Minimum fraction of a silhouette that remains visible. A lower value gives more
            occlusion.
    """
    rng = np.random.default_rng((seed, index))
    if num_objects is None:
        num_objects = int(np.searchsorted((0.04, 0.32, 0.60, 0.84), rng.random(), side="right"))
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    canvas = _draw_background(rng, background)
    allowed = range(len(CLASS_NAMES)) if held_out else SEEN

    masks: list[np.ndarray] = []
    class_ids: list[int] = []
    for position in range(num_objects):
        drawn = class_id if position == 0 and class_id is not None else allowed[rng.integers(len(allowed))]
        if class_ids and rng.random() < 0.3:  # the same color as the first object, so that only the pattern differs
            color = class_ids[0] % len(COLOURS)
            drawn = allowed[rng.integers(len(allowed))]
            while drawn % len(COLOURS) != color:
                drawn = allowed[rng.integers(len(allowed))]
        mask = _place(rng, masks, num_objects == 1, min_visible_fraction)
        if mask is None:
            continue
        for earlier in masks:
            earlier &= ~mask
        _draw_object(rng, canvas, mask, drawn)
        masks.append(mask)
        class_ids.append(int(drawn))

    return _finish(rng, canvas, masks, class_ids, background)


def _finish(
    rng: np.random.Generator, canvas: np.ndarray, masks: list[np.ndarray], class_ids: list[int], background: str
) -> Scene:
    canvas += _crop(rng, _noise_bank()[1], IMAGE_SIZE, IMAGE_SIZE) * np.float32(0.015)  # sensor noise
    np.clip(canvas, 0.0, 1.0, out=canvas)
    canvas *= 255.0
    image = np.ascontiguousarray(canvas.astype(np.uint8).transpose(1, 2, 0))
    stacked = np.stack(masks) if masks else np.zeros((0, IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    return Scene(image, stacked, tuple(class_ids), background, describe(rng, class_ids, background))


def evaluation_scene(seed: int, index: int) -> Scene:
    """Draws one object of class `index % 48`. Consecutive indices are balanced over all classes."""
    return render(seed, index, num_objects=1, class_id=index % len(CLASS_NAMES))


def render_cluttered(seed: int, index: int, num_objects: int) -> Scene:
    """
    Draws a scene with ambiguous masks, for evaluation. Training and the shipped models use only [`render`].

    The classes are the same. A pixel belongs to a class if the surface there has the pattern and the color of the
    class, so all that is colorless is background. In contrast to [`render`],

    - half of the objects have a second part: a silhouette at their outline with the same class, but with its own tones
      and a smaller or larger pattern,
    - half of the objects have a colorless part: a band, a cap or a spot,
    - small colorless shapes, most of them with the patterns of classes, lie behind, between and in front of the
      objects, and half of the backgrounds have such a pattern, too,
    - objects hide up to 60 % of each other.

    Args:
        seed (`int`), index (`int`): Determine the scene.
        num_objects (`int`): Number of objects, 1 to 4. The scene has fewer objects if one would hide too much of the
            others.
    """
    rng = np.random.default_rng((seed, index, 1))  # the third number separates the scenes from those of `render`
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    canvas = _draw_background(rng, background)
    if rng.random() < 0.5:
        pattern = rng.integers(1, len(PATTERNS))
        weights = _weights(rng, PATTERNS[pattern], _PERIODS[pattern], _COORDINATES, _COORDINATES)
        canvas += (weights - np.float32(0.5)) * np.float32(rng.uniform(0.1, 0.2))

    masks: list[np.ndarray] = []
    class_ids: list[int] = []
    _draw_clutter(rng, canvas, masks, int(rng.integers(3, 7)))
    for _ in range(num_objects):
        class_id = int(rng.integers(len(CLASS_NAMES)))
        if class_ids and rng.random() < 0.5:  # the same color as the first object, so that only the pattern differs
            class_id += class_ids[0] % len(COLOURS) - class_id % len(COLOURS)
        body = _place(rng, masks, num_objects == 1, _MIN_VISIBLE_FRACTION)
        if body is None:
            continue
        second_part = _attach(rng, body) if rng.random() < 0.5 else np.zeros_like(body)
        if not _leaves_visible(masks, body | second_part, _MIN_VISIBLE_FRACTION):
            second_part[:] = False
        whole = body | second_part
        for earlier in masks:
            earlier &= ~whole
        tones = [_draw_object(rng, canvas, body, class_id)]
        if second_part.any():
            tones.append(_draw_object(rng, canvas, second_part, class_id, scale=(0.8, 1.4)[rng.integers(2)]))
        if rng.random() < 0.5:
            part = _colorless_part(rng, whole)
            if np.count_nonzero(whole & ~part) >= MIN_AREA * IMAGE_SIZE**2:
                _draw_colorless(rng, canvas, part, PATTERNS.index("solid"), tones)
                whole &= ~part
        masks.append(whole)
        class_ids.append(class_id)
        _draw_clutter(rng, canvas, masks, 1)
    return _finish(rng, canvas, masks, class_ids, background)


def describe(rng: np.random.Generator, class_ids: Iterable[int], background: str | None) -> str | None:
    """
    Returns a caption that names each class once, or `None` if one of the classes is held out. The caption names the
    background with probability 0.7 if it is given. Without classes it names the background or "an empty scene".
    """
    # Sorted, so that scenes with the same classes have the same caption.
    unique_ids = sorted(set(class_ids))
    if any(class_id in HELD_OUT for class_id in unique_ids):
        return None
    if not unique_ids:
        return BACKGROUND_PROMPTS[0] if rng.random() < 0.3 else f"a {background} background"
    objects = " and ".join(f"a {CLASS_NAMES[class_id]}" for class_id in unique_ids)
    return objects if rng.random() < 0.3 or background is None else f"{objects} on a {background} background"


# ---- silhouettes ----


def _silhouette(rng: np.random.Generator, radius: float) -> tuple[np.ndarray, float]:
    """Returns the radii of a random outline at `_ANGLES`, and the relative radius of its hole (0 for none)."""
    kind = rng.integers(6)
    angles = _ANGLES + rng.uniform(0, 2 * np.pi)
    hole = 0.0
    if kind == 0:  # blob
        table = np.ones(_NUM_ANGLES)
        for frequency in (2, 3, 5):
            table += rng.uniform(0.05, 0.42) / frequency**0.7 * np.cos(frequency * angles + rng.uniform(0, 2 * np.pi))
    elif kind == 1:  # regular polygon
        sector = 2 * np.pi / rng.integers(3, 8)
        table = np.cos(sector / 2) / np.cos(angles % sector - sector / 2) * 1.15
    elif kind == 2:  # star
        sector = 2 * np.pi / rng.integers(4, 8)
        table = 1.25 - rng.uniform(0.35, 0.65) * (1 - np.abs(angles % sector / sector * 2 - 1))
    elif kind == 3:  # ellipse
        ratio = rng.uniform(0.5, 1.0)
        table = 1.15 * ratio / np.hypot(ratio * np.cos(angles), np.sin(angles))
    elif kind == 4:  # bar or box
        ratio = rng.uniform(0.4, 1.0)
        table = np.minimum(
            1.2 / np.maximum(np.abs(np.cos(angles)), 1e-3), 1.2 * ratio / np.maximum(np.abs(np.sin(angles)), 1e-3)
        )
    else:  # ring
        table = np.full(_NUM_ANGLES, 1.1)
        hole = rng.uniform(0.3, 0.5)
    return np.clip(table, 0.3, 1.7).astype(np.float32) * radius, hole


def _place(
    rng: np.random.Generator, masks: list[np.ndarray], single: bool, min_visible_fraction: float
) -> np.ndarray | None:
    """
    Returns the mask `(128, 128)` of a new object that leaves enough of all earlier objects visible, or `None` if six
    attempts fail.
    """
    smallest = MIN_AREA * IMAGE_SIZE**2
    for _ in range(6):
        radius = rng.uniform(25, 60) if single else rng.uniform(20, 42)
        table, hole = _silhouette(rng, radius)
        row, column = rng.integers(int(radius * 0.6), IMAGE_SIZE - int(radius * 0.6), size=2)
        mask = _fill(table, hole, row, column)
        if np.count_nonzero(mask) >= smallest * 1.2 and _leaves_visible(masks, mask, min_visible_fraction):
            return mask
    return None


def _fill(table: np.ndarray, hole: float, row: int, column: int) -> np.ndarray:
    """Returns the mask `(128, 128)` of a silhouette at a center."""
    window = (slice(IMAGE_SIZE - row, 2 * IMAGE_SIZE - row), slice(IMAGE_SIZE - column, 2 * IMAGE_SIZE - column))
    limit = table[_ANGLE[window]]
    mask = _RADIUS[window] < limit
    if hole:
        mask &= _RADIUS[window] > hole * limit
    return mask


def _leaves_visible(masks: list[np.ndarray], mask: np.ndarray, min_visible_fraction: float) -> bool:
    """Whether enough of all objects remains visible behind a new mask."""
    for earlier in masks:
        area = np.count_nonzero(earlier)
        left = area - np.count_nonzero(earlier & mask)
        if left < MIN_AREA * IMAGE_SIZE**2 or left < min_visible_fraction * area:
            return False
    return True


def _attach(rng: np.random.Generator, body: np.ndarray) -> np.ndarray:
    """Returns the mask of a smaller silhouette with its center at the outline of a body."""
    inside = body.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inside &= np.roll(body, step, axis)
    outline = np.argwhere(body & ~inside)
    row, column = outline[rng.integers(len(outline))]
    radius = max(np.sqrt(np.count_nonzero(body) / np.pi) * rng.uniform(0.4, 0.65), 11.0)
    return _fill(*_silhouette(rng, radius), row, column)


def _colorless_part(rng: np.random.Generator, whole: np.ndarray) -> np.ndarray:
    """Returns the mask of a band across an object, of a cap at one of its ends, or of a spot in it."""
    pixels = np.argwhere(whole)
    kind = rng.integers(3)
    if kind == 0:
        row, column = pixels[rng.integers(len(pixels))]
        return whole & _fill(*_silhouette(rng, np.sqrt(len(pixels) / np.pi) * rng.uniform(0.35, 0.5)), row, column)
    angle = rng.uniform(0, np.pi)
    distances = _COORDINATES * np.cos(angle) + (_COORDINATES * np.sin(angle))[:, None]
    nearest, farthest = distances[whole].min(), distances[whole].max()
    position = (distances - nearest) / (farthest - nearest)
    start = rng.uniform(0.3, 0.45) if kind == 1 else rng.uniform(0.65, 0.75)
    return whole & (position > start) & (position < (start + rng.uniform(0.2, 0.3) if kind == 1 else 1.0))


# ---- colors, patterns, backgrounds ----


def _object_colors(rng: np.random.Generator, color: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an RGB color of the class and a second tone, which always differs in lightness."""
    hue = (_HUES[color] + rng.uniform(-0.022, 0.022)) % 1.0
    base = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.7, 1.0), rng.uniform(0.6, 1.0)), dtype=np.float32)
    lightness = float(base @ _LUMINANCE)
    darker, lighter = max(lightness - 0.3, 0.0), max(0.95 - lightness - 0.3, 0.0)
    step = rng.uniform(0.0, darker + lighter)
    neutral = step if step < darker else lightness + 0.3 + step - darker
    amount = np.float32(rng.uniform(0.65, 1.0))
    return base, base * (1 - amount) + np.float32(neutral) * amount


def _weights(
    rng: np.random.Generator, pattern: str, period: float, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Returns the weight of the second tone in each pixel: `(len(rows), len(columns))`, in [0, 1]."""
    if pattern == "solid":
        return np.zeros((len(rows), len(columns)), dtype=np.float32)
    if pattern == "fuzzy":
        return np.clip(_crop(rng, _noise_bank()[1], len(rows), len(columns)) * 0.8 + 0.45, 0.0, 1.0)
    if pattern == "marbled":
        return (_crop(rng, _noise_bank()[2], len(rows), len(columns)) > 0.05).astype(np.float32)

    period *= rng.uniform(0.85, 1.15)
    angle, shift = rng.uniform(0, np.pi), rng.uniform(0, 1, size=2)
    cosine, sine = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
    u = columns * cosine + (rows * sine)[:, None] + np.float32(shift[0])
    if pattern == "lined":
        return (u % 1.0 < 0.5).astype(np.float32)
    v = columns * -sine + (rows * cosine)[:, None] + np.float32(shift[1])
    if pattern == "tiled":
        return (np.floor(u * 2) + np.floor(v * 2)) % 2.0
    if pattern == "zigzag":
        return ((v + np.abs(u * 0.75 % 1.0 - 0.5) * 1.7) % 1.0 < 0.5).astype(np.float32)
    if pattern == "dotted":
        u += np.floor(v) % 2.0 * np.float32(0.5)
        inside = (u % 1.0 - 0.5) ** 2 + (v % 1.0 - 0.5) ** 2 < 0.1
    else:  # meshed
        inside = (u % 1.0 < 0.3) | (v % 1.0 < 0.3)
    if rng.random() < 0.4:  # swap the two tones
        inside = ~inside
    return inside.astype(np.float32)


def _draw_object(
    rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, class_id: int, scale: float = 1.0
) -> np.ndarray:
    """Draws a surface with the pattern and the color of a class, and returns its second tone."""
    pattern, color = divmod(class_id, len(COLOURS))
    base, second = _object_colors(rng, color)
    _draw_surface(rng, canvas, mask, pattern, base, second, scale)
    return second


def _draw_colorless(
    rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, pattern: int, tones: Sequence[np.ndarray] = ()
) -> None:
    """Draws a gray surface that differs in lightness from other tones."""
    lightness = [float(tone @ _LUMINANCE) for tone in tones]
    candidates = rng.uniform(0.05, 0.95, size=8).tolist()
    first = max(candidates, key=lambda value: min((abs(value - other) for other in lightness), default=0.0))
    second = (first + rng.uniform(0.4, 0.6)) % 1.0
    _draw_surface(rng, canvas, mask, pattern, np.full(3, first, np.float32), np.full(3, second, np.float32))


def _draw_clutter(rng: np.random.Generator, canvas: np.ndarray, masks: list[np.ndarray], number: int) -> None:
    """Draws small colorless shapes with random patterns, in front of all that is drawn, and removes them from the
    masks. Those that hide too much of an object are left out."""
    for _ in range(number):
        table, hole = _silhouette(rng, rng.uniform(5, 12))
        shape = _fill(table, hole, *rng.integers(IMAGE_SIZE, size=2))
        if shape.any() and _leaves_visible(masks, shape, _MIN_VISIBLE_FRACTION):
            _draw_colorless(rng, canvas, shape, int(rng.integers(len(PATTERNS))))
            for mask in masks:
                mask &= ~shape


def _draw_surface(
    rng: np.random.Generator,
    canvas: np.ndarray,
    mask: np.ndarray,
    pattern: int,
    base: np.ndarray,
    second: np.ndarray,
    scale: float = 1.0,
) -> None:
    used_rows, used_columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    window = (slice(used_rows[0], used_rows[-1] + 1), slice(used_columns[0], used_columns[-1] + 1))
    rows, columns = _COORDINATES[window[0]], _COORDINATES[window[1]]
    weights = _weights(rng, PATTERNS[pattern], _PERIODS[pattern] * scale, rows, columns)
    # A light gradient, so that solid objects are not constant.
    slope = rng.uniform(-0.12, 0.12, size=2).astype(np.float32)
    light = 1 + np.linspace(-slope[0], slope[0], len(rows), dtype=np.float32)[:, None]
    light = light + np.linspace(-slope[1], slope[1], len(columns), dtype=np.float32)
    paint = (base[:, None, None] + weights * (second - base)[:, None, None]) * light
    np.copyto(canvas[:, *window], paint, where=mask[window])


def _draw_background(rng: np.random.Generator, background: str) -> np.ndarray:
    """
    Returns a background of shape `(3, 128, 128)` and type float32, in [0, 1]. Its colors are less saturated than those
    of objects, and its structure is coarser than any object pattern.
    """
    first, second = (
        np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.3), rng.uniform(0.2, 0.95)), np.float32)[
            :, None, None
        ]
        for _ in range(2)
    )
    if background == "plain":
        return np.tile(first, (1, IMAGE_SIZE, IMAGE_SIZE))
    angle = rng.uniform(0, np.pi)
    u = _COORDINATES * np.float32(np.cos(angle)) + (_COORDINATES * np.float32(np.sin(angle)))[:, None]
    if background == "gradient":
        weights = (u - u.min()) / (u.max() - u.min())
    elif background == "noisy":
        weights = np.clip(_crop(rng, _noise_bank()[0], IMAGE_SIZE, IMAGE_SIZE) * 0.35 + 0.5, 0.0, 1.0)
        second = first + (second - first) * np.float32(0.7)
    elif background == "striped":
        weights = (u / rng.uniform(26, 44) % 1.0 < 0.5).astype(np.float32)
    else:  # checkered
        v = _COORDINATES * np.float32(-np.sin(angle)) + (_COORDINATES * np.float32(np.cos(angle)))[:, None]
        cell = rng.uniform(16, 26)
        weights = (np.floor(u / cell) + np.floor(v / cell)) % 2.0
    return first + weights * (second - first)


@functools.cache
def _noise_bank() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns coarse, fine and medium noise of unit variance, each `(512, 512)` float32. Scenes use random crops."""
    white = np.fft.rfft2(np.random.default_rng(20231024).standard_normal((512, 512)))
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)[None, :])
    bank = []
    for low, high in ((0.0, 0.025), (0.0, 0.3), (0.04, 0.075)):
        field = np.fft.irfft2(white * ((frequency > low) & (frequency < high)))
        bank.append((field / field.std()).astype(np.float32))
    return bank[0], bank[1], bank[2]


def _crop(rng: np.random.Generator, field: np.ndarray, height: int, width: int) -> np.ndarray:
    row, column = rng.integers(0, (field.shape[0] - height, field.shape[1] - width))
    return field[row : row + height, column : column + width]
