"""
Post-processing for automatic mask generation ("everything mode"), and the mask formats it returns.

`SamClipMaskGenerationMixin` overrides the three methods of SAM's image processors that the stock
`pipeline("mask-generation")` calls. The results are SAM's; time and memory are lower, because low-scoring masks are
never resized to the image.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from transformers import SamImageProcessorPil
from transformers.utils import is_torchvision_available

if is_torchvision_available():
    from torchvision.ops import nms

# Defaults of the stock mask-generation pipeline.
MASK_GENERATION_DEFAULTS = {
    "points_per_crop": 32,
    "pred_iou_thresh": 0.88,
    "stability_score_thresh": 0.95,
    "crops_nms_thresh": 0.7,
}
ENCODED_PIXELS = 2**22  # masks are encoded in parts of about this many pixels
CROP_EDGE_TOLERANCE = 20  # pixels, as in SAM: a mask this close to the edge of its crop counts as cut off


class SamClipMaskGenerationMixin:
    """Mask generation for subclasses of SAM's image processors."""

    # Attributes of SAM's image processors.
    size: Any
    pad_size: Any
    mask_pad_size: Any
    do_resize: bool

    def post_process_masks(
        self, masks, original_sizes, reshaped_input_sizes, mask_threshold=0.0, binarize=True, pad_size=None
    ):
        r"""
        Resizes masks to the original image sizes and removes the padding, as SAM's image processor does.

        Logits (`binarize=False`) that do not require gradients are returned as [`UpsampledMasks`], which are resized
        on first use.

        Args:
            masks (`torch.Tensor` of shape `(batch_size, num_prompts, num_masks, mask_height, mask_width)`):
                Mask logits.
            original_sizes, reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`):
                Height and width of each image before and after resizing, from the image processor.
            mask_threshold (`float`, *optional*, defaults to 0.0):
                Logits above this value are inside the mask.
            binarize (`bool`, *optional*, defaults to `True`):
                Whether to return boolean masks instead of logits.
            pad_size (`dict[str, int]`, *optional*):
                Height and width after padding. By default, they are computed from the sizes of the masks and of the
                resized images.

        Returns:
            `list[torch.Tensor]`: One tensor `(num_prompts, num_masks, height, width)` per image.

        Raises:
            ValueError: The sizes of the masks and of the resized images do not match.
        """
        if pad_size is None:
            pad_size = self._padded_size(masks, reshaped_input_sizes)

        def upsample(masks, original_sizes, reshaped_input_sizes):
            return super(SamClipMaskGenerationMixin, self).post_process_masks(
                masks, original_sizes, reshaped_input_sizes, mask_threshold, binarize, pad_size
            )

        if binarize or not isinstance(masks, torch.Tensor) or masks.ndim != 5 or masks.requires_grad:
            return upsample(masks, original_sizes, reshaped_input_sizes)
        padded_size = (pad_size["height"], pad_size["width"])
        return [
            UpsampledMasks(mask, tuple(map(int, original_size)), tuple(map(int, reshaped_size)), padded_size, upsample)
            for mask, original_size, reshaped_size in zip(masks, original_sizes, reshaped_input_sizes, strict=True)
        ]

    def _padded_size(self, masks, reshaped_input_sizes) -> dict[str, int]:
        """
        Returns height and width of the padded images to which `masks` belong.

        A mask has four cells per patch. The image processor does not know the patch size, but `preprocess` pads images
        to their longest edge, so that the longest edge determines the number of pixels in a cell. Images of its own
        `size` are the exception, and all images if its `do_resize` is `False`: they are padded to its own `pad_size`.
        """
        mask_size = np.array(masks[0].shape[-2:])
        largest = np.array([tuple(map(int, size)) for size in reshaped_input_sizes]).max(axis=0)
        tight = mask_size * (largest / mask_size).max()
        own = np.array([self.pad_size["height"], self.pad_size["width"]])
        own_by_masks = mask_size * own / [self.mask_pad_size["height"], self.mask_pad_size["width"]]

        def is_possible(padded) -> bool:
            height, width = padded / mask_size  # of a cell
            return height == width and 4 * height % 1 == 0 and (padded >= largest).all()

        padded = tight if is_possible(tight) else own
        may_have_own = largest.max() == self.size["longest_edge"] or not self.do_resize
        if may_have_own and is_possible(tight) and is_possible(own):
            padded = tight if (own_by_masks == tight).all() else own
        if (padded < largest).any():
            raise ValueError(
                f"Masks of {mask_size[0]} x {mask_size[1]} do not match images that were resized to "
                f"{largest[0]} x {largest[1]} pixels. Pass the reshaped_input_sizes of the images, or their pad_size."
            )
        return {"height": int(padded[0]), "width": int(padded[1])}

    def filter_masks(
        self,
        masks,
        iou_scores,
        original_size,
        cropped_box_image,
        pred_iou_thresh=MASK_GENERATION_DEFAULTS["pred_iou_thresh"],
        stability_score_thresh=MASK_GENERATION_DEFAULTS["stability_score_thresh"],
        mask_threshold=0,
        stability_score_offset=1,
    ):
        r"""
        Selects the masks of one crop that have a high predicted IoU, are stable, and are not cut off by the crop.

        The result is that of SAM's image processor without empty masks. The order of the steps differs: masks with a
        low predicted IoU are removed first, and each remaining mask is resized separately, inside its bounding box
        only.

        Args:
            masks (`torch.Tensor` of shape `(num_prompts, num_masks, height, width)`):
                Mask logits at the size of the crop, from `post_process_masks(binarize=False)`.
            iou_scores (`torch.Tensor` of shape `(num_prompts, num_masks)`):
                Predicted IoUs.
            original_size (`tuple[int, int]`):
                Height and width of the image.
            cropped_box_image (`torch.Tensor` of shape `(4,)`):
                Left, top, right and bottom of the crop in the image.
            pred_iou_thresh (`float`, *optional*, defaults to 0.88):
                Only masks with a predicted IoU above this value are kept.
            stability_score_thresh (`float`, *optional*, defaults to 0.95):
                Only masks with a stability score above this value are kept. The stability score is the IoU of the
                masks at the thresholds `mask_threshold + stability_score_offset` and `mask_threshold -
                stability_score_offset` (Kirillov et al. 2023, appendix B).
            mask_threshold (`float`, *optional*, defaults to 0):
                Logits above this value are inside the mask.
            stability_score_offset (`float`, *optional*, defaults to 1):
                Offset of the two thresholds of the stability score.

        Returns:
            `tuple[list[dict], torch.Tensor, torch.Tensor]`: The kept masks as run-length encodings of the image (see
            [`encode_rle`]), their predicted IoUs `(num_kept,)`, and their boxes `(num_kept, 4)`: left, top, right and
            bottom in pixels, all inclusive, as in SAM.

        Raises:
            ValueError: The numbers of masks and of predicted IoUs differ.
        """
        if not isinstance(masks, UpsampledMasks) or masks.upsampled is not None:
            encodings, scores, boxes = super().filter_masks(
                masks,
                iou_scores,
                original_size,
                cropped_box_image,
                pred_iou_thresh,
                stability_score_thresh,
                mask_threshold,
                stability_score_offset,
            )
            kept = [index for index, encoding in enumerate(encodings) if any(encoding["counts"][1::2])]
            return [encodings[index] for index in kept], scores[kept], boxes[kept]
        logits = masks.low_resolution.flatten(0, 1)
        scores = iou_scores.flatten(0, 1).to(logits.device)
        if len(logits) != len(scores):
            raise ValueError(
                f"Expected one predicted IoU per mask, got {len(scores)} iou_scores for {len(logits)} masks."
            )
        if pred_iou_thresh > 0:
            passed = scores > pred_iou_thresh
            logits, scores = logits[passed], scores[passed]

        height, width = (int(side) for side in original_size)
        image_box = np.array([0, 0, width, height])
        crop_box = np.array([int(edge) for edge in cropped_box_image])
        crop_left, crop_top = crop_box[:2]
        kept, boxes, encodings = [], [], []
        floor = mask_threshold - abs(stability_score_offset)
        for index, (left, top, window) in enumerate(_resize_windows(logits, masks.sizes, floor)):
            if stability_score_thresh > 0:
                union = np.count_nonzero(window > mask_threshold - stability_score_offset)
                intersection = np.count_nonzero(window > mask_threshold + stability_score_offset)
                if not union or intersection / union <= stability_score_thresh:
                    continue
            left, top = left + crop_left, top + crop_top
            inside = window > mask_threshold
            box = mask_to_box(inside)
            if box is None:
                continue
            box = np.array([left, top, left - 1, top - 1]) + box
            near_crop_edge, near_image_edge = (
                abs(box - edges) <= CROP_EDGE_TOLERANCE for edges in (crop_box, image_box)
            )
            if (near_crop_edge & ~near_image_edge).any():
                continue
            kept.append(index)
            boxes.append(box)
            encodings.append(encode_window(inside, left, top, height, width))
        boxes = torch.tensor(np.array(boxes, dtype=np.int64).reshape(-1, 4), device=scores.device)
        return encodings, scores[kept], boxes

    def post_process_for_mask_generation(self, all_masks, all_scores, all_boxes, crops_nms_thresh):
        r"""
        Removes duplicates among the masks of all crops by non-maximum suppression of their boxes, as SAM's does. Masks
        of one row or column, whose boxes have no area in SAM, are compared by boxes that are one pixel larger.

        Args:
            all_masks (`list[dict]`):
                Run-length encodings from `filter_masks`.
            all_scores (`torch.Tensor` of shape `(num_masks,)`):
                Predicted IoUs.
            all_boxes (`torch.Tensor` of shape `(num_masks, 4)`):
                Boxes of the masks.
            crops_nms_thresh (`float`):
                A box is removed if its IoU with a box of higher score is above this value.

        Returns:
            `tuple`: Boolean masks `(height, width)`, predicted IoUs `(num_kept,)`, run-length encodings and boxes
            `(num_kept, 4)`, in descending order of predicted IoUs. Masks are tensors with torchvision and arrays with
            PIL, as in SAM.
        """
        kept = distinct_boxes(all_boxes, all_scores, crops_nms_thresh)
        encodings = [all_masks[index] for index in kept]
        masks = [decode_rle(encoding) for encoding in encodings]
        if not isinstance(self, SamImageProcessorPil):
            masks = [torch.from_numpy(mask) for mask in masks]
        return masks, all_scores[kept], encodings, all_boxes[kept]


