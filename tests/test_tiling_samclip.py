"""Results of tiles, merged, against results of the whole image: closed forms, drawn objects, and the miniature."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from samclip_hf import (
    SamClipForImageSegmentation,
    SamClipImageProcessor,
    SamClipImageProcessorPil,
    SamClipMaskGenerationPipeline,
    miniature,
)
from samclip_hf.mask_generation_samclip import decode_rle, distinct_boxes, encode_rle, mask_to_box
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, render
from samclip_hf.segmentation_samclip import SamClipSegmentationOutput
from samclip_hf.tiling_samclip import ComputedSequence, ImageTiles, TiledMasks, TiledSegmentation

SIZES = [
    (200, 300, 64, 0.25),
    (64, 200, 64, 0.5),  # one row
    (65, 129, 64, 0.25),  # a remainder of one pixel
    (130, 70, 64, 0.1),
    (97, 101, 33, 0.5),
    (40, 500, 64, 0.25),  # lower than a tile
]


@pytest.fixture(scope="module")
def segmenter():
    return pipeline("zero-shot-image-segmentation", model=miniature.checkpoint())


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), SIZES)
def test_tiles_cover_the_image_and_overlap(height, width, tile, overlap):
    tiles = ImageTiles(height, width, tile, overlap)
    covered = np.zeros((height, width), dtype=int)
    for left, top, right, bottom in tiles.boxes:
        assert left >= 0 and right <= width and right - left == min(tile, width)
        assert top >= 0 and bottom <= height and bottom - top == min(tile, height)
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    for spans, length in ((tiles.rows, height), (tiles.columns, width)):
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(end - start >= int(tile * overlap) for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), SIZES)
def test_weights_sum_to_one_and_vanish_at_inner_edges(height, width, tile, overlap):
    tiles = ImageTiles(height, width, tile, overlap)
    maps = torch.full((len(tiles), height, width), torch.nan)
    total = torch.zeros(height, width)
    for (left, top, right, bottom), weights in tiles.blocks():
        for index, weight in weights.items():
            maps[index, top:bottom, left:right] = weight
            total[top:bottom, left:right] += weight
    torch.testing.assert_close(total, torch.ones(height, width))
    for index, (left, top, right, bottom) in enumerate(tiles.boxes):
        own = maps[index, top:bottom, left:right]
        assert not own.isnan().any() and int((~maps[index].isnan()).sum()) == own.numel()
        step = 1 / max(1, int(tile * overlap))  # of a ramp over the overlap, for one pixel
        for is_inner, edge in zip(tiles.inner_edges(index), (own[:, 0], own[0], own[:, -1], own[-1]), strict=True):
            assert not is_inner or edge.max() <= step
            assert (own[1:] - own[:-1]).abs().max() <= 2 * step and (own[:, 1:] - own[:, :-1]).abs().max() <= 2 * step


def to_output(logits, masks=None, segment_logits=None, scores=None, background=-1):
    """The outputs for one image of which every cell is a pixel."""
    return SamClipSegmentationOutput(
        logits=logits[None],
        segment_masks=None if masks is None else masks[None],
        segment_logits=None if masks is None else segment_logits[None],
        segment_embeds=None if masks is None else torch.zeros(1, len(masks), 1),
        segment_scores=None if masks is None else scores[None],
        content_sizes=torch.tensor([logits.shape[1:]], dtype=torch.float32),
        background_label_ids=torch.tensor([background]),
    )


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), SIZES)
def test_a_model_of_pixels_gives_the_map_of_the_whole_image(height, width, tile, overlap):
    logits = torch.randn(20, height, width, generator=torch.Generator().manual_seed(0))
    tiles = ImageTiles(height, width, tile, overlap)
    merged, kept = TiledSegmentation(tiles), 0
    for left, top, right, bottom in tiles.boxes:
        merged.add(to_output(logits[:, top:bottom, left:right]))
        kept = max(kept, len(merged.dense.logits))
    assert torch.equal(merged.post_process_semantic_segmentation(), logits.argmax(dim=0).int())
    assert not merged.dense.logits and (len(tiles.rows) < 5 or kept <= 3 * len(tiles.columns))


def test_maps_that_are_linear_in_the_image_have_no_seams():
    """Bilinear interpolation of cells of 8 x 8 pixels is exact for linear functions, except for half a cell at the
    edges of each tile, where the weight is below 1/8 of the whole."""
    height, width = 160, 224
    tiles = ImageTiles(height, width, 64, 0.5)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    slopes = torch.tensor([[1.0, 0.3], [0.2, 1.1], [-0.4, 0.9]])
    logits = slopes[:, :1, None] * x + slopes[:, 1:, None] * y - torch.tensor([0.0, 10.0, -60.0])[:, None, None]
    merged = TiledSegmentation(tiles)
    for left, top, right, bottom in tiles.boxes:
        cells = logits[:, top:bottom, left:right].reshape(3, 8, 8, 8, 8).mean(dim=(2, 4))
        merged.add(to_output(cells))
    found = merged.post_process_semantic_segmentation()
    two = logits.topk(2, dim=0).values
    clear = two[0] - two[1] > 4  # half a cell times the largest difference of slopes, 1.8, times the weight
    assert clear.float().mean() > 0.9
    assert torch.equal(found[clear], logits.argmax(dim=0)[clear].int())


def draw_objects(height, width, count, seed=0):
    """Ellipses of all sizes that may hide one another: mask logits `(count, height, width)`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] + 0.5
    logits = []
    for _ in range(count):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        a, b = rng.uniform(5, height / 3), rng.uniform(5, width / 3)
        logits.append(4 * (1 - ((x - cx) / b) ** 2 - ((y - cy) / a) ** 2))
    return torch.tensor(np.stack(logits), dtype=torch.float32).clamp_min(-20)


