"""Procedural scenes with exact masks and captions: the data of the miniature world.

An object's class is a *pattern* times a *colour*; its silhouette is free. Local texture then carries much of the
class, as in natural images, which is what lets patch features segment by text. Everything follows from a pair
(seed, index) alone, whatever the process or the order:

>>> scene = render(seed=0, index=7)
>>> scene.image.shape, scene.masks.shape[0] == len(scene.class_ids)
((128, 128, 3), True)
"""

import colorsys
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 128
PATTERNS = ("solid", "lined", "dotted", "tiled", "meshed", "fuzzy", "zigzag", "marbled")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
BACKGROUNDS = ("plain", "gradient", "noisy", "striped", "checkered")

# Class id = pattern index * len(COLOURS) + colour index; in label maps 0 is background and class i is i + 1.
CLASS_NAMES = tuple(f"{colour} {pattern} shape" for pattern in PATTERNS for colour in COLOURS)
# One colour of every pattern is never captioned: one class in six, and every pattern and colour occurs with others.
HELD_OUT = tuple(pattern * len(COLOURS) + (pattern * 5 + 2) % len(COLOURS) for pattern in range(len(PATTERNS)))
SEEN = tuple(class_id for class_id in range(len(CLASS_NAMES)) if class_id not in HELD_OUT)

# Prompts in the grammar of the captions.
TEMPLATES = ("a {}", *(f"a {{}} on a {background} background" for background in BACKGROUNDS))
BACKGROUND_PROMPTS = ("an empty scene", *(f"a {background} background" for background in BACKGROUNDS))

MIN_VISIBLE = 0.035  # of the image: an object that shows less is not placed

_HUES = (0.0, 0.36, 0.63, 0.145, 0.79, 0.5)
_PERIODS = (0.0, 9.0, 11.5, 12.0, 11.0, 0.0, 10.0, 0.0)  # pixels; halved by a CLIP that looks at 64 px
_NUM_ANGLES = 720
_ANGLES = np.arange(_NUM_ANGLES) * (2 * np.pi / _NUM_ANGLES)

# Polar coordinates of every offset from a centre, so that a silhouette is one comparison with a table r(angle).
_offsets = np.arange(-IMAGE_SIZE, IMAGE_SIZE, dtype=np.float32)
_RADIUS = np.hypot(_offsets[:, None], _offsets[None, :])
_ANGLE = (np.arctan2(_offsets[:, None], _offsets[None, :]) * (_NUM_ANGLES / (2 * np.pi))).astype(
    np.int16
) % _NUM_ANGLES
_COORDINATES = np.arange(IMAGE_SIZE, dtype=np.float32)


@dataclass
class Scene:
    """One image and everything there is to know about it.

    image (`np.ndarray` uint8 of shape `(128, 128, 3)`).
    masks (`np.ndarray` bool of shape `(num_objects, 128, 128)`): visible pixels, disjoint and never empty.
    class_ids (`tuple[int]`): indices into `CLASS_NAMES`, one per mask.
    background (`str`): one of `BACKGROUNDS`.
    caption (`str` or `None`): None when the scene shows a held-out pair, which nobody ever describes.
    """

    image: np.ndarray
    masks: np.ndarray
    class_ids: tuple[int, ...]
    background: str
    caption: str | None

    @property
    def label_map(self) -> np.ndarray:
        """`(128, 128)` int64: 0 is background, `class_id + 1` elsewhere."""
        labels = np.asarray(self.class_ids, dtype=np.int64).reshape(-1, 1, 1) + 1
        return (self.masks * labels).sum(axis=0)


