"""
A Gradio app for SAM-CLIP: open an image, enter labels, and get named masks; or click on an object. The image encoder
runs once per image.

    python demo/app.py --sam facebook/sam-vit-base --clip openai/clip-vit-base-patch16
    python demo/app.py --model runs/stage3
    python demo/app.py                      # the shipped miniature, for drawn scenes only
    python demo/app.py --model runs/stage3 --review annotated/review.json

The environment variable SAMCLIP_CHECKPOINT sets the default of --model.
"""

import argparse
import contextlib
import functools
import html
import io
import json
import logging
import math
import os
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import numpy as np
import torch
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from PIL import Image, ImageDraw, ImageFilter

from samclip_cli import CommandError, log
from samclip_cli.formats import coco_annotation
from samclip_cli.models import LoadedModel, add_model_arguments, check_models, load_model, mask_generation_options
from samclip_cli.run_record import file_state, recorded_states
from samclip_cli.vocabulary import format_labels, parse_labels
from samclip_hf.images import open_image
from samclip_hf.mask_generation_samclip import decode_rle
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, render
from samclip_hf.segmentation_samclip import SamClipSegmentationOutput, SamClipVocabulary
from samclip_hf.visualization import color_of, draw_segments

EXAMPLE_SCENES = (42, 3, 50, 54, 57, 8)  # indices of scenes with seed 0, which cover all backgrounds
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # some of Pillow's other formats start external programs
Image.init()  # loads the plugins of all formats; `Image.open(formats=...)` does not
MAX_MEGAPIXELS = 50  # a small file can contain a very large image
DISPLAY_EDGES = (512, 1024)  # pixels: the longer side of the displayed image, which is enlarged or reduced
MAX_MASK_BYTES = 2 * 10**9  # of all masks of a download in the original size: one byte for each pixel
MAX_SESSIONS = 200  # each stores the outputs for one image: 17 MB of image embeddings with ViT-B
MAX_VOCABULARIES = 8  # per session
MAX_EXAMPLES = 8  # per session: each keeps the outputs for its image
POINTS_PER_BATCH = 64  # in automatic mask generation
NUM_COLORS = 24
# Background texts for photographs: what often surrounds objects. They are not tuned.
PHOTO_BACKGROUND = ("sky", "wall", "floor", "ground", "grass", "road", "water", "trees", "a building")

FOREGROUND, BACKGROUND, BOX = "Foreground point", "Background point", "Box"
BY_TEXT, BY_PROMPTS, EVERYTHING = "Labels", "Points and box", "Everything"  # what the result shows
SECOND_CORNER = "Click on the opposite corner of the box in the image."
NEXT_STEPS = {
    FOREGROUND: "Click on an object in the image to get its mask.",
    BACKGROUND: "Click outside the object in the image.",
    BOX: "Click on a corner of the box in the image.",
}
REVIEW_SCENES = "Images to review, the most uncertain first. The dataset is not changed."
CORRECTION = "Click again on the object to add a part. To remove a part, select Background point."
NO_IMAGE = (
    "Open an image or choose an example first. Images are removed an hour after they were opened, and when the app is "
    "restarted."
)
EMPTY = {
    BY_TEXT: "Enter labels and press Segment, or add an example.",
    BY_PROMPTS: "Click on an object in the image.",
    EVERYTHING: "Press Segment everything.",
}


@dataclass(frozen=True, eq=False)
class Picture:
    """
    An image and the outputs of the image encoder.

    Attributes:
        image (`PIL.Image.Image`): The displayed image.
        path (`str`): The file of the image in its original size.
        name (`str`): The name that the file had when it was opened.
        original_size (`tuple[int, int]`): Height and width of the original image, after its EXIF orientation.
        reshaped_input_sizes (`torch.Tensor` of shape `(1, 2)`): Height and width of the encoder's input, unpadded.
        vision_embeds (`SamClipVisionEncoderOutput`): Outputs of the image encoder, on the model's device.
        milliseconds (`float`): Duration of the image encoder.
        state (`list[int]`, *optional*): The state of the file when it was read, see [`file_state`].
    """

    image: Image.Image
    path: str
    name: str
    original_size: tuple[int, int]
    reshaped_input_sizes: torch.Tensor
    vision_embeds: object
    milliseconds: float
    state: list[int] | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the displayed image."""
        return self.image.height, self.image.width

    def to_input(self, points: Sequence[tuple[float, float]]) -> torch.Tensor:
        """Converts points from pixels of the displayed image to pixels of the encoder's input `(num_points, 2)`."""
        height, width = self.reshaped_input_sizes[0].tolist()
        return torch.tensor(points, dtype=torch.float32) * torch.tensor(
            [width / self.image.width, height / self.image.height]
        )


