"""Training streams of small tars, parquet files and folders."""

import gzip
import os
import zipfile

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, Value, load_from_disk

from samclip_hf.datasets import open_captions, streams
from samclip_hf.datasets.shards import DatasetShards, choose_num_shards
from samclip_hf.datasets.streams import DataError, SampleImage, SkippedSampleError, open_stream
from samclip_hf.distillation.sampling import Mixture

from .tars import jpeg, write_tar


def test_samples_of_all_sources_have_the_same_keys(photos, tmp_path):
    rows = {"image": [{"bytes": jpeg(0), "path": None}]}
    Dataset.from_dict(rows, features=Features({"image": Image()})).to_parquet(tmp_path / "photos.parquet")
    images = tmp_path / "images"
    images.mkdir()
    (images / "one.jpg").write_bytes(jpeg(0))
    for name in (photos, photos / "*.tar", tmp_path / "photos.parquet", images):
        row, sample = next(open_stream(str(name)).read(0))
        assert row == 0 and sample.keys() == {"key", "image", "json"} and sample["json"] is None
        assert SampleImage(sample).decode().size == (60, 40)


def test_files_with_equal_names_have_different_keys(tmp_path):
    for folder in ("cat", "dog"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        (tmp_path / "photos" / folder / "1.jpg").write_bytes(jpeg(0))
    rows = {"image": [{"bytes": jpeg(n), "path": "image.jpg"} for n in range(3)]}
    Dataset.from_dict(rows, features=Features({"image": Image()})).to_parquet(tmp_path / "photos.parquet")

    def keys(name):
        stream = open_stream(str(tmp_path / name))
        return sorted(sample["key"] for shard in range(stream.num_shards) for _, sample in stream.read(shard))

    assert keys("photos/*/*.jpg") == ["cat/1.jpg", "dog/1.jpg"]
    assert len(set(keys("photos.parquet"))) == 3


@pytest.mark.parametrize("name", ["/nowhere/photos", "./nowhere/*.tar", "nowhere/photos.tar"])
def test_a_missing_path_raises_with_the_accepted_names(name):
    with pytest.raises(FileNotFoundError, match=r"No data at .*nowhere.*Pass a folder, a glob"):
        open_stream(name)


def test_unusable_data_raise(photos, tmp_path):
    Dataset.from_dict({"text": ["a"]}, features=Features({"text": Value("string")})).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no image column"):
        open_stream(str(tmp_path))
    with pytest.raises(ValueError, match="no json files with SA-1B's annotations: its first samples, such as '0/000'"):
        open_stream(str(photos), with_masks=True)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"has neither images nor shards, but 1 \.txt"):
        open_stream(str(tmp_path / "notes.txt"))
    (tmp_path / "text.tar").write_text("text")
    with pytest.raises(ValueError, match=r"text\.tar' could not be read"):
        open_stream(str(tmp_path / "text.tar"))
    (tmp_path / "above" / "empty").mkdir(parents=True)
    with pytest.raises((ValueError, FileNotFoundError), match="above"):
        open_stream(str(tmp_path / "above"))


