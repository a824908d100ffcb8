"""Webdataset tars: the grouping of files into samples is the same in training and evaluation."""

import itertools
import os
import subprocess
import tarfile

import pytest

from samclip_hf.datasets.shards import TarShards
from samclip_hf.datasets.streams import DataError, open_stream
from samclip_hf.datasets.tar import image_rank, index_samples, iterate_files

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


def streamed(path) -> dict:
    """The samples of a tar as training reads them, by name: the content of the image, or the cause without one."""
    samples = [sample for _, sample in TarShards([str(path)], with_masks=False).rows(0, 0, lambda key: True)]
    return {
        sample["key"].removeprefix("photos/"): sample["image"]["bytes"] if sample["image"] else sample.get("cause")
        for sample in samples
    }


def indexed(path) -> dict:
    """The content of the images as evaluation reads them, by name."""
    return {sample.name: sample.read(sample.image_extension()) for sample in index_samples([path])}


@pytest.mark.parametrize(
    "extensions",
    [
        ("jpg", "png"),
        ("jpeg", "png", "json"),
        ("webp", "png"),
        ("png", "seg.png"),
        ("jpg", "jpeg"),
        ("webp", "bmp"),
        ("png", "h5"),  # which Pillow recognizes, but does not read
        ("rgb.png", "json", "txt", "cls"),
        ("jpg", "depth.png", "mask.png"),
    ],
)
def test_the_image_of_a_sample_does_not_depend_on_the_order_of_its_files(tmp_path, extensions):
    for order in itertools.permutations(extensions):
        write_tar(tmp_path / "photos.tar", {f"a.{extension}": extension.encode() for extension in order})
        assert streamed(tmp_path / "photos.tar") == {"a": extensions[0].encode()}
        assert indexed(tmp_path / "photos.tar") == {"a": extensions[0].encode()}


def test_photographs_rank_before_formats_of_masks():
    shuffled = ["x.jpg", "png", "jpg", "tiff", "jpeg", "webp"]
    assert sorted(shuffled, key=image_rank) == ["jpg", "jpeg", "webp", "png", "tiff", "x.jpg"]
    assert image_rank("png") == image_rank("gif") == image_rank("tiff") == image_rank("bmp")
    assert image_rank("json") is image_rank("npy") is image_rank("jpg.txt") is None


@pytest.mark.parametrize(
    "names",
    [
        ("a.left.jpg", "a.right.jpg"),
        ("2026.11.1.jpg", "2026.11.2.jpg"),
        ("a.jpg", "a.JPG"),
        ("a.png", "a.tif"),
        ("a.BMP", "a.png"),
        ("a.gif", "a.jp2"),
        ("a.png", "a.seg.png", "a.tiff"),
    ],
)
def test_several_images_of_a_sample_raise(tmp_path, names):
    path = tmp_path / "photos.tar"
    write_tar(path, dict.fromkeys(names, b"image"))
    with pytest.raises(ValueError, match=r"has no usable images.*several images\. Name the one to use KEY\.jpg"):
        open_stream(str(path))
    with pytest.raises(ValueError, match=r"several images|has two files"):
        indexed(path)


def test_files_that_are_not_of_a_sample_are_left_out(tmp_path):
    """Those of macOS's tar, of archive tools, and without an extension."""
    names = ["._0.jpg", "0.jpg", "./._1.jpg", "./1.jpg", "a/._2.jpg", "a/2.jpg", ".DS_Store", "__MACOSX/a/._2.jpg"]
    names += ["README", "__meta__/3.jpg", ".cache/4.jpg", "../5.jpg"]
    write_tar(tmp_path / "photos.tar", {name: name.encode() for name in names})
    expected = {"0": b"0.jpg", "1": b"./1.jpg", "a/2": b"a/2.jpg", "../5": b"../5.jpg"}
    assert streamed(tmp_path / "photos.tar") == indexed(tmp_path / "photos.tar") == expected


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_formats_of_tars_are_read(tmp_path, tar_format):
    names = ["0.jpg", f"{'folder/' * 14}1.JPG", "caf\u00e9.jpeg"]
    with tarfile.open(tmp_path / "photos.tar", "w", format=tar_format, encoding="utf-8") as tar:
        for name in names:
            (tmp_path / "file").write_bytes(name.encode())
            tar.add(tmp_path / "file", name)
        tar.add(tmp_path, "empty.jpg", recursive=False)  # a folder
    expected = {name.rpartition(".")[0]: name.encode() for name in names}
    assert streamed(tmp_path / "photos.tar") == indexed(tmp_path / "photos.tar") == expected


