"""
Tiled inference for large images: overlapping tiles, and results of tiles merged to the result of the image.

    tiles = ImageTiles(height, width, tile=1024, overlap=0.25)
    merged = TiledSegmentation(tiles)              # or TiledMasks, for mask generation
    for box in tiles.boxes:
        merged.add(...)                            # the outputs for this part of the image
    merged.post_process_semantic_segmentation()

Where tiles overlap, each has a weight that decreases linearly to 0 at its inner edges, and the weights of all tiles
sum to 1. Maps are averaged with these weights, so that no edge of a tile is visible. Segments of two tiles are parts
of one object if their masks agree where the tiles overlap. Objects that no tile contains come from an overview, the
whole image at a lower resolution, unless their parts in the tiles agree. Memory: the parts of maps and masks at the
resolution of the image are not larger than a tile, and a merged result has one label map or run-length encodings.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from .image_processing_samclip import argmax_in_chunks, resize_content
from .mask_generation_samclip import decode_rle, distinct_boxes, encode_rle, encode_window, mask_to_box, rle_iou

DEFAULT_OVERLAP = 0.25
# Masks of two tiles belong to one object if their IoU where the tiles overlap is at least this value.
MATCH_THRESHOLD = 0.7
# A mask is cut off by its tile if it is closer to an inner edge than this fraction of the tile's longer side. SAM's
# everything mode uses 20 pixels of images that are resized to 1024.
CUT_TOLERANCE = 0.02
# A part is cut off only if it reaches the edge over at least this many pixels along it.
MIN_CUT_LENGTH = 4
# An object is a sliver if its merged mask has less than this fraction of the area of its largest part. A merged mask
# contains about all of its parts, so the rest of a sliver is where other tiles have more weight.
SLIVER_FRACTION = 0.25
MATCHING_PIXELS = 2**17  # masks are compared on at most about this many pixels
# An object of the overview is used if at most this fraction of it is inside objects that the tiles show completely.
# It is the complement of transformers' default of overlap_mask_area_threshold, 0.8.
MAX_COVERED_FRACTION = 0.2  # also for two parts of one object in a tile
SAME_OBJECT = 0.5  # a higher IoU than this one is possible with one of several disjoint masks
OVERVIEW = -1  # in place of the index of a tile
# Weight of the overview beside those of tiles, which sum to 1: it counts where no tile has a part of an object.
OVERVIEW_WEIGHT = 0.01

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom exclusive


class ImageTiles:
    r"""
    Overlapping tiles that cover an image. All have the same size. They are evenly spaced, so they overlap by `overlap`
    or more.

    Args:
        height, width (`int`):
            Size of the image in pixels.
        tile (`int`):
            Side of a tile in pixels of the image. A side of the image that is shorter than a tile is not divided.
        overlap (`float`, *optional*, defaults to 0.25):
            Overlap of neighboring tiles as a fraction of `tile`, above 0 and at most 0.5.

    Attributes:
        boxes (`list[tuple[int, int, int, int]]`):
            Left, top, right and bottom of the tiles, row by row; right and bottom exclusive.

    Raises:
        ValueError: `tile` or `overlap` is not in these ranges, or the overlap is less than a pixel.
    """

    def __init__(self, height: int, width: int, tile: int, overlap: float | None = None):
        self.height, self.width = height, width
        if not isinstance(tile, Integral) or isinstance(tile, bool) or tile < 1:
            raise ValueError(f"tile must be the side of a tile in pixels, such as 1024; got {tile!r}.")
        overlap = DEFAULT_OVERLAP if overlap is None else overlap
        if not isinstance(overlap, Real) or isinstance(overlap, bool) or not 0 < overlap <= 0.5:
            raise ValueError(
                f"overlap must be a fraction of the tile, above 0 and at most 0.5, such as 0.25; got {overlap!r}."
            )
        shared = int(tile * overlap)
        if shared < 1:
            raise ValueError(f"Tiles of {tile} pixels overlap by less than a pixel: use larger tiles.")
        self.rows: list[tuple[int, int]] = _spans(height, int(tile), shared)
        self.columns: list[tuple[int, int]] = _spans(width, int(tile), shared)
        self.boxes: list[Box] = [
            (left, top, right, bottom) for top, bottom in self.rows for left, right in self.columns
        ]

    def __len__(self) -> int:
        return len(self.boxes)

    def inner_edges(self, index: int) -> list[bool]:
        """Whether left, top, right and bottom of a tile are inside the image."""
        left, top, right, bottom = self.boxes[index]
        return [left > 0, top > 0, right < self.width, bottom < self.height]

    def contain(self, box: Box) -> bool:
        """Whether there is a tile that contains a box of the image."""
        return all(
            any(start <= box[axis] and box[axis + 2] <= end for start, end in spans)
            for axis, spans in enumerate((self.columns, self.rows))
        )

    def neighbors(self) -> Iterator[tuple[int, int, Box]]:
        """All pairs of tiles that overlap, and the region that they share."""
        for one in range(len(self)):
            row, column = divmod(one, len(self.columns))
            for other_row in range(row, len(self.rows)):
                if self.rows[other_row][0] >= self.rows[row][1]:
                    break
                for other_column, (left, right) in enumerate(self.columns):
                    other = other_row * len(self.columns) + other_column
                    if other > one and left < self.columns[column][1] and right > self.columns[column][0]:
                        yield one, other, _intersect(self.boxes[one], self.boxes[other])

    def blocks(self, region: Box | None = None) -> Iterator[tuple[Box, dict[int, torch.Tensor]]]:
        """Disjoint regions that cover `region`, by default the image, row by row, and the tiles that contain each
        region with their weights `(region_height, region_width)`."""
        left, top, right, bottom = (0, 0, self.width, self.height) if region is None else region
        columns = list(_blocks(self.columns, left, right))
        for start_y, end_y, rows in _blocks(self.rows, top, bottom):
            for start_x, end_x, own_columns in columns:
                yield (
                    (start_x, start_y, end_x, end_y),
                    {
                        row * len(self.columns) + column: row_weights[:, None] * column_weights
                        for row, row_weights in rows.items()
                        for column, column_weights in own_columns.items()
                    },
                )


def _spans(length: int, tile: int, shared: int) -> list[tuple[int, int]]:
    """Start and end of evenly spaced tiles along a side of the image. Two neighbors share at least `shared` pixels."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - shared) // (tile - shared))
    starts = [position * (length - tile) // (count - 1) for position in range(count)]
    return [(start, start + tile) for start in starts]


def _blocks(spans, start: int, end: int) -> Iterator[tuple[int, int, dict[int, torch.Tensor]]]:
    """Divides a range at the edges of all tiles. Yields start, end, and the weights `(end - start,)` of the tiles."""
    edges = sorted({start, end} | {edge for span in spans for edge in span if start < edge < end})
    for first, last in pairwise(edges):
        position = torch.arange(first, last, dtype=torch.float32) + 0.5
        weights = {}
        for index, (span_start, span_end) in enumerate(spans):
            if span_start >= last or span_end <= first:
                continue
            weight = torch.ones(last - first)
            if index > 0:
                weight = torch.minimum(weight, (position - span_start) / (spans[index - 1][1] - span_start))
            if index < len(spans) - 1:
                weight = torch.minimum(weight, (span_end - position) / (span_end - spans[index + 1][0]))
            weights[index] = weight
        total = torch.stack(list(weights.values())).sum(dim=0)
        yield first, last, {index: weight / total for index, weight in weights.items()}


class TiledMap:
    r"""
    The label map of the CLIP head, from the logits of tiles. Only the logits of the tiles that still overlap the next
    ones are kept.

    Args:
        tiles ([`ImageTiles`]):
            The tiles.

    Attributes:
        label_map (`torch.Tensor` of shape `(height, width)`, `int32`):
            The label with the highest weighted mean of logits, complete after the last tile.
    """

    def __init__(self, tiles: ImageTiles):
        self.tiles = tiles
        self.label_map = torch.zeros(tiles.height, tiles.width, dtype=torch.int32)
        self.logits: dict[int, tuple[torch.Tensor, list[float]]] = {}
        self.next = 0
        self.finished = 0  # number of rows of pixels

    def add(self, logits: torch.Tensor, content_size) -> None:
        """Adds the logits `(num_labels, grid_height, grid_width)` of the next tile, whose image has `content_size`
        (height and width in cells of the logits)."""
        self.logits[self.next] = logits.float().cpu(), list(content_size)
        self.next += 1
        row, column = divmod(self.next, len(self.tiles.columns))
        if column:
            return
        # No later tile covers the rows above the next row of tiles.
        bottom = self.tiles.rows[row][0] if row < len(self.tiles.rows) else self.tiles.height
        for region, weights in self.tiles.blocks((0, self.finished, self.tiles.width, bottom)):
            self._fill(region, weights)
        self.finished = bottom
        self.logits = {i: logits for i, logits in self.logits.items() if self.tiles.boxes[i][3] > bottom}

    def _fill(self, region: Box, weights: dict[int, torch.Tensor]) -> None:
        def blend(chunk: slice) -> torch.Tensor:
            parts = [
                weight * _resize_region(*self.logits[index], self.tiles.boxes[index], region, chunk)
                for index, weight in weights.items()
            ]
            return torch.stack(parts).sum(dim=0)

        num_labels = len(self.logits[next(iter(weights))][0])
        left, top, right, bottom = region
        label, _ = argmax_in_chunks(num_labels, blend, (bottom - top, right - left))
        self.label_map[top:bottom, left:right] = label


def _resize_region(maps: torch.Tensor, content_size, box: Box, region: Box, chunk=slice(None)) -> torch.Tensor:
    """The part of a tile's maps in a region of the image `(num_maps, region_height, region_width)`."""
    left, top, right, bottom = box
    own_region = (region[0] - left, region[1] - top, region[2] - left, region[3] - top)
    return resize_content(maps[chunk], content_size, (bottom - top, right - left), own_region)


@dataclass
class MapMask:
    r"""
    A mask of a tile by its logits.

    logits (`torch.Tensor` of shape `(window_height, window_width)`):
        The part of the mask logits that contains the mask.
    origin (`tuple[int, int]`):
        Row and column of the window in the map of the tile.
    content_size (`tuple[float, float]`):
        Height and width of the tile in cells of the map.
    tile_box (`tuple[int, int, int, int]`):
        The tile in the image.
    """

    logits: torch.Tensor
    origin: tuple[int, int]
    content_size: tuple[float, float]
    tile_box: Box
    box: Box
    area: float

    @classmethod
    def from_map(cls, logits: torch.Tensor, content_size, tile_box: Box, threshold: float) -> "MapMask | None":
        """From the mask logits `(height, width)` of a tile; `None` if no cell has a probability above `threshold`."""
        rows, columns = (
            min(side, int(np.ceil(cells))) for side, cells in zip(logits.shape, content_size, strict=True)
        )
        inside = logits[:rows, :columns].float().sigmoid() > threshold
        marked = [inside.any(dim=1).nonzero().flatten(), inside.any(dim=0).nonzero().flatten()]
        if not len(marked[0]):
            return None
        left, top, right, bottom = tile_box
        scale = [side / cells for side, cells in zip((bottom - top, right - left), content_size, strict=True)]
        # A pixel between two cells is interpolated, so the window has one more cell on each side.
        start = [max(0, int(cells[0]) - 1) for cells in marked]
        end = [min(side, int(cells[-1]) + 2) for side, cells in zip(logits.shape, marked, strict=True)]
        box = (
            max(left, left + int((start[1] - 0.5) * scale[1])),
            max(top, top + int((start[0] - 0.5) * scale[0])),
            min(right, left + int(np.ceil((end[1] + 0.5) * scale[1]))),
            min(bottom, top + int(np.ceil((end[0] + 0.5) * scale[0]))),
        )
        window = logits[start[0] : end[0], start[1] : end[1]].to("cpu", torch.float16).clone()
        area = float(inside.sum()) * scale[0] * scale[1]
        return cls(window, (start[0], start[1]), tuple(content_size), tile_box, box, area)

    def probability(self, region: Box) -> torch.Tensor:
        """Probabilities `(region_height, region_width)` in a region of the image, 0 outside the window."""
        result = torch.zeros(region[3] - region[1], region[2] - region[0])
        part = _intersect(region, self.box)
        if part[0] >= part[2] or part[1] >= part[3]:
            return result
        left, top, right, bottom = self.tile_box
        own = (part[0] - left, part[1] - top, part[2] - left, part[3] - top)
        resized = resize_content(
            self.logits[None].float(), self.content_size, (bottom - top, right - left), own, self.origin
        )[0]
        result[_slices(part, region)] = resized.sigmoid()
        return result


@dataclass
class BinaryMask:
    r"""
    A binary mask of a tile.

    bits (`np.ndarray` of type uint8):
        The pixels in `box`, row by row, eight in a byte.
    box (`tuple[int, int, int, int]`):
        The bounding box of the mask in the image.
    """

    bits: np.ndarray
    box: Box
    area: float

    @classmethod
    def from_rle(cls, encoding: dict, box: Box, tile_box: Box) -> "BinaryMask":
        """From a run-length encoding of the tile and the bounding box of the mask in the tile."""
        left, top, right, bottom = box
        window = decode_rle(encoding)[top:bottom, left:right]
        x, y = tile_box[:2]
        return cls(np.packbits(window), (left + x, top + y, right + x, bottom + y), float(window.sum()))

    def probability(self, region: Box) -> torch.Tensor:
        """1 inside and 0 outside the mask, `(region_height, region_width)`, in a region of the image."""
        result = torch.zeros(region[3] - region[1], region[2] - region[0])
        part = _intersect(region, self.box)
        if part[0] >= part[2] or part[1] >= part[3]:
            return result
        height, width = self.box[3] - self.box[1], self.box[2] - self.box[0]
        window = torch.from_numpy(np.unpackbits(self.bits, count=height * width).reshape(height, width))
        result[_slices(part, region)] = window[_slices(part, self.box)].float()
        return result


@dataclass
class TileSegment:
    """A segment of a tile: the index of the tile or `OVERVIEW`, its mask, its score from 0 to 1, the probabilities of
    the labels `(num_labels,)` or `None`, and its embedding `(projection_dim,)` or `None`."""

    tile: int
    mask: MapMask | BinaryMask
    score: float
    probabilities: torch.Tensor | None = None
    embeds: torch.Tensor | None = None

    @property
    def label(self) -> int | None:
        return None if self.probabilities is None else int(self.probabilities.argmax())


def match_segments(
    tiles: ImageTiles, segments: Sequence[TileSegment], threshold: float, may_nest: bool = False
) -> list[list[int]]:
    r"""
    Groups the segments of all tiles by object.

    Two segments of overlapping tiles are parts of one object if the IoU of their masks in the region that both tiles
    share is at least `MATCH_THRESHOLD`. Each segment has at most one such partner in a tile. Several segments that
    the edge of their tile cuts off in that region, such as the legs of a table, are parts of one object if they
    match a segment of the other tile together and have its label. Segments of one tile are never joined through
    segments of other tiles, unless their tile cuts off both of them.

    With `may_nest`, a segment may be a part of another one of its tile, as in everything mode. Such a segment and the
    one that contains it are different objects: segments of a tile are joined only if they are disjoint, and groups
    only if their segments agree wherever tiles overlap, with an IoU above `SAME_OBJECT`.

    Args:
        tiles ([`ImageTiles`]), segments (`Sequence[TileSegment]`):
            The tiles and their segments.
        threshold (`float`):
            A pixel is inside a mask if its probability is above this value.
        may_nest (`bool`, *optional*, defaults to `False`):
            See above.

    Returns:
        `list[list[int]]`: For each object, the indices of its segments.
    """
    by_tile: list[list[int]] = [[] for _ in range(len(tiles))]
    for index, segment in enumerate(segments):
        by_tile[segment.tile].append(index)
    matches: list[tuple[float, list[int]]] = []
    for one, other, shared in tiles.neighbors():
        own = [
            [i for i in by_tile[tile] if not _is_empty(_intersect(segments[i].mask.box, shared))]
            for tile in (one, other)
        ]
        if own[0] and own[1]:
            matches += _match_pair(tiles, segments, own, shared, threshold, may_nest)

    is_cut = [_is_cut(tiles, segment) for segment in segments]
    groups = {index: [index] for index in range(len(segments))}
    group_of = list(range(len(segments)))
    for _, indices in sorted(matches, key=lambda match: -match[0]):
        joined = {group_of[index] for index in indices}
        members = [groups[number] for number in joined]
        conflicts = any(
            segments[i].tile == segments[j].tile
            and not (is_cut[i] and is_cut[j] and (not may_nest or _are_disjoint(segments[i], segments[j], threshold)))
            for group, later in combinations(members, 2)
            for i in group
            for j in later
        )
        if may_nest and not conflicts:
            conflicts = not _agree(tiles, [segments[i] for group in members for i in group], threshold)
        if not conflicts:
            kept = min(joined)
            for number in joined - {kept}:
                groups[kept] += groups.pop(number)
            for index in groups[kept]:
                group_of[index] = kept
    return list(groups.values())


def _are_disjoint(one: TileSegment, other: TileSegment, threshold: float) -> bool:
    """Whether less than `MAX_COVERED_FRACTION` of the smaller one of two segments is inside the other one."""
    region = _intersect(one.mask.box, other.mask.box)
    if _is_empty(region):
        return True
    step = _matching_step(region)
    inside = [segment.mask.probability(region)[::step, ::step] > threshold for segment in (one, other)]
    intersection = float((inside[0] & inside[1]).sum()) * step**2
    return intersection < MAX_COVERED_FRACTION * min(one.mask.area, other.mask.area)


def _agree(tiles: ImageTiles, parts: Sequence[TileSegment], threshold: float) -> bool:
    """Whether the IoU of the parts in any two tiles that overlap is above `SAME_OBJECT` where they do."""
    by_tile: dict[int, list[TileSegment]] = {}
    for part in parts:
        by_tile.setdefault(part.tile, []).append(part)
    for one, other in combinations(by_tile, 2):
        shared = _intersect(tiles.boxes[one], tiles.boxes[other])
        if _is_empty(shared):
            continue
        step = _matching_step(shared)
        inside = [
            torch.stack([part.mask.probability(shared)[::step, ::step] > threshold for part in by_tile[tile]]).any(0)
            for tile in (one, other)
        ]
        if (inside[0] | inside[1]).any() and _iou(*inside) <= SAME_OBJECT:
            return False
    return True


def _match_pair(
    tiles: ImageTiles,
    segments: Sequence[TileSegment],
    own: list[list[int]],
    shared: Box,
    threshold: float,
    may_nest: bool,
) -> list[tuple[float, list[int]]]:
    """The matches between the segments of two tiles, with indices `own`, in the region that both share: IoU and
    indices."""
    step = _matching_step(shared)
    inside = [
        torch.stack(
            [(segments[i].mask.probability(shared)[::step, ::step] > threshold).flatten() for i in indices]
        ).float()
        for indices in own
    ]
    areas = [masks.sum(dim=1) for masks in inside]
    intersection = inside[0] @ inside[1].T
    iou = intersection / (areas[0][:, None] + areas[1] - intersection).clamp_min(1)
    matches, partners = [], set()
    for pair in iou.flatten().argsort(descending=True).tolist():
        a, b = divmod(pair, len(own[1]))
        if iou[a, b] < MATCH_THRESHOLD:
            break
        if own[0][a] not in partners and own[1][b] not in partners:
            partners |= {own[0][a], own[1][b]}
            matches.append((float(iou[a, b]), [own[0][a], own[1][b]]))
    for side in (0, 1):
        covered = (intersection if side == 0 else intersection.T) / areas[side][:, None].clamp_min(1)
        for column, whole in enumerate(own[1 - side]):
            if whole in partners:
                continue
            parts: list[int] = []
            for row in areas[side].argsort(descending=True, stable=True).tolist():
                segment = segments[own[side][row]]
                if (
                    own[side][row] not in partners
                    and covered[row, column] >= MATCH_THRESHOLD
                    and segment.label == segments[whole].label
                    and _is_cut(tiles, segment, shared)
                    and not (
                        may_nest and any(not _are_disjoint(segment, segments[own[side][i]], threshold) for i in parts)
                    )
                ):
                    parts.append(row)
            if len(parts) < 2:
                continue
            union, other = inside[side][parts].amax(dim=0), inside[1 - side][column]
            together = float((union * other).sum() / torch.maximum(union, other).sum().clamp_min(1))
            if together >= MATCH_THRESHOLD:
                matches.append((together, [whole, *(own[side][row] for row in parts)]))
    return matches


def _is_cut(tiles: ImageTiles, segment: TileSegment, region: Box | None = None) -> bool:
    """Whether the mask of a segment reaches an inner edge of its tile, or one that is an edge of `region`."""
    if segment.tile == OVERVIEW:
        return False
    box = tiles.boxes[segment.tile]
    tolerance = CUT_TOLERANCE * max(box[2] - box[0], box[3] - box[1])
    return any(
        is_inner and abs(own - edge) <= tolerance and (region is None or edge == region_edge)
        for is_inner, own, edge, region_edge in zip(
            tiles.inner_edges(segment.tile), segment.mask.box, box, box if region is None else region, strict=True
        )
    )


def _whole_parts(tiles: ImageTiles, parts: Sequence[TileSegment], threshold: float) -> list[TileSegment]:
    """The segments of an object that no inner edge of their tiles cuts off. A segment is cut off at an edge if it has
    `MIN_CUT_LENGTH` or more pixels along the edge where no other segment of the object continues on the other side.
    Without a segment that is cut off, others may be cut off, so the search repeats until nothing changes. A segment of
    the overview completes all of them."""
    kept = list(parts)
    if any(part.tile == OVERVIEW for part in parts):
        return kept
    while True:
        whole = [
            part
            for part in kept
            if not any(
                _cut_length(tiles, part, kept, side, threshold, is_confirmed=len(kept) > 1) >= MIN_CUT_LENGTH
                for side in range(4)
            )
        ]
        if len(whole) == len(kept):
            return kept
        kept = whole


def _complete_parts(tiles: ImageTiles, parts: Sequence[TileSegment], threshold: float) -> list[TileSegment]:
    """The segments of an object that show all of it: those that reach no inner edge of their tile over
    `MIN_CUT_LENGTH` pixels or more. The overview shows all of it at a low resolution, and is not among them."""
    is_confirmed = len(parts) > 1
    return [
        part
        for part in parts
        if part.tile != OVERVIEW
        and all(_cut_length(tiles, part, [], side, threshold, is_confirmed) < MIN_CUT_LENGTH for side in range(4))
    ]


def _cut_length(
    tiles: ImageTiles,
    part: TileSegment,
    others: Sequence[TileSegment],
    side: int,
    threshold: float,
    is_confirmed: bool,
) -> int:
    """The number of pixels along a side of its tile (0 left, 1 top, 2 right, 3 bottom) at which a segment reaches the
    edge, and none of the others continues. A segment reaches the edge within `CUT_TOLERANCE`; one that others confirm
    touches it, because an object may end close to an edge."""
    box = tiles.boxes[part.tile]
    tolerance = CUT_TOLERANCE * max(box[2] - box[0], box[3] - box[1])
    edge = box[side]
    if not tiles.inner_edges(part.tile)[side] or abs(part.mask.box[side] - edge) > tolerance:
        return 0
    width = 1 if is_confirmed else int(tolerance) + 1
    strip = list(part.mask.box)
    strip[side], strip[(side + 2) % 4] = edge, edge + width if side < 2 else edge - width
    region: Box = (strip[0], strip[1], strip[2], strip[3])
    axis = side % 2
    touches = (part.mask.probability(region) > threshold).any(dim=1 - axis)
    for other in others:
        other_box = tiles.boxes[other.tile]
        if not other_box[axis] < edge < other_box[axis + 2]:
            continue
        if (other.mask.probability(region) > threshold).any():
            # Along the edge, the other tile has nearly all weight, so that its mask is the one that counts there.
            start = region[1 - axis]
            touches[max(0, other_box[1 - axis] - start) : max(0, other_box[3 - axis] - start)] = False
    return int(touches.sum())


def add_overview(
    tiles: ImageTiles,
    objects: Sequence[Sequence[TileSegment]],
    overview: Sequence[TileSegment],
    threshold: float,
    max_covered: float = MAX_COVERED_FRACTION,
) -> list[list[TileSegment]]:
    r"""
    Adds the segments of the overview to the objects of the tiles.

    A segment of the overview completes an object that the tiles cut off if their IoU is above `SAME_OBJECT`: it is
    used where the tiles show no part of the object. If the tiles show the object completely, it is not used. Without
    such an object, it is an object of its own, unless more than a fraction `max_covered` of it is inside objects that
    the tiles show completely, as in a group of small objects. Other objects that the tiles cut off and that are inside
    a used segment, by at least `MATCH_THRESHOLD` of their area, are its parts and are removed.

    Args:
        tiles ([`ImageTiles`]), objects (`Sequence[Sequence[TileSegment]]`):
            The tiles, and the segments of each object in them.
        overview (`Sequence[TileSegment]`):
            The segments of the overview.
        threshold (`float`):
            A pixel is inside a mask if its probability is above this value.
        max_covered (`float`, *optional*, defaults to `MAX_COVERED_FRACTION`):
            See above.

    Returns:
        `list[list[TileSegment]]`: The segments of each object.
    """
    candidates: list[tuple[TileSegment, torch.Tensor]] = []
    for segment in sorted(overview, key=lambda segment: -segment.score):
        sample = _sample(tiles, [segment], threshold)
        if sample.any() and all(_iou(sample, other) < MATCH_THRESHOLD for _, other in candidates):
            candidates.append((segment, sample))
    covered = [torch.zeros_like(sample) for _, sample in candidates]
    best: list[tuple[float, int]] = [(0.0, -1)] * len(candidates)  # IoU with the most similar object, and its position
    incomplete: dict[int, torch.Tensor] = {}
    for number, parts in enumerate(objects):
        if all(_is_empty(_intersect(part.mask.box, large.mask.box)) for part in parts for large, _ in candidates):
            continue
        own = _sample(tiles, parts, threshold)
        is_whole = len(_whole_parts(tiles, parts, threshold)) == len(parts)
        if not is_whole:
            incomplete[number] = own
        for position, (_, sample) in enumerate(candidates):
            best[position] = max(best[position], (_iou(own, sample), number))
            if is_whole:
                covered[position] |= own & sample
    result: list[list[TileSegment]] = [list(parts) for parts in objects]
    used = _sample(tiles, [], threshold)
    for (segment, sample), inside, (iou, number) in zip(candidates, covered, best, strict=True):
        if iou > SAME_OBJECT:
            if number in incomplete:
                result[number].append(segment)
                del incomplete[number]
                used |= sample
        elif inside.sum() <= max_covered * sample.sum():
            result.append([segment])
            used |= sample
    removed = {number for number, own in incomplete.items() if (own & used).sum() >= MATCH_THRESHOLD * own.sum()}
    return [parts for number, parts in enumerate(result) if number not in removed]


def _matching_step(region: Box) -> int:
    """The distance of the pixels of a region on which masks are compared."""
    return int(np.ceil(np.sqrt((region[2] - region[0]) * (region[3] - region[1]) / MATCHING_PIXELS)))


def _sample(tiles: ImageTiles, parts: Sequence[TileSegment], threshold: float) -> torch.Tensor:
    """Whether pixels are inside one of the masks, in a grid of about `MATCHING_PIXELS` pixels of the image."""
    step = _matching_step((0, 0, tiles.width, tiles.height))
    result = torch.zeros(-(-tiles.height // step), -(-tiles.width // step), dtype=torch.bool)
    for part in parts:
        for region, _ in tiles.blocks(part.mask.box):
            left, top, right, bottom = region
            inside = part.mask.probability(region)[-top % step :: step, -left % step :: step] > threshold
            result[-(-top // step) : -(-bottom // step), -(-left // step) : -(-right // step)] |= inside
    return result


def _iou(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one & other).sum() / (one | other).sum().clamp_min(1))


def _is_sliver(window: np.ndarray, parts: Sequence[TileSegment]) -> bool:
    """Whether the merged mask of an object is empty or a small rest of its parts."""
    area = int(window.sum())
    return area == 0 or area < SLIVER_FRACTION * max(part.mask.area for part in parts)


class TiledSegmentation:
    r"""
    Semantic, instance and panoptic segmentation of an image from the outputs for its tiles.

    Args:
        tiles ([`ImageTiles`]):
            The tiles.
        mask_threshold (`float`, *optional*, defaults to 0.5):
            A mask contains the pixels with a probability above this value.
        with_map (`bool`, *optional*, defaults to `True`):
            Whether the label map of the CLIP head is computed. Semantic segmentation without a background uses it
            outside all segments.
    """

    def __init__(self, tiles: ImageTiles, mask_threshold: float = 0.5, with_map: bool = True):
        self.tiles = tiles
        self.mask_threshold = mask_threshold
        self.dense = TiledMap(tiles) if with_map else None
        self.segments: list[TileSegment] = []
        self.overview: list[TileSegment] = []
        self.next = 0
        self.background = -1
        self.is_by_class = False

    def add(self, outputs) -> None:
        """Adds the outputs of [`SamClipForImageSegmentation`] for the next tiles, in the order of `tiles.boxes`."""
        for index in range(len(outputs.logits)):
            self.background = int(outputs.background_label_ids[index])
            if self.dense is not None and (self.background < 0 or outputs.get("segment_masks") is None):
                self.dense.add(outputs.logits[index], outputs.content_sizes[index].tolist())
            if outputs.get("segment_masks") is not None:
                self.is_by_class = outputs.get("segment_embeds") is None
                self.segments += self._read_segments(outputs, index, self.next, self.tiles.boxes[self.next])
            self.next += 1

    def add_overview(self, outputs) -> None:
        """Adds the outputs for the whole image, for objects that no tile contains. Its batch size is 1, and the
        composition is that of segments: segments of classes have no objects."""
        self.overview += [
            segment
            for segment in self._read_segments(outputs, 0, OVERVIEW, (0, 0, self.tiles.width, self.tiles.height))
            if segment.label != int(outputs.background_label_ids[0]) and not self.tiles.contain(segment.mask.box)
        ]

    def _read_segments(self, outputs, index: int, tile: int, box: Box) -> Iterator[TileSegment]:
        """The segments of an image of a batch, which is a tile or the overview, and covers a box of the image."""
        masks, scores = outputs.segment_masks[index], outputs.segment_scores[index]
        scale = masks.shape[-1] / outputs.logits.shape[-1]
        content_size = [cells * scale for cells in outputs.content_sizes[index].tolist()]
        probabilities = outputs.get("label_scores")  # the pipeline's, which may be independent of each other
        if probabilities is None:
            probabilities = outputs.segment_logits.softmax(dim=-1)
        probabilities = probabilities[index].float().cpu()
        for number in (scores > 0).nonzero().flatten().tolist():
            mask = MapMask.from_map(masks[number], content_size, box, self.mask_threshold)
            if mask is not None:
                yield TileSegment(tile, mask, float(scores[number]), probabilities[number])

    def _objects(self) -> tuple[list[list[TileSegment]], torch.Tensor]:
        """The segments of each object, and the probabilities of its labels `(num_objects, num_labels)`: the mean over
        its segments, weighted by area."""
        if self.is_by_class:
            by_label: dict[int | None, list[int]] = {}
            for index, segment in enumerate(self.segments):
                by_label.setdefault(segment.label, []).append(index)
            objects = [[self.segments[index] for index in group] for group in by_label.values()]
        else:
            groups = match_segments(self.tiles, self.segments, self.mask_threshold)
            objects = [[self.segments[index] for index in group] for group in groups]
            objects = add_overview(self.tiles, objects, self.overview, self.mask_threshold)
        means = []
        for parts in objects:
            areas = torch.tensor([part.mask.area for part in parts])
            probabilities = [part.probabilities for part in parts]
            means.append(sum(a * p for a, p in zip(areas, probabilities, strict=True)) / areas.sum())
        return objects, torch.stack(means) if means else torch.zeros(0, 1)

    def _assign(
        self, objects: Sequence[Sequence[TileSegment]], selected: Sequence[bool]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The object of each pixel `(height, width)`, -1 outside all, the area of each object's mask in pixels
        `(num_objects,)`, and the number of pixels that are assigned to it `(num_objects,)`. Objects of the overview
        are below those of the tiles, which have a higher resolution."""
        tiles = self.tiles
        result = torch.full((tiles.height, tiles.width), -1, dtype=torch.int32)
        area = torch.zeros(len(objects), dtype=torch.int64)
        assigned = torch.zeros(len(objects), dtype=torch.int64)
        # For each tile and, as the last one, for the overview: segments by object.
        members: list[dict[int, list[TileSegment]]] = [{} for _ in range(len(tiles) + 1)]
        for number, parts in enumerate(objects):
            if selected[number]:
                for part in parts:
                    members[part.tile].setdefault(number, []).append(part)
        fading = [self._is_fading(parts) for parts in objects]
        is_in_tiles = [any(part.tile != OVERVIEW for part in parts) for parts in objects]
        for region, weights in tiles.blocks():
            left, top, right, bottom = region
            best = torch.zeros(bottom - top, right - left)
            winner = torch.full(best.shape, -1, dtype=torch.int32)
            weights[OVERVIEW] = torch.tensor(OVERVIEW_WEIGHT)
            for number in sorted({number for tile in weights for number in members[tile]}):
                probability = _blend(
                    [part for tile in weights for part in members[tile].get(number, [])],
                    weights,
                    region,
                    fading[number],
                )
                if probability is None:
                    continue
                inside, value = probability[0] > self.mask_threshold, probability[1]
                area[number] += inside.sum()
                value = (value + is_in_tiles[number]) * inside
                winner[value > best] = number
                best = torch.maximum(best, value)
            result[top:bottom, left:right] = winner
            assigned += torch.bincount(winner.flatten() + 1, minlength=len(objects) + 1)[1:]
        return result, area, assigned

    def _is_fading(self, parts: Sequence[TileSegment]) -> bool:
        """Whether an object is a single segment that its tile cuts off."""
        return not self.is_by_class and len(parts) == 1 and _is_cut(self.tiles, parts[0])

    def post_process_semantic_segmentation(self) -> torch.Tensor:
        """The label map `(height, width)` of type `torch.int32`, see
        [`SamClipImageProcessor.post_process_semantic_segmentation`]."""
        objects, probabilities = self._objects()
        dense = self.dense.label_map if self.dense is not None and self.dense.next else None
        if dense is not None and not objects:
            return dense
        label_map, _, _ = self._assign(objects, [True] * len(objects))
        labels = torch.cat([probabilities.argmax(dim=-1).int(), torch.tensor([max(0, self.background)]).int()])
        for number, own in enumerate(label_map):  # in place, and row by row without large arrays of indices
            own.copy_(labels[own] if dense is None else torch.where(own >= 0, labels[own], dense[number]))
        return label_map

    def post_process_panoptic_segmentation(
        self, threshold: float = 0.5, overlap_mask_area_threshold: float = 0.8
    ) -> dict[str, Any]:
        """`segmentation` `(height, width)` and `segments_info`, see
        [`SamClipImageProcessor.post_process_panoptic_segmentation`]."""
        objects, probabilities = self._objects()
        if not objects:
            segmentation = torch.zeros(self.tiles.height, self.tiles.width, dtype=torch.int32)
            return {"segmentation": segmentation, "segments_info": []}
        scores, labels = probabilities.max(dim=-1)
        selected = (scores >= threshold) & (labels != self.background)
        winner, area, counts = self._assign(objects, selected.tolist())
        largest = torch.tensor([max(part.mask.area for part in parts) for parts in objects])
        is_sliver = selected & (area > 0) & (area < SLIVER_FRACTION * largest)
        if not self.is_by_class and is_sliver.any():  # their pixels belong to the other objects that contain them
            selected &= ~is_sliver
            winner, area, counts = self._assign(objects, selected.tolist())
        ids = torch.zeros(len(objects) + 1, dtype=torch.int32)  # the last one is for pixels outside all objects
        segments_info: list[dict] = []
        for number in range(len(objects)):
            if counts[number] == 0 or counts[number] < overlap_mask_area_threshold * area[number]:
                continue
            ids[number] = len(segments_info) + 1
            segments_info.append(
                {
                    "id": len(segments_info) + 1,
                    "label_id": int(labels[number]),
                    "was_fused": False,
                    "score": float(scores[number]),
                }
            )
        for row in winner:  # without large arrays of indices
            row.copy_(ids[row])
        return {"segmentation": winner, "segments_info": segments_info}

    def encode_segments(self, segmentation: torch.Tensor, numbers: Sequence[int]) -> list[dict]:
        """Run-length encodings of the regions of a map `(height, width)` with these numbers, such as the ids of
        `post_process_panoptic_segmentation`."""
        boxes: dict[int, Box] = {}
        for region, _ in self.tiles.blocks():
            for number in segmentation[_slices(region, (0, 0, 0, 0))].unique().tolist():
                left, top, right, bottom = boxes.get(number, region)
                boxes[number] = (
                    min(left, region[0]),
                    min(top, region[1]),
                    max(right, region[2]),
                    max(bottom, region[3]),
                )
        encodings = []
        for number in numbers:
            box = boxes[number]
            window = (segmentation[_slices(box, (0, 0, 0, 0))] == number).numpy()
            encodings.append(encode_window(window, box[0], box[1], self.tiles.height, self.tiles.width))
        return encodings

    def independent_segments(self, threshold: float, is_semantic: bool) -> list[tuple[float, int, dict]]:
        """Score, label and run-length encoding of each object and each label whose score reaches the threshold, in
        descending order of scores. With `is_semantic`, of each label, with the union of its objects.

        Parts that an inner edge of their tile cuts off, and slivers, are not objects. Unions contain them: a region of
        a label may continue in another object, and without its part the region has a hole."""
        tiles = self.tiles
        objects, scores = self._objects()
        unions: dict[int, np.ndarray] = {}
        found = []
        for parts, own_scores in zip(objects, scores, strict=True):
            labels = (own_scores >= threshold).nonzero().flatten().tolist()
            if not labels:
                continue
            keeps_all = is_semantic or self.is_by_class
            if not keeps_all:
                parts = _whole_parts(tiles, parts, self.mask_threshold)
                if not parts:
                    continue
            window, left, top = _merge_masks(tiles, parts, self.mask_threshold, self._is_fading(parts))
            if not window.any() or (not keeps_all and _is_sliver(window, parts)):
                continue
            encoding = encode_window(window, left, top, tiles.height, tiles.width)
            found += [(float(own_scores[label]), label, encoding) for label in labels]
            if is_semantic:
                for label in labels:
                    union = unions.setdefault(label, np.zeros((tiles.height, tiles.width), dtype=bool))
                    union[top : top + window.shape[0], left : left + window.shape[1]] |= window
        if is_semantic:
            highest: dict[int, float] = {}
            for score, label, _ in found:
                highest[label] = max(score, highest.get(label, 0.0))
            found = [(highest[label], label, encode_rle(union)) for label, union in unions.items()]
        return sorted(found, key=lambda entry: -entry[0])


def _merge_masks(
    tiles: ImageTiles, parts: Sequence[TileSegment], threshold: float, is_fading: bool
) -> tuple[np.ndarray, int, int]:
    """The mask of an object inside the bounding box of its parts, `(box_height, box_width)`, and left and top of the
    box."""
    box = (
        min(part.mask.box[0] for part in parts),
        min(part.mask.box[1] for part in parts),
        max(part.mask.box[2] for part in parts),
        max(part.mask.box[3] for part in parts),
    )
    window = np.zeros((box[3] - box[1], box[2] - box[0]), dtype=bool)
    for region, weights in tiles.blocks(box):
        weights[OVERVIEW] = torch.tensor(OVERVIEW_WEIGHT)
        blended = _blend([part for part in parts if part.tile in weights], weights, region, is_fading)
        if blended is not None:
            window[_slices(region, box)] = (blended[0] > threshold).numpy()
    return window, box[0], box[1]


def _blend(
    segments: Sequence[TileSegment], weights: dict[int, torch.Tensor], region: Box, is_fading: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    The mask of an object in a region, from its segments in the tiles of the region: the weighted mean of their
    probabilities `(region_height, region_width)`, and the weighted sum of probabilities times scores. `None` if the
    object is outside the region.

    The mean is over the tiles that have a segment of the object; with `is_fading`, over all tiles, so that a segment
    that its tile cuts off ends where the other tiles have more weight.
    """
    if all(_is_empty(_intersect(segment.mask.box, region)) for segment in segments):
        return None
    by_tile: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for segment in segments:
        probability = segment.mask.probability(region)
        value = probability * segment.score
        if segment.tile in by_tile:
            earlier = by_tile[segment.tile]
            probability, value = torch.maximum(earlier[0], probability), torch.maximum(earlier[1], value)
        by_tile[segment.tile] = probability, value
    shape = (region[3] - region[1], region[2] - region[0])
    total, probability, value = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    for tile, (own_probability, own_value) in by_tile.items():
        total += weights[tile]
        probability += weights[tile] * own_probability
        value += weights[tile] * own_value
    return (probability if is_fading else probability / total), value


class TiledMasks:
    r"""
    Masks of an image from the masks of its tiles ("everything mode"). A mask that is cut off by an inner edge of its
    tile and does not continue in the tile beyond the edge is removed, as SAM removes masks at the edges of crops. If a
    tile shows all of an object, the mask of this tile is used. Only masks that all tiles cut off are put together.
    Masks of the overview are for objects that no tile contains.

    Args:
        tiles ([`ImageTiles`]):
            The tiles.
    """

    def __init__(self, tiles: ImageTiles):
        self.tiles = tiles
        self.segments: list[TileSegment] = []
        self.overview: list[TileSegment] = []

    def add(
        self,
        index: int,
        encodings: Sequence[dict],
        scores: torch.Tensor,
        boxes: torch.Tensor,
        embeds: torch.Tensor | None = None,
    ) -> None:
        """Adds the masks of a tile: run-length encodings of the tile, predicted IoUs `(num_masks,)`, boxes
        `(num_masks, 4)` with inclusive right and bottom, as `filter_masks` returns them, and optionally embeddings
        `(num_masks, projection_dim)`."""
        for number, (encoding, (left, top, right, bottom)) in enumerate(zip(encodings, boxes.tolist(), strict=True)):
            mask = BinaryMask.from_rle(encoding, (left, top, right + 1, bottom + 1), self.tiles.boxes[index])
            own = None if embeds is None else embeds[number]
            self.segments.append(TileSegment(index, mask, float(scores[number]), embeds=own))

    def add_overview(
        self,
        encodings: Sequence[dict],
        scores: torch.Tensor,
        embeds: torch.Tensor | None = None,
    ) -> None:
        """Adds the masks of the image at a lower resolution, see `add`. Those that a tile contains have no effect."""
        image_box = (0, 0, self.tiles.width, self.tiles.height)
        for number, encoding in enumerate(encodings):
            logits = torch.from_numpy(decode_rle(encoding).copy()) * 20.0 - 10
            mask = MapMask.from_map(logits, logits.shape, image_box, 0.5)
            if mask is not None and not self.tiles.contain(mask.box):
                own = None if embeds is None else embeds[number]
                self.overview.append(TileSegment(OVERVIEW, mask, float(scores[number]), embeds=own))

    def merge(self, max_iou: float = 0.7) -> tuple[list[dict], torch.Tensor, torch.Tensor, torch.Tensor | None]:
        r"""
        Merges the masks of all tiles and of the overview, and removes duplicates.

        Args:
            max_iou (`float`, *optional*, defaults to 0.7):
                A mask is removed if the IoU of its box or of its pixels with those of a better mask is above this
                value. Masks of tiles are better than those of the overview, and then those of higher score.

        Returns:
            `tuple`: Run-length encodings of the image; predicted IoUs `(num_masks,)`, the mean over the parts of a
            mask weighted by area; boxes `(num_masks, 4)` with inclusive right and bottom; and the embeddings
            `(num_masks, projection_dim)` of the largest parts, or `None`. In descending order of predicted IoUs.
        """
        groups = match_segments(self.tiles, self.segments, 0.5, may_nest=True)
        objects = [[self.segments[index] for index in group] for group in groups]
        objects = add_overview(self.tiles, objects, self.overview, 0.5, max_covered=1)
        encodings, scores, priorities = [], [], []
        boxes: list[Box] = []
        embeds: list[torch.Tensor | None] = []
        for parts in objects:
            parts = _whole_parts(self.tiles, parts, 0.5)
            if not parts:
                continue
            if complete := _complete_parts(self.tiles, parts, 0.5):
                parts = [max(complete, key=lambda part: part.score)]
            window, left, top = _merge_masks(self.tiles, parts, 0.5, is_fading=False)
            box = mask_to_box(window)
            if box is None or _is_sliver(window, parts):
                continue
            areas = [part.mask.area for part in parts]
            encodings.append(encode_window(window, left, top, self.tiles.height, self.tiles.width))
            scores.append(sum(a * part.score for a, part in zip(areas, parts, strict=True)) / sum(areas))
            boxes.append((left + box[0], top + box[1], left + box[2] - 1, top + box[3] - 1))
            priorities.append(scores[-1] + (parts[0].tile != OVERVIEW))  # a segment of the overview is the last one
            embeds.append(parts[int(np.argmax(areas))].embeds)
        all_boxes = torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4)
        kept: list[int] = []
        for index in distinct_boxes(all_boxes, torch.tensor(priorities), max_iou):
            others = (other for other in kept if not _is_empty(_intersect(boxes[index], boxes[other])))
            if all(rle_iou(encodings[index], encodings[other]) <= max_iou for other in others):
                kept.append(index)
        kept.sort(key=lambda index: -scores[index])
        own_embeds = [embed for index in kept if (embed := embeds[index]) is not None]
        return (
            [encodings[index] for index in kept],
            torch.tensor([scores[index] for index in kept]),
            all_boxes[kept],
            torch.stack(own_embeds) if own_embeds else None,
        )


class ComputedSequence(Sequence):
    """A read-only sequence whose items are computed at each access, such as masks of a large image, which do not fit
    into memory all at once."""

    def __init__(self, length: int, compute: Callable[[int], Any]):
        self._length, self._compute = length, compute

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._length} items, computed at access>"

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._compute(position) for position in range(*index.indices(self._length))]
        position = index + self._length if index < 0 else index
        if not 0 <= position < self._length:
            raise IndexError(f"index {index} is out of range for {self._length} items")
        return self._compute(position)


def _intersect(one: Box, other: Box) -> Box:
    return (max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))


def _is_empty(box: Box) -> bool:
    return box[0] >= box[2] or box[1] >= box[3]


def _slices(part: Box, whole: Box) -> tuple[slice, slice]:
    """Rows and columns of `part` in an array that covers `whole`."""
    return (
        slice(part[1] - whole[1], part[3] - whole[1]),
        slice(part[0] - whole[0], part[2] - whole[0]),
    )


__all__ = ["ImageTiles", "TiledMasks", "TiledSegmentation"]