def render(
    seed: int,
    index: int,
    num_objects: int | None = None,
    class_id: int | None = None,
    held_out: bool = True,
    visible_share: float = 0.65,
) -> Scene:
    """Draws scene `index` of world `seed`.

    Args:
        num_objects (`int`, *optional*): 0 to 4; drawn at random when omitted (4 % of the scenes are then empty).
            Objects that would hide others or be hidden are left out, so that fewer may be seen.
        class_id (`int`, *optional*): class of the first object; the others are random.
        held_out (`bool`): whether held-out pairs may appear. False for everything that is captioned.
        visible_share (`float`): of an object's silhouette that later objects leave visible, at least. Less is harder.
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
        if class_ids and rng.random() < 0.3:  # neighbours that share a colour: only the pattern tells them apart
            colour = class_ids[0] % len(COLOURS)
            drawn = allowed[rng.integers(len(allowed))]
            while drawn % len(COLOURS) != colour:
                drawn = allowed[rng.integers(len(allowed))]
        mask = _place(rng, masks, num_objects == 1, visible_share)
        if mask is None:
            continue
        for earlier in masks:
            earlier &= ~mask
        _draw_object(rng, canvas, mask, drawn)
        masks.append(mask)
        class_ids.append(int(drawn))

    canvas += _crop(rng, _noise_bank()[1], IMAGE_SIZE, IMAGE_SIZE) * np.float32(0.015)  # sensor noise
    np.clip(canvas, 0.0, 1.0, out=canvas)
    canvas *= 255.0
    image = np.ascontiguousarray(canvas.astype(np.uint8).transpose(1, 2, 0))
    stacked = np.stack(masks) if masks else np.zeros((0, IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    return Scene(image, stacked, tuple(class_ids), background, describe(rng, class_ids, background))


def evaluation_scene(seed: int, index: int) -> Scene:
    """A single object of class `index % 48`: consecutive indices make a set balanced over all classes."""
    return render(seed, index, num_objects=1, class_id=index % len(CLASS_NAMES))


def describe(rng: np.random.Generator, class_ids: Iterable[int], background: str | None) -> str | None:
    """A caption of those classes on that background, which is left out where it is `None` and sometimes where it is
    not; `None` if a held-out pair is among them."""
    # Each class once, in a fixed order: equal contents have equal captions.
    shown = sorted(set(class_ids))
    if any(class_id in HELD_OUT for class_id in shown):
        return None
    if not shown:
        return BACKGROUND_PROMPTS[0] if rng.random() < 0.3 else f"a {background} background"
    things = " and ".join(f"a {CLASS_NAMES[class_id]}" for class_id in shown)
    return things if rng.random() < 0.3 or background is None else f"{things} on a {background} background"


# ---- silhouettes ----


def _silhouette(rng: np.random.Generator, radius: float) -> tuple[np.ndarray, float]:
    """A random outline as a table of radii over `_ANGLES`, and the share of it that is a hole (0 for none)."""
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


def _place(rng: np.random.Generator, masks: list[np.ndarray], single: bool, visible_share: float) -> np.ndarray | None:
    """A silhouette that leaves itself and every earlier object sensibly visible, or None after a few attempts."""
    smallest = MIN_VISIBLE * IMAGE_SIZE**2
    for _ in range(6):
        radius = rng.uniform(25, 60) if single else rng.uniform(20, 42)
        table, hole = _silhouette(rng, radius)
        row, column = rng.integers(int(radius * 0.6), IMAGE_SIZE - int(radius * 0.6), size=2)
        window = (
            slice(IMAGE_SIZE - row, 2 * IMAGE_SIZE - row),
            slice(IMAGE_SIZE - column, 2 * IMAGE_SIZE - column),
        )
        limit = table[_ANGLE[window]]
        mask = _RADIUS[window] < limit
        if hole:
            mask &= _RADIUS[window] > hole * limit
        if np.count_nonzero(mask) < smallest * 1.2:
            continue
        for earlier in masks:
            area = np.count_nonzero(earlier)
            left = area - np.count_nonzero(earlier & mask)
            if left < smallest or left < visible_share * area:
                break
        else:
            return mask
    return None


# ---- colours, patterns, backgrounds ----


def _object_colours(rng: np.random.Generator, colour: int) -> tuple[np.ndarray, np.ndarray]:
    """The class's colour and a second tone: lighter, darker or neutral, always of another lightness."""
    hue = (_HUES[colour] + rng.uniform(-0.022, 0.022)) % 1.0
    base = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.7, 1.0), rng.uniform(0.6, 1.0)), dtype=np.float32)
    lightness = float(base @ (0.3, 0.59, 0.11))
    darker, lighter = max(lightness - 0.3, 0.0), max(0.95 - lightness - 0.3, 0.0)
    step = rng.uniform(0.0, darker + lighter)
    neutral = step if step < darker else lightness + 0.3 + step - darker
    amount = np.float32(rng.uniform(0.65, 1.0))
    return base, base * (1 - amount) + np.float32(neutral) * amount


def _weights(
    rng: np.random.Generator, pattern: str, period: float, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """How much of the second tone each pixel takes, `(len(rows), len(columns))` in [0, 1]."""
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
    if rng.random() < 0.4:  # dots and lines in either tone
        inside = ~inside
    return inside.astype(np.float32)


def _draw_object(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, class_id: int) -> None:
    pattern, colour = divmod(class_id, len(COLOURS))
    base, second = _object_colours(rng, colour)
    used_rows, used_columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    window = (slice(used_rows[0], used_rows[-1] + 1), slice(used_columns[0], used_columns[-1] + 1))
    rows, columns = _COORDINATES[window[0]], _COORDINATES[window[1]]
    weights = _weights(rng, PATTERNS[pattern], _PERIODS[pattern], rows, columns)
    # A soft light from one side keeps even a solid object from being one constant.
    slope = rng.uniform(-0.12, 0.12, size=2).astype(np.float32)
    light = 1 + np.linspace(-slope[0], slope[0], len(rows), dtype=np.float32)[:, None]
    light = light + np.linspace(-slope[1], slope[1], len(columns), dtype=np.float32)
    paint = (base[:, None, None] + weights * (second - base)[:, None, None]) * light
    np.copyto(canvas[:, *window], paint, where=mask[window])


def _draw_background(rng: np.random.Generator, background: str) -> np.ndarray:
    """Dull colours, and structure coarser than that of any object pattern.

    `(3, 128, 128)` float32 in [0, 1]: planes are faster to paint than pixels.
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
    """Coarse, fine and middling noise, `(512, 512)` float32 of unit variance: drawing is then a crop."""
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
