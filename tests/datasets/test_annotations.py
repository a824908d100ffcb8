"""SA-1B's annotations of training images: all forms of masks are read, and only invalid masks are skipped."""

import json
from collections import Counter

import numpy as np
import pytest

from samclip_hf.datasets.streams import SkippedSampleError, draw_masks, open_stream
from samclip_hf.distillation.collation import SamBatches, StepLoader, StepStream
from samclip_hf.images import encode_mask

from .tars import jpeg, write_tar

coco = pytest.importorskip("pycocotools.mask", reason="needs the extra `train`")

SIZE = (40, 60)
POLYGON = [[10, 5, 50, 5, 50, 30, 10, 30], [0, 0, 4, 0, 4, 4]]


def box(left: int, top: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


MASKS = [box(number, 2 * number, 5 + number, 6) for number in range(6)]
WHOLE = np.ones(SIZE, dtype=bool)


def annotation(mask: np.ndarray, **fields) -> dict:
    return {"segmentation": encode_mask(mask, compressed=True), "area": int(mask.sum())} | fields


def draw(content, num_masks: int = 6, seed: int = 0) -> tuple[list[np.ndarray], Counter]:
    masks, skipped = draw_masks({"json": json.dumps(content)}, num_masks, np.random.default_rng(seed), SIZE)
    return [mask.decode() for mask in masks], skipped


def indices(masks: list[np.ndarray]) -> list[int]:
    """The indices in `MASKS` of drawn masks."""
    return [next(index for index, mask in enumerate(MASKS) if np.array_equal(mask, drawn)) for drawn in masks]


@pytest.mark.parametrize("num_masks", [1, 4, 6, 9])
def test_masks_are_drawn_in_random_order_and_repeated_only_if_there_are_too_few(num_masks):
    content = {"annotations": [annotation(mask) for mask in [*MASKS, WHOLE, ~WHOLE]]}
    drawn, skipped = draw(content, num_masks, seed=3)
    rng = np.random.default_rng(3)
    # The empty mask is tried at its place in the order. `permutation` of seven, of which the last is the empty one.
    order = [index for index in rng.permutation(7).tolist() if index < 6][:num_masks]
    order += rng.integers(6, size=num_masks - len(order)).tolist()
    assert indices(drawn) == order
    assert skipped in ({}, {"empty annotation": 1})


@pytest.mark.parametrize("form", ["uncompressed", "compressed", "bytes", "polygon"])
@pytest.mark.parametrize("area", ["present", "missing", None, 0, "12"])
def test_all_forms_of_masks_are_read_with_and_without_an_area(form, area):
    compressed = coco.merge(coco.frPyObjects(POLYGON, *SIZE))
    expected = coco.decode(compressed).astype(bool)
    segmentation = {
        "uncompressed": encode_mask(expected),
        "compressed": encode_mask(expected, compressed=True),
        "bytes": compressed,
        "polygon": POLYGON,
    }[form]
    areas = {"present": {"area": int(expected.sum())}, "missing": {}}
    content = {"annotations": [{"segmentation": segmentation, **areas.get(area, {"area": area})}]}
    (drawn,), skipped = draw_masks({"json": content}, 1, np.random.default_rng(0), SIZE)
    assert drawn.area == expected.sum() and np.array_equal(drawn.decode(), expected) and not skipped


@pytest.mark.parametrize("content", ["generator", "samclip masks", "SA-1B"])
def test_the_files_of_the_mask_generator_and_of_samclip_masks_are_read(content):
    records = [{"segmentation": encode_mask(mask), "bbox": [0, 0, 1, 1], "area": int(mask.sum())} for mask in MASKS]
    content = {
        "generator": records,
        "samclip masks": {"image": "dog.jpg", "height": 40, "width": 60, "masks": records},
        "SA-1B": {"image": {"image_id": 1}, "annotations": records},
    }[content]
    drawn, skipped = draw(content)
    assert sorted(indices(drawn)) == list(range(6)) and not skipped


BAD = {
    "too short": (annotation(MASKS[0], segmentation={"size": SIZE, "counts": [5, 5]}), "broken annotation"),
    "too long": (annotation(MASKS[0], segmentation={"size": SIZE, "counts": [2401]}), "broken annotation"),
    "negative": (annotation(MASKS[0], segmentation={"size": SIZE, "counts": [2500, -100]}), "broken annotation"),
    # pycocotools returns uninitialized memory for this one.
    "truncated": (
        annotation(
            MASKS[0], segmentation={"size": SIZE, "counts": encode_mask(MASKS[0], compressed=True)["counts"][:-4]}
        ),
        "broken annotation",
    ),
    "no counts": (annotation(MASKS[0], segmentation={"size": SIZE}), "broken annotation"),
    "text": (annotation(MASKS[0], segmentation="mask"), "broken annotation"),
    "no mask": ({"area": 3}, "broken annotation"),
    "no object": (None, "broken annotation"),
    "polygon of two points": (annotation(MASKS[0], segmentation=[[1, 1, 5, 5]]), "broken annotation"),
    "polygon with half a point": (annotation(MASKS[0], segmentation=[[1, 1, 5, 1, 5, 5, 1]]), "broken annotation"),
    # pycocotools does not return for these two.
    "polygon with NaN": (annotation(MASKS[0], segmentation=[[1, 1, 5, 1, float("nan"), 5]]), "broken annotation"),
    "huge polygon": (annotation(MASKS[0], segmentation=[[1, 1, 1e30, 1, 5, 5]]), "broken annotation"),
    "flat polygon": (annotation(MASKS[0], segmentation=[1, 1, 5, 1, 5, 5]), "broken annotation"),
    "empty": (annotation(~WHOLE), "empty annotation"),
    "empty with an area": (annotation(~WHOLE, area=20), "empty annotation"),
    "another size": (annotation(MASKS[0].T), "mask and image differ in size"),
    "no size": (annotation(MASKS[0], segmentation={"counts": [2400]}), "mask and image differ in size"),
    "whole image": (annotation(WHOLE), None),
    "whole image with a wrong area": (annotation(WHOLE, area=20), None),
}


@pytest.mark.parametrize("kind", BAD)
def test_only_the_invalid_annotation_is_skipped_and_counted(kind):
    bad, cause = BAD[kind]
    drawn, skipped = draw({"annotations": [annotation(MASKS[0]), bad, annotation(MASKS[1])]}, num_masks=3)
    assert set(indices(drawn)) == {0, 1} and len(drawn) == 3
    assert skipped == ({cause: 1} if cause else {})
    with pytest.raises(SkippedSampleError, match=cause or "no usable mask"):
        draw({"annotations": [bad]})


def test_an_area_that_is_larger_than_the_image_is_computed_from_the_mask():
    drawn, skipped = draw({"annotations": [annotation(MASKS[0], area=10**6)]}, num_masks=1)
    assert indices(drawn) == [0] and not skipped


@pytest.mark.parametrize(("content", "cause"), [([], "no usable mask"), ({}, "no annotations"), (3, "no annotations")])
def test_files_without_annotations_are_counted(content, cause):
    with pytest.raises(SkippedSampleError, match=cause):
        draw(content)


def test_skipped_annotations_are_in_the_counts_of_the_training(tmp_path, transformers_log):
    content = {"annotations": [annotation(MASKS[0]), BAD["too short"][0], BAD["another size"][0]]}
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(0), "a.json": json.dumps(content).encode()})
    task = SamBatches(
        [open_stream(str(tmp_path), with_masks=True)], weights=[1.0], image_size=64, student_image_sizes=[64],
        batch_size=2, masks_per_image=2, max_box_noise=2.0, shuffle_buffer=1,
    )  # fmt: skip
    loader = StepLoader(StepStream({"sam": task}, seed=0), max_corrupt_fraction=0.0)
    batch = next(iter(loader))
    assert batch["usable_fractions"] == {"sam": 1.0}
    assert batch["sam"].keys() & {"input_points", "input_boxes"} and "skipped_annotations" not in batch["sam"]
    assert loader.state["skipped"] == {"broken annotation": 2, "mask and image differ in size": 2}
    assert "Skipped an annotation of '0/a': broken annotation." in transformers_log.text