@pytest.mark.parametrize("with_background", [False, True])
@pytest.mark.parametrize(("height", "width", "tile", "overlap"), SIZES[:3])
def test_segments_of_a_model_of_pixels_equal_those_of_the_whole_image(height, width, tile, overlap, with_background):
    generator = torch.Generator().manual_seed(1)
    masks = draw_objects(height, width, 8)
    segment_logits = 3 * torch.randn(8, 5, generator=generator)
    scores = torch.linspace(0.5, 1, 8)
    logits = torch.randn(5, height, width, generator=generator)
    background = 0 if with_background else -1
    whole = to_output(logits, masks, segment_logits, scores, background)
    tiles = ImageTiles(height, width, tile, overlap)
    merged = TiledSegmentation(tiles)
    for left, top, right, bottom in tiles.boxes:
        crop = (slice(None), slice(top, bottom), slice(left, right))
        merged.add(to_output(logits[crop], masks[crop], segment_logits, scores, background))
    processor = SamClipImageProcessorPil()
    size = [(height, width)]
    expected = processor.post_process_semantic_segmentation(whole, size)[0]
    # Mask logits are stored in float16, so pixels whose best two segments are equal to 3 digits may differ.
    assert (merged.post_process_semantic_segmentation() != expected).float().mean() < 2e-3
    expected = processor.post_process_panoptic_segmentation(whole, 0.4, target_sizes=size)[0]
    found = merged.post_process_panoptic_segmentation(0.4)
    assert len(found["segments_info"]) == len(expected["segments_info"]) > 2
    for info in expected["segments_info"]:
        own = expected["segmentation"] == info["id"]
        ids, counts = found["segmentation"][own].unique(return_counts=True)
        best = found["segments_info"][int(ids[counts.argmax()]) - 1]
        same = found["segmentation"] == best["id"]
        assert (same ^ own).sum() <= 2e-3 * height * width
        assert best["label_id"] == info["label_id"] and best["score"] == pytest.approx(info["score"], abs=1e-5)


def draw_shapes():
    """Masks `(300, 420)` of all relations to tiles of 128 pixels."""
    y, x = np.mgrid[:300, :420]
    ring = (np.hypot(x - 210, y - 150) < 120) & (np.hypot(x - 210, y - 150) > 80)  # larger than a tile
    u_shape = ((abs(x - 60) < 8) | (abs(x - 30) < 8)) & (y > 60) & (y < 190) | (abs(y - 190) < 8) & (abs(x - 45) < 23)
    return {
        "inside a tile": np.hypot(x - 20, y - 20) < 12,
        "across an edge": np.hypot(x - 120, y - 40) < 30,
        "at a corner of four tiles": np.hypot(x - 110, y - 100) < 25,
        "larger than a tile": ring,
        "in two parts in one tile": u_shape,
        "along a row": abs(y - 280) < 6,
        "at the edge of the image": np.hypot(x - 419, y - 299) < 30,
    }


