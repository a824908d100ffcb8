"""
Inputs of `samclip segment`, `classify` and `masks`: image files, folders, patterns, webdataset tars, and datasets of
the Hub. Only names are collected before the work; images are read one by one.
"""

import argparse
import functools
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from . import CommandError, first_line, log
from .argument_types import positive_int
from .run_record import RecordedOutputs

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    from PIL import ImageFile

    from samclip_hf.datasets.hub import HubSplit

# Files of a folder with these extensions are read. Files that are named or match a pattern may have any extension.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2")
TAR_EXTENSION = ".tar"
HUB_PREFIX = "hf://"

INPUTS_HELP = """\
images:
  IMAGE is one of
    photo.jpg              an image file
    photos/                a folder: the images in it, without subfolders, or its .tar files if it
                           has no images. Outputs of an earlier run beside images are skipped
    'photos/**/*.jpg'      a quoted pattern; '**' matches subfolders
    photos.tar             a tar in webdataset's layout, not compressed
    'hf://owner/name?split=test'
                           a dataset on the Hub, or a folder with parquet or image files instead
                           of owner/name. Options, joined by '&': split, config, column
  Tars and datasets need the extra train: pip install 'samclip-hf[train]'. Repeated images are
  processed once. The EXIF orientation is applied before prediction.

many images:
  Run the same command again to continue an interrupted run with a folder as --output. The folder
  .samclip in it records the run, and results of other options or models are not mixed.
  Several processes share the images; each one uses a GPU of its own if there are several, and the
  CPU if there is none:
    torchrun --nproc_per_node N -m samclip_cli COMMAND IMAGE [IMAGE ...] --output out/
  Then run the command in a single process to join their results in results.jsonl and COCO's files.
  It retries failed images. With several processes, the exit status is 0 even if images failed."""


class ImageInput(NamedTuple):
    """
    An image that has not been read yet.

    key (`str`):
        Identifies the image in messages and in the results.
    stem (`str`):
        Name of its outputs without extension. Images may share it, see [`unique_names`] of `batch`.
    source (`Path`, or a function that returns `bytes` or `str`):
        The file, or a function that reads the content or finds the file.
    file (`Path`, *optional*):
        The local file that contains the image: its own, or a tar.
    """

    key: str
    stem: str
    source: Path | Callable[[], bytes | str]
    file: Path | None


class InputError(Exception):
    """A dataset cannot be read further."""


class DataSetImages:
    """
    The images of a dataset of the Hub, streamed: rows are downloaded while they are read.

    name (`str`):
        "hf://owner/name" or "hf://folder", with the options `config`, `split` and `column`.

    Raises `CommandError` if it cannot be opened.
    """

    def __init__(self, name: str):
        path, _, query = name.removeprefix(HUB_PREFIX).removeprefix("datasets/").partition("?")
        options = dict(parse_qsl(query))
        if unknown := sorted(options.keys() - {"config", "split", "column"}):
            raise CommandError(f"{name}: unknown option {unknown[0]!r}. Options are config, split and column.")
        column = options.pop("column", None)
        self.split = _open_hub(f"{HUB_PREFIX}{path}{'?' if options else ''}{urlencode(options)}", name)
        columns = self.split.image_columns
        if column is not None and column not in columns:
            raise CommandError(f"{name}: no image column {column!r}. Image columns: {', '.join(columns) or 'none'}.")
        if column is None and len(columns) != 1:
            choice = f"choose one with column=, such as column={columns[0]}" if columns else "it has none"
            raise CommandError(f"{name}: {len(columns)} image columns ({', '.join(columns)}): {choice}.")
        self.column = column or columns[0]
        self.folder = Path(path) if os.path.isdir(path) else None  # of a dataset that is not on the Hub
        parts = [path, options.get("config"), self.split.description["split"], column]
        self.key = HUB_PREFIX + "/".join(part for part in parts if part)
        self.stem = "-".join(part for part in (PurePosixPath(path).name, *parts[1:]) if part).replace("/", "-")

    def __iter__(self) -> Iterator[ImageInput]:
        from samclip_hf.datasets.hub import image_source

        rows = iter(self.split.rows)
        for number in itertools.count():
            key = f"{self.key}/{number}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # `datasets` and HTTP clients raise many kinds of errors
                raise InputError(f"{key} cannot be read: {first_line(error)}") from error
            yield ImageInput(key, f"{self.stem}-{number:06d}", partial(image_source, row[self.column], key), None)

    @property
    def count(self) -> int | None:
        """The number of rows, if the dataset states it."""
        splits = self.split.rows.info.splits or {}
        split = splits.get(self.split.description["split"])
        return split.num_examples if split is not None else None


