"""
Functions for `samclip segment`, `classify` and `masks`: finding images, planning the output, running a pipeline on
each image, and writing JSON and annotated images.
"""

import argparse
import glob
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import INTERRUPTED, CommandError, discard_standard_output, first_line, log
from .formats import Prediction, encode
from .models import check_models
from .outputs import check_outputs, check_writable

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    from PIL import Image

# Files of a folder with these extensions are read. Files that are named or match a pattern may have any extension.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2")


def prepare(arguments: argparse.Namespace) -> tuple[list[Path], list[list[Path]]]:
    """Images and their outputs, see [`find_images`] and [`plan_outputs`]. Raises `CommandError` if an image, the
    output or the model cannot be used. Imports neither torch nor transformers."""
    images = find_images(arguments.images)
    outputs = plan_outputs(arguments.output, images, arguments.overwrite)
    check_models(arguments)
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
        log(f"{folder}: skipping {skipped} of {len(paths)} files, which are not images ({', '.join(extensions)}).")
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
        log(
            f"several images have the same name: a number is appended to {len(renamed)} outputs, such as "
            f'{names[first]} for {images[first]}. The field "image" of the JSON has the full path.'
        )
    return names


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
                contents: list[bytes] = []
                for path in paths:
                    name = "json" if path.suffix.lower() == ".json" else "overlay"
                    contents += encode(image, record, prediction, [name], path.stem).values()
            except Exception as error:  # whatever fails for one image, the others are processed
                failed += 1
                log(f"{image_path}: {_describe_error(error)}")
                continue
            try:
                for path, content in zip(paths, contents, strict=True):
                    write_atomically(path, content, overwrite)
            except FileExistsError as error:
                failed += 1
                log(f"{image_path}: {error.filename} was created in the meantime and is not replaced.")
                continue
            if not paths:
                tqdm.write(json.dumps(record))  # print would break the progress bar on a terminal
                sys.stdout.flush()
            done += 1
    except KeyboardInterrupt:
        progress.close()
        log(f"interrupted: {done} of {len(images)} images are complete.")
        return INTERRUPTED
    except BrokenPipeError:
        progress.close()
        raise
    except OSError as error:  # such as a full disk: the other images would fail as well
        progress.close()
        if not outputs[0]:
            discard_standard_output()
        log(f"stopped after {done} of {len(images)} images, the output cannot be written: {_describe_error(error)}")
        return 1
    if failed:
        progress.close()
        log(f"{failed} of {len(images)} images failed.")
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


def _describe_error(error: Exception) -> str:
    """One line. The type of the exception is left out if the message is written for users."""
    if isinstance(error, ValueError | OSError):
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"
