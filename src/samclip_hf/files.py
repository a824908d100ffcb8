"""Atomic writes: a file has either its old or its new content, whenever the process ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Context manager that yields the path of a temporary file in the folder of `path`. The block writes the temporary
    file, which replaces `path` when the block ends. If the block raises an error, the temporary file is deleted and
    `path` stays as it is. Several processes may write the same path: the last one wins.

    ```python
    with atomic_path("table.parquet") as temporary:
        pyarrow.parquet.write_table(table, temporary)
    ```
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a whole file, see [`atomic_path`]. Text is encoded as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