class UpsampledMasks(torch.Tensor):
    r"""
    Mask logits `(num_prompts, num_masks, height, width)` at the size of an image, computed on first use.

    The stock mask-generation pipeline resizes the masks of all points to the image (26 GB for a photograph of two
    megapixels) before `filter_masks` removes most of them by their predicted IoU. `filter_masks` of SAM-CLIP reads
    `low_resolution` instead and resizes the remaining masks only. Any other operation first computes the full tensor,
    which is then stored, and runs on it.
    """

    @staticmethod
    def __new__(cls, low_resolution, original_size, reshaped_size, padded_size, upsample):
        shape = (*low_resolution.shape[:2], *original_size)
        return cls._make_wrapper_subclass(cls, shape, dtype=low_resolution.dtype, device=low_resolution.device)

    def __init__(self, low_resolution, original_size, reshaped_size, padded_size, upsample):
        self.low_resolution = low_resolution
        self.sizes = [padded_size, reshaped_size, original_size]
        self.upsample = upsample
        self.upsampled = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.compute, (args, kwargs or {}))
        return function(*args, **kwargs)

    # Some functions, such as torch.tensor, do not go through __torch_function__.
    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]

    def compute(self) -> torch.Tensor:
        """Returns the full tensor. Later calls return the same object, so in-place changes persist."""
        if self.upsampled is None:
            _, reshaped_size, original_size = self.sizes
            self.upsampled = self.upsample([self.low_resolution], [original_size], [reshaped_size])[0]
        return self.upsampled


