"""
Webdataset tars: the files of a sample have one name up to the first dot, such as `000.jpg` and `000.json`.

Training reads tars sequentially ([`iterate_files`]), evaluation reads single files of an index ([`index_samples`]).
"""

import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .layouts import IMAGE_EXTENSIONS
from .samples import read_image


class SampleFile(NamedTuple):
    """
    A file in a tar.

    sample (`str`):
        The name of the file's sample: its path in the tar up to the first dot of its base name.
    extension (`str`):
        The rest of the base name in lower case, without the dot.
    member (`tarfile.TarInfo`):
        Where the content is.
    """

    sample: str
    extension: str
    member: tarfile.TarInfo


def iterate_files(tar: tarfile.TarFile) -> Iterator[SampleFile]:
    """Yields the files of an open tar in their order. The content of one can be read until the next is yielded."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # otherwise memory grows with the number of files
        if member.isfile():
            folder, _, base_name = posixpath.normpath(member.name).rpartition("/")
            stem, _, extension = base_name.partition(".")
            yield SampleFile(posixpath.join(folder, stem), extension.lower(), member)


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

    def image_reader(self) -> Callable[[], Image.Image]:
        """Returns a function that reads the sample's image. Raises `ValueError` if the sample has none."""
        for extension in IMAGE_EXTENSIONS:
            if extension[1:] in self.files:
                return partial(self._read_image, extension[1:])
        raise ValueError(f"{self.path}: {self.name!r} has no image.")

    def _read_image(self, extension: str) -> Image.Image:
        return read_image(self.read(extension))


def index_samples(paths: list[Path]) -> Iterator[TarSample]:
    """Yields the samples of tars in the order of their first files. Raises `ValueError` for an unreadable tar."""
    for path in paths:
        samples: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        try:
            with tarfile.open(path, "r:") as tar:
                for file in iterate_files(tar):
                    samples[file.sample][file.extension] = (file.member.offset_data, file.member.size)
        except tarfile.TarError as error:
            raise ValueError(f"{path} is not a readable tar: {error}.") from error
        for name, files in samples.items():
            yield TarSample(path, name, files)
