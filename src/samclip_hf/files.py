"""Atomic writes: even if the process is killed, a file has either its old or its new content."""

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors of a disk that has become full or read-only.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def named_disk_errors(path: str | os.PathLike[str], temporary: Path | None = None) -> Iterator[None]:
    """
    Context manager in which errors of a full or read-only disk get the name `path`: errors of `write` have no name,
    others may have that of the file `temporary`. Errors that have another name are raised as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def atomic_path(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """
    Context manager that yields the path of a temporary file in the folder of `path`. The block writes the temporary
    file, which replaces `path` when the block ends. If the block raises an error, the temporary file is deleted and
    `path` is unchanged; errors of a full disk name `path`. If several threads or processes, even on different
    machines, write the same path, the file of the last one remains or, with `overwrite=False`, that of the first one.
    As with `open`, a symbolic link is followed and an existing file keeps its permissions.

    With `overwrite=False`, raises `FileExistsError` at the end of the block if `path` exists, even as a broken link.

    ```python
    with atomic_path("table.parquet") as temporary:
        pyarrow.parquet.write_table(table, temporary)
    ```
    """
    path = Path(os.path.realpath(path)) if overwrite else Path(path)
    # Of the name only the start, so that `path` may have the longest name that the file system accepts. Random,
    # because process ids are not unique among threads and machines. Not from `tempfile`, whose files only their owner
    # can read: the block creates the file with the permissions of a new one.
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.partial")
    try:
        with named_disk_errors(path, temporary):
            yield temporary
            if not overwrite:
                path.open("xb").close()  # reserves the name: a check and a replacement would not be one step
            elif path.exists():
                shutil.copymode(path, temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary_files(path: str | os.PathLike[str]) -> None:
    """Deletes the temporary files that killed processes have left while they wrote `path`, see [`atomic_path`]. No
    process may be writing it."""
    path = Path(path)
    for temporary in path.parent.glob(f".{glob.escape(path.name[:40])}.{'[0-9a-f]' * 16}.partial"):
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], content: bytes | str, overwrite: bool = True) -> None:
    """Writes a whole file, see [`atomic_path`]. Text is encoded as UTF-8."""
    with atomic_path(path, overwrite) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
