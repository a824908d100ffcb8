"""Tiny webdataset tars."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask


def jpeg(seed: int, size: tuple[int, int] = (60, 40)) -> bytes:
    """A picture of `size` (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, format="JPEG")
    return buffer.getvalue()


def annotation(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": 0,
        "segmentation": {"size": list(mask.shape), "counts": encoded["counts"].decode()},
        "area": int(mask.sum()),
    }


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def photo(number: int) -> dict[str, bytes]:
    return {"jpg": jpeg(number), "txt": b"never read"}
