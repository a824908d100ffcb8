"""Atomic writes."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from samclip_hf.files import atomic_path, write_atomically


@pytest.mark.parametrize("content", [b"\x00\xff", "é\n"])
def test_a_file_is_written_and_replaced(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("old")
    write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_without_overwriting_an_existing_path_is_an_error_and_stays(tmp_path, kind):
    path = tmp_path / "path"
    with pytest.raises(FileExistsError), atomic_path(path, overwrite=False) as temporary:
        temporary.write_text("new")
        {"file": path.touch, "folder": path.mkdir, "broken link": lambda: path.symlink_to("nowhere")}[kind]()
    assert list(tmp_path.iterdir()) == [path] and path.is_symlink() == (kind == "broken link")
    assert not path.is_file() or path.read_text() == ""


def test_without_overwriting_a_new_file_of_any_name_is_written(tmp_path):
    path = tmp_path / ("ü" * 127)  # 254 bytes, one less than most file systems accept
    write_atomically(path, "new", overwrite=False)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_an_error_of_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError) as raised, atomic_path(path) as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("new")
    assert str(raised.value) == f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: {str(path)!r}"
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_read_only_disk_names_the_file_and_not_the_temporary_one(tmp_path):
    def fail(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    path, other = tmp_path / "file", tmp_path / "other"
    with pytest.raises(OSError) as raised, atomic_path(path) as temporary:
        fail(temporary)
    assert (raised.value.errno, raised.value.filename) == (errno.EROFS, str(path))
    with pytest.raises(OSError) as raised, atomic_path(path):
        fail(other)
    assert raised.value.filename == str(other)


def test_an_error_before_anything_is_written_is_raised_as_it_is(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "file"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_threads_that_write_the_same_file_do_not_share_a_temporary_file(tmp_path):
    path, barrier = tmp_path / "file", Barrier(4)

    def write(content):
        with atomic_path(path) as temporary:
            temporary.write_text(content)
            barrier.wait(timeout=10)  # all have written, none has replaced the file
            return temporary.read_text()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(write, "abcd")) == list("abcd")
    assert path.read_text() in "abcd" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("target", ["existing", "new"])
def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path, target):
    link, file = tmp_path / "link", tmp_path / "folder" / "file"
    file.parent.mkdir()
    if target == "existing":
        file.write_text("old")
    link.symlink_to("folder/file")
    write_atomically(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    assert list(file.parent.iterdir()) == [file]


def test_permissions_are_those_of_open(tmp_path):
    expected, path = tmp_path / "open", tmp_path / "file"
    expected.touch()
    write_atomically(path, "new")
    assert path.stat().st_mode == expected.stat().st_mode
    path.chmod(0o640)
    write_atomically(path, "newer")
    assert path.stat().st_mode & 0o777 == 0o640 and path.read_text() == "newer"