@pytest.mark.parametrize("overlap", [0.2, 0.25, 0.5])
def test_masks_across_edges_come_out_whole_and_once(overlap):
    masks = draw_shapes()
    tiles = ImageTiles(300, 420, 128, overlap)
    merged = TiledMasks(tiles)
    for index, (left, top, right, bottom) in enumerate(tiles.boxes):
        visible = dict(masks)
        if bottom <= 182:  # the sides of the U are not connected in this tile
            u_shape, is_left = visible.pop("in two parts in one tile"), np.arange(420) < 45
            visible |= {"left": u_shape & is_left, "right": u_shape & ~is_left}
        parts = [mask[top:bottom, left:right] for mask in visible.values()]
        found = [(part, mask_to_box(part)) for part in parts if part.sum() > 30]
        boxes = torch.tensor([[b[0], b[1], b[2] - 1, b[3] - 1] for _, b in found]).reshape(-1, 4)
        merged.add(index, [encode_rle(part) for part, _ in found], torch.full((len(found),), 0.9), boxes)
    encodings, scores, boxes, _ = merged.merge()
    found = [decode_rle(encoding) for encoding in encodings]
    for name, mask in masks.items():
        assert sum(np.array_equal(mask, other) for other in found) == 1, name
    assert len(found) == len(masks)
    assert scores.tolist() == pytest.approx([0.9] * len(masks))
    for mask, (left, top, right, bottom) in zip(found, boxes.tolist(), strict=True):
        assert mask_to_box(mask) == (left, top, right + 1, bottom + 1)


def test_a_mask_that_is_cut_off_and_has_no_counterpart_is_removed():
    tiles = ImageTiles(100, 180, 100, 0.2)
    merged = TiledMasks(tiles)
    cut, whole = np.zeros((100, 100), dtype=bool), np.zeros((100, 100), dtype=bool)
    cut[10:30, 60:], whole[60:80, 60:80] = True, True
    boxes = torch.tensor([[60, 10, 99, 29], [60, 60, 79, 79]])
    merged.add(0, [encode_rle(cut), encode_rle(whole)], torch.tensor([0.9, 0.8]), boxes)
    merged.add(1, [], torch.zeros(0), torch.zeros(0, 4, dtype=torch.int64))
    encodings, scores, boxes, _ = merged.merge()
    assert scores.tolist() == pytest.approx([0.8]) and boxes.tolist() == [[60, 60, 79, 79]]
    assert decode_rle(encodings[0]).sum() == 400


def longest_cut(mask, tiles):
    """The number of pixels of a mask that end exactly on the same inner edge of a tile."""
    lengths = [0]
    for edges, values in ((tiles.columns, mask.T), (tiles.rows, mask)):
        for edge in {edge for span in edges for edge in span if 0 < edge < len(values)}:
            lengths.append(int((values[edge - 1] ^ values[edge]).sum()))
    return max(lengths)


def draw_mosaic():
    """Disks in a grid, of which one crosses the edges of four tiles of 100 pixels, and tiles of `(240, 240)`."""
    y, x = np.mgrid[:240, :240]
    disks = [np.hypot(x - cx, y - cy) < 25 for cy in (30, 85, 155, 210) for cx in (30, 85, 155, 210)]
    return disks, ImageTiles(240, 240, 100, 0.25)


@pytest.mark.parametrize("missing_column", [None, 1])
def test_masks_do_not_end_at_inner_edges_of_tiles(missing_column):
    """Nothing is found in tiles of the missing column, so disks in two tiles of the first column are cut off."""
    disks, tiles = draw_mosaic()
    merged = TiledMasks(tiles)
    parts = TiledSegmentation(tiles, with_map=False)
    for index, (left, top, right, bottom) in enumerate(tiles.boxes):
        visible = [disk[top:bottom, left:right] for disk in disks]
        is_missing = index % len(tiles.columns) == missing_column
        visible = [] if is_missing else [part for part in visible if part.sum() > 30]
        found = [mask_to_box(part) for part in visible]
        boxes = torch.tensor([[b[0], b[1], b[2] - 1, b[3] - 1] for b in found], dtype=torch.int64).reshape(-1, 4)
        merged.add(index, [encode_rle(part) for part in visible], torch.full((len(visible),), 0.9), boxes)
        logits = torch.stack([torch.from_numpy(part) * 20.0 - 10 for part in visible] or [torch.full((100, 100), -10)])
        segment_logits = torch.tensor([[5.0, 0.0]]).repeat(len(logits), 1)
        scores = torch.full((len(logits),), 0.9 if visible else 0.0)
        parts.add(to_output(torch.zeros(2, 100, 100), logits, segment_logits, scores))
    everything = [decode_rle(encoding) for encoding in merged.merge()[0]]
    labeled = [decode_rle(encoding) for _, _, encoding in parts.independent_segments(0.5, is_semantic=False)]
    for found in (everything, labeled):
        assert all(any(np.array_equal(mask, disk) for disk in disks) for mask in found)
        assert max(longest_cut(mask, tiles) for mask in found if mask.any()) <= max(
            longest_cut(disk, tiles) for disk in disks
        )
        assert len(found) == 16 if missing_column is None else 0 < len(found) < 16