@dataclass
class Inputs:
    """
    All inputs of a command, without repetition. Can be iterated repeatedly, in the same order.

    listed (`list[ImageInput]`):
        Images in files and tars.
    data_sets (`list[DataSetImages]`):
        Datasets, whose images follow.
    """

    listed: list[ImageInput]
    data_sets: list[DataSetImages]

    def __iter__(self) -> Iterator[ImageInput]:
        return itertools.chain(self.listed, *self.data_sets)

    @property
    def count(self) -> int | None:
        """The number of images, or `None` if a dataset does not state it."""
        counts = [len(self.listed), *(data_set.count for data_set in self.data_sets)]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def files(self) -> set[Path]:
        """The local files that contain the images."""
        return {image.file for image in self.listed if image.file is not None}

    @property
    def folders(self) -> list[Path]:
        """The local folders of datasets, with links resolved."""
        return [own.folder.resolve() for own in self.data_sets if own.folder is not None]


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of all image commands that determine what is read."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder, a pattern such as 'a/*.jpg', a tar, or a dataset",
    )
    parser.set_defaults(batch_size=1)
    parser.add_argument(
        "--max_image_pixels",
        type=positive_int,
        metavar="N",
        help="largest width times height of an image (default: Pillow's limit, 89478485). Larger images are not "
        "processed, because they can exhaust the memory",
    )


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Adds `--batch_size`, for commands that run the model on several images at once."""
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        metavar="N",
        default=1,
        help="images in a forward pass of the model (default: %(default)s). Larger batches may be faster on a GPU",
    )


def find_inputs(patterns: Sequence[str], output: str | None = None) -> Inputs:
    """
    Finds the images of all arguments `IMAGE`.

    patterns (`Sequence[str]`):
        The arguments.
    output (`str`, *optional*):
        The output folder. Images and tars that runs have written to it are skipped and counted. Those that runs have
        written to other folders are skipped unless an argument matches nothing else.

    Raises `CommandError` for an argument that matches no image, or if all images are such outputs.
    """
    own = None if output is None else os.path.realpath(output)
    recorded = functools.cache(RecordedOutputs)
    # By paths in which links of folders are resolved: '**' follows a link to a folder above up to 40 times.
    written: dict[str, str] = {}
    listed: dict[str, list[ImageInput]] = {}
    data_sets: dict[str, DataSetImages] = {}
    for pattern in patterns:
        if pattern.startswith(HUB_PREFIX):
            data_set = DataSetImages(pattern)
            data_sets.setdefault(data_set.key, data_set)
            continue
        paths = _find_files(pattern)
        folders = {path: folder for path in paths if (folder := _output_folder(path, recorded)) is not None}
        are_meant = len(folders) == len(paths)  # such as an output that is named
        for path in paths:
            resolved = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            if path in folders and (folders[path] == own or not are_meant):
                written[resolved] = path
            elif resolved not in listed:
                is_tar = path.lower().endswith(TAR_EXTENSION)
                listed[resolved] = _images_of_tar(path) if is_tar else [_image_of_file(path)]
    if written and not listed and not data_sets:
        raise CommandError(
            f"all images are outputs of an earlier run to --output {output}: pass other images, or another --output."
        )
    if skipped := [path for resolved, path in written.items() if resolved not in listed]:
        count = f"{len(skipped)} output{'s' * (len(skipped) > 1)}"
        log(f"skipping {count} of earlier runs among the images, such as {skipped[0]}.")
    return Inputs(list(itertools.chain.from_iterable(listed.values())), list(data_sets.values()))


def _find_files(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        return _files_of_folder(pattern)
    if os.path.isfile(pattern):  # also a file whose name looks like a pattern, such as photo[1].jpg
        return [pattern]
    if os.path.exists(pattern):
        raise CommandError(f"{pattern}: neither a file nor a folder.")
    if glob.has_magic(pattern):
        if found := sorted(match for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)):
            return found
        raise CommandError(f"{pattern}: no file matches this pattern.")
    hint = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", pattern) and not os.path.splitext(pattern)[1]:
        hint = f" For a dataset on the Hub, pass {HUB_PREFIX}{pattern}."
    raise CommandError(f"{pattern or repr(pattern)}: no such file or folder.{hint}")


def _files_of_folder(folder: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise CommandError(f"{folder}: {error.strerror}.") from error
    paths = [os.path.join(folder, name) for name in names]
    paths = [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]  # a broken link is reported
    found = [path for path in paths if path.lower().endswith(IMAGE_EXTENSIONS)]
    found = found or [path for path in paths if path.lower().endswith(TAR_EXTENSION)]
    if not found:
        raise CommandError(
            f"{folder}: no images in this folder. Image files end in {', '.join(IMAGE_EXTENSIONS)}. For images in "
            f"subfolders, pass a pattern such as '{os.path.join(folder, '**', '*.jpg')}'."
        )
    if len(found) < len(paths):
        extensions = sorted({os.path.splitext(path)[1] or "no extension" for path in set(paths) - set(found)})
        skipped = len(paths) - len(found)
        log(f"{folder}: skipping {skipped} of {len(paths)} files, which are not images ({', '.join(extensions)}).")
    return found


def _output_folder(path: str, recorded: Callable[[str], RecordedOutputs]) -> str | None:
    """The output folder of the run that has written a file: its folder or the folder above it. `None` for other files.
    `recorded` returns the outputs in a folder."""
    parent = os.path.dirname(path) or os.curdir
    outputs = (recorded(folder) for folder in (parent, os.path.join(parent, os.pardir)))
    return next((own.folder for own in outputs if path in own), None)


def _image_of_file(path: str) -> ImageInput:
    file = Path(path)
    return ImageInput(str(file), file.stem, file, file)


def _images_of_tar(path: str) -> list[ImageInput]:
    """The images of a tar, whose headers are read, without the samples that have none."""
    try:
        from samclip_hf.datasets.tar import image_rank, index_samples
    except ModuleNotFoundError as error:
        raise _missing_extra(path, error) from error
    file = Path(path)
    images, skipped = [], 0
    try:
        for sample in index_samples([file]):
            if all(image_rank(extension) is None for extension in sample.files):
                skipped += 1
                continue
            try:
                member = f"{sample.name}.{sample.image_extension()}"
            except ValueError:  # several images: reported when the image is read, as other images that cannot be used
                member = sample.name
            stem = PurePosixPath(sample.name).name
            images.append(ImageInput(f"{file}/{member}", stem, partial(_read_sample, sample), file))
    except (OSError, ValueError) as error:
        raise CommandError(first_line(error)) from error
    if not images:
        raise CommandError(f"{path}: no images in this tar.")
    if skipped:
        log(f"{path}: skipping {skipped} of {skipped + len(images)} samples, which have no image.")
    return images


def _read_sample(sample) -> bytes:
    return sample.read(sample.image_extension())


def _open_hub(name: str, argument: str) -> "HubSplit":
    try:
        from samclip_hf.datasets.hub import open_hub
    except ModuleNotFoundError as error:
        raise _missing_extra(argument, error) from error
    try:
        return open_hub(name)
    except ValueError as error:
        raise CommandError(first_line(error)) from error


def _missing_extra(name: str, error: ModuleNotFoundError) -> CommandError:
    return CommandError(
        f"{name}: {error}. Tars and datasets need the optional dependencies: pip install 'samclip-hf[train]'"
    )


def _count(pixels: int) -> str:
    return f"{pixels / 1e6:.0f} million" if pixels >= 1e7 else f"{pixels}"


def read_image(
    source: Path | Callable[[], bytes | str],
    max_pixels: int | None,
    convert: "Callable[[ImageFile.ImageFile], Any] | None" = None,
) -> Any:
    """
    The image in RGB, with its EXIF orientation applied.

    source (`Path`, or a function that returns `bytes` or `str`):
        See [`ImageInput`].
    max_pixels (`int`, *optional*):
        The largest accepted width times height. It must not exceed Pillow's own limit, `Image.MAX_IMAGE_PIXELS`.
    convert (function of the opened image, *optional*):
        What to return instead of the image in RGB. Pixels that it does not need are not decoded.

    Raises `ValueError` if the image cannot be read. Pillow's decoders raise other errors, too.
    """
    from PIL import Image, UnidentifiedImageError

    from samclip_hf.images import convert_to_rgb, open_undecoded

    content = source() if callable(source) else source
    if (len(content) if isinstance(content, bytes) else os.path.getsize(content)) == 0:
        raise ValueError("the file is empty (0 bytes).")
    try:
        with open_undecoded(content, max_pixels=max_pixels) as file:
            return convert_to_rgb(file, apply_orientation=True) if convert is None else convert(file)
    except UnidentifiedImageError as error:
        raise ValueError("not an image, or a format that Pillow cannot read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"the image has more than {_count(max_pixels or 0)} pixels. Resize it first, or raise the "
            "limit with --max_image_pixels."
        ) from error
