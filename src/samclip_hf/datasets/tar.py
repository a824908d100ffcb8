"""
Webdataset tars: the files of a sample have one name up to the first dot, such as `000.jpg` and `000.json`, and follow
each other in the tar.

Training reads tars sequentially ([`iterate_files`]), evaluation reads single files of an index ([`index_samples`]).
Both read the same files and use [`image_rank`] to choose the image of a sample.
"""

import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from .layouts import IGNORED_NAME, IMAGE_EXTENSIONS
from .samples import read_image

# The first bytes of compressed files.
MAGIC_NUMBERS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "zstd -d"}


_ZEROS = bytes(tarfile.BLOCKSIZE)  # a block that marks the end of a tar


class ConcatenatedTarError(tarfile.ReadError):
    """Data follow the end of a tar, such as another tar."""


class SampleFile(NamedTuple):
    """
    A file in a tar.

    sample (`str`):
        The name of the file's sample: its path in the tar up to the first dot of its base name.
    extension (`str`):
        The rest of the base name in lower case, without the dot.
    member (`tarfile.TarInfo`):
        The location of the content. Links have none: their `isfile()` is false.
    """

    sample: str
    extension: str
    member: tarfile.TarInfo


def open_tar(file: IO[bytes]) -> tarfile.TarFile:
    """Opens an uncompressed tar. Bytes of names that are not UTF-8 are escaped, as in "caf\\xe9". Raises
    `tarfile.ReadError` if it is compressed, or not a tar."""
    start = file.read(6)
    file.seek(0)
    for magic_number, command in MAGIC_NUMBERS.items():
        if start.startswith(magic_number):
            raise tarfile.ReadError(f"it is compressed: decompress it with {command}")
    return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace")


def iterate_files(tar: tarfile.TarFile) -> Iterator[SampleFile]:
    """Yields the files and links of an open tar in their order, without those of `IGNORED_NAME` and those without an
    extension. The content of one can be read until the next is yielded.

    Raises [`ConcatenatedTarError`] if data follow the end of the tar, and `tarfile.ReadError` for a corrupt header."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # otherwise memory grows with the number of files
        name = posixpath.normpath(member.name)
        folder, _, base_name = name.rpartition("/")
        stem, _, extension = base_name.partition(".")
        if extension and not member.isdir() and not IGNORED_NAME.search(name):
            yield SampleFile(posixpath.join(folder, stem), extension.lower(), member)
    _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises an error if not only zeros follow where `tarfile` stops reading: at a block of zeros, but also at a
    corrupt header."""
    file = tar.fileobj
    assert file is not None  # `tar` is open
    file.seek(tar.offset)  # type: ignore[attr-defined]
    if (block := file.read(tarfile.BLOCKSIZE)) != _ZEROS[: len(block)]:
        raise tarfile.ReadError(f"the header at byte {tar.offset} is corrupt")  # type: ignore[attr-defined]
    while chunk := file.read(1 << 20):
        if any(chunk):
            raise ConcatenatedTarError(
                "data follow its end, as in tars that are joined with cat. Join them with GNU tar's --concatenate "
                "(tar -A), or keep them as separate files"
            )


def image_rank(extension: str) -> int | None:
    """
    Returns the rank of a file among the images of a sample, or `None` if it is not an image. The image with the lowest
    rank is used. The order is jpg, jpeg, webp, other formats, so a png next to a jpg, which may be a mask, is not
    used. The other formats share a rank, because a png next to a tif may be its mask or the same photograph.
    Extensions with a dot, such as "rgb.png", share the highest rank. Two files of the lowest rank are ambiguous.
    """
    first, _, last = extension.rpartition(".")
    if f".{last}" not in IMAGE_EXTENSIONS:
        return None
    png = IMAGE_EXTENSIONS.index(".png")
    return png + 1 if first else min(png, IMAGE_EXTENSIONS.index(f".{last}"))


def sample_key(path: str | Path, sample: str) -> str:
    """Returns a sample's key: the tar's name without its extension, and the sample's name."""
    return f"{Path(path).stem}/{sample}"


class TarSample(NamedTuple):
    """
    A sample of an indexed tar.

    path (`Path`):
        The tar.
    name (`str`):
        The sample's name, see [`SampleFile`].
    files (`dict[str, tuple[int, int]]`):
        Offset and size of each file's content in bytes, by extension.
    """

    path: Path
    name: str
    files: dict[str, tuple[int, int]]

    @property
    def key(self) -> str:
        return sample_key(self.path, self.name)

    def read(self, extension: str) -> bytes:
        """Reads a file's content. Raises `ValueError` if the sample has no file with this extension."""
        if extension not in self.files:
            raise ValueError(f"{self.path}: {self.name!r} has no {extension} file.")
        offset, size = self.files[extension]
        with open(self.path, "rb") as tar:
            tar.seek(offset)
            return tar.read(size)

    def image_extension(self) -> str:
        """Returns the extension of the sample's image, see [`image_rank`]. Raises `ValueError` if the sample has no
        image, or several."""
        ranks = {extension: rank for extension in self.files if (rank := image_rank(extension)) is not None}
        extensions = [extension for extension, rank in ranks.items() if rank == min(ranks.values())]
        if not extensions:
            raise ValueError(f"{self.path}: {self.name!r} has no image.")
        if len(extensions) > 1:
            raise ValueError(
                f"{self.path}: {self.name!r} has several images, {', '.join(extensions)}. Rename the one to use "
                f"to {self.name}.jpg, whatever its format, or remove the others."
            )
        return extensions[0]

    def image_reader(self, annotated_size: tuple[int, int] | None = None) -> Callable[[], Image.Image]:
        """Returns a function that reads the sample's image, see [`read_image`]. Raises `ValueError` as
        `image_extension` does."""
        return partial(self._read_image, self.image_extension(), annotated_size)

    def _read_image(self, extension: str, annotated_size: tuple[int, int] | None) -> Image.Image:
        return read_image(self.read(extension), f"{self.path}: {self.name}.{extension}", annotated_size)


def index_samples(paths: list[Path]) -> Iterator[TarSample]:
    """
    Yields the samples of tars in the order of their first files. Their files need not follow each other.

    Raises `ValueError` for an unreadable tar, for two files with one name, and for files whose content is not in one
    piece in the tar: links and sparse files.
    """
    for path in paths:
        samples: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        try:
            with open(path, "rb") as stream, open_tar(stream) as tar:
                for sample, extension, member in iterate_files(tar):
                    if not member.isfile() or member.issparse():
                        raise ValueError(
                            f"{path}: {member.name} is a {'sparse file' if member.issparse() else 'link'}. Write the "
                            "tar again with GNU tar's --dereference --hard-dereference and without --sparse."
                        )
                    if extension in samples[sample]:
                        raise ValueError(f"{path} has two files {sample}.{extension}. Write the tar again with one.")
                    samples[sample][extension] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ValueError(f"{path} is not a readable tar: {error}.") from error
        for name, files in samples.items():
            yield TarSample(path, name, files)