def disk_of(height, width, x, y, radius):
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.hypot(columns - x, rows - y) < radius


def add_everything(merged, masks, edge):
    """Adds the parts of masks in tiles, and the masks in an overview with a longer side of `edge` pixels."""
    for index, (left, top, right, bottom) in enumerate(merged.tiles.boxes):
        parts = [mask[top:bottom, left:right] for mask in masks]
        # A part that covers its tile has no edge there, so that a model does not find it.
        parts = [part for part in parts if part.sum() > 30 and not part.all()]
        boxes = [mask_to_box(part) for part in parts]
        boxes = torch.tensor([[b[0], b[1], b[2] - 1, b[3] - 1] for b in boxes], dtype=torch.int64).reshape(-1, 4)
        merged.add(index, [encode_rle(part) for part in parts], torch.full((len(parts),), 0.8), boxes)
    size = (edge, round(edge * merged.tiles.height / merged.tiles.width))
    small = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    merged.add_overview([encode_rle(mask) for mask in small], torch.full((len(small),), 0.9))


@pytest.mark.parametrize("with_overview", [False, True])
def test_a_mask_larger_than_a_tile_comes_from_the_overview(with_overview):
    tiles = ImageTiles(300, 420, 80, 0.25)
    large, across = disk_of(300, 420, 200, 150, 110), disk_of(300, 420, 65, 70, 20)
    merged = TiledMasks(tiles)
    add_everything(merged, [large, across], 120)
    if not with_overview:
        merged.overview = []
    encodings, scores, _, _ = merged.merge()
    found = [decode_rle(encoding) for encoding in encodings]
    assert best_iou(across, found) == 1  # at the resolution of the tiles, and once
    assert len(found) == 1 + with_overview
    assert scores[-1] == pytest.approx(0.8) and (scores > 0.81).sum() == with_overview
    assert (best_iou(large, found) > 0.97) == with_overview


def test_masks_that_tiles_complete_are_not_replaced_by_the_overview():
    """The tiles overlap enough to show the whole edge of the disk, which is larger than a tile."""
    tiles = ImageTiles(160, 160, 100, 0.4)
    disk = disk_of(160, 160, 80, 80, 55)
    merged = TiledMasks(tiles)
    add_everything(merged, [disk], 40)
    assert not tiles.contain(mask_to_box(disk)) and len(merged.overview) == 1
    [encoding], scores, _, _ = merged.merge()
    assert np.array_equal(decode_rle(encoding), disk) and scores.tolist() == pytest.approx([0.8])


def test_masks_with_nearly_equal_pixels_are_duplicates_even_if_their_boxes_differ():
    tiles = ImageTiles(100, 180, 100, 0.2)
    disk = disk_of(100, 100, 40, 40, 20)
    stray, other = disk.copy(), disk_of(100, 100, 60, 75, 15)
    stray[2, 60:78] = True  # a few pixels far from the disk
    merged = TiledMasks(tiles)
    masks = [disk, stray, other]
    boxes = [mask_to_box(mask) for mask in masks]
    boxes = torch.tensor([[b[0], b[1], b[2] - 1, b[3] - 1] for b in boxes])
    assert len(distinct_boxes(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.7)) == 3
    merged.add(0, [encode_rle(mask) for mask in masks], torch.tensor([0.8, 0.9, 0.7]), boxes)
    encodings, scores, _, _ = merged.merge(0.7)
    assert scores.tolist() == pytest.approx([0.9, 0.7])
    assert np.array_equal(decode_rle(encodings[0])[:, :100], stray)


def test_masks_that_share_a_part_are_not_joined():
    """Two masks differ in the upper tiles only. In the lower tiles, both have the same parts, which are found once."""
    tiles = ImageTiles(175, 175, 100, 0.25)
    masks = np.zeros((2, 175, 175), dtype=bool)
    masks[:, 60:110, 40:120] = True
    masks[0, 20:60, 40:90] = True
    masks[1, 20:60, 92:120] = True
    merged = TiledMasks(tiles)
    for index, order in enumerate([[0, 1], [1, 0], [0], [0]]):
        left, top, right, bottom = tiles.boxes[index]
        parts = masks[order, top:bottom, left:right]
        boxes = torch.tensor([mask_to_box(part) for part in parts]) - torch.tensor([0, 0, 1, 1])
        merged.add(index, [encode_rle(part) for part in parts], torch.full((len(parts),), 0.8), boxes)
    [encoding] = merged.merge()[0]
    assert best_iou(decode_rle(encoding), masks) == 1