def test_a_shard_can_be_read_from_any_row(photos, tmp_path):
    rows = {"image": [{"bytes": jpeg(n), "path": None} for n in range(4)], "__key__": list("abcd")}
    features = Features({"image": Image(), "__key__": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "photos.parquet")
    for name in (photos, tmp_path):
        stream = open_stream(str(name))
        whole = list(stream.read(0))
        assert [row for row, _ in whole] == [0, 1, 2, 3]
        for start in range(5):
            assert list(stream.read(0, start)) == whole[start:]


def test_shard_fraction_chooses_the_same_tars_every_time_and_logs_their_number(tmp_path, transformers_log):
    for number in range(20):
        write_tar(tmp_path / f"{number:02d}.tar", {"0.jpg": jpeg(number)})
    few, again, more = (open_stream(str(tmp_path), shard_fraction=fraction) for fraction in (0.1, 0.1, 0.5))
    assert few.shards.names == again.shards.names and len(few.shards.names) == 2 and len(more.shards.names) == 10
    assert set(few.shards.names) < set(more.shards.names)
    assert f"'{tmp_path}': 2 of 20 tars are used, a fraction of 0.1." in transformers_log.text
    with pytest.raises(ValueError, match="for tars only"):
        open_stream("miniature", shard_fraction=0.5)


def test_images_above_the_pixel_limit_are_not_decoded(monkeypatch):
    sample = {"image": {"bytes": jpeg(0), "path": None}}
    monkeypatch.setattr(streams, "MAX_PIXELS", 60 * 40 - 1)
    with pytest.raises(SkippedSampleError, match="image too large"):
        SampleImage(sample).decode()


def test_masks_with_another_size_than_the_image_are_not_read(sa1b, monkeypatch):
    _, sample = next(open_stream(str(sa1b), with_masks=True).read(0))
    monkeypatch.setattr(streams, "read_mask", lambda segmentation, size: pytest.fail("read"))
    with pytest.raises(SkippedSampleError, match="mask and image differ in size"):
        streams.draw_masks(sample, 2, np.random.default_rng(0), (60, 40))


def test_a_stream_with_embeddings_adds_them_to_its_samples(photos):
    class Embeddings:
        def read(self, shard):
            return ["0/000", "0/001", "0/002", "other"], np.arange(4)

    stream = open_stream(str(photos))
    with_embeddings = stream.with_embeddings(Embeddings())
    rows = with_embeddings.read(0)
    assert [sample["embeds"] for _, sample in (next(rows), next(rows), next(rows))] == [0, 1, 2]
    with pytest.raises(DataError, match="its stored embedding is that of another sample"):
        next(rows)
    assert "embeds" not in next(stream.read(0))[1]
    assert with_embeddings.complement().embeddings is with_embeddings.embeddings


def write(folder, *names: str) -> str:
    """Writes files with their own names as content and returns the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return str(folder)


def keys(name, **options) -> list[str]:
    """The sorted keys of the samples of all shards."""
    stream = open_stream(str(name), **options)
    return sorted(sample["key"] for shard in range(stream.num_shards) for _, sample in stream.read(shard))


@pytest.mark.parametrize(("num_files", "num_shards"), [(1, 1), (127, 1), (128, 2), (600, 8), (10**6, 256)])
def test_the_number_of_shards_of_image_files_is_a_power_of_two(num_files, num_shards):
    assert choose_num_shards(num_files) == num_shards


@pytest.fixture(params=["folder", "zip"])
def two_classes(request, tmp_path) -> str:
    """600 images of two classes."""
    names = [f"{name}/{number:03d}.png" for name in ("cat", "dog") for number in range(300)]
    if request.param == "folder":
        return write(tmp_path / "photos", *names)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return str(tmp_path / "photos.zip")


class TestImageFiles:
    def test_the_classes_of_an_image_folder_are_mixed(self, two_classes):
        mixture = Mixture([open_stream(two_classes)], [1.0], 0, num_readers=16, shuffle_buffer=16, positions={})
        seen = [mixture.sample(number)[1]["key"] for number in range(600)]
        assert len(set(seen)) == 600  # an epoch
        assert 25 < sum(key.startswith("cat/") for key in seen[:100]) < 75

    def test_an_image_folder_resumes_and_is_divided_among_processes(self, two_classes):
        def mixture(positions):
            return Mixture([open_stream(two_classes)], [1.0], 0, 4, shuffle_buffer=16, positions=positions)

        whole = mixture({})
        expected = [whole.sample(number)[1] for number in range(900)]
        seen = [None] * 900
        for process in range(2):
            before = mixture({})
            for number in range(process, 400, 2):
                seen[number] = before.sample(number)[1]
            after = mixture(before.positions)
            for number in range(400 + process, 900, 2):
                seen[number] = after.sample(number)[1]
        assert seen == expected
        assert not {sample["key"] for sample in expected[0:600:2]} & {sample["key"] for sample in expected[1:600:2]}

    def test_the_names_of_the_shards_change_with_the_files_but_not_with_the_folder(self, tmp_path):
        write(tmp_path / "a/photos", "1.jpg", "2.jpg")
        write(tmp_path / "b/photos", "1.jpg", "2.jpg")
        first, moved = (open_stream(str(tmp_path / name / "photos")).shards.names for name in "ab")
        assert first == moved
        (tmp_path / "b/photos/2.jpg").rename(tmp_path / "b/photos/3.jpg")
        assert open_stream(str(tmp_path / "b/photos")).shards.names != first

    def test_a_png_beside_a_jpg_is_left_out_and_logged(self, tmp_path, transformers_log):
        name = write(tmp_path, "a/1.jpg", "a/1.png", "a/2.png", "b/1.png", "b/3.JPEG", "b/3.bmp")
        assert keys(name) == ["a/1.jpg", "a/2.png", "b/1.png", "b/3.JPEG"]
        assert "are not used, because another image has the same name" in transformers_log.text

    @pytest.mark.parametrize("extensions", [("png", "tif"), ("PNG", "bmp"), ("gif", "jp2")])
    def test_a_png_beside_a_tif_raises(self, tmp_path, extensions):
        name = write(tmp_path, "a/0.jpg", *(f"a/1.{extension}" for extension in extensions))
        message = r"a/1\.\w+ and .*a/1\.\w+ have the same name.*Pass the photographs only: a glob of their format"
        with pytest.raises(DataError, match=message):
            open_stream(name)
        assert keys(f"{name}/a/*.{extensions[1]}") == [f"a/1.{extensions[1]}"]

    def test_images_that_are_named_as_masks_of_others_are_left_out_and_logged(self, tmp_path, transformers_log):
        names = "a/1.jpg", "a/1_mask.png", "a/1.mask.png", "a/2.png", "a/2-depth.png", "b/1_mask.png"
        assert keys(write(tmp_path, *names)) == ["a/1.jpg", "a/2.png", "b/1_mask.png"]
        assert "3 images, such as " in transformers_log.text
        assert "Their names say that they are annotations of other images" in transformers_log.text

    @pytest.mark.parametrize("folder", ["gtFine/val/aachen", "SegmentationObject", "stuffthingmaps", "depth"])
    def test_folders_of_annotations_of_known_datasets_raise(self, tmp_path, folder):
        with pytest.raises(DataError, match=f"images in a folder of annotations, such as .*{folder}/1"):
            open_stream(write(tmp_path, "images/1.jpg", f"{folder}/1.png"))

    def test_folders_of_photographs_and_of_annotations_raise(self, tmp_path):
        name = write(tmp_path / "labels/data", "images/1.png", "labels/1.png")
        with pytest.raises(DataError, match=r"has photographs, such as .*images/1\.png, and .*labels/1\.png\."):
            open_stream(name)
        assert keys(f"{name}/images") == ["images/1.png"]
        assert keys(f"{name}/images/*.png") == ["images/1.png"]

    def test_other_files_are_counted_and_hidden_ones_are_not_read(self, tmp_path, transformers_log):
        names = "1.jpg", "2.heic", "3.HEIC", "a/b/notes.txt", "._1.jpg", ".cache/4.jpg", "__MACOSX/5.jpg", "6"
        assert len(keys(write(tmp_path, *names))) == 1
        expected = "has 1 images. Other files are not used: 2 .heic, 1 without an extension, 1 .txt"
        assert expected in transformers_log.text

    def test_images_of_a_zip_have_keys_and_only_the_broken_one_is_skipped(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for name in ("dog/1.jpg", "cat/1.jpg", "3.jpg", "__MACOSX/._3.jpg", "notes.txt"):
                archive.writestr(name, name.encode() * 50)
        content = (tmp_path / "photos.zip").read_bytes()
        (tmp_path / "photos.zip").write_bytes(content.replace(b"cat/1.jpgcat", b"cat/1.jpgdog", 1))
        stream = open_stream(str(tmp_path / "photos.zip"))
        samples = [sample for shard in range(stream.num_shards) for _, sample in stream.read(shard)]
        found = {sample["key"]: sample.get("cause") for sample in samples}
        assert found == {"cat/1.jpg": "broken image", "dog/1.jpg": None, "photos.zip/3.jpg": None}

    def test_a_zip_that_is_written_again_is_read_again(self, tmp_path):
        for name in ("dog/1.jpg", "cat/1.jpg"):
            with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
                archive.writestr(name, name)
            os.utime(tmp_path / "photos.zip", ns=(0, len(name) + ord(name[0])))
            assert keys(tmp_path / "photos.zip") == [name]

    def test_images_of_an_archive_on_the_hub_have_keys(self):
        """`datasets` streams the images of an archive with paths such as these."""

        def rows():
            for name in ("dog/1.jpg", "cat/1.jpg"):
                yield {"image": {"bytes": jpeg(0), "path": f"zip://{name}::hf://datasets/owner/name/photos.zip"}}

        stream = IterableDataset.from_generator(rows, features=Features({"image": Image()}))
        samples = [sample for _, sample in DatasetShards(stream, "owner/name", False).rows(0, 0, lambda key: True)]
        assert [sample["key"] for sample in samples] == ["dog/1.jpg", "cat/1.jpg"]

    def test_annotations_are_read_from_the_json_file_beside_an_image(self, tmp_path):
        write(tmp_path, "1.jpg", "2.jpg")
        (tmp_path / "1.json").write_bytes(b'{"annotations": []}')
        stream = open_stream(str(tmp_path), with_masks=True)
        samples = [sample for shard in range(stream.num_shards) for _, sample in stream.read(shard)]
        assert {sample["json"] for sample in samples} == {b'{"annotations": []}', None}

    def test_names_that_are_not_utf_8_are_escaped(self, tmp_path):
        folder = os.fsencode(tmp_path / "photos")
        os.mkdir(folder)
        with open(folder + b"/caf\xe9.jpg", "wb") as file:
            file.write(jpeg(0))
        assert keys(tmp_path / "photos", eval_fraction=1e-9) == [r"photos/caf\xe9.jpg"]

    def test_links_to_folders_are_followed_once(self, tmp_path):
        write(tmp_path / "a", "1.jpg")
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos/b").symlink_to(tmp_path / "a")
        (tmp_path / "a/back").symlink_to(tmp_path / "a")
        assert keys(tmp_path / "photos") == ["b/1.jpg"]


class TestFolders:
    def test_tars_in_subfolders_are_read(self, tmp_path):
        for name in ("a/0.tar", "b/c/1.TAR"):
            (tmp_path / name).parent.mkdir(parents=True)
            write_tar(tmp_path / name, {"0.jpg": jpeg(0)})
        assert keys(tmp_path) == ["0/0", "1/0"]
        with pytest.raises(ValueError, match=r"has tars in its subfolders only, such as .*a/0\.tar\. Pass one of"):
            open_captions(str(tmp_path), "")

    @pytest.mark.parametrize("name", ["0.tar.gz", "0.TGZ", "a/0.tar.zst", "0.tar.bz2", "0.txz"])
    def test_compressed_tars_raise(self, tmp_path, name):
        folder = write(tmp_path, name)
        for place in (folder, str(tmp_path / name)):
            with pytest.raises(ValueError, match=r"is a compressed tar.*Decompress it, for example with gunzip"):
                open_stream(place)
        with pytest.raises(ValueError, match="is a compressed tar"):
            open_captions(str((tmp_path / name).parent), "")
        with pytest.raises(ValueError, match="is a compressed tar"):
            open_stream("hf://datasets/owner/name/0.tar.gz")

    def test_a_compressed_tar_with_another_name_raises(self, photos, tmp_path):
        (tmp_path / "0.tar").write_bytes(gzip.compress((photos / "0.tar").read_bytes()))
        for open_it in (open_stream, lambda place: open_captions(place, "")):
            with pytest.raises(ValueError, match="it is compressed: decompress it with gunzip"):
                open_it(str(tmp_path))

    def test_names_with_characters_of_globs_are_read(self, tmp_path):
        write_tar(tmp_path / "photos[1].tar", {"0.jpg": jpeg(0), "0.txt": b"a dog"})
        assert keys(tmp_path / "photos[1].tar") == ["photos[1]/0"]
        assert len(open_captions("photos[1].tar", tmp_path).samples) == 1

    def test_files_of_several_kinds_raise(self, tmp_path):
        write_tar(tmp_path / "0.tar", {"0.jpg": jpeg(0)})
        with pytest.raises(ValueError, match=r"several kinds: 1 tars, 1 images\. Choose one with a glob"):
            open_stream(write(tmp_path, "1.jpg"))
        assert keys(tmp_path / "*.tar") == ["0/0"]

    def test_a_folder_of_img2dataset_is_read(self, tmp_path):
        files = {"jpg": jpeg(0), "json": b"{}", "txt": b"a dog"}
        write_tar(
            tmp_path / "00000.tar", {f"{n}.{ending}": content for n in range(2) for ending, content in files.items()}
        )
        write(tmp_path, "00000.parquet", "00000_stats.json")
        assert keys(tmp_path) == ["00000/0", "00000/1"]
        with pytest.raises(ValueError, match="several kinds"):
            open_stream(write(tmp_path, "others.parquet"))

    @pytest.mark.parametrize(
        "names",
        [
            ("train/cat/1.jpg", "val/cat/2.jpg", "3.jpg"),
            ("Training/cat/1.jpg", "test/cat/2.jpg"),
            ("data/train/cat/1.jpg", "data/validation/cat/1.jpg"),
            ("images/train2017/cat/1.jpg", "images/val2017/2.jpg", "images/test_256/3.jpg"),
        ],
    )
    def test_only_one_of_several_splits_is_used(self, tmp_path, names, transformers_log):
        assert keys(write(tmp_path, *names)) == ["cat/1.jpg"]
        assert f"Only train is used: 1 of {len(names)} files" in transformers_log.text
        with pytest.raises(ValueError, match=r"has splits .*train.*, but not 'all'. Pass one of its folders"):
            open_stream(str(tmp_path), split="all")

    def test_parquet_files_of_several_splits(self, tmp_path):
        for number, split in enumerate(("train", "test")):
            rows = {"image": [{"bytes": jpeg(number), "path": f"{split}.jpg"}]}
            dataset = Dataset.from_dict(rows, features=Features({"image": Image()}))
            dataset.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
        assert keys(tmp_path) == ["0/0/train.jpg"]

    def test_a_class_named_as_a_split_is_a_class(self, tmp_path):
        assert keys(write(tmp_path, "train/1.jpg", "bus/2.jpg")) == ["bus/2.jpg", "train/1.jpg"]

    @pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
    def test_saved_data_sets_are_read(self, tmp_path, kind):
        rows = {"image": [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(9)], "label": list(range(9))}
        dataset = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))
        if kind == "DatasetDict":
            DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "saved")
        else:
            dataset.save_to_disk(tmp_path / "saved")
            load_from_disk(tmp_path / "saved").filter(lambda row: row["label"] < 5)  # caches other rows in the folder
        before = sorted(tmp_path.rglob("*"))
        stream = open_stream(str(tmp_path / "saved"))
        samples = [sample for shard in range(stream.num_shards) for _, sample in stream.read(shard)]
        found = [sample["key"].rpartition("/")[2] for sample in samples]
        assert sorted(found) == [f"{number}.jpg" for number in range(9)] != found
        assert SampleImage(samples[0]).decode().size == (60, 40)
        assert sorted(tmp_path.rglob("*")) == before
        if kind == "DatasetDict":
            with pytest.raises(ValueError, match=r"has no split 'val'\. Pass the folder of one of its splits"):
                open_stream(str(tmp_path / "saved"), split="val")

    def test_a_folder_of_saved_data_sets_raises(self, tmp_path):
        rows = {"image": [{"bytes": jpeg(0), "path": None}]}
        Dataset.from_dict(rows, features=Features({"image": Image()})).save_to_disk(tmp_path / "a")
        with pytest.raises(ValueError, match=r"a is a folder of `save_to_disk`\. Pass such folders"):
            open_stream(str(tmp_path))

    def test_an_empty_folder_raises(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"The folder .* is empty\. Pass a folder"):
            open_stream(str(tmp_path))