@dataclass(frozen=True)
class Prompts:
    """
    Prompts in pixels of the displayed image.

    Attributes:
        points (`tuple`): x and y of each point.
        labels (`tuple`): The label of each point: 1 for foreground, 0 for background.
        box (`tuple`, *optional*): x1, y1, x2, y2.
        corner (`tuple`, *optional*): First corner of a box whose second corner is not set yet.
        previous (`Prompts`, *optional*): The prompts before the last change, for `Undo`.
    """

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    corner: tuple[float, float] | None = None
    previous: "Prompts | None" = field(default=None, compare=False)

    def click(self, mode: str, x: float, y: float) -> "Prompts":
        """
        Returns the prompts after a click. `mode` is `FOREGROUND`, `BACKGROUND` or `BOX`. Raises `ValueError` with a
        message for the user for a box without area.
        """
        if mode != BOX:
            labels = (*self.labels, int(mode == FOREGROUND))
            return replace(self, points=(*self.points, (x, y)), labels=labels, corner=None, previous=self)
        if self.corner is None:
            return replace(self, corner=(x, y), previous=self)
        if x == self.corner[0] or y == self.corner[1]:
            raise ValueError(f"The box would have no area. {SECOND_CORNER}")
        left, right = sorted((self.corner[0], x))
        top, bottom = sorted((self.corner[1], y))
        return replace(self, box=(left, top, right, bottom), corner=None, previous=self)

    def clear(self) -> "Prompts":
        return self if self == Prompts() else Prompts(previous=self)

    def draw(self, image: Image.Image) -> Image.Image:
        """
        Returns a copy of the image with a plus in a green circle at foreground points, a minus in a red circle at
        background points, a yellow box, and a cross at the first corner of a box.
        """
        image = image.copy()
        draw, radius = ImageDraw.Draw(image), max(image.size) / 60
        width = max(2, round(radius / 4))
        for (x, y), label in zip(self.points, self.labels, strict=True):
            draw.circle((x, y), radius + width, fill="white", outline="black", width=max(1, width // 2))
            draw.circle((x, y), radius, fill="#007a1f" if label else "#c00000")
            length = radius / 2
            draw.line((x - length, y, x + length, y), fill="white", width=width)
            if label:
                draw.line((x, y - length, x, y + length), fill="white", width=width)
        if self.box is not None:
            draw.rectangle(self.box, outline="black", width=2 * width)
            draw.rectangle(self.box, outline="yellow", width=width)
        if self.corner is not None:
            x, y = self.corner
            for color, length, line_width in (("black", 2 * radius + width, 3 * width), ("yellow", 2 * radius, width)):
                draw.line((x - length, y, x + length, y), fill=color, width=line_width)
                draw.line((x, y - length, x, y + length), fill=color, width=line_width)
        return image

    def describe(self) -> str:
        """Returns a text for users of screen readers."""
        counts = [(self.labels.count(1), "foreground point"), (self.labels.count(0), "background point")]
        counts += [(int(self.box is not None), "box"), (int(self.corner is not None), "first corner of a box")]
        return ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counts if count)

    def next_step(self, mode: str) -> str:
        """Returns what to click on next."""
        if mode == BOX and self.corner is not None:
            return SECOND_CORNER
        return CORRECTION if mode == FOREGROUND and (self.points or self.box) else NEXT_STEPS[mode]


@dataclass(frozen=True, eq=False)
class LabelScores:
    """
    Scores of labels for masks.

    Attributes:
        scores (`torch.Tensor` of shape `(num_masks, num_labels)`): Probabilities among all labels, on the CPU.
        independent_scores (`torch.Tensor` of shape `(num_masks, num_labels)`): Scores from 0 to 1 that do not depend
            on the other labels.
        vocabulary (`SamClipVocabulary`): The labels.
    """

    scores: torch.Tensor
    independent_scores: torch.Tensor
    vocabulary: SamClipVocabulary


@dataclass(frozen=True, eq=False)
class TextSegments:
    """Segmentation by text: outputs of the model, and the vocabulary."""

    outputs: SamClipSegmentationOutput
    vocabulary: SamClipVocabulary


@dataclass(frozen=True, eq=False)
class PromptedMask:
    """
    The mask of points and a box.

    Attributes:
        logits (`torch.Tensor` of shape `(1, 1, 1, height, width)`): Mask logits, as `predict_masks` returns them.
        score (`float`): Predicted IoU.
        labels (`LabelScores`, *optional*): Scores of labels for this mask.
    """

    logits: torch.Tensor
    score: float
    labels: LabelScores | None = None


@dataclass(frozen=True, eq=False)
class GeneratedMasks:
    """
    Masks of everything mode, best first.

    Attributes:
        encodings (`list[dict]`): Run-length encodings in the size of the displayed image.
        scores (`list[float]`): Predicted IoUs.
        labels (`LabelScores`, *optional*): Scores of labels for these masks.
    """

    encodings: list[dict]
    scores: list[float]
    labels: LabelScores | None = None


@dataclass(frozen=True, eq=False)
class Example:
    """
    An object that defines a label.

    Attributes:
        picture (`Picture`): Its image.
        mask (`numpy.ndarray` of shape `(height, width)`): Its mask in the displayed image.
        label (`str`): Its label.
    """

    picture: Picture
    mask: np.ndarray
    label: str


class Segment(NamedTuple):
    """
    A mask of the result.

    Attributes:
        mask (`numpy.ndarray` of shape `(height, width)`): Boolean.
        label (`str`): The label, or "" if there are no labels or none reaches the score threshold.
        label_id (`int`): Position of the label among the entered ones, from 1; 0 without a label.
        label_score (`float`, *optional*): Score of the label.
        iou_score (`float`, *optional*): Predicted IoU of masks from prompts.
    """

    mask: np.ndarray
    label: str = ""
    label_id: int = 0
    label_score: float | None = None
    iou_score: float | None = None


class Fields(NamedTuple):
    """Values of the page's fields, in the order of the inputs of all events."""

    mode: str
    labels: str
    background: str
    template: str
    threshold: float
    opacity: float
    pred_iou_thresh: float

    @property
    def texts(self) -> tuple[str, str, str]:
        return self.labels, self.background, self.template


class Session:
    """
    One image of one visitor, with all results. Another image gets another session, so that results of the previous
    one, which may still be computed, are not shown; it keeps the examples and the vocabularies of the previous one.
    Events of a session run one after the other, see `lock`.
    """

    def __init__(self, picture: Picture | None = None, previous: "Session | None" = None):
        self.lock = threading.Lock()
        self.picture = picture
        self.vocabularies: dict = {} if previous is None else previous.vocabularies  # by texts and examples
        self.examples: tuple[Example, ...] = () if previous is None else previous.examples
        self.used: tuple | None = None  # the last texts and examples that were used or refused
        self.refused = -math.inf  # when the last ones were refused
        self.prompts = Prompts()
        self.by_text: TextSegments | None = None
        self.by_prompts: PromptedMask | None = None
        self.everything: GeneratedMasks | None = None
        self.classes: dict[str, float] | None = None
        self.view = BY_TEXT
        self.times: dict[str, list[tuple[str, Timer]]] = {}  # of the parts of each result
        self.drawn: tuple | None = None  # what the image shows
        self.is_replaced = False

    def result(self, view: str) -> TextSegments | PromptedMask | GeneratedMasks | None:
        return {BY_TEXT: self.by_text, BY_PROMPTS: self.by_prompts, EVERYTHING: self.everything}[view]

    def classes_of(self, fields: Fields) -> tuple:
        """The texts of the fields and the examples."""
        return fields.texts, self.examples

    def vocabulary(self, view: str) -> SamClipVocabulary | None:
        """The labels of a result, if it has any."""
        result = self.result(view)
        named = result if isinstance(result, TextSegments) else result and result.labels
        return named and named.vocabulary


def read_image(path: str | None) -> Image.Image:
    """Reads an image in RGB. Raises `ValueError` with a message for the user if that fails."""
    try:
        with open(os.devnull if path is None else path, "rb") as file:
            is_empty = not file.read(1)
    except OSError as error:  # such as a file that was deleted
        raise ValueError(f"The file cannot be read: {error.strerror}.") from error
    if is_empty:
        raise ValueError("The file is empty.")
    try:
        return open_image(path, max_pixels=MAX_MEGAPIXELS * 10**6, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"The image is too large. The maximum is {MAX_MEGAPIXELS} megapixels.") from None
    except Exception as error:  # Pillow's decoders raise many types for invalid files
        raise ValueError(
            f"The file is not an image or is damaged. Supported formats: {', '.join(FORMATS)}."
        ) from error


def thumbnail(path: str) -> str:
    """Writes a small copy of an image to a temporary file, which the page may show. Returns its path."""
    image = read_image(path)
    image.thumbnail((128, 128))
    with tempfile.NamedTemporaryFile(prefix="samclip-thumbnail-", suffix=".png", delete=False) as file:
        image.save(file, "PNG")
    return file.name


def to_display(image: Image.Image) -> Image.Image:
    """Resizes an image so that its longer side is between `DISPLAY_EDGES`."""
    smallest, largest = DISPLAY_EDGES
    scale = min(max(max(image.size), smallest), largest) / max(image.size)
    return image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.BICUBIC)


class Review(NamedTuple):
    """
    Images of a dataset to look at, and the options that it was annotated with.

    Attributes:
        paths (`list[str]`): The files of the images.
        labels, background, template (`str`): Values of the fields.
        threshold (`float`): The score threshold.
        model (`dict`): The description of the model.
        states (`dict`): The states of the files when they were annotated, see [`file_state`], by their paths.
    """

    paths: list[str]
    labels: str
    background: str
    template: str
    threshold: float
    model: dict
    states: dict[str, list[int] | None]