def test_a_mask_that_a_tile_shows_completely_is_not_mixed_with_parts_of_other_tiles():
    """The mask of the left tile ends at its edge and is 6 rows higher, so that a mean of both would have a step in the
    middle of the overlap."""
    tiles = ImageTiles(100, 175, 100, 0.25)
    whole, part = np.zeros((2, 100, 175), dtype=bool)
    whole[20:50, 80:150], part[20:56, 80:100] = True, True
    merged = TiledMasks(tiles)
    for index, mask in enumerate([part, whole]):
        left, top, right, bottom = tiles.boxes[index]
        mask = mask[top:bottom, left:right]
        box = torch.tensor([mask_to_box(mask)]) - torch.tensor([0, 0, 1, 1])
        merged.add(index, [encode_rle(mask)], torch.tensor([0.9 - 0.2 * index]), box)
    [encoding], scores, _, _ = merged.merge()
    assert np.array_equal(decode_rle(encoding), whole) and scores.tolist() == pytest.approx([0.7])


def add_segments(merged, masks, labels, num_labels=3):
    """Adds the parts of masks in tiles, except for those that cover a tile, and the masks in an overview."""

    def output(parts, shape):
        logits = torch.stack([torch.from_numpy(part) * 20.0 - 10 for part, _ in parts] or [torch.full(shape, -10.0)])
        own = torch.nn.functional.one_hot(torch.tensor([label for _, label in parts] or [0]), num_labels) * 5.0
        scores = torch.full((len(logits),), 0.9 if parts else 0.0)
        return to_output(torch.zeros(num_labels, *shape), logits, own, scores, background=0)

    for left, top, right, bottom in merged.tiles.boxes:
        parts = [(mask[top:bottom, left:right], label) for mask, label in zip(masks, labels, strict=True)]
        parts = [(part, label) for part, label in parts if part.sum() > 30 and not part.all()]
        merged.add(output(parts, (bottom - top, right - left)))
    merged.add_overview(output([(m[::4, ::4], label) for m, label in zip(masks, labels, strict=True)], (75, 105)))


def test_a_segment_larger_than_a_tile_replaces_its_parts():
    large, front, beside = (
        disk_of(300, 420, 200, 150, 110),
        disk_of(300, 420, 180, 120, 25),
        disk_of(300, 420, 65, 40, 20),
    )
    merged = TiledSegmentation(ImageTiles(300, 420, 80, 0.25), with_map=False)
    add_segments(merged, [large & ~front, front, beside], [1, 2, 2])
    found = merged.post_process_panoptic_segmentation(0.4, overlap_mask_area_threshold=0.5)
    assert sorted(info["label_id"] for info in found["segments_info"]) == [1, 2, 2]
    expected = np.where(front | beside, 2, np.where(large, 1, 0))
    label_map = merged.post_process_semantic_segmentation().numpy()
    assert (label_map != expected).mean() < 0.01
    assert np.array_equal(label_map == 2, expected == 2)  # at the resolution of the tiles
    entries = merged.independent_segments(0.5, is_semantic=False)
    assert sorted(label for _, label, _ in entries) == [1, 2, 2]
    assert best_iou(large & ~front, [decode_rle(encoding) for _, _, encoding in entries]) > 0.95


def test_a_group_of_objects_in_the_overview_is_not_an_object():
    disks = [disk_of(300, 420, x, y, 28) for x in range(30, 420, 60) for y in range(30, 300, 60)]
    merged = TiledSegmentation(ImageTiles(300, 420, 80, 0.25), with_map=False)
    add_segments(merged, disks, [2] * len(disks))
    group = np.zeros((300, 420), dtype=bool)
    group[10:290, 10:410] = True
    logits = torch.from_numpy(group[::4, ::4])[None] * 20.0 - 10
    merged.add_overview(
        to_output(torch.zeros(3, 75, 105), logits, torch.tensor([[0.0, 5, 0]]), torch.ones(1), background=0)
    )
    assert any(segment.mask.area >= group.sum() for segment in merged.overview)
    found = merged.post_process_panoptic_segmentation(0.4, overlap_mask_area_threshold=0.0)
    assert [info["label_id"] for info in found["segments_info"]] == [2] * len(disks)


