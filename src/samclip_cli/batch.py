"""
Functions for `samclip segment`, `classify` and `masks`: finding images, planning the output, running a pipeline on
each image, and writing JSON and annotated images.
"""

import argparse
import glob
import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import INTERRUPTED, CommandError, discard_standard_output, first_line
from .models import check_model
from .outputs import check_outputs, check_writable

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    import numpy as np
    from PIL import Image
    from transformers import Pipeline

# Files of a folder with these extensions are read. Files that are named or match a pattern may have any extension.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2")

COMMON_HELP = """
images:
  IMAGE is a file, a folder (all images in it, without subfolders) or a pattern. '**' in a quoted
  pattern matches subfolders. Repeated images are processed once. The EXIF orientation is applied
  before prediction.

output:
  Existing files are replaced with --overwrite only, and input images never.
  Without --output, JSON is written to standard output, one line per image:
    {"image": "photo.jpg", "height": 480, "width": 640,
     %s}
%s
exit status:
  0    success
  1    some images failed, or an output could not be written; all other outputs are complete
  2    wrong arguments; no image was processed
  130  interrupted by Ctrl-C; all outputs written before are complete"""

MASKS_HELP = """\
  bbox is [left, top, width, height] in pixels and segmentation is an uncompressed run-length
  encoding, both as in COCO. To read a mask with pycocotools:
    pycocotools.mask.frPyObjects(segmentation, *segmentation["size"])
"""


@dataclass
class Prediction:
    r"""
    Result of a pipeline for one image.

    record (`dict`):
        Content of the JSON output, without the image's name and size.
    legend (`list[tuple[int | None, str]]`):
        Rows of the annotated image's legend: the index of a color, or `None`, and a text.
    masks (`list[numpy.ndarray]` of shape `(height, width)`):
        Boolean masks to draw.
    colors (`list[int]`):
        Index of each mask's color.
    """

    record: dict[str, Any]
    legend: list[tuple[int | None, str]]
    masks: list["np.ndarray"] = field(default_factory=list)
    colors: list[int] = field(default_factory=list)