def read_review(path: str) -> Review:
    """Reads the `review.json` of `samclip annotate` and the `report.json` next to it. Raises `ValueError` with a
    message for the user if that fails, if there are no images, and for images that are no files."""
    try:
        images = [entry["image"] for entry in json.loads(Path(path).read_text())["images"]]
        report = json.loads(Path(path).with_name("report.json").read_text())
        options, model = report["run"]["options"], report["run"]["model"]
        labels = options["labels"] or [[name] for name in report["annotations_by_label"]]
        review = Review(
            images,
            format_labels(labels),
            format_labels([[text] for text in options["background"] or []]),
            options["template"],
            options["threshold"],
            {key: value for key, value in model.items() if key in ("name", "sam", "clip")},
            recorded_states(Path(path).parent),
        )
        other = [name for name in ("examples", "multi_label", "tile") if options[name]]
    except (AttributeError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--review {path} must be the review.json of samclip annotate, beside its report.json."
        ) from error
    if not images:
        raise ValueError(
            f"--review {path}: no image has annotations. Run samclip annotate with a lower --threshold, which finds "
            "more."
        )
    if missing := [name for name in images if not os.path.isfile(name)]:
        raise ValueError(
            f"--review {path}: {missing[0]} is not a file. Start the app in the folder in which samclip annotate ran. "
            "Images in tars and in datasets of the Hub cannot be opened."
        )
    if other:
        raise ValueError(f"--review {path}: the dataset was annotated with --{other[0]}, which the app does not have.")
    return review._replace(paths=without_unreadable(images, f"--review {path}"))


def without_unreadable(paths: list[str], origin: str) -> list[str]:
    """Returns the images that the app can open. The others are reported on standard error: the dataset may contain
    larger images and more formats. Raises `ValueError` if none is left."""
    readable = []
    for path in paths:
        try:
            read_image(path)
        except (OSError, ValueError) as error:
            log(f"{origin}: {path} is left out. {error}")
        else:
            readable.append(path)
    if not readable:
        raise ValueError(f"{origin}: none of the {len(paths)} images can be opened.")
    return readable


def parse_texts(fields: Fields, examples: Sequence[Example]) -> tuple[list[list[str]], list[str], str]:
    """
    Returns the labels with their synonyms, the background texts and the prompt template. A background text that is
    also a label is left out. There may be no labels if there are examples. Raises `ValueError` with a message for the
    user if they cannot be used.
    """
    try:
        is_empty = not fields.labels.strip() and bool(examples)
        labels = [] if is_empty else parse_labels('The field "Labels"', fields.labels)
        background = parse_labels('The field "Background"', fields.background) if fields.background.strip() else []
    except CommandError as error:
        raise ValueError(str(error).replace("pass comma-separated", "enter comma-separated")) from error
    names = {name for synonyms in labels for name in synonyms} | {example.label for example in examples}
    if background and "background" in names:
        raise ValueError('Give the label "background" another name, or empty the field "Background".')
    if fields.template.count("{}") != 1:
        raise ValueError(
            'The field "Prompt template" must contain {} once, in the place of the label, such as "a photo of a {}".'
        )
    return labels, [text for texts in background for text in texts if text not in names], fields.template


def contrasting_colors(image: Image.Image, groups: Sequence[Sequence[np.ndarray]]) -> list[int]:
    """
    Chooses a color number, see [`color_of`], for each group of masks `(height, width)`: the one with the largest
    distance, in RGB, to the mean color of the image in and around the masks and to the colors of earlier groups.
    """
    edge = 64  # a small image suffices for mean colors
    pixels = np.asarray(image.resize((edge, edge), Image.Resampling.BOX), dtype=np.float32)
    colors = np.array([color_of(number) for number in range(NUM_COLORS)], dtype=np.float32)
    available = np.full(NUM_COLORS, np.inf, dtype=np.float32)  # distance to the nearest color of an earlier group
    numbers: list[int] = []
    for masks in groups:
        inside = np.zeros((edge, edge), dtype=np.uint8)
        for mask in masks:
            small = Image.fromarray(mask.astype(np.uint8) * 255).resize((edge, edge), Image.Resampling.BOX)
            inside = np.maximum(inside, np.asarray(small))
        weights = np.asarray(Image.fromarray(inside).filter(ImageFilter.MaxFilter(5))).astype(np.float32)[..., None]
        mean = (pixels * weights).sum(axis=(0, 1)) / max(1, weights.sum())
        best = int(np.minimum(np.linalg.norm(colors - mean, axis=-1), available).argmax())
        numbers.append(best)
        available = np.minimum(available, np.linalg.norm(colors - colors[best], axis=-1))
        if not available.any():  # every color is used
            available[:] = np.inf
    return numbers


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a mask `(height, width)` of type bool bilinearly to `size`, height and width."""
    if mask.shape == size:
        return mask
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized) > 127


def label(vocabulary: SamClipVocabulary, label_id: int) -> tuple[str, int]:
    """Returns the name of a label and its position among the entered ones, from 1; 0 for background."""
    return vocabulary.id2label[label_id], label_id + (vocabulary.background_label_id is None)


def best_labels(scores: torch.Tensor, vocabulary: SamClipVocabulary, with_background: bool = True) -> str:
    """Returns the names and scores of the best four labels as a text."""
    label_ids = [n for n in vocabulary.id2label if with_background or n != vocabulary.background_label_id]
    best = sorted(label_ids, key=lambda label_id: -float(scores[label_id]))[:4]
    return ", ".join(f"{vocabulary.id2label[label_id]} {float(scores[label_id]):.2f}" for label_id in best)


def check_values(component: gr.components.Component, is_valid: Callable, expected: str) -> None:
    """
    Makes a value that is not valid an error that names the field. Without a value, such as that of a number field that
    was cleared, the field has its default. Gradio's own errors do not name the field, or are tracebacks in the
    terminal. This is not a subclass of the component, because Gradio would write a file `app.pyi` for it.
    """
    original, default = component.preprocess, component.value

    def preprocess(value):
        value = default if value is None else value
        if not is_valid(value):
            message = f'The value of "{component.label}" must be {expected}.'
            raise gr.Error(message, title="The value was not used", print_exception=False)
        return original(value)

    component.preprocess = preprocess


def is_fraction(value) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


@contextlib.contextmanager
def logged_warnings(name: str) -> Iterator[list[str]]:
    """Collects the messages of a logger, which are warnings or errors, in addition to its output."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


class Timer:
    """Context manager that measures the duration of its block in milliseconds."""

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.milliseconds = 1000 * (time.perf_counter() - self.start)