def test_slivers_of_parts_are_not_objects():
    """The logits of one cell of 8 x 8 pixels are above 0 in its center only: 4 of 64 pixels."""
    tiles = ImageTiles(64, 112, 64, 0.25)
    masks = torch.full((2, 8, 8), -4.0)
    masks[0, 3, 3], masks[1, 2:6, 5] = 0.6, 8.0
    merged = TiledSegmentation(tiles, with_map=False)
    segment_logits = torch.tensor([[9.0, 0.0], [3.0, 0.0]])
    merged.add(to_output(torch.zeros(2, 8, 8), masks, segment_logits, torch.ones(2)))
    merged.add(to_output(torch.zeros(2, 8, 8), masks[:1] * 0 - 4, segment_logits[:1], torch.zeros(1)))
    sizes = [decode_rle(encoding).sum() for _, _, encoding in merged.independent_segments(0.5, is_semantic=False)]
    assert len(sizes) == 1 and sizes[0] > 200
    sizes = [decode_rle(encoding).sum() for _, _, encoding in merged.independent_segments(0.5, is_semantic=True)]
    assert len(sizes) == 1 and sizes[0] > 200
    assert len(merged.post_process_panoptic_segmentation(0.5)["segments_info"]) == 1


ARGUMENTS = {
    "candidate_labels": list(CLASS_NAMES),
    "hypothesis_template": "a {}",
    "background": list(BACKGROUND_PROMPTS),
}


def assert_equal_segments(actual, expected):
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert (one["label"], one["score"]) == (other["label"], other["score"])
        assert np.array_equal(np.asarray(one["mask"]), np.asarray(other["mask"]))


@pytest.mark.parametrize("subtask", ["panoptic", "semantic"])
def test_an_image_that_is_not_larger_than_a_tile_is_segmented_as_a_whole(segmenter, subtask):
    image = Image.fromarray(render(seed=0, index=8).image)
    expected = segmenter(image, subtask=subtask, **ARGUMENTS)
    for tile in (128, 5000):
        assert_equal_segments(segmenter(image, subtask=subtask, tile=tile, overlap=0.1, **ARGUMENTS), expected)
    everything = pipeline(
        "mask-generation", model=miniature.checkpoint(), pipeline_class=SamClipMaskGenerationPipeline
    )
    options = miniature.MASK_GENERATION | {"points_per_crop": 4}
    one, other = everything(image, **options), everything(image, tile=128, **options)
    assert torch.equal(one["scores"], other["scores"]) and len(one["masks"]) > 0
    assert all(torch.equal(a, b) for a, b in zip(one["masks"], other["masks"], strict=True))


def draw_large_scene(height, width, seed, positions):
    """Objects of the miniature's scenes, up to 70 pixels large, with left and top at `positions`, on a mirrored
    background. Returns the image, masks and names."""
    background = render(seed=seed, index=3, num_objects=0).image
    canvas = np.pad(background, ((0, height - 128), (0, width - 128), (0, 0)), mode="symmetric").copy()
    masks, names, index = [], [], 0
    while len(masks) < len(positions):
        scene = render(seed=seed, index=index, num_objects=1)
        box, index = mask_to_box(scene.masks[0]), index + 1
        if max(box[2] - box[0], box[3] - box[1]) > 70:
            continue
        left, top = positions[len(masks)]
        mask = np.zeros((height, width), dtype=bool)
        mask[top : top + box[3] - box[1], left : left + box[2] - box[0]] = scene.masks[0][
            box[1] : box[3], box[0] : box[2]
        ]
        canvas[mask] = scene.image[scene.masks[0]]
        masks.append(mask)
        names.append(CLASS_NAMES[scene.class_ids[0]])
    return Image.fromarray(canvas), masks, names


POSITIONS = [(10, 20), (100, 40), (200, 60)]  # for tiles of 150 pixels: inside one, across one edge, across two


def best_iou(mask, others):
    return max(((mask & other).sum() / (mask | other).sum() for other in others), default=0)


@pytest.mark.parametrize("seed", [1, 6])
@pytest.mark.parametrize("subtask", ["panoptic", "semantic"])
def test_objects_across_tiles_are_segmented_by_text_once(segmenter, seed, subtask):
    image, masks, names = draw_large_scene(150, 290, seed, POSITIONS)
    assert len(ImageTiles(150, 290, 150).boxes) == 3
    found = segmenter(image, tile=150, threshold=0.2, subtask=subtask, batch_size=2, **ARGUMENTS)
    found = [(segment["label"], np.asarray(segment["mask"]) > 0) for segment in found]
    found = [(label, mask) for label, mask in found if label != "background"]
    assert sorted(label for label, _ in found) == sorted(names)
    for name, mask in zip(names, masks, strict=True):
        assert best_iou(mask, [other for label, other in found if label == name]) > 0.9


