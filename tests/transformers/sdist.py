"""Fetches, once, the tests that are in the sdist of transformers alone: `python -m tests.transformers.sdist`."""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

RELEASE = f"transformers-{version('transformers')}"  # as installed
CACHE = Path(__file__).parents[2] / ".cache"
FOLDER = CACHE / RELEASE  # of the sdist's tests/test_*.py


def fetch() -> None:
    """Downloads the sdist from wherever pip is told to look for packages, and unpacks its tests."""
    if FOLDER.exists():
        return
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", folder]
        sdist = ["--no-deps", "--no-binary", "transformers", RELEASE.replace("-", "==")]
        if subprocess.run([*pip, *sdist]).returncode:
            sys.exit(
                f"The sdist of {RELEASE}, which holds transformers' own tests, could not be downloaded; pip says why "
                "above. It is needed once, and with it a network."
            )
        with tarfile.open(Path(folder) / f"{RELEASE}.tar.gz") as archive:
            tests = [member for member in archive.getmembers() if member.name.startswith(f"{RELEASE}/tests/test_")]
            archive.extractall(folder, tests, filter="data")
        (Path(folder) / RELEASE / "tests").rename(FOLDER)  # there as a whole or not at all


if __name__ == "__main__":
    fetch()
