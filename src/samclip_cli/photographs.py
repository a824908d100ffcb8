"""The command line, `samclip` or `python -m samclip_hf`: the package's pipelines on photographs.

It reads images, asks a pipeline about each, and writes what it says as JSON or draws it.
"""

import argparse
import glob
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm
from transformers import AutoConfig, Pipeline, pipeline
from transformers.utils import logging

from samclip_hf import miniature
from samclip_hf.configuration_samclip import SamClipConfig
from samclip_hf.image_processing_samclip import _readable, _run_lengths
from samclip_hf.pipeline_samclip import SamClipImageSegmentationPipeline
from samclip_hf.visualization import annotated

# What a folder's images are recognised by. A file that is named or matched by a pattern may be called anything.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2")

# The miniature's masks do not reach the pipeline's own thresholds.
MINIATURE_THRESHOLDS = {"pred_iou_thresh": 0.4, "stability_score_thresh": 0.0}

LEGEND_LINES = 10  # of a classification's picture; the JSON has every label

INTERRUPTED, BROKEN_PIPE = 130, 141  # exit status: 128 and the number of the signal, as in shells

DESCRIPTION = """\
Segments and classifies photographs by a SAM-CLIP.

examples:
  samclip segment photo.jpg --labels "cat, sofa" --background "wall, floor" --output out.png
  samclip classify holiday/ --labels "beach, mountains, a city" > labels.jsonl
  samclip masks 'photos/**/*.jpg' --output masks/

"samclip segment --help" and so on say more of each."""

COMMON = """
An image is a file, a folder (the images right in it, by their extensions) or a pattern, quoted or not; ** in a quoted
one also means subfolders. An image that is named twice is done once. Images are turned as their EXIF orientation says,
and so is all that is found in them.

Without --output, JSON goes to standard output, one line an image:
  {"image": "photo.jpg", "height": 480, "width": 640, %s}
%s
The exit status is 0, 1 if some images failed (the others are done), 2 if nothing was begun, for a reason that is said,
and 130 after Ctrl-C: what was finished before it is kept."""

MASKS_IN_JSON = """\
bbox is COCO's: left, top, width, height in pixels. segmentation is the mask as COCO's uncompressed run lengths, which
pycocotools.mask.frPyObjects(segmentation, *segmentation["size"]) reads.
"""

SEGMENT = """\
Draws the outlines of all that the labels name.

examples:
  samclip segment photo.jpg --labels "cat, sofa" --background "wall, floor" --output out.png
  samclip segment photo.jpg --labels "cat, sofa" --output out.json
  samclip segment one.jpg 'more/*.jpg' folder/ --labels "cat, sofa" --output results/

A label's score is its probability among all labels and background texts. So a single label without background has 1
wherever there is anything."""

CLASSIFY = """\
Says which of the labels an image shows.

examples:
  samclip classify photo.jpg --labels "cat, dog, horse"
  samclip classify photos/ --labels "cat, dog, horse" --template "a drawing of a {}" --output results/

Scores are probabilities among the labels, the best first."""

MASKS = """\
Everything mode: the outlines of all there is, without names.

examples:
  samclip masks photo.jpg --output out.png
  samclip masks 'photos/*.jpg' --pred_iou_thresh 0.7 --output results/

A mask's score is the IoU with the true mask that the model itself predicts for it, the best first."""


class CommandError(Exception):
    """What the person who gave the command can put right; nothing was begun."""