def encode_rle(mask: np.ndarray) -> dict:
    r"""
    Encodes a mask as uncompressed COCO run-length encoding (RLE).

    Args:
        mask (`np.ndarray` of shape `(height, width)`):
            Boolean mask.

    Returns:
        `dict`: `size`, a list of height and width, and `counts`, the lengths of alternating runs outside and inside
        the mask, column by column. The first run is outside the mask; its length may be 0.
    """
    return encode_window(mask, 0, 0, *mask.shape)


def decode_rle(encoding: dict) -> np.ndarray:
    r"""
    Decodes uncompressed COCO run-length encoding.

    Args:
        encoding (`dict`):
            `size` and `counts`, see [`encode_rle`].

    Returns:
        `np.ndarray`: Boolean mask `(height, width)`.

    Raises:
        ValueError: `counts` do not add up to the size.
    """
    height, width = encoding["size"]
    counts = encoding["counts"]
    if sum(counts) != height * width:
        raise ValueError(f"The counts of a mask of {height} x {width} pixels add up to {sum(counts)}.")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def rle_iou(one: dict, other: dict) -> float:
    r"""
    IoU of two masks from their uncompressed run-length encodings, without decoding them.

    Args:
        one, other (`dict`):
            `size` and `counts`, see [`encode_rle`]. Both have the same size.
    """
    ends, other_ends = (np.cumsum([0, *encoding["counts"]]) for encoding in (one, other))
    # The number of pixels of the other mask before each end of a run. It grows linearly inside of its runs.
    lengths = np.array([0, *other["counts"]])
    lengths[1::2] = 0  # outside the mask
    before = np.interp(ends, other_ends, lengths.cumsum())
    intersection = np.diff(before)[1::2].sum()
    return float(intersection / (sum(one["counts"][1::2]) + lengths.sum() - intersection or 1))


