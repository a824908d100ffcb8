"""Checks of outputs before the work, so that a command does not lose its results or replace a file of the user."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import CommandError


def check_writable(folder: str | Path, option: str) -> None:
    """
    Checks that files can be written to a folder, or to the nearest existing folder above it if it does not exist.

    folder (`str` or `Path`):
        An output folder. It is not created.
    option (`str`):
        The argument that has this value, for the message.

    Raises `CommandError` if the path leads through a file, or if a small file cannot be written: without permission,
    on a read-only file system or on a full disk.
    """
    existing = Path(os.path.abspath(folder))
    while not os.path.lexists(existing):  # a broken link exists, and no folder can be created there
        existing = existing.parent
    if not os.path.isdir(existing):
        raise CommandError(f"{option} {folder}: {existing} is not a folder.")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise CommandError(f"{option} {folder}: cannot write to {existing}: {error.strerror}.") from error


def identity(path: Path) -> tuple[int, int]:
    """Device and inode, which identify a file under all of its names."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def check_outputs(paths: Sequence[Path], inputs: Iterable[Path], overwrite: bool) -> None:
    """
    Checks that files can be written without replacing a file of the user.

    paths (`Sequence[Path]`):
        Files to write, in existing folders.
    inputs (`Iterable[Path]`):
        Files that are never replaced. Links and file systems that ignore case are considered.
    overwrite (`bool`):
        Whether other existing files may be replaced.

    Raises `CommandError`.
    """
    originals = {identity(path) for path in inputs if os.path.exists(path)}  # not broken links
    existing = []
    for path in paths:
        try:
            os.lstat(path)
        except FileNotFoundError:
            continue
        except OSError as error:  # such as a name that is too long
            raise CommandError(f"--output: {path} cannot be written: {error.strerror}.") from error
        if os.path.isdir(path):
            raise CommandError(f"--output: {path} cannot be written, because it is a folder.")
        if os.path.exists(path) and identity(path) in originals:
            raise CommandError(
                f"--output would overwrite the input image {path}: pass another file or folder as --output."
            )
        existing.append(path)
    if existing and not overwrite:
        others = f" and {len(existing) - 1} more of the outputs" if len(existing) > 1 else ""
        raise CommandError(
            f"{existing[0]}{others} would be overwritten. Pass --overwrite to replace existing files, or another "
            "--output."
        )