def test_independent_labels_of_objects_across_tiles(segmenter):
    image, masks, names = draw_large_scene(150, 290, 4, POSITIONS)
    arguments = {"candidate_labels": [*names, "red solid shape"], "hypothesis_template": "a {}", "multi_label": True}
    found = segmenter(image, tile=150, threshold=0.0, **arguments)
    assert [entry["score"] for entry in found] == sorted((entry["score"] for entry in found), reverse=True)
    for name, mask in zip(names, masks, strict=True):
        own = [entry for entry in found if entry["label"] == name]
        assert own[0]["score"] > 0.9 and best_iou(mask, [np.asarray(own[0]["mask"]) > 0]) > 0.5, name
    unions = segmenter(image, tile=150, threshold=0.0, subtask="semantic", **arguments)
    assert sorted(entry["label"] for entry in unions) == sorted(arguments["candidate_labels"])
    all_masks = [np.asarray(entry["mask"]) > 0 for entry in found if entry["label"] == names[0]]
    union = next(np.asarray(entry["mask"]) > 0 for entry in unions if entry["label"] == names[0])
    assert np.array_equal(union, np.logical_or.reduce(all_masks))


@pytest.fixture(scope="module")
def everything():
    model = SamClipForImageSegmentation.from_pretrained(miniature.checkpoint())
    image_processor = SamClipImageProcessor.from_pretrained(miniature.checkpoint())
    return SamClipMaskGenerationPipeline(model=model, image_processor=image_processor)


def test_masks_of_tiles_have_embeddings_without_another_pass_of_the_encoder(everything, monkeypatch):
    image, masks, names = draw_large_scene(150, 290, 5, POSITIONS)
    model, calls = everything.model, []
    encode = model.get_vision_embeds
    monkeypatch.setattr(model, "get_vision_embeds", lambda *args: calls.append(args) or encode(*args))
    options = miniature.MASK_GENERATION | {"points_per_crop": 8}
    found = everything(image, tile=150, output_segment_embeds=True, **options)
    tiles = ImageTiles(150, 290, 150)
    assert len(calls) == 1 + len(tiles)
    nothing = everything(image, tile=150, output_segment_embeds=True, points_per_crop=1, pred_iou_thresh=2.0)
    assert len(nothing["masks"]) == 0 and nothing["segment_embeds"].shape == (0, found["segment_embeds"].shape[1])
    plain = everything(image, tile=150, **options)
    assert torch.equal(found["scores"], plain["scores"]) and len(found["masks"]) == len(plain["masks"]) == 3
    assert found["segment_embeds"].norm(dim=-1).tolist() == pytest.approx([1] * 3)
    logits = model.classify(found["segment_embeds"], model.vocabulary)
    labels = [model.config.id2label[index] for index in logits.argmax(dim=-1).tolist()]
    best = [int(np.argmax([best_iou(mask, [other.numpy()]) for other in found["masks"]])) for mask in masks]
    assert sum(labels[index] == name for index, name in zip(best, names, strict=True)) >= 2  # of 48 names
    # The first mask is inside a single tile, so that its embedding is that of classify_masks in the tile.
    left, top, right, bottom = tiles.boxes[0]
    inputs = everything.image_processor(image.crop(tiles.boxes[0]), return_tensors="pt")
    own = model.classify_masks([[found["masks"][best[0]][top:bottom, left:right]]], **inputs).segment_embeds[0, 0]
    torch.testing.assert_close(found["segment_embeds"][best[0]], own, rtol=0, atol=1e-4)


