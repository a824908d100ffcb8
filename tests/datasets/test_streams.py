import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value

from samclip_hf.datasets import streams
from samclip_hf.datasets.streams import SkippedSampleError, decode_image, open_stream

from .tars import jpeg, write_tar

# ---- opening by name ----


def test_folders_globs_parquet_and_pictures_give_the_same_columns(photos, tmp_path):
    rows = {"image": [{"bytes": jpeg(0), "path": None}]}
    Dataset.from_dict(rows, features=Features({"image": Image()})).to_parquet(tmp_path / "photos.parquet")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "one.jpg").write_bytes(jpeg(0))
    for name in (photos, photos / "*.tar", tmp_path / "photos.parquet", pictures):
        row, sample = next(open_stream(str(name)).read(0))
        assert row == 0 and sample.keys() == {"key", "image", "json"} and sample["json"] is None
        assert decode_image(sample).size == (60, 40)


def test_equal_names_are_different_samples(tmp_path):
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
def test_a_missing_path_is_named_with_what_would_do(name):
    with pytest.raises(FileNotFoundError, match=r"No data at .*nowhere.*Pass a folder, a glob"):
        open_stream(name)


def test_data_of_the_wrong_kind_are_refused(photos, tmp_path):
    Dataset.from_dict({"words": ["a"]}, features=Features({"words": Value("string")})).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match="no image column"):
        open_stream(str(tmp_path))
    with pytest.raises(ValueError, match="no json files with SA-1B's annotations: its first samples, such as '0/000'"):
        open_stream(str(photos), with_masks=True)
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(ValueError, match=r"the unsupported extension '\.txt'"):
        open_stream(str(tmp_path / "notes.txt"))
    (tmp_path / "text.tar").write_text("words")
    with pytest.raises(ValueError, match=r"text\.tar' could not be read"):
        open_stream(str(tmp_path / "text.tar"))
    (tmp_path / "above" / "empty").mkdir(parents=True)
    with pytest.raises((ValueError, FileNotFoundError), match="above"):
        open_stream(str(tmp_path / "above"))


def test_a_shard_goes_on_from_any_row(photos, tmp_path):
    rows = {"image": [{"bytes": jpeg(n), "path": None} for n in range(4)], "__key__": list("abcd")}
    features = Features({"image": Image(), "__key__": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "photos.parquet")
    for name in (photos, tmp_path):
        stream = open_stream(str(name))
        whole = list(stream.read(0))
        assert [row for row, _ in whole] == [0, 1, 2, 3]
        for start in range(5):
            assert list(stream.read(0, start)) == whole[start:]


def test_the_same_share_of_the_tars_is_drawn_every_time(tmp_path):
    for number in range(20):
        write_tar(tmp_path / f"{number:02d}.tar", {"0.jpg": jpeg(number)})
    few, again, more = (open_stream(str(tmp_path), shard_fraction=share) for share in (0.1, 0.1, 0.5))
    assert few.shards.names == again.shards.names and len(few.shards.names) == 2 and len(more.shards.names) == 10
    assert set(few.shards.names) < set(more.shards.names)
    with pytest.raises(ValueError, match="for tars only"):
        open_stream("miniature", shard_fraction=0.5)


def test_images_above_the_pixel_limit_are_not_decoded(monkeypatch):
    sample = {"image": {"bytes": jpeg(0), "path": None}}
    monkeypatch.setattr(streams, "MAX_PIXELS", 60 * 40 - 1)
    with pytest.raises(SkippedSampleError, match="image too large"):
        decode_image(sample)


# ---- samples ----


def test_masks_of_another_size_than_the_image_are_not_decoded(sa1b, monkeypatch):
    _, sample = next(open_stream(str(sa1b), with_masks=True).read(0))
    monkeypatch.setattr(streams, "decode_mask", lambda segmentation: pytest.fail("decoded"))
    with pytest.raises(SkippedSampleError, match="mask and image differ in size"):
        streams.draw_masks(sample, 2, np.random.default_rng(0), (60, 40))