def create_parser(command: str, description: str, record: str, has_masks: bool) -> argparse.ArgumentParser:
    """A parser with the arguments of all three commands. `record` is an example of the JSON for `--help`."""
    parser = argparse.ArgumentParser(
        prog=f"samclip {command}",
        description=description,
        epilog=COMMON_HELP % (record, MASKS_HELP if has_masks else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, a folder, or a pattern such as 'a/*.jpg'")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a .png file (annotated image), a .json file, or an existing folder, which gets both for every image",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing output files; input images are never replaced"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a SAM-CLIP checkpoint: a folder or a repository on the Hub (default: the miniature that ships with the "
        "package; it is trained on synthetic scenes, not on photographs)",
    )
    parser.add_argument("--device", help="such as cpu, cuda:1 or mps (default: a GPU if one is available)")
    return parser


def parse_names(option: str, text: str) -> list[str]:
    """Splits comma-separated names. Raises `CommandError` for an empty or repeated name."""
    names = [" ".join(name.split()) for name in text.split(",")]
    if not any(names):
        raise CommandError(f'{option} is empty: pass comma-separated names, such as "cat, sofa".')
    if "" in names:
        raise CommandError(f"{option} has an empty name: remove the extra comma in {text!r}.")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CommandError(f"{option} has repeated names: {', '.join(repeated)}.")
    if any(
        0xD800 <= ord(letter) < 0xE000 for letter in text
    ):  # surrogates stand for undecodable bytes of the argument
        raise CommandError(f"{option} is not valid UTF-8: {text!r}.")
    return names


def check_template(text: str) -> str:
    """Returns the prompt template. Raises `CommandError` unless it has exactly one `{}`."""
    if text.count("{}") != 1 or "{" in text.replace("{}", "") or "}" in text.replace("{}", ""):
        raise CommandError(
            f'--template must contain {{}} once, in the place of the label, such as "a photo of a {{}}": got {text!r}.'
        )
    return text


def prepare(arguments: argparse.Namespace) -> tuple[list[Path], list[list[Path]]]:
    """Images and their outputs, see [`find_images`] and [`plan_outputs`]. Raises `CommandError` if an image, the
    output or the model cannot be used. Imports neither torch nor transformers."""
    images = find_images(arguments.images)
    outputs = plan_outputs(arguments.output, images, arguments.overwrite)
    if arguments.model is not None:
        check_model(arguments.model)
    return images, outputs


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Image files of all files, folders and patterns, without repetition. Raises `CommandError` for an argument that
    matches no image."""
    images: dict[str, Path] = {}
    for pattern in patterns:
        if os.path.isdir(pattern):
            found = _images_of_folder(pattern)
        elif os.path.isfile(pattern):  # also a file whose name looks like a pattern, such as photo[1].jpg
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


def _images_of_folder(folder: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise CommandError(f"{folder}: {error.strerror}.") from error
    paths = [path for name in names if os.path.isfile(path := os.path.join(folder, name))]
    images = [path for path in paths if path.lower().endswith(IMAGE_EXTENSIONS)]
    if not images:
        raise CommandError(
            f"{folder}: no images in this folder. Image files end in {', '.join(IMAGE_EXTENSIONS)}. For images in "
            f"subfolders, pass a pattern such as '{os.path.join(folder, '**', '*.jpg')}'."
        )
    if len(images) < len(paths):
        extensions = sorted({os.path.splitext(path)[1] or "no extension" for path in set(paths) - set(images)})
        skipped = len(paths) - len(images)
        _log(f"{folder}: skipping {skipped} of {len(paths)} files, which are not images ({', '.join(extensions)}).")
    return images


def plan_outputs(output: str | None, images: Sequence[Path], overwrite: bool) -> list[list[Path]]:
    """
    Files to write for every image; an empty list stands for standard output.

    Raises `CommandError` for an output that cannot be written, that is an input image, or that exists if `overwrite`
    is false.
    """
    if output is None:
        if sys.stdout is None:
            raise CommandError("standard output is closed: pass --output.")
        return [[] for _ in images]
    path = Path(output)
    if os.path.isdir(path):
        names = unique_names(images)
        plan = [[path / f"{name}{extension}" for extension in (".json", ".png")] for name in names]
    elif output == "-":
        raise CommandError("--output -: without --output, JSON is written to standard output.")
    elif os.path.lexists(path) and not os.path.isfile(path):  # such as /dev/null, or a broken link
        raise CommandError(f"--output {output}: neither a file nor a folder.")
    elif path.suffix.lower() in (".png", ".json") and not output.endswith(os.sep):
        if len(images) > 1:
            raise CommandError(f"--output {output} is one file, but there are {len(images)} images: pass a folder.")
        if not os.path.isdir(path.parent):
            raise CommandError(f"--output {output}: the folder {path.parent} does not exist.")
        plan = [[path]]
    elif path.suffix and not output.endswith(os.sep):
        raise CommandError(f"--output {output} must end in .png or .json, or be an existing folder.")
    else:
        raise CommandError(f"--output {output}: the folder does not exist. Create it first: mkdir -p {output}")
    check_outputs([path for paths in plan for path in paths], images, overwrite)
    check_writable(plan[0][0].parent, "--output")
    return plan


def unique_names(images: Sequence[Path]) -> list[str]:
    """File names without extension, unique without regard to case and to the encoding of accents, as some file systems
    require. If images share a name, a number is appended to all but the first."""

    def key(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    taken = {key(image.stem) for image in images}
    names: list[str] = []
    seen: set[str] = set()
    for image in images:
        name, number = image.stem, 1
        if key(name) in seen:
            while key(f"{name}-{number}") in taken or number == 1:
                number += 1
            name = f"{name}-{number}"
            taken.add(key(name))
        seen.add(key(name))
        names.append(name)
    if renamed := [index for index, image in enumerate(images) if names[index] != image.stem]:
        first = renamed[0]
        _log(
            f"several images have the same name: a number is appended to {len(renamed)} outputs, such as "
            f'{names[first]} for {images[first]}. The field "image" of the JSON has the full path.'
        )
    return names


def load_pipeline(task: str, model: str | None, device: str | None, **options) -> "Pipeline":
    """
    The pipeline of a SAM-CLIP checkpoint.

    task (`str`):
        Task of [`~transformers.pipeline`].
    model (`str`, *optional*):
        A folder or a repository on the Hub. By default the shipped miniature.
    device (`str`, *optional*):
        A torch device. By default a GPU if one is available.

    Raises `CommandError` if the device or the checkpoint cannot be used.
    """
    import torch
    from transformers import AutoConfig, pipeline
    from transformers.utils import logging

    from samclip_hf import SamClipConfig, miniature

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
            raise CommandError(f"--device {device}: {first_line(error)}") from error
    if model is None:
        _log("using the shipped miniature, which is trained on synthetic scenes, not on photographs; see --model.")
        model = miniature.checkpoint()
    try:
        config = AutoConfig.from_pretrained(model)
        if isinstance(config, SamClipConfig):
            return pipeline(task, model=model, device=device, **options)
    except Exception as error:  # a faulty checkpoint can raise any exception of the libraries that read it
        raise CommandError(f"--model {model} cannot be loaded: {first_line(error)}") from error
    raise CommandError(f"--model {model} is not a SAM-CLIP: its model type is {config.model_type!r}.")


def process_images(
    images: Sequence[Path],
    outputs: Sequence[Sequence[Path]],
    predict: Callable[["Image.Image"], Prediction],
    overwrite: bool,
) -> int:
    """
    Runs `predict` on every image and writes the results.

    An image is reported and skipped if it cannot be read or processed, or if a file with the name of its output has
    appeared in the meantime and `overwrite` is false. Returns the exit status.
    """
    from tqdm import tqdm

    from samclip_hf.files import write_atomically

    failed = done = 0
    progress = tqdm(images, unit="image", disable=len(images) == 1 or not sys.stderr.isatty())
    try:
        for image_path, paths in zip(progress, outputs, strict=True):
            try:
                image = read_image(image_path)
                prediction = predict(image)
                record = {"image": str(image_path), "height": image.height, "width": image.width} | prediction.record
                contents = [_encode(path.suffix.lower(), image, record, prediction) for path in paths]
            except Exception as error:  # whatever fails for one image, the others are processed
                failed += 1
                _log(f"{image_path}: {_describe_error(error)}")
                continue
            try:
                for path, content in zip(paths, contents, strict=True):
                    write_atomically(path, content, overwrite)
            except FileExistsError as error:
                failed += 1
                _log(f"{image_path}: {error.filename} was created in the meantime and is not replaced.")
                continue
            if not paths:
                tqdm.write(json.dumps(record))  # print would break the progress bar on a terminal
                sys.stdout.flush()
            done += 1
    except KeyboardInterrupt:
        progress.close()
        _log(f"interrupted: {done} of {len(images)} images are complete.")
        return INTERRUPTED
    except BrokenPipeError:
        progress.close()
        raise
    except OSError as error:  # such as a full disk: the other images would fail as well
        progress.close()
        if not outputs[0]:
            discard_standard_output()
        _log(f"stopped after {done} of {len(images)} images, the output cannot be written: {_describe_error(error)}")
        return 1
    if failed:
        progress.close()
        _log(f"{failed} of {len(images)} images failed.")
    return 1 if failed else 0


def read_image(path: Path) -> "Image.Image":
    """The image in RGB, with its EXIF orientation applied. Raises `ValueError` if it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    from samclip_hf.images import open_image

    if os.path.getsize(path) == 0:
        raise ValueError("the file is empty (0 bytes).")
    try:
        return open_image(path, max_pixels=Image.MAX_IMAGE_PIXELS)
    except UnidentifiedImageError as error:
        raise ValueError("not an image, or a format that Pillow cannot read.") from error
    except Image.DecompressionBombError as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ValueError(f"the image has more than {limit:.0f} million pixels: resize it first.") from error


def coco_annotation(mask: "np.ndarray", segmentation: dict | None = None) -> dict[str, Any]:
    """
    COCO's fields of a mask: `bbox`, `area` and `segmentation`.

    mask (`numpy.ndarray` of shape `(height, width)`):
        Boolean.
    segmentation (`dict`, *optional*):
        The mask's run-length encoding, if it is available.
    """
    from samclip_hf.images import encode_mask, mask_to_coco_box

    return {
        "bbox": mask_to_coco_box(mask),
        "area": int(mask.sum()),
        "segmentation": encode_mask(mask) if segmentation is None else segmentation,
    }


def _encode(extension: str, image: "Image.Image", record: dict, prediction: Prediction) -> bytes:
    if extension == ".json":
        return (json.dumps(record) + "\n").encode()
    from samclip_hf.visualization import draw_segments

    file = io.BytesIO()
    draw_segments(image, prediction.masks, prediction.colors, prediction.legend).save(file, "PNG")
    return file.getvalue()


def _describe_error(error: Exception) -> str:
    """One line. The type of the exception is left out if the message is written for users."""
    if isinstance(error, ValueError | OSError):
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"


def _log(message: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"samclip: {message}", file=sys.stderr)  # print would break the progress bar