def mask_to_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    r"""
    Returns the bounding box of a mask as left, top, right and bottom in pixels, right and bottom exclusive; `None` if
    the mask is empty.

    Args:
        mask (`np.ndarray` of shape `(height, width)`):
            Boolean mask.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _resize_windows(logits: torch.Tensor, sizes: list[tuple[int, int]], floor: float):
    r"""
    Resizes each mask as SAM does, inside the bounding box of the pixels that can exceed `floor`.

    Args:
        logits (`torch.Tensor` of shape `(num_masks, mask_height, mask_width)`):
            Mask logits of the padded image.
        sizes (`list[tuple[int, int]]`):
            Height and width of the padded image, of the resized image without padding, and of the original image. SAM
            resizes masks to the first size, crops them to the second and resizes them to the third.
        floor (`float`):
            Pixels up to this value may be left out.

    Yields:
        `tuple[int, int, np.ndarray]`: For each mask, left and top of the box, and logits `(box_height, box_width)`.
        The columns of the array are contiguous, as run-length encoding reads them.
    """
    logits = logits.float()
    rows, columns = (
        _resize_matrix(length, *side).to(logits.device)
        for length, side in zip(logits.shape[1:], zip(*sizes, strict=True), strict=True)
    )
    (row_cells, row_weights), (column_cells, column_weights) = _nonzero_weights(rows), _nonzero_weights(columns)
    # Interpolation never exceeds the largest of the values that it combines.
    tops, bottoms = _extents((logits.amax(dim=2) > floor).float() @ (rows != 0).float().T > 0)
    lefts, rights = _extents((logits.amax(dim=1) > floor).float() @ (columns != 0).float().T > 0)
    for mask, left, top, right, bottom in zip(logits, lefts, tops, rights, bottoms, strict=True):
        # embedding_bag computes weighted sums of rows, and reads only the rows with a weight.
        y, x = slice(top, bottom), slice(left, right)
        resized = F.embedding_bag(row_cells[y], mask, per_sample_weights=row_weights[y], mode="sum").T.contiguous()
        resized = F.embedding_bag(column_cells[x], resized, per_sample_weights=column_weights[x], mode="sum")
        yield left, top, resized.cpu().numpy().T


def _resize_matrix(length: int, padded: int, reshaped: int, original: int) -> torch.Tensor:
    """Returns a matrix `(original, length)` for SAM's two resizes along one side: `length` to `padded` and, after
    padding is removed, `reshaped` to `original`. Both are linear, so their result for the identity is the matrix."""
    resized = F.interpolate(torch.eye(length)[None], padded, mode="linear")
    return F.interpolate(resized[..., :reshaped], original, mode="linear")[0].T


def _nonzero_weights(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns columns and values `(num_rows, max_nonzero)` of the nonzero values in each row of a matrix."""
    weights, cells = matrix.topk(int((matrix != 0).sum(dim=1).max()), dim=1)
    return cells.contiguous(), weights.contiguous()


