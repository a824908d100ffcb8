"""Downloads transformers' own tests, which only its sdist contains: `python -m tests.transformers.sdist`."""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

RELEASE = f"transformers-{version('transformers')}"  # the installed version
CACHE = Path(__file__).parents[2] / ".cache"
FOLDER = CACHE / RELEASE  # tests/test_*.py of the sdist


def fetch() -> None:
    """Downloads the sdist with pip and unpacks its tests. Does nothing if they exist."""
    if FOLDER.exists():
        return
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", folder]
        sdist = ["--no-deps", "--no-binary", "transformers", RELEASE.replace("-", "==")]
        if subprocess.run([*pip, *sdist]).returncode:
            sys.exit(
                f"The sdist of {RELEASE}, which contains transformers' own tests, could not be downloaded; see pip's "
                "message above. It is needed once and requires a network."
            )
        with tarfile.open(Path(folder) / f"{RELEASE}.tar.gz") as archive:
            tests = [member for member in archive.getmembers() if member.name.startswith(f"{RELEASE}/tests/test_")]
            archive.extractall(folder, tests, filter="data")
        (Path(folder) / RELEASE / "tests").rename(FOLDER)  # atomic


if __name__ == "__main__":
    fetch()
