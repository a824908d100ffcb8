"""Training streams of small tars, parquet files and folders."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value

from samclip_hf.datasets import streams
from samclip_hf.datasets.streams import DataError, SkippedSampleError, decode_image, open_stream

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
        assert decode_image(sample).size == (60, 40)


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
    with pytest.raises(ValueError, match=r"the unsupported extension '\.txt'"):
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


def test_shard_fraction_chooses_the_same_tars_every_time(tmp_path):
    for number in range(20):
        write_tar(tmp_path / f"{number:02d}.tar", {"0.jpg": jpeg(number)})
    few, again, more = (open_stream(str(tmp_path), shard_fraction=fraction) for fraction in (0.1, 0.1, 0.5))
    assert few.shards.names == again.shards.names and len(few.shards.names) == 2 and len(more.shards.names) == 10
    assert set(few.shards.names) < set(more.shards.names)
    with pytest.raises(ValueError, match="for tars only"):
        open_stream("miniature", shard_fraction=0.5)


def test_images_above_the_pixel_limit_are_not_decoded(monkeypatch):
    sample = {"image": {"bytes": jpeg(0), "path": None}}
    monkeypatch.setattr(streams, "MAX_PIXELS", 60 * 40 - 1)
    with pytest.raises(SkippedSampleError, match="image too large"):
        decode_image(sample)


def test_masks_with_another_size_than_the_image_are_not_decoded(sa1b, monkeypatch):
    _, sample = next(open_stream(str(sa1b), with_masks=True).read(0))
    monkeypatch.setattr(streams, "decode_mask", lambda segmentation: pytest.fail("decoded"))
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
