"""Tars of small JPEG images."""

import json
from pathlib import Path

import numpy as np
import pytest

from .tars import annotation, jpeg, photo, write_tar


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Returns a folder with three tars of four images each."""
    folder = tmp_path_factory.mktemp("photos")
    for shard in range(3):
        numbers = range(shard * 4, shard * 4 + 4)
        write_tar(folder / f"{shard}.tar", {f"{n:03d}.{ending}": c for n in numbers for ending, c in photo(n).items()})
    return folder


@pytest.fixture(scope="session")
def sa1b(tmp_path_factory) -> Path:
    """Returns a folder with a tar in SA-1B's layout: four images with a small, a large and a full mask each."""
    folder = tmp_path_factory.mktemp("sa1b")
    small, large, whole = np.zeros((40, 60), bool), np.zeros((40, 60), bool), np.ones((40, 60), bool)
    small[5:10, 20:30] = True
    large[15:35, 10:50] = True
    annotations = [annotation(mask) for mask in (small, large, whole)]
    files = {}
    for number in range(4):
        files[f"sa_{number}.jpg"] = jpeg(100 + number)
        files[f"sa_{number}.json"] = json.dumps({"image": {"image_id": number}, "annotations": annotations}).encode()
    write_tar(folder / "sa_000000.tar", files)
    return folder
