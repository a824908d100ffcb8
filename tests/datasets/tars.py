"""Writes small webdataset tars."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from samclip_hf.images import encode_mask


def jpeg(seed: int, size: tuple[int, int] = (60, 40)) -> bytes:
    """Returns a JPEG file of random colors with the `size` (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, format="JPEG")
    return buffer.getvalue()


def annotation(mask: np.ndarray) -> dict:
    """Returns a mask's annotation in SA-1B's format."""
    return {"id": 0, "segmentation": encode_mask(mask, compressed=True), "area": int(mask.sum())}


def write_tar(path: Path, files: Mapping[str, bytes] | Iterable[tuple[str, bytes]], **options) -> None:
    """Writes the files, by name. `options` are those of `tarfile.open`."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def photo(number: int) -> dict[str, bytes]:
    """Returns the files of a sample, by extension."""
    return {"jpg": jpeg(number), "txt": b"never read"}
