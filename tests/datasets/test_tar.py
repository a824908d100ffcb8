"""Webdataset tars: the grouping of files into samples is the same in training and evaluation."""

import tarfile

import pytest

from samclip_hf.datasets.streams import TarShards
from samclip_hf.datasets.tar import index_samples, iterate_files

from .tars import jpeg, write_tar

FILES = {"a/1.jpg": jpeg(1), "a/1.seg.png": b"mask", "./2.JPG": jpeg(2), "2.json": b"{}", "b/1.jpg": jpeg(3)}


@pytest.fixture
def path(tmp_path):
    write_tar(tmp_path / "photos.tar", FILES)
    return tmp_path / "photos.tar"


def test_a_samples_name_ends_at_the_first_dot_of_the_base_name(path):
    with tarfile.open(path) as tar:
        files = [(file.sample, file.extension) for file in iterate_files(tar)]
    assert files == [("a/1", "jpg"), ("a/1", "seg.png"), ("2", "jpg"), ("2", "json"), ("b/1", "jpg")]


def test_training_and_evaluation_read_the_same_samples(path):
    streamed = [sample for _, sample in TarShards([str(path)], with_masks=True).rows(0, 0, lambda key: True)]
    indexed = list(index_samples([path]))
    assert [sample["key"] for sample in streamed] == [sample.key for sample in indexed]
    assert [sample.key for sample in indexed] == ["photos/a/1", "photos/2", "photos/b/1"]
    assert [sample["image"]["bytes"] for sample in streamed] == [sample.read("jpg") for sample in indexed]
    assert streamed[1]["json"] == indexed[1].read("json") == b"{}"


def test_a_missing_file_of_a_sample_raises(path):
    with pytest.raises(ValueError, match=r"photos\.tar: 'b/1' has no json file"):
        list(index_samples([path]))[2].read("json")


def test_skipped_rows_are_not_read(path, monkeypatch):
    read = []
    extract = tarfile.TarFile.extractfile
    monkeypatch.setattr(
        tarfile.TarFile, "extractfile", lambda tar, member: read.append(member.name) or extract(tar, member)
    )
    rows = list(TarShards([str(path)], with_masks=False).rows(0, 1, lambda key: key != "photos/2"))
    assert [(row, sample["key"]) for row, sample in rows] == [(2, "photos/b/1")]
    assert read == ["b/1.jpg"]
