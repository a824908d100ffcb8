"""Checks of output folders before the work."""

import os
import resource
from pathlib import Path

import pytest

from samclip_cli import CommandError
from samclip_cli.outputs import check_writable


@pytest.mark.parametrize("name", ["runs", "runs/new/folder", "link", "."])
def test_a_folder_that_exists_or_can_be_created_passes_and_stays_as_it_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("link").symlink_to("runs")
    check_writable(name, "--output_dir")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "runs"]


@pytest.mark.parametrize("name", ["file", "file/folder", "broken", "broken/folder"])
def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("broken").symlink_to("nowhere")
    with pytest.raises(CommandError, match=f"--output_dir {name}: .*{name.split('/')[0]} is not a folder"):
        check_writable(name, "--output_dir")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder that nobody can write to")
def test_a_folder_without_write_access_is_an_error():
    with pytest.raises(CommandError, match="--folder /proc/new: cannot write to /proc"):
        check_writable("/proc/new", "--folder")


def test_a_full_disk_is_an_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # in bytes; stands for a full disk
    try:
        with pytest.raises(CommandError, match="File too large"):
            check_writable(tmp_path, "--output_dir")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
