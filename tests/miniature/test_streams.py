import numpy as np
import pytest

pytest.importorskip("datasets", reason="streams need the extra `train`")
pytest.importorskip("pycocotools", reason="streams need the extra `train`")

from datasets import List, Value
from pycocotools import mask as coco_mask

from samclip_hf.miniature import streams
from samclip_hf.miniature.scenes import render


def test_annotations_contain_the_masks_of_the_scene():
    stream = streams.masks(seed=3, num_shards=2, num_images=6)
    for index, row in enumerate(stream):
        scene = render(3, index, num_objects=1 + index % 4)
        assert np.array_equal(np.asarray(row["jpg"]), scene.image)
        decoded = [coco_mask.decode(entry["segmentation"]) for entry in row["json"]["annotations"]]
        assert np.array_equal(np.stack(decoded).astype(bool), scene.masks)
        for entry, mask in zip(row["json"]["annotations"], scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert entry["area"] == mask.sum()
            assert entry["bbox"] == [
                columns.min(),
                rows.min(),
                columns.max() - columns.min() + 1,
                rows.max() - rows.min() + 1,
            ]
            (x, y) = entry["point_coords"][0]
            assert mask[int(y), int(x)]


def test_the_columns_are_those_of_webdataset_tars_and_of_sa_1b():
    # The features that `load_dataset("webdataset", ...)` infers from SA-1B's tars.
    annotation = {
        "id": Value("int64"),
        "segmentation": {"size": List(Value("int64")), "counts": Value("string")},
        "bbox": List(Value("float64")),
        "area": Value("int64"),
        "predicted_iou": Value("float64"),
        "stability_score": Value("float64"),
        "crop_box": List(Value("float64")),
        "point_coords": List(List(Value("float64"))),
    }
    stream = streams.masks(num_shards=1, num_images=1)
    assert stream.features["json"]["annotations"] == List(annotation)
    assert list(stream.features) == list(next(iter(stream))) == ["jpg", "json", "__key__", "__url__"]
    assert list(next(iter(streams.images(num_shards=1, num_images=1)))) == ["jpg", "__key__", "__url__"]


@pytest.mark.parametrize("stream", [streams.images, streams.masks])
def test_each_image_is_in_exactly_one_shard(stream):
    sharded = stream(num_shards=4, num_images=18)
    assert sharded.num_shards == 4
    parts = [[row["__key__"] for row in sharded.shard(num_shards=2, index=rank)] for rank in range(2)]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(f"sa_{index}" for index in range(18))


def test_the_number_of_shards_can_be_set():
    assert streams.images().num_shards >= 16
    assert streams.images(num_shards=64, num_images=64).num_shards == 64