@dataclass
class Finding:
    """What a pipeline says of one image."""

    record: dict[str, Any]  # for JSON
    legend: list[tuple[int | None, str]]  # numbers of colours, and words
    masks: list[np.ndarray] = field(default_factory=list)  # (height, width), bool
    numbers: list[int] = field(default_factory=list)  # of the masks' colours


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default this process's own. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except CommandError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _say("stopped before the first image was done.")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="samclip", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="segment | classify | masks")

    def add(name: str, load: Callable, summary: str, description: str, record: str, more: str):
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=COMMON % (record, more),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(load=load)
        command.add_argument("images", nargs="+", metavar="image", help="files, folders, patterns such as 'a/*.jpg'")
        command.add_argument(
            "--output",
            metavar="PATH",
            help="out.png (the photograph with what was found), out.json, or, for one or more images, a folder that "
            "exists, for both of every image; what is there already is overwritten",
        )
        command.add_argument(
            "--model",
            metavar="NAME",
            help="a SAM-CLIP: a folder or a name on the Hub (default: the shipped miniature, which knows drawn "
            "scenes and no photographs)",
        )
        command.add_argument("--device", help="such as cpu, cuda:1 or mps (default: a GPU if there is one)")
        return command

    found = '{"label": "cat", "score": 0.93, "bbox": [...], "area": 5120, "segmentation": {...}}'
    command = add("segment", _segment, "masks by text", SEGMENT, f'"segments": [\n   {found}, ...]', MASKS_IN_JSON)
    command.add_argument("--labels", metavar='"A, B"', help="names, with commas (default: the checkpoint's own)")
    command.add_argument("--background", metavar='"A, B"', help="texts of what none of the labels is, with commas")
    command.add_argument("--template", metavar='"a {}"', help='the labels\' sentence (default: "a photo of a {}")')
    command.add_argument(
        "--threshold",
        type=_probability,
        metavar="P",
        default=0.5,
        help="segments of a lower score are left out (default: %(default)s)",
    )

    found = '[{"label": "cat", "score": 0.93}, ...]'
    command = add("classify", _classify, "labels for whole images", CLASSIFY, f'"labels": {found}', "")
    command.add_argument("--labels", required=True, metavar='"A, B"', help="names, with commas")
    command.add_argument(
        "--template",
        metavar='"a {}"',
        default="This is a photo of {}.",
        help='the labels\' sentence (default: "%(default)s")',
    )

    found = '{"score": 0.97, "bbox": [...], "area": 5120, "segmentation": {...}}'
    command = add("masks", _masks, "everything mode", MASKS, f'"masks": [\n   {found}, ...]', MASKS_IN_JSON)
    for option, meaning, default in (
        ("pred_iou_thresh", "masks of a lower score", 0.88),
        ("stability_score_thresh", "masks whose outline is vaguer than that", 0.95),
    ):
        command.add_argument(
            f"--{option}",
            type=_probability,
            metavar="P",
            help=f"{meaning} are left out, from 0 to 1 (default: {default}, with the shipped miniature "
            f"{MINIATURE_THRESHOLDS[option]})",
        )
    command.add_argument(
        "--points_per_crop",
        type=_at_least_one,
        default=32,
        metavar="N",
        help="the model is asked at a grid of N times N points (default: %(default)s)",
    )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    images = _find_images(arguments.images)
    outputs = _plan_outputs(arguments.output, images)
    if arguments.output is None and sys.stdout is None:
        raise CommandError("standard output is closed: give --output.")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    find = arguments.load(arguments)

    failed = done = 0
    progress = tqdm(images, unit="image", disable=len(images) == 1 or not sys.stderr.isatty())
    try:
        for image_path, paths in zip(progress, outputs, strict=True):
            # Whatever is the matter with one image, the others are to be done.
            try:
                image = _read(image_path)
                finding = find(image)
                record = {"image": str(image_path), "height": image.height, "width": image.width} | finding.record
                contents = [_content(path.suffix.lower(), image, record, finding) for path in paths]
            except Exception as error:
                failed += 1
                _say(f"{image_path}: {_in_words(error)}")
                continue
            for path, content in zip(paths, contents, strict=True):
                _write(path, content)
            if not paths:
                tqdm.write(json.dumps(record))  # around the progress bar, which may be on the same terminal
                sys.stdout.flush()
            done += 1
    except KeyboardInterrupt:
        progress.close()
        _say(f"stopped: {done} of {len(images)} images are done.")
        return INTERRUPTED
    except BrokenPipeError:  # who read standard output has enough, such as head
        _leave_standard_output()
        return BROKEN_PIPE
    except OSError as error:  # a full disk, say: no other image would fare better
        progress.close()
        if arguments.output is None:
            _leave_standard_output()
        _say(f"{done} of {len(images)} images are done, and then nothing could be written: {_in_words(error)}")
        return 1
    if failed:
        progress.close()
        _say(f"{failed} of {len(images)} images failed.")
    return 1 if failed else 0