def test_names_that_are_not_utf_8_are_escaped(tmp_path):
    files = {"caf\u00e9.jpg": b"1", "caf\u00e8.jpg": b"2"}
    write_tar(tmp_path / "photos.tar", files, format=tarfile.GNU_FORMAT, encoding="latin-1")
    expected = {r"caf\xe9": b"1", r"caf\xe8": b"2"}
    assert streamed(tmp_path / "photos.tar") == indexed(tmp_path / "photos.tar") == expected
    stream = open_stream(str(tmp_path / "photos.tar"), eval_fraction=0.5)  # which hashes the key
    assert sum(len(list(part.read(0))) for part in (stream, stream.complement())) == 2


@pytest.mark.parametrize("kind", ["hard link", "symbolic link"])
def test_links_are_counted_in_training_and_raise_in_evaluation(tmp_path, kind):
    (tmp_path / "a.jpg").write_bytes(b"image")
    (os.link if kind == "hard link" else os.symlink)(tmp_path / "a.jpg", tmp_path / "b.jpg")
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for name in ("a.jpg", "b.jpg"):
            tar.add(tmp_path / name, name)
    assert streamed(tmp_path / "photos.tar") == {"a": b"image", "b": "link in a tar"}
    with pytest.raises(ValueError, match=r"photos\.tar: b\.jpg is a link\. Write the tar again with GNU tar's"):
        indexed(tmp_path / "photos.tar")


