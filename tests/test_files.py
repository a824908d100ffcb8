"""Atomic writes."""

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


def test_an_error_before_anything_is_written_is_raised_as_it_is(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "file"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