def _segment(arguments: argparse.Namespace) -> Callable[[Image.Image], Finding]:
    labels = background = None
    if arguments.labels is not None:
        labels = _names("--labels", arguments.labels)
    elif arguments.background is not None or arguments.template is not None:
        raise CommandError("--background and --template belong to --labels: give them too.")
    if arguments.background is not None:
        background = _names("--background", arguments.background)
    templates = ["a photo of a {}"] if arguments.template is None else [_template(arguments.template)]
    if labels is not None and len(labels) == 1 and background is None:
        _say(
            "with one label and no --background everything gets that label: "
            'say what else there is, such as --background "wall, floor".'
        )
    # By its class: of a checkpoint from the Hub, the name would mean the code beside it.
    segmenter = _load(arguments, "zero-shot-image-segmentation", pipeline_class=SamClipImageSegmentationPipeline)
    model = segmenter.model
    try:
        if labels is not None:
            model.set_vocabulary(labels, background, templates, segmenter.tokenizer)
        names = list(model.vocabulary.id2label.values())
    except ValueError as error:
        raise CommandError(f"--labels: {_first_line(error)}") from error

    def find(image: Image.Image) -> Finding:
        segments = segmenter(image, threshold=arguments.threshold)
        masks = [np.asarray(segment["mask"]) > 0 for segment in segments]
        described = [
            {"label": segment["label"], "score": segment["score"]} | _coco(mask)
            for segment, mask in zip(segments, masks, strict=True)
        ]
        legend: list[tuple[int | None, str]] = []
        for number, name in enumerate(names):
            scores = [segment["score"] for segment in segments if segment["label"] == name]
            if scores:
                times = f" ({len(scores)} times)" if len(scores) > 1 else ""
                legend.append((number, f"{name} {max(scores):.2f}{times}"))
        numbers = [names.index(segment["label"]) for segment in segments]
        return Finding({"segments": described}, legend or [(None, "nothing found")], masks, numbers)

    return find


def _classify(arguments: argparse.Namespace) -> Callable[[Image.Image], Finding]:
    names, template = _names("--labels", arguments.labels), _template(arguments.template)
    classifier = _load(arguments, "zero-shot-image-classification")
    model = classifier.model
    if not model.config.has_text_tower:
        raise CommandError(f"{arguments.model} has no text tower any more: it cannot be asked for labels.")
    longest = model.config.text_config.max_position_embeddings
    for label in names:
        tokens = len(classifier.tokenizer(template.format(label))["input_ids"])
        if tokens > longest:
            raise CommandError(
                f"--labels: the text tower reads {longest} tokens at most, and in its sentence this has {tokens}: "
                f"{label!r}."
            )

    def find(image: Image.Image) -> Finding:
        labels = classifier(image, candidate_labels=names, hypothesis_template=template)
        legend: list[tuple[int | None, str]] = [
            (None, f"{label['label']} {label['score']:.2f}") for label in labels[:LEGEND_LINES]
        ]
        return Finding({"labels": labels}, legend)

    return find


def _masks(arguments: argparse.Namespace) -> Callable[[Image.Image], Finding]:
    options: dict[str, Any] = {"points_per_crop": arguments.points_per_crop, "output_rle_mask": True}
    for name, value in MINIATURE_THRESHOLDS.items():
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
        elif arguments.model is None:
            options[name] = value
    generator = _load(arguments, "mask-generation")

    def find(image: Image.Image) -> Finding:
        found = generator(image, **options)
        masks = [np.asarray(mask) for mask in found["masks"]]
        scores = found["scores"].tolist()
        described = [
            {"score": score} | _coco(mask, run_lengths)
            for score, mask, run_lengths in zip(scores, masks, found["rle_mask"], strict=True)
        ]
        words = f"{len(masks)} masks, scores from {min(scores):.2f} to {max(scores):.2f}" if masks else "no masks"
        return Finding({"masks": described}, [(None, words)], masks, list(range(len(masks))))

    return find


