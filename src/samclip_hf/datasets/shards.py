"""
Sources of training samples, divided into shards that can be read from any row: tars, image files, and streaming
datasets of `datasets`. [`open_shards`] finds the source that a name means.
"""

import contextlib
import glob
import itertools
import math
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import datasets
import fsspec
import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from transformers.utils import logging

from .layouts import (
    ANNOTATION_FOLDER,
    ANNOTATION_NAME,
    IGNORED_NAME,
    IMAGE_EXTENSIONS,
    list_files,
    raise_if_compressed,
)
from .tar import ConcatenatedTarError, SampleFile, image_rank, iterate_files, open_tar, sample_key

logger = logging.get_logger(__name__)

# Names of the image column in webdataset tars and parquet files.
IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "images", "img")
# Builders of `datasets` by extension. Tars are read by `TarShards`, images and zip archives by `ImageShards`.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
SHARD_EXTENSIONS = (".tar", *BUILDERS)
KINDS = dict.fromkeys((*IMAGE_EXTENSIONS, ".zip"), "images") | {
    ".tar": "tars",
    ".parquet": "parquet files",
    ".arrow": "arrow files",
}
# Image files and saved datasets have no shards, so they are divided into shards. The number is a power of two, so that
# all readers of a stream have the same number of samples.
MAX_SHARDS, MIN_SHARD_LENGTH = 256, 64
# Names of folders that are the splits of a dataset, if there are several of them. A number may follow, as in COCO.
SPLITS = {
    **{"train": "train", "training": "train", "val": "validation", "valid": "validation"},
    **{"validation": "validation", "test": "test", "testing": "test"},
}
ACCEPTED_NAMES = (
    "Pass a folder, a glob such as 'photos/*.tar', 'hf://datasets/owner/name/*.tar', the name of a dataset on the "
    "Hub, or 'miniature'."
)
BROKEN_IMAGE = "broken image"
NO_IMAGE = (math.inf, "")  # rank and extension
IS_ANNOTATION = "Their names say that they are annotations of other images. Rename them if they are not."
# Causes for which samples of tars cannot be used, and what to do.
SEVERAL_IMAGES, SCATTERED_FILES, LINK = "several images", "scattered files", "link in a tar"
REMEDIES = {
    SEVERAL_IMAGES: (
        "It has several images. Name the one to use KEY.jpg, whatever its format and with no other dot in the name, "
        "or remove the others."
    ),
    SCATTERED_FILES: "Its files do not follow each other in the tar. Write the tar again with GNU tar's --sort=name.",
    LINK: "It is a link. Write the tar again with GNU tar's --dereference --hard-dereference.",
}


class DataError(ValueError):
    """The data cannot be used for training."""