class App:
    """
    The callbacks of the page. They return the values of the components that `build` connects them to; most return
    those of `show`.

    Args:
        loaded (`LoadedModel`): The model and its processors.
        mask_generation (`dict`): Arguments of everything mode.
        review (`Review`, *optional*): Images to look at, in place of the example scenes.
    """

    def __init__(self, loaded: LoadedModel, mask_generation: dict, review: Review | None = None):
        self.model, self.image_processor, self.tokenizer = loaded.model, loaded.image_processor, loaded.tokenizer
        self.processor = loaded.processor
        self.description, self.caption = loaded.description, loaded.caption
        self.mask_generation = mask_generation
        self.is_miniature = "note" in self.description
        self.tokenizer_lock = threading.Lock()  # callbacks run in threads, and tokenizers are not thread-safe
        self.default_background = ", ".join(BACKGROUND_PROMPTS if self.is_miniature else PHOTO_BACKGROUND)
        self.default_template = "a {}" if self.is_miniature else "a photo of a {}"
        if review is not None:
            self.default_background, self.default_template = review.background, review.template
        self.review = review
        if review is not None and review.model.items() - self.description.items():
            names = " and ".join(f"--{'model' if key == 'name' else key} {name}" for key, name in review.model.items())
            raise ValueError(f"The dataset of --review was annotated by another model: pass {names}.")
        self.scenes: list[tuple[str, str]] = []  # path and labels
        if review is not None:
            self.scenes = [(path, review.labels) for path in review.paths]
        elif self.is_miniature:
            folder = Path(tempfile.mkdtemp(prefix="samclip-scenes-"))
            for index in EXAMPLE_SCENES:
                scene = render(seed=0, index=index)
                path = str(folder / f"scene{index}.png")
                to_display(Image.fromarray(scene.image)).save(path)
                self.scenes.append((path, ", ".join(CLASS_NAMES[number] for number in dict.fromkeys(scene.class_ids))))

    # Images.

    @torch.inference_mode()
    def load(self, path: str | None, name: str, session: Session | None, fields: Fields):
        """Reads and encodes an image. If it cannot be read, shows a warning and keeps the previous one."""
        state = file_state(path)
        try:
            original = read_image(path)
        except ValueError as error:
            gr.Warning(str(error), title="The image was not opened")
            return session, *self.show(session, fields, is_redrawn=True)
        inputs = self.image_processor(original, return_tensors="pt")
        with Timer() as timer:
            vision_embeds = self.model.get_vision_embeds(
                inputs["pixel_values"].to(self.model.device), inputs["reshaped_input_sizes"]
            )
        picture = Picture(
            to_display(original),
            path,
            name,
            (original.height, original.width),
            inputs["reshaped_input_sizes"],
            vision_embeds,
            timer.milliseconds,
            state,
        )
        new = Session(picture, session)
        if session is not None:
            session.is_replaced = True
        return new, *self.show(new, fields)

    def upload(self, file: dict | None, session: Session | None, *fields):
        """Opens a file that the browser has uploaded, and no other file of the server."""
        file = file if isinstance(file, dict) else {}
        path, name = (value if isinstance(value, str) else None for value in map(file.get, ("path", "orig_name")))
        # Without preprocessing, Gradio 6.31 checks this only for values with "meta", which a client can leave out.
        if path is not None and not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
            gr.Warning("The file was not uploaded. Open an image.", title="The image was not opened")
            return session, *self.show(session, Fields(*fields), is_redrawn=True)
        return self.load(path, name or "image.png", session, Fields(*fields))

    def choose(self, index: int, session: Session | None, *fields):
        """Opens an example. The last output is its labels."""
        # From a page of an earlier app, which had more images, or from another client.
        if not isinstance(index, int) or not 0 <= index < len(self.scenes):
            gr.Warning("The app was restarted with other images. Reload the page.", title="The image was not opened")
            return session, *self.show(session, Fields(*fields), is_redrawn=True), gr.skip()
        path, labels = self.scenes[index]
        state = None if self.review is None else self.review.states.get(path)
        if state is not None and os.path.exists(path) and file_state(path) != state:
            gr.Warning(
                "The file was changed after it was annotated, so the masks can differ from the dataset.",
                title=f"{Path(path).name} has changed",
            )
        return *self.load(path, Path(path).name, session, Fields(*fields)), labels

    def remove(self, session: Session | None, *fields):
        """Removes the image, its prompts and all results."""
        if session is not None:
            session.is_replaced = True
        return None, *self.show(None, Fields(*fields))

    # Text.

    def embed_texts(self, session: Session, fields: Fields) -> SamClipVocabulary:
        """Returns the vocabulary of the texts in the fields and of the examples. The session keeps the last ones.
        Raises `ValueError` with a message for the user."""
        key = session.classes_of(fields)
        if key not in session.vocabularies:
            labels, background, template = parse_texts(fields, session.examples)
            with self.tokenizer_lock:
                vocabulary = None
                if labels:
                    with logged_warnings("samclip_hf.segmentation_samclip") as messages:
                        vocabulary = self.model.embed_vocabulary(
                            labels, background, [template], self.tokenizer, multi_label=True
                        )
                    for message in messages:  # about names with the same tokens
                        gr.Warning(message, title="Some names are not used")
                if session.examples:
                    vocabulary = self.embed_examples(session.examples, vocabulary, background)
            while len(session.vocabularies) >= MAX_VOCABULARIES:
                del session.vocabularies[next(iter(session.vocabularies))]
            session.vocabularies[key] = vocabulary
        return session.vocabularies[key]

    @torch.inference_mode()
    def embed_examples(
        self, examples: Sequence[Example], vocabulary: SamClipVocabulary | None, background: list[str]
    ) -> SamClipVocabulary:
        """Returns the vocabulary of examples, with the labels and the background of `vocabulary`, or with the
        background texts."""
        pictures: dict[Picture, list[Example]] = {}
        for example in examples:
            pictures.setdefault(example.picture, []).append(example)
        own = {} if vocabulary is None else {"vocabulary": vocabulary}
        return self.model.embed_examples(
            None,
            [[example.label for example in group] for group in pictures.values()],
            processor=self.processor,
            masks=[[example.mask for example in group] for group in pictures.values()],
            vision_embeds=[picture.vision_embeds for picture in pictures],
            reshaped_input_sizes=[picture.reshaped_input_sizes for picture in pictures],
            **(own or {"background": background, "multi_label": True}),
        )

    def segment(self, session: Session | None, *values):
        """Segments by text. If the texts cannot be used, shows a warning and keeps the previous results."""
        if session is None:
            gr.Warning(NO_IMAGE)
            return gr.skip()
        fields = Fields(*values)
        with session.lock:
            result = session.by_text
            if result is not None and result.vocabulary is session.vocabularies.get(session.classes_of(fields)):
                session.view = BY_TEXT  # the field lost its focus when the button was pressed
                return self.show(session, fields)
            is_repeated = session.classes_of(fields) == session.used and time.monotonic() < session.refused + 1
            return gr.skip() if is_repeated else self._segment(session, fields)

    def segment_changes(self, session: Session | None, *values):
        """Segments by text as `segment`, if there are an image and labels or examples, and they are not the last
        ones."""
        fields = Fields(*values)
        if session is None or not (fields.labels.strip() or session.examples):
            return gr.skip()
        with session.lock:
            return gr.skip() if session.classes_of(fields) == session.used else self._segment(session, fields)

    @torch.inference_mode()
    def _segment(self, session: Session, fields: Fields):
        session.used = session.classes_of(fields)
        try:
            with Timer() as text_tower:
                vocabulary = self.embed_texts(session, fields)
        except ValueError as error:
            session.refused = time.monotonic()
            gr.Warning(str(error), title="The texts were not used")
            return gr.skip()
        inputs = {
            "vision_embeds": session.picture.vision_embeds,
            "reshaped_input_sizes": session.picture.reshaped_input_sizes,
        }
        with Timer() as segmentation:
            session.by_text = TextSegments(self.model(**inputs, vocabulary=vocabulary), vocabulary)
        session.times[BY_TEXT] = [("text tower", text_tower), ("segmentation", segmentation)]
        image_embeds = torch.nn.functional.normalize(self.model.get_image_features(**inputs).pooler_output, dim=-1)
        scores = self.model.classify(image_embeds, vocabulary)[0].softmax(dim=-1)
        session.classes = dict(zip(vocabulary.id2label.values(), scores.tolist(), strict=True))
        session.view = BY_TEXT
        if session.by_prompts is not None:
            session.by_prompts = self.name(session, session.by_prompts, vocabulary)
        if session.everything is not None:
            session.everything = self.name(session, session.everything, vocabulary)
        return self.show(session, fields)

    def name(self, session: Session, result, vocabulary: SamClipVocabulary | None):
        """Returns a result with the scores of a vocabulary's labels for its masks."""
        masks = [segment.mask for segment in self.masks(session, result, session.picture.size)]
        if vocabulary is None or not masks:
            return replace(result, labels=None)
        outputs = self.model.classify_masks(
            [masks],
            vision_embeds=session.picture.vision_embeds,
            reshaped_input_sizes=session.picture.reshaped_input_sizes,
            vocabulary=vocabulary,
        )
        independent = self.model.classify(outputs.segment_embeds, vocabulary, multi_label=True).sigmoid()
        scores = (outputs.scores, independent)
        return replace(result, labels=LabelScores(*(part[0].float().cpu() for part in scores), vocabulary))

    def current_vocabulary(self, session: Session, fields: Fields) -> SamClipVocabulary | None:
        """Returns the vocabulary of the texts in the fields, or `None` if they cannot be used. The events of the
        fields show the reason."""
        try:
            return self.embed_texts(session, fields) if fields.labels.strip() or session.examples else None
        except ValueError:
            return None

    # Points and boxes.

    def click(self, session: Session | None, event: gr.SelectData, *values):
        if session is None:
            gr.Warning(NO_IMAGE)
            return gr.skip()
        fields = Fields(*values)
        with session.lock:
            try:
                x, y = map(float, event.index)
            except (TypeError, ValueError):  # from another client than the page
                x = y = math.nan
            if not (0 <= x <= session.picture.image.width and 0 <= y <= session.picture.image.height):
                gr.Warning("The point is outside the image. Click in the image.", title="The point was not set")
                return gr.skip()
            try:
                prompts = session.prompts.click(fields.mode, x, y)
            except ValueError as error:
                gr.Warning(str(error), title="The box was not drawn")
                return gr.skip()
            return self.predict_mask(session, prompts, fields)

    def undo(self, session: Session | None, *values):
        """Returns to the prompts before the last click, or before they were cleared."""
        if session is None or session.prompts.previous is None:
            return gr.skip()
        with session.lock:
            return self.predict_mask(session, session.prompts.previous or session.prompts, Fields(*values))

    def clear(self, session: Session | None, *values):
        if session is None:
            return gr.skip()
        with session.lock:
            return self.predict_mask(session, session.prompts.clear(), Fields(*values))

    @torch.inference_mode()
    def predict_mask(self, session: Session, prompts: Prompts, fields: Fields):
        """Predicts one mask from all points and the box, and names it. For a single point, it is the one of three
        masks with the highest predicted IoU."""
        session.prompts, session.by_prompts, session.view = prompts, None, BY_PROMPTS
        if prompts.points or prompts.box:
            picture, device = session.picture, self.model.device
            inputs = {}
            if prompts.points:
                inputs["input_points"] = picture.to_input(prompts.points)[None, None].to(device)
                inputs["input_labels"] = torch.tensor([[prompts.labels]], device=device)
            if prompts.box:
                corners = picture.to_input([prompts.box[:2], prompts.box[2:]])
                inputs["input_boxes"] = corners.reshape(1, 1, 4).to(device)
            with Timer() as decoder:
                logits, iou_scores = self.model.predict_masks(
                    picture.vision_embeds.last_hidden_state,
                    **inputs,
                    multimask_output=len(prompts.points) == 1 and prompts.box is None,
                )
                best = int(iou_scores[0, 0].argmax())
                result = PromptedMask(logits[:, :, best, None], float(iou_scores[0, 0, best]))
            with Timer() as naming:
                session.by_prompts = self.name(session, result, self.current_vocabulary(session, fields))
            session.times[BY_PROMPTS] = [("mask decoder", decoder), ("naming", naming)]
        return self.show(session, fields)

    # Examples.

    def add_example(self, session: Session | None, name: str, *values):
        """Adds the mask of the points and the box as an example of a label, and segments the image. The last outputs
        are the field of the name and the list of examples. If the mask, the name or the texts cannot be used, shows a
        warning and changes nothing."""
        fields, name = Fields(*values), name.strip()
        problem = None
        if session is None:
            problem = NO_IMAGE
        elif session.by_prompts is None:
            problem = "Click on an object first, so that it has a mask."
        elif not name:
            problem = 'Enter a name in the field "Name of the object".'
        elif name == "background":
            problem = 'Give the object another name than "background".'
        elif len(session.examples) >= MAX_EXAMPLES:
            problem = f"There are {MAX_EXAMPLES} examples, the maximum. Remove them first."
        if problem is None:
            with session.lock:
                (segment,) = self.masks(session, session.by_prompts, session.picture.size)
                if not segment.mask.any():
                    problem = "The mask has no pixels. Click again on the object."
                else:
                    previous = session.examples
                    session.examples = (*previous, Example(session.picture, segment.mask, name))
                    try:
                        self.embed_texts(session, fields)
                    except ValueError as error:
                        session.examples, problem = previous, str(error)
                    else:
                        return *self._segment(session, fields), "", self.list_examples(session)
        gr.Warning(problem, title="The example was not added")
        return gr.skip()

    def remove_examples(self, session: Session | None, *values):
        """Removes all examples and the results with their labels, and segments by the labels in words, if there are
        any. The last output is the empty list of examples."""
        if session is None or not session.examples:
            return gr.skip()
        fields = Fields(*values)
        with session.lock:
            session.examples = ()
            if fields.labels.strip():
                shown = self._segment(session, fields)
                if shown != gr.skip():
                    return *shown, ""
            session.by_text = session.used = session.classes = None
            if session.by_prompts is not None:
                session.by_prompts = replace(session.by_prompts, labels=None)
            if session.everything is not None:
                session.everything = replace(session.everything, labels=None)
            return *self.show(session, fields), ""

    @staticmethod
    def list_examples(session: Session | None) -> str:
        """Returns the names of the examples and their numbers as HTML."""
        counts = Counter(example.label for example in session.examples) if session else {}
        names = ", ".join(f"{html.escape(name)} ({count})" for name, count in counts.items())
        return f"<p>Examples: {names}</p>" if names else ""

    # Everything mode.

    def segment_everything(self, session: Session | None, *values):
        if session is None:
            gr.Warning(NO_IMAGE)
            return gr.skip()
        fields = Fields(*values)
        with session.lock:
            self.generate_masks(session, fields)
            session.view = EVERYTHING
            return self.show(session, fields)

    @torch.inference_mode()
    def generate_masks(self, session: Session, fields: Fields) -> None:
        """Generates masks as `pipeline("mask-generation")` does, for the displayed image and from the image embeddings
        of the session, and names them."""
        picture, image_processor, device = session.picture, self.image_processor, self.model.device
        options = self.mask_generation
        with Timer() as timer:
            crop_boxes, points, _, labels = image_processor.generate_crop_boxes(
                picture.image, image_processor.size["longest_edge"], points_per_crop=options["points_per_crop"]
            )
            filtered = []
            for start in range(0, points.shape[1], POINTS_PER_BATCH):
                batch = slice(start, start + POINTS_PER_BATCH)
                logits, iou_scores = self.model.predict_masks(
                    picture.vision_embeds.last_hidden_state,
                    points[:, batch].to(device, self.model.dtype),
                    labels[:, batch].to(device),
                )
                masks = image_processor.post_process_masks(
                    logits, torch.tensor([picture.size]), picture.reshaped_input_sizes, binarize=False
                )
                filtered.append(
                    image_processor.filter_masks(
                        masks[0],
                        iou_scores[0],
                        picture.size,
                        crop_boxes[0],
                        pred_iou_thresh=fields.pred_iou_thresh,
                        stability_score_thresh=options["stability_score_thresh"],
                    )
                )
            all_masks, all_scores, all_boxes = zip(*filtered, strict=True)
            _, iou_scores, encodings, _ = image_processor.post_process_for_mask_generation(
                [mask for batch_masks in all_masks for mask in batch_masks],
                torch.cat(all_scores),
                torch.cat(all_boxes),
                options["crops_nms_thresh"],
            )
        with Timer() as naming:
            result = GeneratedMasks(encodings, iou_scores.tolist())
            session.everything = self.name(session, result, self.current_vocabulary(session, fields))
        session.times[EVERYTHING] = [("mask decoder", timer), ("naming", naming)]

    # Results.

    def segments(self, session: Session, view: str, size: tuple[int, int], threshold: float) -> list[Segment]:
        """
        Returns the masks of a result.

        Args:
            session (`Session`): The image and its results.
            view (`str`): `BY_TEXT`, `BY_PROMPTS` or `EVERYTHING`.
            size (`tuple[int, int]`): Height and width of the masks.
            threshold (`float`): The least label score. Masks of `BY_TEXT` with a lower score are left out; masks of
                the others have no label then.
        """
        result = session.result(view)
        if result is None:
            return []
        if isinstance(result, TextSegments):
            # The settings of the zero-shot segmentation pipeline and of `samclip segment`.
            found = self.image_processor.post_process_panoptic_segmentation(
                result.outputs, threshold=threshold, target_sizes=[size]
            )[0]
            segmentation, vocabulary = found["segmentation"].cpu().numpy(), result.vocabulary
            return [
                Segment(segmentation == info["id"], *label(vocabulary, info["label_id"]), info["score"])
                for info in found["segments_info"]
            ]
        segments = self.masks(session, result, size)
        if result.labels is None:
            return segments
        scores, label_ids = result.labels.scores.max(dim=-1)
        return [
            Segment(segment.mask, *label(result.labels.vocabulary, label_id), score, segment.iou_score)
            if score >= threshold
            else segment
            for segment, label_id, score in zip(segments, label_ids.tolist(), scores.tolist(), strict=True)
        ]

    def masks(self, session: Session, result: PromptedMask | GeneratedMasks, size: tuple[int, int]) -> list[Segment]:
        """Returns the masks of prompts or of everything mode, without labels."""
        if isinstance(result, PromptedMask):
            masks = self.image_processor.post_process_masks(
                result.logits.cpu(), torch.tensor([size]), session.picture.reshaped_input_sizes
            )[0][0, 0]
            return [Segment(masks.numpy(), iou_score=result.score)]
        return [
            Segment(resize_mask(decode_rle(encoding), size), iou_score=score)
            for encoding, score in zip(result.encodings, result.scores, strict=True)
        ]

    def show(self, session: Session | None, fields: Fields, is_redrawn: bool = False):
        """
        Returns the image with its prompts, the result, the table of masks, the durations, the next step, the view and
        the classes of the whole image. `is_redrawn` also returns the image with its prompts if it has not changed.
        """
        if session is None:
            step = "Drop an image on the frame, paste one, or choose an example."
            step = step if self.scenes else "Drop a photograph on the frame, or paste one."
            return gr.Image(None, label="Image"), gr.Image(None, alt_text=""), "", "", step, BY_TEXT, None
        if session.is_replaced:
            return [gr.skip()] * 7
        picture, view = session.picture, session.view
        with Timer() as drawing:
            segments = self.segments(session, view, picture.size, fields.threshold)
            colors = self.colors(picture.image, segments)
            result = self.draw(picture.image, segments, colors, fields.opacity)
            drawn = (session.prompts, session.by_prompts, fields.threshold, fields.opacity)
            if drawn == session.drawn and not is_redrawn:
                image = gr.skip()
            else:
                session.drawn = drawn
                prompted = self.segments(session, BY_PROMPTS, picture.size, fields.threshold)
                image = self.draw(picture.image, prompted, self.colors(picture.image, prompted), fields.opacity)
                text = f"{picture.name}, {session.prompts.describe() or 'no points'}"
                image = gr.Image(session.prompts.draw(image), alt_text=text, label=picture.name)
        names = ", ".join(dict.fromkeys(segment.label or "unnamed" for segment in segments))
        count = f"{len(segments)} mask{'s' * (len(segments) > 1)}: {names}" if segments else "no masks"
        alt_text = f"{picture.name}, {count}"
        return (
            image,
            gr.Image(result, alt_text=alt_text, label=f"Result: {view}"),
            self.table(session, segments, colors, fields),
            self.durations(session, drawing),
            session.prompts.next_step(fields.mode),
            view,
            session.classes,
        )

    def choose_view(self, session: Session | None, view: str, *values):
        if session is None:
            return gr.skip()
        with session.lock:
            session.view = view
            return self.show(session, Fields(*values))

    def update(self, session: Session | None, *values):
        """Shows the results with other thresholds, another opacity or another prompt type. No model runs."""
        if session is None:
            return gr.skip()
        with session.lock:
            return self.show(session, Fields(*values))

    @staticmethod
    def colors(image: Image.Image, segments: list[Segment]) -> list[int]:
        """The color number of each segment. Segments with the same label have the same color."""
        keys = [segment.label or index for index, segment in enumerate(segments)]
        groups: dict = {}
        for key, segment in zip(keys, segments, strict=True):
            groups.setdefault(key, []).append(segment.mask)
        numbers = dict(zip(groups, contrasting_colors(image, list(groups.values())), strict=True))
        return [numbers[key] for key in keys]

    @staticmethod
    def draw(image: Image.Image, segments: list[Segment], colors: list[int], opacity: float, **options) -> Image.Image:
        masks, names = [segment.mask for segment in segments], [segment.label for segment in segments]
        return draw_segments(image, masks, colors, (), names=names, opacity=opacity, **options)

    def table(self, session: Session, segments: list[Segment], colors: list[int], fields: Fields) -> str:
        """Returns the masks as HTML: color, label, scores and area."""
        view, notes, result = session.view, [], session.result(session.view)
        vocabulary = session.vocabulary(view)
        if result is None:
            return f"<p>{EMPTY[view]}</p>"
        if not segments and view == BY_TEXT:
            notes.append(f"No mask has a label score of {fields.threshold:.2f} or more. Lower the score threshold.")
        elif not segments:
            notes.append("No mask reaches the threshold of the predicted IoU (in Settings).")
        elif vocabulary is None:
            notes.append("Enter labels or add examples to name the masks.")
        if vocabulary is not None and len(vocabulary.id2label) == 1:
            notes.append(
                "With one label and no background texts, the score is always 1. Enter more labels, or texts in the "
                "field Background (in Settings)."
            )
        if view == BY_PROMPTS and result.labels is not None:
            notes.append(f"Label scores of this mask: {best_labels(result.labels.scores[0], vocabulary)}.")
            independent = best_labels(result.labels.independent_scores[0], vocabulary, with_background=False)
            notes.append(f"Independent of the other labels: {independent}.")
        has_labels, has_ious = vocabulary is not None, view != BY_TEXT
        heads = ["Mask", *["Label score"] * has_labels, *["Predicted IoU"] * has_ious, "Area"]
        rows = []
        for index, segment in enumerate(segments):
            color = "#{:02x}{:02x}{:02x}".format(*color_of(colors[index]))
            unnamed = "no label reaches the threshold" if has_labels else f"mask {index + 1}"
            cells = [f'<i style="background:{color}"></i>{html.escape(segment.label or unnamed)}']
            if has_labels:
                cells.append("" if segment.label_score is None else f"{segment.label_score:.2f}")
            if has_ious:
                cells.append(f"{segment.iou_score:.2f}")
            cells.append(f"{segment.mask.mean():.1%}")
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        head = "".join(f'<th scope="col">{text}</th>' for text in heads)
        table = f'<div class="mask-list"><table class="masks"><tr>{head}</tr>{"".join(rows)}</table></div>'
        return (table if rows else "") + "".join(f"<p>{html.escape(note)}</p>" for note in notes)

    def durations(self, session: Session, drawing: Timer) -> str:
        """Returns the measured durations of the shown result."""
        encoder = f"Image encoder: once for this image, **{session.picture.milliseconds:.0f} ms**."
        if session.result(session.view) is None:
            return encoder
        parts = [*session.times[session.view], ("drawing", drawing)]
        what = {BY_TEXT: "Labels to masks", BY_PROMPTS: "Click to mask", EVERYTHING: "Everything"}[session.view]
        total = sum(timer.milliseconds for _, timer in parts)
        detail = ", ".join(f"{name} {timer.milliseconds:.0f}" for name, timer in parts)
        return f"{what}: **{total:.0f} ms** ({detail}). {encoder} Measured on the server, without the transfer."

    # Downloads.

    def record(self, session: Session, segments: list[Segment]) -> dict:
        """Returns the shown result as `samclip segment`, `samclip points` and `samclip masks` write it."""
        records = []
        for segment in segments:
            if session.view == BY_TEXT:
                record = {"label": segment.label, "label_id": segment.label_id, "score": segment.label_score}
            else:
                record = {}
                if session.vocabulary(session.view) is not None:
                    record |= {"label": segment.label or None, "label_id": segment.label_id}
                if segment.label:
                    record["label_score"] = segment.label_score
                record["score"] = segment.iou_score
            if session.view == BY_PROMPTS:
                record |= self.prompts_record(session)
            records.append(record | coco_annotation(segment.mask))
        height, width = session.picture.original_size
        key = "segments" if session.view == BY_TEXT else "masks"
        return {
            "image": session.picture.name,
            "height": height,
            "width": width,
            "model": self.description,
            key: records,
        }

    @staticmethod
    def prompts_record(session: Session) -> dict:
        """Returns the prompts in pixels of the original image, as `samclip points` writes them."""
        prompts, (height, width) = session.prompts, session.picture.original_size
        scales = (width / session.picture.image.width, height / session.picture.image.height)
        record: dict = {}
        if prompts.points:
            record["points"] = [[x * scales[0], y * scales[1]] for x, y in prompts.points]
            record["point_labels"] = list(prompts.labels)
        if prompts.box is not None:
            record["box"] = [side * scale for side, scale in zip(prompts.box, 2 * scales, strict=True)]
        return record

    def download(self, suffix: str, session: Session | None, *values):
        """Writes the shown result in the size of the original image. Returns the path of the file, `None` without
        masks."""
        if session is None:
            gr.Warning(NO_IMAGE)
            return None
        fields, picture = Fields(*values), session.picture
        with session.lock:
            shown = self.segments(session, session.view, picture.size, fields.threshold)
            if not shown:
                gr.Warning(f"There are no masks to download. {EMPTY[session.view]}")
                return None
            if len(shown) * math.prod(picture.original_size) > MAX_MASK_BYTES:
                gr.Warning(
                    f"{len(shown)} masks in the original size need too much memory. Raise the thresholds, or open a "
                    "smaller image."
                )
                return None
            segments = self.segments(session, session.view, picture.original_size, fields.threshold)
            if suffix == ".json":
                content = (json.dumps(self.record(session, segments)) + "\n").encode()
            else:
                try:
                    image = read_image(picture.path)
                except (ValueError, OSError):
                    gr.Warning("The image was removed from the server. Open it again.")
                    return None
                if file_state(picture.path) != picture.state:
                    gr.Warning("The file of the image has changed. Open it again.")
                    return None
                # The colors of the page, unless small segments exist in one of both sizes only.
                colors = self.colors(picture.image, shown if len(shown) == len(segments) else segments)
                result = self.draw(image, segments, colors, fields.opacity, caption=self.caption)
                file = io.BytesIO()
                result.save(file, "PNG")
                content = file.getvalue()
        return save_bytes_to_cache(content, f"{Path(picture.name).stem}_masks{suffix}", get_upload_folder())

    # The page.

    def describe(self) -> str:
        """Returns a line about the model."""
        size = f"{sum(parameter.numel() for parameter in self.model.parameters()) / 1e6:.0f} million parameters"
        names = [
            f"**{html.escape(str(self.description[key]))}**"
            for key in ("name", "sam", "clip")
            if key in self.description
        ]
        if self.is_miniature:
            return (
                f"**This model works on drawn scenes only**, not photographs: it is the shipped miniature ({size}). "
                "For photographs: `python demo/app.py --sam facebook/sam-vit-base --clip openai/clip-vit-base-patch16`"
            )
        if len(names) == 1:
            return f"Model: {names[0]}, {size}."
        return f"Masks by {names[0]}, labels by {names[1]}, {size}. Not trained together: two encoders."

    def build(self) -> gr.Blocks:
        """Returns the page."""
        image_options = {"height": 440, "format": "jpeg"}  # WebP, Gradio's default, takes ten times as long to write
        one_line = {"lines": 1, "max_lines": 1}
        with gr.Blocks(title="SAM-CLIP", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.Markdown("## SAM-CLIP: named masks from labels and clicks")
            gr.Markdown(self.describe(), elem_id="note")
            session = gr.State(None, time_to_live=3600)
            scenes = gr.Dataset(
                components=[gr.Image(visible=False)],
                samples=[[thumbnail(path)] for path, _ in self.scenes],
                type="index",
                label="Example scenes" if self.review is None else REVIEW_SCENES,
                elem_id="scenes",
                visible=bool(self.scenes),
            )
            with gr.Row():
                with gr.Column(min_width=340):
                    image = gr.Image(
                        label="Image",
                        sources=["upload", "clipboard"],
                        buttons=[],
                        placeholder="Drop an image here, or click to open one",
                        elem_id="input_image",
                        **image_options,
                    )
                    labels = gr.Textbox(
                        label="Labels",
                        info="What to find, separated by commas.",
                        placeholder="cat, sofa, person",
                        elem_id="labels",
                        **one_line,
                    )
                    with gr.Row():
                        segment = gr.Button("Segment", variant="primary", min_width=120, elem_id="segment")
                        everything = gr.Button("Segment everything", min_width=120, elem_id="segment_everything")
                    next_step = gr.Markdown(elem_id="next_step")
                    modes = [FOREGROUND, BACKGROUND, BOX]
                    mode = gr.Radio(modes, value=FOREGROUND, label="A click in the image sets a", elem_id="mode")
                    with gr.Row():
                        undo = gr.Button("Undo", size="sm", min_width=100, elem_id="undo")
                        clear = gr.Button("Clear points and box", size="sm", min_width=100, elem_id="clear")
                    with gr.Accordion("Find this object in other images", open=False, elem_id="find"):
                        object_name = gr.Textbox(
                            label="Name of the object",
                            info="The mask of the points and the box becomes an example of this label, in this and "
                            "other images.",
                            elem_id="object_name",
                            **one_line,
                        )
                        with gr.Row():
                            add = gr.Button("Add example", size="sm", min_width=100, elem_id="add_example")
                            forget = gr.Button("Remove examples", size="sm", min_width=100, elem_id="remove_examples")
                        examples = gr.HTML(elem_id="examples")
                    threshold = gr.Slider(
                        0,
                        1,
                        0.5 if self.review is None else self.review.threshold,
                        step=0.01,
                        label="Score threshold",
                        info="The lowest score that a label needs, from 0 to 1.",
                        buttons=[],
                        elem_id="threshold",
                    )
                    with gr.Accordion("Settings", open=False, elem_id="settings"):
                        background = gr.Textbox(
                            self.default_background,
                            label="Background",
                            info="What else the image may show, separated by commas. Regions that match one of these "
                            "texts better than the labels have no mask.",
                            elem_id="background",
                            **one_line,
                        )
                        template = gr.Textbox(
                            self.default_template,
                            label="Prompt template",
                            info="The text around each label.",
                            elem_id="template",
                            **one_line,
                        )
                        pred_iou_thresh = gr.Slider(
                            0,
                            1,
                            self.mask_generation["pred_iou_thresh"],
                            step=0.01,
                            label="Predicted IoU threshold",
                            info="For Segment everything: the least quality of a mask as the model predicts it.",
                            buttons=[],
                            elem_id="pred_iou_thresh",
                        )
                        opacity = gr.Slider(
                            0,
                            1,
                            0.45,
                            step=0.01,
                            label="Opacity of the masks",
                            info="In both images and in the PNG, from 0 to 1. With 0, only outlines are drawn.",
                            buttons=[],
                            elem_id="opacity",
                        )
                with gr.Column(min_width=340):
                    result = gr.Image(
                        label="Result", interactive=False, buttons=["fullscreen"], elem_id="result", **image_options
                    )
                    view = gr.Radio(
                        [BY_TEXT, BY_PROMPTS, EVERYTHING], value=BY_TEXT, label="Result of", elem_id="view"
                    )
                    table = gr.HTML(elem_id="table")
                    with gr.Row():
                        png = gr.Button("Download PNG", size="sm", min_width=100, elem_id="download_png")
                        json_ = gr.Button("Download JSON", size="sm", min_width=100, elem_id="download_json")
                        file = gr.DownloadButton(visible="hidden", elem_id="file")
                    times = gr.Markdown(elem_id="times")
                    with gr.Accordion("Scores of the whole image", open=False, elem_id="whole"):
                        classes = gr.Label(num_top_classes=5, show_label=False, show_heading=False, elem_id="classes")

            for slider in (threshold, opacity, pred_iou_thresh):
                check_values(slider, is_fraction, "a number from 0 to 1")
            for textbox in (labels, background, template, object_name):
                check_values(textbox, lambda value: isinstance(value, str), "a text")
            for radio in (mode, view):
                names = [name for name, _ in radio.choices]
                check_values(radio, names.__contains__, f"one of {', '.join(names)}")

            inputs = [session, mode, labels, background, template, threshold, opacity, pred_iou_thresh]
            shown = [image, result, table, times, next_step, view, classes]
            on_result = {"show_progress_on": result}
            segment_changes = {"fn": self.segment_changes, "inputs": inputs, "outputs": shown} | on_result
            loads = [
                scenes.click(self.choose, [scenes, *inputs], [session, *shown, labels], **on_result),
                # Without preprocessing, because Gradio would open the file and report a less specific error.
                image.upload(self.upload, [image, *inputs], [session, *shown], preprocess=False, **on_result),
            ]
            if self.scenes:
                first = page.load(
                    lambda *inputs: self.choose(0, *inputs), inputs, [session, *shown, labels], **on_result
                )
                loads.append(first)
            else:
                page.load(self.remove, inputs, [session, *shown])
            events = [load.then(**segment_changes) for load in loads]
            fields = (labels, background, template)
            events.append(
                gr.on([segment.click, *(field.submit for field in fields)], self.segment, inputs, shown, **on_result)
            )
            events.append(gr.on([field.blur for field in fields], **segment_changes))
            with_name = {"inputs": [session, object_name, *inputs[1:]], "outputs": [*shown, object_name, examples]}
            events.append(gr.on([add.click, object_name.submit], self.add_example, **with_name, **on_result))
            events.append(forget.click(self.remove_examples, inputs, [*shown, examples], **on_result))
            events.append(everything.click(self.segment_everything, inputs, shown, **on_result))
            quick = {"inputs": inputs, "outputs": shown, "show_progress": "hidden"}
            sliders = [threshold.release, opacity.release, mode.input]
            events += [
                image.select(self.click, trigger_mode="multiple", **quick),
                undo.click(self.undo, trigger_mode="multiple", **quick),
                clear.click(self.clear, **quick),
                gr.on(sliders, self.update, trigger_mode="always_last", **quick),
                view.input(self.choose_view, **(quick | {"inputs": [session, view, *inputs[1:]]})),
            ]
            cleared = image.clear(self.remove, inputs, [session, *shown], cancels=events)
            for event in (*loads, cleared):
                event.then(self.list_examples, session, examples)
            save = "() => setTimeout(() => document.querySelector('#file').click(), 200)"
            for button, suffix in ((png, ".png"), (json_, ".json")):
                event = button.click(functools.partial(self.download, suffix), inputs, file, **on_result)
                event.success(None, js=save)
        return page


def build_theme() -> gr.Theme:
    """Returns a theme with system fonts, because Gradio's default fonts are downloaded, and with a contrast ratio of
    at least 4.5 for texts."""
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return theme.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="deprecated: the same as --model")
    add_model_arguments(parser)
    parser.add_argument(
        "--review", metavar="FILE", help="review.json of samclip annotate: offer its images, with their labels"
    )
    arguments = parser.parse_args()
    if arguments.checkpoint is not None:
        warnings.warn("The model is now an option: pass --model FOLDER_OR_NAME.", FutureWarning, stacklevel=2)
        if arguments.model is not None:
            parser.error("pass --model alone.")
        arguments.model = arguments.checkpoint
    if arguments.model is None and arguments.sam is None and arguments.clip is None:
        arguments.model = os.environ.get("SAMCLIP_CHECKPOINT")
    try:
        check_models(arguments)
        review = None if arguments.review is None else read_review(arguments.review)
        loaded = load_model(arguments)
        app = App(loaded, mask_generation_options(loaded), review)
    except (CommandError, OSError, ValueError) as error:
        parser.error(str(error))
    folder = Path(__file__).parent
    try:
        app.build().launch(
            theme=build_theme(),
            css_paths=folder / "page.css",
            js=(folder / "keyboard.js").read_text(),
            max_file_size="64mb",
            state_session_capacity=MAX_SESSIONS,
            footer_links=[],
        )
    except (OSError, ValueError) as error:  # no free port, no space for the thumbnails, or a server that is too slow
        parser.error(f"the page cannot be opened: {error}")


if __name__ == "__main__":
    main()