def _load(arguments: argparse.Namespace, task: str, **options) -> Pipeline:
    """A pipeline of the model that was asked for. Raises `CommandError` where that fails."""
    if arguments.device is not None:
        try:
            torch.empty(1, device=arguments.device)
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts; the rest are RuntimeErrors
            raise CommandError(f"--device {arguments.device}: {_first_line(error)}") from error
    if arguments.model is None:
        _say("the model is the shipped miniature, which knows drawn scenes and no photographs; see --model.")
    model = arguments.model or miniature.checkpoint()
    try:
        config = AutoConfig.from_pretrained(model)
        if isinstance(config, SamClipConfig):
            return pipeline(task, model=model, device=arguments.device, **options)
    except Exception as error:  # of what can be wrong with a checkpoint, the libraries know
        raise CommandError(f"--model {model} cannot be used: {_first_line(error)}") from error
    raise CommandError(f"--model {model} is no SAM-CLIP: its configuration says {config.model_type!r}.")


def _find_images(patterns: Sequence[str]) -> list[Path]:
    """The images that are meant by files, folders and patterns, each once. Raises `CommandError` where there is
    none."""
    images: dict[str, Path] = {}
    for pattern in patterns:
        if os.path.isdir(pattern):
            found = _images_in(pattern)
        elif os.path.isfile(pattern):  # even one that is called photo[1].jpg
            found = [pattern]
        elif os.path.exists(pattern):
            raise CommandError(f"{pattern}: neither a file nor a folder.")
        elif glob.has_magic(pattern):
            found = sorted(match for match in glob.glob(pattern, recursive=True) if os.path.isfile(match))
            if not found:
                raise CommandError(f"{pattern}: no file matches this pattern.")
        else:
            raise CommandError(f"{pattern or repr(pattern)}: no such file or folder.")
        for path in found:
            images.setdefault(os.path.abspath(path), Path(path))
    return list(images.values())


