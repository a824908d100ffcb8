"""Atomic writes: even if the process is killed, a file has either its old or its new content."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """
    Context manager that yields the path of a temporary file in the folder of `path`. The block writes the temporary
    file, which replaces `path` when the block ends. If the block raises an error, the temporary file is deleted and
    `path` is unchanged. If several processes write the same path, the file of the last one remains or, with
    `overwrite=False`, that of the first one.

    With `overwrite=False`, raises `FileExistsError` at the end of the block if `path` exists, even as a broken link.

    ```python
    with atomic_path("table.parquet") as temporary:
        pyarrow.parquet.write_table(table, temporary)
    ```
    """
    path = Path(path)
    # Of the name only the start, so that `path` may have the longest name that the file system accepts.
    checksum = zlib.crc32(os.fsencode(path.name))
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}-{checksum:08x}.partial")
    try:
        yield temporary
        if not overwrite:
            path.open("xb").close()  # reserves the name: a check and a replacement would not be one step
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], content: bytes | str, overwrite: bool = True) -> None:
    """Writes a whole file, see [`atomic_path`]. Text is encoded as UTF-8."""
    with atomic_path(path, overwrite) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