class Shards(Protocol):
    """
    The shards of a stream.

    names (`list[str]`):
        A name for each shard.
    is_remote (`bool`):
        Whether the shards are read over a network. Failed reads are then retried.
    """

    names: list[str]
    is_remote: bool

    def rows(self, shard: int, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        """
        Yields the row and the sample of each sample from row `start` on whose key is `wanted`. A sample has `key`,
        unique in the shard; `image`, a dict of `bytes` and `path`, or `None`; and `json`, SA-1B's annotations, or
        `None`. A sample without an image may have the `cause`.
        """


class TarShards:
    """
    Tars in webdataset's layout, such as SA-1B's. Consecutive files with one name up to the first dot are a sample, and
    [`image_rank`] says which of them is the image. Skipped rows of a local tar are not read; a remote tar is read from
    its start.

    A tar that is truncated between two files cannot be distinguished from a complete one, as in Python's `tarfile`.
    """

    def __init__(self, names: list[str], with_masks: bool):
        self.names, self.with_masks = names, with_masks
        self.has_logged_annotations = False  # a line in the log for all tars
        self.is_remote = any("://" in name for name in names)

    def rows(self, shard: int, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            yield from self._rows(self.names[shard], start, wanted)
        except ConcatenatedTarError as error:
            raise DataError(f"{self.names[shard]} is not a readable tar: {error}.") from error

    def _rows(self, path: str, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        names: set[str] = set()
        with fsspec.open(path, "rb") as stream, open_tar(stream) as tar:
            samples = groupby(self._check_order(iterate_files(tar), path), key=attrgetter("sample"))
            for row, (name, files) in enumerate(samples):
                key, is_known = sample_key(path, name), name in names
                names.add(name)
                if row < start or not wanted(key):
                    continue  # without reading the files
                if is_known:
                    yield row, {"key": key, "image": None, "json": None, "cause": SCATTERED_FILES}
                else:
                    yield row, {"key": key, **self._read_files(tar, files)}

    def _check_order(self, files: Iterable[SampleFile], path: str) -> Iterator[SampleFile]:
        """
        Yields the files without those that other samples separate from their sample and that it does not need, such as
        masks after all photographs, and without images of `ANNOTATION_NAME`, which are logged.

        Raises `DataError` if the image of a sample, or another candidate for it, follows after another file was used
        in its place, such as photographs after all masks, if another sample is between a photograph and an earlier
        image of `ANNOTATION_NAME`, or if there are folders of photographs and of annotations.
        """
        lowest: dict[str, tuple[float, str]] = {}  # rank and extension of each sample's image
        annotations: dict[str, str] = {}  # images of `ANNOTATION_NAME` that were used, by the photograph to expect
        previous, is_separated = None, False
        examples: dict[bool, str] = {}  # of images in folders of annotations, and in others
        for file in self._without_annotations_before(files, path):
            if file.sample != previous:
                previous, is_separated = file.sample, file.sample in lowest
            rank = image_rank(file.extension)
            if rank is not None:
                examples.setdefault(bool(ANNOTATION_FOLDER.search(file.sample)), file.member.name)
                raise_if_annotations(examples, path)
                if file.sample in annotations:
                    raise DataError(
                        f"{path}: {annotations[file.sample]} seems to be an annotation of {file.member.name}, which "
                        "follows later. Write the tar again without annotations, or rename the file if it is not one."
                    )
                if match := ANNOTATION_NAME.fullmatch(file.sample):
                    if lowest.get(match["stem"], NO_IMAGE) != NO_IMAGE:
                        self._log_annotation(file, path)
                        continue
                    annotations.setdefault(match["stem"], file.member.name)
            lowest_rank, extension = lowest.setdefault(file.sample, NO_IMAGE)
            if is_separated:
                if rank is not None and (rank, file.extension) != (lowest_rank, extension) and rank <= lowest_rank:
                    is_image = "is" if rank < lowest_rank else "may be"
                    raise DataError(
                        f"{path}: {file.member.name} {is_image} the image of its sample, but does not follow its "
                        "other files. Write the tar again with GNU tar's --sort=name."
                    )
                is_needed = file.extension == "json" and self.with_masks if rank is None else rank == lowest_rank
                if not is_needed:
                    continue
            elif rank is not None and rank < lowest_rank:
                lowest[file.sample] = rank, file.extension
            yield file

    def _without_annotations_before(self, files: Iterable[SampleFile], path: str) -> Iterator[SampleFile]:
        """Yields the files without images of `ANNOTATION_NAME` directly before their photograph, as in the order of
        GNU tar's --sort=name: "1-mask.png", "1.jpg". They are logged."""
        waiting: list[SampleFile] = []  # images of `ANNOTATION_NAME` of one photograph, and other files of its sample
        photograph = None  # its sample
        for file in files:
            is_image = image_rank(file.extension) is not None
            match = ANNOTATION_NAME.fullmatch(file.sample) if is_image else None
            if waiting and file.sample == photograph:
                if is_image:
                    for other in waiting:
                        if other.sample == photograph:
                            yield other
                        else:
                            self._log_annotation(other, path)
                    waiting = []
            elif waiting and (match is None or match["stem"] != photograph):
                yield from waiting
                waiting = []
            if match is not None or waiting:
                photograph = photograph if waiting or match is None else match["stem"]
                waiting.append(file)
            else:
                yield file
        yield from waiting

    def _log_annotation(self, file: SampleFile, path: str) -> None:
        if not self.has_logged_annotations:
            self.has_logged_annotations = True
            logger.warning(f"{path}: images such as {file.member.name} are not used. {IS_ANNOTATION}")

    def _read_files(self, tar: tarfile.TarFile, files: Iterable[SampleFile]) -> dict[str, Any]:
        """Reads the image and the annotations of a sample."""
        sample: dict[str, Any] = {"image": None, "json": None}
        lowest_rank = math.inf
        for _, extension, member in files:
            rank = image_rank(extension)
            if rank == lowest_rank:
                sample |= {"image": None, "cause": SEVERAL_IMAGES}
            is_image = rank is not None and rank < lowest_rank
            if not (is_image or (extension == "json" and self.with_masks)):
                continue
            if not member.isfile():
                return {"image": None, "json": None, "cause": LINK}
            content = _read_member(tar, member)
            if rank is None:
                sample["json"] = content
            else:
                lowest_rank = rank
                sample = {"image": {"bytes": content, "path": None}, "json": sample["json"]}
        return sample


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # `member` is a regular file
    return file.read()


def raise_if_annotations(examples: dict[bool, str], name: str) -> None:
    """Raises `DataError` if there are examples of images in folders of annotations (`True`) and in others."""
    if len(examples) == 2:
        raise DataError(
            f"{name} has photographs, such as {examples[False]}, and images in a folder of annotations, such as "
            f"{examples[True]}. Pass photographs only: a subfolder, a glob, or a tar without the annotations."
        )


class ImageFile(NamedTuple):
    """
    A file in a folder, or in a zip archive.

    path (`str`):
        The file or the archive.
    member (`str`, *optional*):
        The name in the archive.
    """

    path: str
    member: str | None = None

    @property
    def name(self) -> str:
        """The path, which may continue in the archive."""
        return self.path if self.member is None else os.path.join(self.path, self.member)

    @property
    def key(self) -> str:
        """The last folder and the base name. Bytes that are not UTF-8 are escaped."""
        key = os.path.join(*self.name.split(os.sep)[-2:])
        return os.fsencode(key).decode(errors="backslashreplace")

    def with_extension(self, extension: str) -> "ImageFile":
        """Returns the file of the same name with another extension."""
        if self.member is None:
            return ImageFile(os.path.splitext(self.path)[0] + extension)
        return ImageFile(self.path, os.path.splitext(self.member)[0] + extension)

    def read(self) -> bytes:
        """Reads the content. Raises `FileNotFoundError` if there is no such file."""
        if self.member is None:
            return Path(self.path).read_bytes()
        try:
            return open_zip(self.path).read(self.member)
        except KeyError as error:
            raise FileNotFoundError(f"{self.path} has no file {self.member}.") from error


def open_zip(path: str) -> zipfile.ZipFile:
    """Opens an archive, once in each process: processes must not share the position in a file."""
    return _open_zip(path, os.stat(path).st_mtime_ns, os.getpid())


@lru_cache(maxsize=8)
def _open_zip(path: str, modified: int, process_id: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


class ImageShards:
    """
    Image files of folders and zip archives, in a fixed random order, because folders often contain the samples of one
    class. Skipped rows are not read.

    With masks, the annotations of `dog.jpg` are `dog.json` in the same folder.
    """

    is_remote = False

    def __init__(self, files: Sequence[ImageFile], name: str, with_masks: bool):
        self.with_masks = with_masks
        order = np.random.default_rng(0).permutation(len(files))
        parts = np.array_split(order, choose_num_shards(len(files)))
        self.files = [[files[index] for index in part] for part in parts]
        # The names change with the files, so that neither a checkpoint nor an embedding cache is used with others.
        checksums = (zlib.crc32("/".join(file.key for file in part).encode()) for part in self.files)
        self.names = [f"{Path(name).name} {shard} ({checksum:08x})" for shard, checksum in enumerate(checksums)]

    def rows(self, shard: int, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, file in enumerate(self.files[shard][start:], start):
            if wanted(file.key):
                sample: dict[str, Any] = {"key": file.key, "image": {"bytes": None, "path": file.path}, "json": None}
                if file.member is not None:
                    try:
                        sample["image"] = {"bytes": file.read(), "path": None}
                    except Exception:  # `zipfile` raises many kinds of errors; the other files may be readable
                        sample |= {"image": None, "cause": BROKEN_IMAGE}
                if self.with_masks:
                    with contextlib.suppress(FileNotFoundError):
                        sample["json"] = file.with_extension(".json").read()
                yield row, sample


class DatasetShards:
    """Shards of a streaming dataset of `datasets`: parquet files, saved datasets, datasets on the Hub, and the
    miniature. Skipped rows are read and discarded."""

    def __init__(self, stream: IterableDataset, name: str, with_masks: bool, is_remote: bool = False):
        self.is_remote = is_remote
        columns = list(stream.features or next(iter(stream), {}))
        image_column = next((column for column in IMAGE_COLUMNS if column in columns), None)
        if image_column is None:
            raise ValueError(f"{name!r} has no image column: found {columns}, expected one of {list(IMAGE_COLUMNS)}.")
        if with_masks and "json" not in columns:
            raise ValueError(f"{name!r} has no column 'json' with SA-1B's annotations: found {columns}.")
        kept = {"__key__", image_column} | ({"json"} if with_masks else set())
        stream = stream.select_columns([column for column in columns if column in kept])
        self.stream = stream.cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.names = [f"{Path(name).name} {shard}" for shard in range(stream.num_shards)]

    def rows(self, shard: int, start: int, wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        samples = self.stream.shard(num_shards=len(self.names), index=shard).skip(start)
        # `iter(samples)` would yield only a part of the shard in a data loader's worker.
        for row, batch in enumerate(samples.iter(batch_size=1), start):
            sample = {column: values[0] for column, values in batch.items()}
            image = sample[self.image_column]
            # In an archive, the path is "zip://cat/1.jpg::hf://...".
            location = PurePosixPath(((image and image.get("path")) or "").partition("::")[0])
            folder, path = location.parent.name, location.name
            # The folder distinguishes `cat/1.jpg` from `dog/1.jpg`. In parquet, all rows may have the same bare name.
            key = sample.get("__key__") or (f"{folder}/{path}" if folder else f"{shard}/{row}/{path}")
            if wanted(key):
                if image and not image.get("bytes") and "://" in (image.get("path") or ""):  # a file of a zip
                    content = _read_url(image["path"])
                    image = None if content is None else {"bytes": content, "path": path or None}
                yield row, {"key": key, "image": image, "json": sample.get("json")}


def _read_url(url: str) -> bytes | None:
    """Returns the content of a URL, which may point into an archive; `None` if there is no such file."""
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def choose_num_shards(num_samples: int) -> int:
    """Returns the number of shards for samples without shards."""
    return 2 ** int(math.log2(min(MAX_SHARDS, max(1, num_samples // MIN_SHARD_LENGTH))))


def open_shards(name: str, split: str, with_masks: bool) -> Shards:
    """Opens the shards of `name`, see [`open_stream`]."""
    if name == "miniature":
        from ..miniature import streams as miniature

        return DatasetShards(miniature.masks() if with_masks else miniature.images(), name, with_masks)
    raise_if_compressed([name])
    if os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json")):
        return _open_saved(name, split, with_masks)
    if files := list_files(name):
        return _open_files(files, name, split, with_masks)
    if os.path.isdir(name):
        raise FileNotFoundError(f"The folder {name!r} is empty. {ACCEPTED_NAMES}")
    return _open_remote(name, split, with_masks)


def _open_saved(name: str, split: str, with_masks: bool) -> Shards:
    """Opens a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, in a fixed random order."""
    saved: Dataset | DatasetDict = load_from_disk(name)
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"{name!r} has no split {split!r}. Pass the folder of one of its splits: {list(saved)}.")
        saved = saved[split]
    if not len(saved):
        raise FileNotFoundError(f"The dataset in {name!r} is empty.")
    saved = saved.shuffle(seed=0, keep_in_memory=True)  # otherwise the order is written into the folder
    stream = saved.to_iterable_dataset(num_shards=choose_num_shards(len(saved)))
    return DatasetShards(stream, name, with_masks)


def _open_files(files: list[str], name: str, split: str, with_masks: bool) -> Shards:
    """Opens local files of one kind."""
    raise_if_compressed(files)
    if os.path.isdir(name):
        files = _files_of_split(files, name, split)
    by_kind: dict[str | None, list[str]] = defaultdict(list)
    for file in files:
        by_kind[KINDS.get(_extension(file))].append(file)
    others = by_kind.pop(None, [])
    stems = {os.path.splitext(file)[0] for file in by_kind.get("tars", [])}
    if stems and all(os.path.splitext(file)[0] in stems for file in by_kind.get("parquet files", [])):
        by_kind.pop("parquet files", None)  # img2dataset writes the metadata of `0.tar` to `0.parquet`
    if len(by_kind) > 1:
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in by_kind.items())
        raise ValueError(
            f"{name!r} has files of several kinds: {counts}. Choose one with a glob, such as 'photos/**/*.tar'."
        )
    if not by_kind:
        raise ValueError(f"{name!r} has neither images nor shards, but {_count(others)}. {ACCEPTED_NAMES}")
    kind, paths = by_kind.popitem()
    if kind == "tars":
        return TarShards(paths, with_masks)
    if kind == "images":
        return _open_images(paths, others, name, with_masks)
    if saved := [file for file in others if os.path.basename(file) == "state.json"]:
        raise ValueError(f"{os.path.dirname(saved[0])} is a folder of `save_to_disk`. Pass such folders one by one.")
    builder = BUILDERS[_extension(paths[0])]
    return DatasetShards(load_dataset(builder, data_files=paths, split="train", streaming=True), name, with_masks)


def _files_of_split(files: list[str], folder: str, split: str) -> list[str]:
    """Returns the files of a split, if the folder has several splits: folders such as `train` and `val`, or files such
    as `train-00000-of-00002.parquet`. Otherwise returns all."""
    splits = [_split_of(os.path.relpath(file, folder)) for file in files]
    present = sorted({split for split in splits if split is not None})
    if len(present) < 2:
        return files
    wanted = SPLITS.get(split, split)
    if wanted not in present:
        raise ValueError(f"{folder!r} has splits {', '.join(present)}, but not {split!r}. Pass one of its folders.")
    kept = [file for file, of_file in zip(files, splits, strict=True) if of_file == wanted]
    logger.warning(
        f"{folder!r} has the splits {', '.join(present)}. Only {wanted} is used: {len(kept)} of {len(files)} files."
    )
    return kept


def _split_of(path: str) -> str | None:
    *folders, base_name = path.split(os.sep)
    shard = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}.*", base_name)
    names = [re.sub(r"[-_]?\d+$", "", name.lower()) for name in ([*folders, shard.group(1)] if shard else folders)]
    return next((SPLITS[name] for name in names if name in SPLITS), None)


def _open_images(paths: list[str], others: list[str], name: str, with_masks: bool) -> Shards:
    """Opens images and zip archives of images. Of several images with one name, the one with the lowest
    [`image_rank`] is used, as in tars. Raises `DataError` if there are several. Images of `ANNOTATION_NAME` are left
    out."""
    files: list[ImageFile] = []
    for path in paths:
        if path.lower().endswith(".zip"):
            members = [member for member in open_zip(path).namelist() if not member.endswith("/")]
            members = [member for member in members if not IGNORED_NAME.search(member)]
            is_image = [_extension(member) in IMAGE_EXTENSIONS for member in members]
            files += [ImageFile(path, member) for member in itertools.compress(members, is_image)]
            others = others + [member for member, image in zip(members, is_image, strict=True) if not image]
        else:
            files.append(ImageFile(path))
    root = len(name) if os.path.isdir(name) else 0
    raise_if_annotations({bool(ANNOTATION_FOLDER.search(file.name[root:])): file.name for file in files}, name)
    stems = {os.path.splitext(file.name)[0] for file in files}
    photographs = [file for file in files if not _is_annotation(file, stems)]
    if left_out := len(files) - len(photographs):
        example = next(file.name for file in files if _is_annotation(file, stems))
        logger.warning(f"{name!r}: {left_out} images, such as {example}, are not used. {IS_ANNOTATION}")
    files = _choose_images(photographs, name)
    others = [file for file in others if not (with_masks and file.endswith(".json"))]
    if others:
        logger.warning(f"{name!r} has {len(files)} images. Other files are not used: {_count(others)}.")
    if not files:
        raise ValueError(f"{name!r} has no images, but {_count(others)}. {ACCEPTED_NAMES}")
    return ImageShards(files, name, with_masks)


def _is_annotation(file: ImageFile, stems: set[str]) -> bool:
    """Returns whether an image's name is that of an annotation of an image with one of the `stems`."""
    match = ANNOTATION_NAME.fullmatch(os.path.splitext(file.name)[0])
    return match is not None and match["stem"] in stems


def _choose_images(files: list[ImageFile], name: str) -> list[ImageFile]:
    """Returns the files without those that are not the image of their name, see [`image_rank`]."""
    lowest: dict[str, tuple[float, str]] = {}
    ranks: list[int] = []
    for file in files:
        stem, extension = os.path.splitext(file.name)
        rank = image_rank(extension[1:].lower())
        assert rank is not None  # all are images
        ranks.append(rank)
        lowest[stem] = min((rank, extension.lower()), lowest.get(stem, NO_IMAGE))
    used: list[ImageFile] = []
    left_out: list[ImageFile] = []
    for file, rank in zip(files, ranks, strict=True):
        stem, extension = os.path.splitext(file.name)
        lowest_rank, image_extension = lowest[stem]
        if rank == lowest_rank and extension.lower() != image_extension:
            raise DataError(
                f"{name!r}: {file.name} and {stem}{image_extension} have the same name, and either may be the image. "
                "Pass the photographs only: a glob of their format, or a folder without the other files."
            )
        (used if rank == lowest_rank else left_out).append(file)
    if left_out:
        logger.warning(
            f"{name!r}: {len(left_out)} images, such as {left_out[0].name}, are not used, because another image has "
            "the same name. Rename them if they are not masks."
        )
    return used


def _extension(path: str) -> str:
    """Returns the last extension of a file's name, in lower case and with its dot."""
    return os.path.splitext(path)[1].lower()


def _count(files: list[str]) -> str:
    """Describes files by their extensions."""
    counts = Counter(_extension(file) or "without an extension" for file in files)
    return ", ".join(f"{count} {extension}" for extension, count in counts.most_common(5)) or "no files"


def _open_remote(name: str, split: str, with_masks: bool) -> Shards:
    """Opens remote tars, parquet files, or a dataset on the Hub."""
    extension = Path(name).suffix
    is_remote_file = "://" in name and extension in SHARD_EXTENSIONS
    is_hub_name = extension not in SHARD_EXTENSIONS and re.fullmatch(r"(hf://datasets/)?[\w.-]+(/[\w.-]+)?", name)
    if not is_remote_file and not is_hub_name:
        raise FileNotFoundError(f"No data at {name!r}: it is not a folder and matches no file. {ACCEPTED_NAMES}")
    try:
        if not is_remote_file:
            stream = load_dataset(name.removeprefix("hf://datasets/"), split=split, streaming=True)
            return DatasetShards(stream, name, with_masks, is_remote=True)
        file_system, pattern = fsspec.core.url_to_fs(name)
        found = sorted(file_system.glob(pattern)) if glob.has_magic(name) else [pattern]
        if not found:
            raise FileNotFoundError("it matches no file")
        paths = [file_system.unstrip_protocol(path) for path in found]
        if extension == ".tar":
            return TarShards(paths, with_masks)
        stream = load_dataset(BUILDERS[extension], data_files=paths, split="train", streaming=True)
    except Exception as error:  # missing, private or without this split, or any error of the HTTP client
        raise FileNotFoundError(
            f"No data at {name!r}: it is not a folder, matches no file, and could not be opened on the Hub "
            f"({type(error).__name__}: {error}). {ACCEPTED_NAMES}"
        ) from error
    return DatasetShards(stream, name, with_masks, is_remote=True)