def test_sparse_files_are_read_in_training_and_raise_in_evaluation(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    if subprocess.run(["tar", "--sparse", "-cf", "photos.tar", "a.jpg"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("Only GNU tar writes sparse files; tarfile and BSD tar (macOS) cannot.")
    assert streamed(tmp_path / "photos.tar") == {"a": bytes(1 << 20) + b"end"}
    with pytest.raises(ValueError, match=r"a\.jpg is a sparse file"):
        indexed(tmp_path / "photos.tar")


@pytest.mark.parametrize("masks_are_first", [False, True])
def test_masks_in_another_part_of_a_tar_are_not_used(tmp_path, masks_are_first):
    files = [{f"{number}.{extension}": extension.encode() for number in range(9)} for extension in ("jpg", "png")]
    write_tar(tmp_path / "photos.tar", files[masks_are_first] | files[not masks_are_first])
    assert set(indexed(tmp_path / "photos.tar").values()) == {b"jpg"}  # evaluation reads the whole tar first
    if not masks_are_first:
        assert streamed(tmp_path / "photos.tar") == {str(number): b"jpg" for number in range(9)}
        return
    message = r"photos\.tar: 0\.jpg is the image of its sample, but does not follow its other files.*--sort=name"
    with pytest.raises(DataError, match=message):
        streamed(tmp_path / "photos.tar")
    with pytest.raises(DataError, match=message):  # also if the earlier rows are not read
        list(open_stream(str(tmp_path / "photos.tar")).read(0, start=9))


def test_separated_annotations_and_repeated_images_are_counted(tmp_path):
    path = str(tmp_path / "photos.tar")
    write_tar(path, [("0.jpg", b"first"), ("0.json", b""), ("1.jpg", b"second"), ("0.jpg", b"third"), ("1.json", b"")])
    rows = list(TarShards([path], with_masks=True).rows(0, 0, lambda key: True))
    assert [sample["image"] and sample["image"]["bytes"] for _, sample in rows] == [b"first", b"second", None, None]
    assert [sample.get("cause") for _, sample in rows] == [None, None, "scattered files", "scattered files"]
    for start in range(5):  # after resuming
        assert list(TarShards([path], with_masks=True).rows(0, start, lambda key: True)) == rows[start:]
    assert len(list(TarShards([path], with_masks=False).rows(0, 0, lambda key: True))) == 3
    write_tar(path, {"0.jpg": jpeg(0), "1.jpg": jpeg(1), "0.json": b"{}", "1.json": b"{}"})
    with pytest.raises(ValueError, match=r"has no json files.*such as 'photos/0'.*--sort=name"):
        open_stream(path, with_masks=True)


@pytest.mark.parametrize("folders", [("images", "labels"), ("photos/images", "photos/Masks"), ("gt", ".")])
@pytest.mark.parametrize("interleaved", [False, True])
def test_tars_with_folders_of_photographs_and_of_annotations_raise(tmp_path, folders, interleaved):
    names = [f"{folder}/{number}.png" for folder in folders for number in range(9)]
    names = sorted(names, key=lambda name: name[-5]) if interleaved else names
    write_tar(tmp_path / "photos.tar", dict.fromkeys(names, b""))
    with pytest.raises(DataError, match=r"photos\.tar has photographs, such as .*0\.png, and images in a folder of"):
        list(open_stream(str(tmp_path)).read(0))


def test_an_equal_candidate_for_the_image_in_another_part_of_a_tar_raises(tmp_path):
    write_tar(tmp_path / "photos.tar", dict.fromkeys(["0.png", "1.png", "0.tif", "1.tif"], b""))
    with pytest.raises(DataError, match=r"0\.tif may be the image of its sample.*--sort=name"):
        open_stream(str(tmp_path))


@pytest.mark.parametrize(
    "folders",
    [
        ("JPEGImages", "SegmentationObject"),
        ("JPEGImages/train", "SegmentationClassAug/train"),
        ("leftImg8bit", "gtFine"),
        ("images", "stuffthingmaps"),
        ("val2017", "panoptic_val2017"),
        ("rgb", "depth"),
        ("train_images", "train_masks"),
        ("images", "masks_val"),
        ("images", "trimaps"),
    ],
)
def test_folders_of_annotations_of_known_datasets_raise(tmp_path, folders):
    write_tar(tmp_path / "photos.tar", dict.fromkeys([f"{folder}/0.png" for folder in folders], b""))
    with pytest.raises(DataError, match=rf"images in a folder of annotations, such as {folders[1]}/0\.png"):
        open_stream(str(tmp_path))


def test_folders_of_classes_are_no_annotations(tmp_path):
    write_tar(tmp_path / "photos.tar", {"gas_mask/0.jpg": b"0", "ski_mask/1.jpg": b"1", "cat/2.jpg": b"2"})
    assert len(list(open_stream(str(tmp_path)).read(0))) == 3


@pytest.mark.parametrize(
    "name",
    [
        "0_mask.png",
        "0_seg.png",
        "0-mask.PNG",
        "0_gt.png",
        "0_depth.tif",
        "0_mask_1.png",
        "0_alpha.png",
        "0-instances2.png",
    ],
)
def test_images_that_are_named_as_masks_of_others_are_left_out_and_logged(tmp_path, name, transformers_log):
    path = tmp_path / "photos.tar"
    write_tar(path, {"0.jpg": b"0", name: b"mask", "0.json": b"{}", "1_mask.jpg": b"1"})
    for _ in range(2):
        rows = list(open_stream(str(path), with_masks=False).read(0))
        assert [(row, sample["image"]["bytes"]) for row, sample in rows] == [(0, b"0"), (1, b"1")]
    assert f"photos.tar: images such as {name} are not used" in transformers_log.text
    rows = list(TarShards([str(path)], with_masks=True).rows(0, 0, lambda key: True))
    assert [sample["json"] for _, sample in rows] == [b"{}", None]


@pytest.mark.parametrize("others", [{}, {"0.json": b"{}"}, {"0-depth.png": b"depth", "0.json": b"{}"}])
def test_masks_directly_before_their_photograph_are_left_out_and_logged(tmp_path, others, transformers_log):
    path = tmp_path / "photos.tar"  # in the order of GNU tar's --sort=name
    write_tar(path, {"0-mask.png": b"mask", **others, "0.jpg": b"0", "1-mask.png": b"1", "2.jpg": b"2"})
    rows = list(open_stream(str(path)).read(0))
    assert [(row, sample["image"]["bytes"]) for row, sample in rows] == [(0, b"0"), (1, b"1"), (2, b"2")]
    assert "photos.tar: images such as 0-mask.png are not used" in transformers_log.text
    (_, first), *_ = TarShards([str(path)], with_masks=True).rows(0, 0, lambda key: True)
    assert first["json"] == others.get("0.json")


def test_a_photograph_long_after_its_mask_raises(tmp_path):
    write_tar(tmp_path / "photos.tar", {"0-mask.png": b"mask", "1.jpg": b"1", "0.jpg": b"0"})
    with pytest.raises(DataError, match=r"0-mask\.png seems to be an annotation of 0\.jpg, which follows later"):
        open_stream(str(tmp_path))


def test_concatenated_tars_and_corrupt_headers_raise(tmp_path):
    names = [f"{number}.jpg" for number in range(9)]  # more than `open_stream` reads
    write_tar(tmp_path / "photos.tar", dict.fromkeys(names, b"image"))
    content = (tmp_path / "photos.tar").read_bytes()
    (tmp_path / "photos.tar").write_bytes(content + bytes(1 << 21))  # padding
    assert len(streamed(tmp_path / "photos.tar")) == len(indexed(tmp_path / "photos.tar")) == 9
    (tmp_path / "photos.tar").write_bytes(content + bytes(1 << 21) + content)
    message = r"photos\.tar is not a readable tar: data follow its end.*\(tar -A\)"
    with pytest.raises(DataError, match=message):
        list(open_stream(str(tmp_path)).read(0))
    with pytest.raises(ValueError, match=message):
        indexed(tmp_path / "photos.tar")
    (tmp_path / "photos.tar").write_bytes(content.replace(b"5.jpg", b"6.jpg", 1))  # its checksum is wrong
    with pytest.raises(ValueError, match=r"photos\.tar is not a readable tar: the header at byte 5120 is corrupt"):
        indexed(tmp_path / "photos.tar")
    samples = [sample for _, sample in open_stream(str(tmp_path)).read(0)]
    assert [sample.get("cause") for sample in samples] == [None] * 4 + ["unreadable shard"]