def _images_in(folder: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise CommandError(f"{folder}: {error.strerror}.") from error
    paths = [path for name in names if os.path.isfile(path := os.path.join(folder, name))]
    images = [path for path in paths if path.lower().endswith(IMAGE_EXTENSIONS)]
    if not images:
        raise CommandError(
            f"{folder}: no image in this folder, that is, no file whose name ends in {', '.join(IMAGE_EXTENSIONS)}. "
            f"Those of its subfolders are meant by a pattern, such as '{os.path.join(folder, '**', '*.jpg')}'."
        )
    if others := {os.path.splitext(path)[1] or "no extension" for path in paths} - {
        os.path.splitext(path)[1] for path in images
    }:
        number = len(paths) - len(images)
        _say(f"{folder}: {number} of {len(paths)} files are not taken for images ({', '.join(sorted(others))}).")
    return images


def _plan_outputs(output: str | None, images: Sequence[Path]) -> list[list[Path]]:
    """The files to write for every image; none of them means standard output. Raises `CommandError` for an output that
    cannot be written or would overwrite an image."""
    if output is None:
        return [[] for _ in images]
    path = Path(output)
    if path.is_dir():
        names = _distinct_names(images)
        plan = [[path / f"{name}{extension}" for extension in (".json", ".png")] for name in names]
    elif path.suffix.lower() in (".png", ".json"):
        if len(images) > 1:
            raise CommandError(f"--output {output} is one file, and there are {len(images)} images: give a folder.")
        if not path.parent.is_dir():
            raise CommandError(f"--output {output}: there is no folder {path.parent}.")
        plan = [[path]]
    elif path.suffix and not output.endswith(os.sep):
        raise CommandError(f"--output {output}: ends in neither .png nor .json, nor is it a folder that exists.")
    else:
        raise CommandError(f"--output {output}: there is no such folder. Create it first: mkdir -p {output}")
    folder = plan[0][0].parent
    if not os.access(folder, os.W_OK):
        raise CommandError(f"--output {output}: nothing can be written to {folder}, it is read-only for you.")
    originals = {os.path.realpath(image) for image in images}
    for planned in (planned for own in plan for planned in own):
        if os.path.realpath(planned) in originals:
            raise CommandError(f"--output {output}: {planned} is one of the images and would be overwritten.")
    return plan


def _distinct_names(images: Sequence[Path]) -> list[str]:
    """Names without extension. Where images share theirs, capitals aside, all but the first get a number."""
    taken = {image.stem.casefold() for image in images}
    names: list[str] = []
    seen: set[str] = set()
    for image in images:
        name, number = image.stem, 1
        if name.casefold() in seen:
            while f"{name}-{number}".casefold() in taken or number == 1:
                number += 1
            name = f"{name}-{number}"
            taken.add(name.casefold())
        seen.add(name.casefold())
        names.append(name)
    if renamed := [number for number, image in enumerate(images) if names[number] != image.stem]:
        first = renamed[0]
        _say(
            f"written with a number, because other images have the same name: {len(renamed)}, such as "
            f'{images[first]} as {names[first]}; "image" in the JSON tells which is which.'
        )
    return names


def _read(path: Path) -> Image.Image:
    """The image upright and in RGB. Raises `ValueError` in words where there is none."""
    if os.path.getsize(path) == 0:
        raise ValueError("an empty file, of 0 bytes.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _readable(ImageOps.exif_transpose(image), do_rescale=True).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("not an image, or of a kind that Pillow cannot read.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ValueError(f"more than {most:.0f} million pixels, too many to be safe: make it smaller.") from error


def _coco(mask: np.ndarray, run_lengths: dict | None = None) -> dict[str, Any]:
    """A mask `(height, width)` as in COCO's annotations."""
    height, width = mask.shape
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    box = [0, 0, 0, 0]
    if len(columns):
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
    return {
        "bbox": box,
        "area": int(np.count_nonzero(mask)),
        "segmentation": _run_lengths(mask.T, 0, 0, height, width) if run_lengths is None else run_lengths,
    }


def _content(extension: str, image: Image.Image, record: dict, finding: Finding) -> bytes:
    if extension == ".json":
        return (json.dumps(record) + "\n").encode()
    file = io.BytesIO()
    annotated(image, finding.masks, finding.numbers, finding.legend).save(file, "PNG")
    return file.getvalue()


def _write(path: Path, content: bytes) -> None:
    """All of the file or, where this is interrupted, none of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _names(option: str, text: str) -> list[str]:
    """What stands between commas. Raises `CommandError` for an empty or doubled name."""
    names = [" ".join(name.split()) for name in text.split(",")]
    if not any(names):
        raise CommandError(f'{option} is empty: give names with commas, such as "cat, sofa".')
    if "" in names:
        raise CommandError(f"{option}: there is nothing between two commas, or before the first or after the last.")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise CommandError(f"{option}: more than once: {', '.join(doubled)}.")
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):  # how Python carries bytes that are no text
        raise CommandError(f"{option} is not in UTF-8: {text!r}.")
    return names


def _template(text: str) -> str:
    if text.count("{}") != 1 or "{" in text.replace("{}", "") or "}" in text.replace("{}", ""):
        raise CommandError(
            f'--template is a sentence with {{}} once for the label, such as "a photo of a {{}}": {text!r}.'
        )
    return text


def _probability(text: str) -> float:
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"a number from 0 to 1, not {text!r}")


def _at_least_one(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")


def _in_words(error: Exception) -> str:
    """In one line. What a message of our own or the system's says is enough; others have the name of their type."""
    if isinstance(error, ValueError | OSError):
        return _first_line(error)
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _say(message: str) -> None:
    # Between the lines of a progress bar, if there is one.
    tqdm.write(f"samclip: {message}", file=sys.stderr)


def _leave_standard_output() -> None:
    """What is still to be written goes nowhere: at the end, Python would try again, and complain."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