def test_embeddings_of_a_whole_image_are_those_of_classify_masks(everything):
    image = Image.fromarray(render(seed=0, index=8).image).resize((200, 150))
    options = miniature.MASK_GENERATION | {"points_per_crop": 8, "output_rle_mask": True, "output_bboxes_mask": True}
    expected = everything(image, **options)
    found = everything(image, output_segment_embeds=True, points_per_batch=None, **options)
    assert len(found["masks"]) > 1 and found["rle_mask"] == expected["rle_mask"]
    torch.testing.assert_close(found["scores"], expected["scores"])
    assert torch.equal(found["bounding_boxes"], expected["bounding_boxes"])
    assert all(torch.equal(one, other) for one, other in zip(found["masks"], expected["masks"], strict=True))
    inputs = everything.image_processor(image, return_tensors="pt")
    embeds = everything.model.classify_masks([expected["masks"]], **inputs).segment_embeds[0]
    torch.testing.assert_close(found["segment_embeds"], embeds, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="either output_segment_embeds or crops_n_layers"):
        everything(image, output_segment_embeds=True, crops_n_layers=1)
    for arguments in ({"output_segment_embeds": True}, {"tile": 100}):
        with pytest.raises(ValueError, match="batch_size has no effect"):
            everything(image, batch_size=2, **arguments)
    stock = pipeline("mask-generation", model=miniature.checkpoint(), pipeline_class=SamClipMaskGenerationPipeline)
    with pytest.raises(ValueError, match="SamClipModel cannot embed masks"):
        stock(image, output_segment_embeds=True)


def test_everything_mode_finds_objects_across_tiles():
    image, masks, _ = draw_large_scene(150, 290, 5, POSITIONS)
    everything = pipeline(
        "mask-generation", model=miniature.checkpoint(), pipeline_class=SamClipMaskGenerationPipeline
    )
    options = miniature.MASK_GENERATION | {"points_per_crop": 8, "output_rle_mask": True, "output_bboxes_mask": True}
    found = everything(image, tile=150, **options)
    assert len(found["masks"]) == len(found["scores"]) == 3
    for mask in masks:
        assert best_iou(mask, [other.numpy() for other in found["masks"]]) > 0.85
    for mask, encoding, (left, top, right, bottom) in zip(
        found["masks"], found["rle_mask"], found["bounding_boxes"].tolist(), strict=True
    ):
        assert np.array_equal(decode_rle(encoding), mask.numpy())
        assert mask_to_box(mask.numpy()) == (left, top, right + 1, bottom + 1)
    with pytest.raises(ValueError, match="either tile or crops_n_layers"):
        everything(image, tile=150, crops_n_layers=1)


def test_composition_by_class_gives_one_segment_for_each_label(segmenter, monkeypatch):
    monkeypatch.setattr(segmenter.model.config, "composition", "classes")
    image, _, names = draw_large_scene(150, 290, 6, POSITIONS)
    found = segmenter(image, tile=150, threshold=0.0, candidate_labels=names, hypothesis_template="a {}")
    assert sorted(segment["label"] for segment in found) == sorted(names)


def test_lists_and_generators_of_images_of_all_sizes(segmenter):
    large = draw_large_scene(150, 290, 1, POSITIONS)[0]
    images = [large, large.crop((0, 0, 100, 80)), large.transpose(Image.Transpose.ROTATE_90)]
    made = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint(), tile=150, batch_size=4, **ARGUMENTS)
    results = made(images)
    for image, listed, streamed in zip(images, results, made(image for image in images), strict=True):
        assert_equal_segments(streamed, listed)
        assert all(segment["mask"].size == image.size for segment in listed)
    assert isinstance(results[0], ComputedSequence) and isinstance(results[1], list)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overlap": 0.2}, "overlap has no effect without tile"),
        ({"tile": 0}, "tile must be the side of a tile in pixels"),
        ({"tile": 0.5}, "tile must be the side of a tile in pixels"),
        ({"tile": 64, "overlap": 0}, "overlap must be a fraction of the tile"),
        ({"tile": 64, "overlap": 16}, "overlap must be a fraction of the tile"),
        ({"tile": 3, "overlap": 0.1}, "overlap by less than a pixel"),
    ],
)
def test_wrong_tiles_raise(segmenter, arguments, message):
    everything = pipeline(
        "mask-generation", model=miniature.checkpoint(), pipeline_class=SamClipMaskGenerationPipeline
    )
    for made in (segmenter, everything):
        with pytest.raises(ValueError, match=message):
            made(Image.new("RGB", (200, 100)), **arguments)


def test_computed_sequences_compute_items_at_access():
    calls = []
    sequence = ComputedSequence(4, lambda index: calls.append(index) or index * 10)
    assert repr(sequence) == "<ComputedSequence of 4 items, computed at access>"
    assert len(sequence) == 4 and not calls
    assert sequence[-1] == 30 and sequence[1:3] == [10, 20] and list(sequence) == [0, 10, 20, 30]
    assert calls == [3, 1, 2, 0, 1, 2, 3]
    with pytest.raises(IndexError):
        sequence[4]