def _extents(marked: torch.Tensor) -> tuple[list[int], list[int]]:
    """Returns the start and the end (exclusive) of the marked range in each row of `(num_rows, length)`; the whole row
    if nothing is marked."""
    ends = marked.shape[1] - marked.flip(1).int().argmax(dim=1)
    return marked.int().argmax(dim=1).tolist(), ends.tolist()


def encode_window(window: np.ndarray, left: int, top: int, height: int, width: int) -> dict:
    """As [`encode_rle`], for a mask `(height, width)` that is empty outside a window `(window_height, window_width)`
    at `left` and `top`."""
    changes, last = [], False
    step = max(1, ENCODED_PIXELS // height)
    for start in range(0, window.shape[1], step):
        part = window[:, start : start + step].T
        columns = np.zeros((len(part), height), dtype=bool)
        columns[:, top : top + window.shape[0]] = part
        pixels = columns.ravel()
        changes.append((left + start) * height + np.flatnonzero(np.diff(pixels, prepend=last)))
        last = pixels[-1]
    if last:
        changes.append(np.array([(left + window.shape[1]) * height]))
    counts = np.diff(np.concatenate(changes), prepend=0, append=height * width).tolist()
    if counts[-1] == 0:  # the last pixel is inside the mask
        counts.pop()
    return {"size": [height, width], "counts": counts}


def distinct_boxes(boxes: torch.Tensor, scores: torch.Tensor, max_iou: float) -> list[int]:
    r"""
    Non-maximum suppression of boxes, as in SAM. Boxes without an area, which belong to masks of one row or column, are
    compared as if they were one pixel larger.

    Args:
        boxes (`torch.Tensor` of shape `(num_boxes, 4)`):
            Left, top, right and bottom.
        scores (`torch.Tensor` of shape `(num_boxes,)`):
            The box with the higher score remains.
        max_iou (`float`):
            A box is removed if its IoU with a box of higher score is above this value.

    Returns:
        `list[int]`: Indices of the remaining boxes, in descending order of scores.
    """
    boxes, scores = boxes.float(), scores.float()
    kept = _suppress_overlaps(boxes, scores, max_iou)
    is_thin = (boxes[:, :2] == boxes[:, 2:]).any(dim=1)
    if is_thin.any():
        thin = is_thin.nonzero().flatten()
        larger = boxes[thin] + boxes.new_tensor([0, 0, 1, 1])
        distinct = set(thin[_suppress_overlaps(larger, scores[thin], max_iou)].tolist())
        kept = [index for index in kept if not is_thin[index] or index in distinct]
    return kept


def _suppress_overlaps(boxes: torch.Tensor, scores: torch.Tensor, max_iou: float) -> list[int]:
    """Returns the indices of the boxes `(num_boxes, 4)` that remain after non-maximum suppression, in descending order
    of `scores` `(num_boxes,)`. The IoU of two remaining boxes is at most `max_iou`."""
    if is_torchvision_available():
        return nms(boxes, scores, max_iou).tolist()
    order = scores.argsort(descending=True, stable=True)
    left_top, right_bottom = boxes[order].split(2, dim=1)
    area = (right_bottom - left_top).prod(dim=1)
    suppressed = torch.zeros_like(order, dtype=torch.bool)
    kept = []
    for position, index in enumerate(order.tolist()):
        if suppressed[position]:
            continue
        kept.append(index)
        overlap = torch.minimum(right_bottom, right_bottom[position]) - torch.maximum(left_top, left_top[position])
        intersection = overlap.clamp_min(0).prod(dim=1)
        iou = intersection / (area + area[position] - intersection)
        suppressed |= iou.double() > max_iou  # torchvision compares in double
    return kept


__all__ = ["MASK_GENERATION_DEFAULTS", "SamClipMaskGenerationMixin", "decode_rle", "encode_rle", "mask_to_box"]
