"""
SAM-CLIP's image processor: SAM's, at any size, with the post-processing of text-labelled segments and a faster one of
everything-mode's masks.

`SamClipImageProcessor` runs on torchvision, `SamClipImageProcessorPil` on PIL and numpy for installations without it.
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils._pytree import tree_map_only
from transformers import SamImageProcessorPil
from transformers.utils import is_torchvision_available, logging

logger = logging.get_logger(__name__)

# Maps of labels and of segments are resized in chunks of so many: memory grows with the picture, not with the picture
# times the vocabulary.
MAPS_PER_CHUNK = 16

CROP_EDGE = 20  # pixels: a mask that ends so near to its crop's edge is taken for cut off (Kirillov et al. 2023)


class SamClipPostProcessing:
    """What both image processors add to SAM's."""

    def preprocess(self, images, segmentation_maps=None, size=None, pad_size=None, **kwargs):
        r"""
        As SAM's: longest edge to `size`, bottom and right padded to a square. Differs in three things: a `size` for
        this call alone pads to that size; images of 16 bits a channel are brought to 8, where SAM's cut them off at
        255; arrays without an axis of channels are grey. A file is turned as its EXIF orientation says, a picture in
        memory is taken as it is.

        Raises `ValueError` for no image, an image without pixels, and pixels that are not finite.
        """
        images = _readable(images, kwargs.get("do_rescale", self.do_rescale))
        if size is not None and pad_size is None:
            edge = size if isinstance(size, int) else size["longest_edge"]
            pad_size = {"height": edge, "width": edge}
            size = {"longest_edge": edge}
        if size is not None:
            kwargs["size"] = size
        if pad_size is not None:
            kwargs["pad_size"] = pad_size
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _get_preprocess_shape(self, old_shape, longest_edge):
        """As SAM's, but a long thin picture keeps a pixel of its short side."""
        height, width = super()._get_preprocess_shape(old_shape, longest_edge)
        return max(1, height), max(1, width)

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        r"""
        A label for every pixel. With both heads, that of the best segment it lies in, and background where there is
        none; without, or where the vocabulary has no background, the CLIP head's most probable one.

        outputs ([`SamClipSegmentationOutput`]):
            Of [`SamClipForImageSegmentation`].
        target_sizes (`list[tuple[int, int]]`, *optional*):
            Height and width of every image, usually its original size. By default, those of the segments' masks or,
            without, of the logits.

        Returns, per image, labels of type `torch.int64` and shape `(height, width)`.
        """
        label_maps = []
        for index, target_size in enumerate(_target_sizes(outputs, target_sizes)):
            background = int(outputs.background_label_ids[index])
            if outputs.get("segment_masks") is None or background < 0:
                content_size = _content_sizes(outputs, outputs.logits)[index]
                label_map, _ = _highest(outputs.logits[index], content_size, target_size)
            else:
                label_map = torch.full(target_size, background, device=outputs.logits.device)
            if outputs.get("segment_masks") is not None:
                segment, _ = _segment_map(outputs, index, target_size)
                labels = outputs.segment_logits[index].argmax(dim=-1)
                label_map = torch.where(segment >= 0, labels[segment], label_map)
            label_maps.append(label_map)
        return label_maps

    def post_process_instance_segmentation(
        self,
        outputs,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: list[tuple[int, int]] | None = None,
    ) -> list[dict]:
        r"""
        Every segment by itself: [`post_process_panoptic_segmentation`] with nothing fused.
        """
        return self.post_process_panoptic_segmentation(
            outputs, threshold, mask_threshold, overlap_mask_area_threshold, target_sizes=target_sizes
        )

    def post_process_panoptic_segmentation(
        self,
        outputs,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: set[int] | None = None,
        target_sizes: list[tuple[int, int]] | None = None,
    ) -> list[dict]:
        r"""
        Segments that do not overlap, each with a label and a score; background is none of them.

        outputs ([`SamClipSegmentationOutput`]):
            Of [`SamClipForImageSegmentation`] with both heads.
        threshold (`float`, defaults to 0.5):
            Segments of a lower score are left out before pixels are given away. The score is the probability of the
            label among all labels of the vocabulary: it says how sure the name is, not how well drawn the mask.
        mask_threshold (`float`, defaults to 0.5):
            A pixel can belong to a mask from this probability on.
        overlap_mask_area_threshold (`float`, defaults to 0.8):
            A segment that better drawn ones have left less than this share of its mask is left out, and what it had
            left stays without a segment.
        label_ids_to_fuse (`set[int]`, *optional*):
            Labels of which there is one segment an image, such as sky: theirs become one, with the highest score.
        target_sizes (`list[tuple[int, int]]`, *optional*):
            Height and width of every image, usually its original size. By default, those of the masks.

        Returns, per image, `segmentation` of type `torch.int32` and shape `(height, width)`, 0 or a segment's id, and
        `segments_info`, a list of `id`, `label_id`, `was_fused` and `score`.
        """
        if outputs.get("segment_masks") is None:
            raise ValueError("Segments are drawn by the SAM head: call the model with both_heads=True.")
        results = []
        for index, target_size in enumerate(_target_sizes(outputs, target_sizes)):
            probability, label = outputs.segment_logits[index].softmax(dim=-1).max(dim=-1)
            chosen = (probability >= threshold) & (label != outputs.background_label_ids[index])
            segment, area = _segment_map(outputs, index, target_size, chosen, mask_threshold)
            segmentation = torch.zeros(target_size, dtype=torch.int32, device=segment.device)
            segments: list[dict] = []
            fused: dict[int, dict] = {}
            for number in segment.unique().tolist():
                own = segment == number
                if number < 0 or own.sum() < overlap_mask_area_threshold * area[number]:
                    continue
                label_id, score = int(label[number]), float(probability[number])
                info = fused.get(label_id)
                if info is None:
                    info = {"id": len(segments) + 1, "label_id": label_id, "was_fused": False, "score": score}
                    segments.append(info)
                    if label_id in (label_ids_to_fuse or ()):
                        info["was_fused"] = True
                        fused[label_id] = info
                info["score"] = max(info["score"], score)
                segmentation[own] = info["id"]
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results

    def post_process_object_detection(
        self, outputs, threshold: float = 0.1, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        r"""
        Boxes around the segments that a text names.

        outputs ([`SamClipObjectDetectionOutput`]):
            Of [`SamClipForObjectDetection`].
        threshold (`float`, defaults to 0.1):
            Segments of a lower score are left out.
        target_sizes (`list[tuple[int, int]]`, *optional*):
            Height and width of every image, usually its original size. By default, those of the masks.

        Returns, per image, `scores` `(num_boxes,)`, best first, `boxes` `(num_boxes, 4)`, x1, y1, x2, y2 in pixels,
        and `labels` `(num_boxes,)`, all 0: there is one text.
        """
        results = []
        for index, target_size in enumerate(_target_sizes(outputs, target_sizes)):
            scores, order = outputs.object_scores[index].sort(descending=True, stable=True)
            order = order[scores > threshold]
            content_size = _content_sizes(outputs, outputs.segment_masks)[index]
            boxes, kept = [], []
            for number in order.tolist():
                mask = outputs.segment_masks[index, number : number + 1].float()
                rows, columns = (resize_content(mask, content_size, target_size)[0] > 0).nonzero(as_tuple=True)
                if len(rows):
                    boxes.append(torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]))
                    kept.append(number)
            results.append(
                {
                    "scores": outputs.object_scores[index, kept],
                    "boxes": torch.stack(boxes).float() if boxes else order.new_zeros(0, 4, dtype=torch.float32),
                    "labels": order.new_zeros(len(kept)),
                }
            )
        return results

    def post_process_masks(
        self, masks, original_sizes, reshaped_input_sizes, mask_threshold=0.0, binarize=True, pad_size=None
    ):
        r"""
        As SAM's: masks `(num_images, num_prompts, num_masks, mask_height, mask_width)` at the images' own sizes, for
        each image `(num_prompts, num_masks, height, width)`. Differs in one thing: logits (`binarize=False`) that need
        no gradient are not computed before they are used, see [`UpsampledMasks`].
        """

        def upsample(masks, original_sizes, reshaped_input_sizes):
            return super(SamClipPostProcessing, self).post_process_masks(
                masks, original_sizes, reshaped_input_sizes, mask_threshold, binarize, pad_size
            )

        if binarize or not isinstance(masks, torch.Tensor) or masks.ndim != 5 or masks.requires_grad:
            return upsample(masks, original_sizes, reshaped_input_sizes)
        padded_size = self.pad_size if pad_size is None else pad_size
        padded_size = (padded_size["height"], padded_size["width"])
        return [
            UpsampledMasks(mask, tuple(map(int, original_size)), tuple(map(int, reshaped_size)), padded_size, upsample)
            for mask, original_size, reshaped_size in zip(masks, original_sizes, reshaped_input_sizes, strict=True)
        ]

    def filter_masks(
        self,
        masks,
        iou_scores,
        original_size,
        cropped_box_image,
        pred_iou_thresh=0.88,
        stability_score_thresh=0.95,
        mask_threshold=0,
        stability_score_offset=1,
    ):
        r"""
        As SAM's: which of a crop's masks are good by their predicted IoU, steady when the threshold shifts by
        `stability_score_offset`, and not cut off by the crop. Differs in the order, not in the result: predicted IoUs
        come first, and only masks that pass are brought to the image's size, one at a time and where they can be
        inside at all.

        masks (`torch.Tensor` of shape `(num_prompts, num_masks, height, width)`):
            Mask logits from `post_process_masks(binarize=False)`, at the crop's size.
        iou_scores (`torch.Tensor` of shape `(num_prompts, num_masks)`):
            Predicted IoUs.
        original_size (`tuple[int, int]`):
            Height and width of the whole image.
        cropped_box_image (`torch.Tensor` of shape `(4,)`):
            The crop in the image: left, top, right and bottom.

        Returns, of the masks kept, run lengths (`size` and `counts`, by columns) in the whole image, predicted IoUs
        `(num_kept,)` and boxes `(num_kept, 4)`.
        """
        if not isinstance(masks, UpsampledMasks) or masks.computed is not None:
            return super().filter_masks(
                masks,
                iou_scores,
                original_size,
                cropped_box_image,
                pred_iou_thresh,
                stability_score_thresh,
                mask_threshold,
                stability_score_offset,
            )
        logits = masks.low_resolution.flatten(0, 1)
        scores = iou_scores.flatten(0, 1).to(logits.device)
        if len(logits) != len(scores):
            raise ValueError(
                f"Every mask has one predicted IoU: got {len(logits)} masks and {len(scores)} iou_scores."
            )
        if pred_iou_thresh > 0:
            passed = scores > pred_iou_thresh
            logits, scores = logits[passed], scores[passed]

        height, width = (int(side) for side in original_size)
        image_box = np.array([0, 0, width, height])
        crop_box = np.array([int(edge) for edge in cropped_box_image])
        offset = crop_box[[0, 1, 0, 1]]
        kept, boxes, run_lengths = [], [], []
        floor = mask_threshold - abs(stability_score_offset)
        for number, (left, top, window) in enumerate(_windows(logits, masks.sizes, floor)):
            if stability_score_thresh > 0:
                around = np.count_nonzero(window > mask_threshold - stability_score_offset)
                steady = np.count_nonzero(window > mask_threshold + stability_score_offset)
                if not around or steady / around <= stability_score_thresh:
                    continue
            inside = window > mask_threshold
            columns, rows = inside.any(axis=1).nonzero()[0], inside.any(axis=0).nonzero()[0]
            box = offset.copy()
            if len(columns):
                box += [left + columns[0], top + rows[0], left + columns[-1], top + rows[-1]]
            near_crop_edge, near_image_edge = (abs(box - edges) <= CROP_EDGE for edges in (crop_box, image_box))
            if (near_crop_edge & ~near_image_edge).any():
                continue
            kept.append(number)
            boxes.append(box)
            run_lengths.append(_run_lengths(inside, left + offset[0], top + offset[1], height, width))
        boxes = torch.tensor(np.array(boxes, dtype=np.int64).reshape(-1, 4), device=scores.device)
        return run_lengths, scores[kept], boxes

    def post_process_for_mask_generation(self, all_masks, all_scores, all_boxes, crops_nms_thresh):
        r"""
        As SAM's: of masks whose boxes overlap by an IoU above `crops_nms_thresh`, the best by score.

        all_masks (`list[dict]`), all_scores (`torch.Tensor` of shape `(num_masks,)`), all_boxes (`torch.Tensor` of
        shape `(num_masks, 4)`):
            What `filter_masks` returned for all crops and points.

        Returns, best first, masks `(height, width)` of type bool, scores, run lengths and boxes.
        """
        kept = _distinct_boxes(all_boxes.float(), all_scores, crops_nms_thresh)
        run_lengths = [all_masks[index] for index in kept]
        masks = [_decode(lengths) for lengths in run_lengths]
        if not isinstance(self, SamImageProcessorPil):  # whose masks are arrays
            masks = [torch.from_numpy(mask) for mask in masks]
        return masks, all_scores[kept], run_lengths, all_boxes[kept]


def _readable(images, do_rescale: bool):
    """Images, or a list of them, as SAM's image processors read them."""
    if isinstance(images, list | tuple):
        if len(images) == 0:
            raise ValueError("There is no image: the list of images is empty.")
        return [_readable(image, do_rescale) for image in images]
    if isinstance(images, Image.Image):
        if images.mode.startswith("I"):  # 16 bits, in a type of 16 or of 32
            pixels = np.asarray(images)
            images = Image.fromarray((pixels // (257 if pixels.size and pixels.max() > 255 else 1)).astype(np.uint8))
    elif isinstance(images, np.ndarray):
        images = (images // 257).astype(np.uint8) if images.dtype == np.uint16 else images
        images = images[..., None].repeat(3, axis=-1) if images.ndim == 2 else images
    elif isinstance(images, torch.Tensor):
        images = (images.int() // 257).to(torch.uint8) if images.dtype == torch.uint16 else images
        images = images[None].expand(3, -1, -1) if images.ndim == 2 else images
    else:
        if not isinstance(images, str | os.PathLike) or not os.path.isfile(images):
            return images  # a URL; of anything else, SAM's image processor says what it is
        with Image.open(images) as image:
            return _readable(ImageOps.exif_transpose(image), do_rescale).convert("RGB")
    shape = images.size if isinstance(images, Image.Image) else images.shape
    if 0 in shape:
        raise ValueError(f"An image has no pixels: {tuple(shape)}.")
    if not isinstance(images, Image.Image) and "float" in str(images.dtype):
        lowest, highest = float(images.min()), float(images.max())
        if not np.isfinite([lowest, highest]).all():
            raise ValueError("An image holds pixels that are not finite numbers.")
        if do_rescale and lowest >= 0 and highest <= 1:
            logger.warning_once(
                "An image of floats from 0 to 1 is taken for one of 0 to 255, almost black: pass do_rescale=False."
            )
    return images


class UpsampledMasks(torch.Tensor):
    r"""
    Mask logits `(num_prompts, num_masks, height, width)` at an image's size, not computed before they are used.

    The stock mask-generation pipeline asks for all masks of all points at the image's size, 26 GB of them for a photo
    of two megapixels, and only then lets `filter_masks` drop most by a score that was known before. `filter_masks`
    therefore reads `low_resolution` and upsamples what it needs. Every other use, by anyone, sees the real tensor, as
    of the moment of its first use.
    """

    @staticmethod
    def __new__(cls, low_resolution, original_size, reshaped_size, padded_size, upsample):
        shape = (*low_resolution.shape[:2], *original_size)
        return cls._make_wrapper_subclass(cls, shape, dtype=low_resolution.dtype, device=low_resolution.device)

    def __init__(self, low_resolution, original_size, reshaped_size, padded_size, upsample):
        self.low_resolution = low_resolution
        self.sizes = [padded_size, reshaped_size, original_size]
        self.upsample = upsample
        self.computed = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.compute, (args, kwargs or {}))
        return function(*args, **kwargs)

    # For functions without the other hook, such as torch.tensor.
    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]

    def compute(self) -> torch.Tensor:
        """The real tensor, always the same one."""
        if self.computed is None:
            _, reshaped_size, original_size = self.sizes
            self.computed = self.upsample([self.low_resolution], [original_size], [reshaped_size])[0]
        return self.computed


def _windows(logits: torch.Tensor, sizes: list[tuple[int, int]], floor: float):
    """
    Mask logits `(num_masks, mask_height, mask_width)` resized as SAM does, to the padded size and from the part
    without padding to the original one: the three `sizes`. Of each mask only the window that can exceed `floor`: left,
    top and an array `(window_width, window_height)`, columns first as run lengths want it.
    """
    logits = logits.float()
    rows, columns = (
        _resize_matrix(length, *side).to(logits.device)
        for length, side in zip(logits.shape[1:], zip(*sizes, strict=True), strict=True)
    )
    (row_cells, row_weights), (column_cells, column_weights) = _taps(rows), _taps(columns)
    # No pixel is higher than the highest of the cells that it is interpolated between.
    tops, bottoms = _extents((logits.amax(dim=2) > floor).float() @ (rows != 0).float().T > 0)
    lefts, rights = _extents((logits.amax(dim=1) > floor).float() @ (columns != 0).float().T > 0)
    for mask, left, top, right, bottom in zip(logits, lefts, tops, rights, bottoms, strict=True):
        # A bag of embeddings is a weighted sum of rows. It reads the few cells there are to a pixel and nothing else.
        y, x = slice(top, bottom), slice(left, right)
        resized = F.embedding_bag(row_cells[y], mask, per_sample_weights=row_weights[y], mode="sum").T.contiguous()
        resized = F.embedding_bag(column_cells[x], resized, per_sample_weights=column_weights[x], mode="sum")
        yield left, top, resized.cpu().numpy()


def _resize_matrix(length: int, padded: int, reshaped: int, original: int) -> torch.Tensor:
    """Both of SAM's resizes along one side are linear, `length` to `padded` and, after the cut, `reshaped` to
    `original`: as one matrix `(original, length)`, read off the identity."""
    resized = F.interpolate(torch.eye(length)[None], padded, mode="linear")
    return F.interpolate(resized[..., :reshaped], original, mode="linear")[0].T


def _taps(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and values `(num_rows, num_taps)` of all that is not zero in a matrix."""
    weights, cells = matrix.topk(int((matrix != 0).sum(dim=1).max()), dim=1)
    return cells.contiguous(), weights.contiguous()


def _extents(marked: torch.Tensor) -> tuple[list[int], list[int]]:
    """Per row of `(num_rows, length)` the first that is marked and the one after the last; all where none is."""
    ends = marked.shape[1] - marked.flip(1).int().argmax(dim=1)
    return marked.int().argmax(dim=1).tolist(), ends.tolist()


def _run_lengths(inside: np.ndarray, left: int, top: int, height: int, width: int) -> dict:
    """A window `(window_width, window_height)` of a mask, otherwise empty, as run lengths by columns."""
    columns = np.zeros((len(inside), height), dtype=bool)
    columns[:, top : top + inside.shape[1]] = inside
    changes = left * height + np.flatnonzero(np.diff(columns.ravel(), prepend=False, append=False))
    counts = np.diff(changes, prepend=0, append=height * width).tolist()
    if counts[-1] == 0:  # the last pixel is inside
        counts.pop()
    return {"size": [height, width], "counts": counts}


def _decode(run_lengths: dict) -> np.ndarray:
    """The mask `(height, width)` of run lengths."""
    height, width = run_lengths["size"]
    counts = run_lengths["counts"]
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def _distinct_boxes(boxes: torch.Tensor, scores: torch.Tensor, max_overlap: float) -> list[int]:
    """Non-maximum suppression: indices of the boxes `(num_boxes, 4)` that overlap no better one that is kept by an IoU
    above `max_overlap`, best first. Here because installations with PIL lack torchvision's."""
    order = scores.argsort(descending=True, stable=True)
    left_top, right_bottom = boxes[order].split(2, dim=1)
    area = (right_bottom - left_top).prod(dim=1)
    suppressed = torch.zeros_like(order, dtype=torch.bool)
    kept = []
    for position, index in enumerate(order.tolist()):
        if suppressed[position]:
            continue
        kept.append(index)
        shared = torch.minimum(right_bottom, right_bottom[position]) - torch.maximum(left_top, left_top[position])
        intersection = shared.clamp_min(0).prod(dim=1)
        suppressed |= intersection / (area + area[position] - intersection) > max_overlap
    return kept


def _content_sizes(outputs, maps: torch.Tensor) -> list[list[float]]:
    """Height and width of every image's content in cells of `maps` `(..., height, width)`."""
    return (outputs.content_sizes * maps.shape[-1] / outputs.logits.shape[-1]).tolist()


def _target_sizes(outputs, target_sizes) -> list[tuple[int, int]]:
    """Height and width of every image's result."""
    if target_sizes is None:
        maps = outputs.logits if outputs.get("segment_masks") is None else outputs.segment_masks
        target_sizes = _content_sizes(outputs, maps)
    if len(target_sizes) != len(outputs.logits):
        raise ValueError(f"Got {len(target_sizes)} target_sizes for {len(outputs.logits)} images.")
    return [(round(float(height)), round(float(width))) for height, width in target_sizes]


def _segment_map(
    outputs, index: int, target_size: tuple[int, int], chosen: torch.Tensor | None = None, mask_threshold: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """For one image, the number of the best segment of every pixel `(height, width)`, -1 where there is none, and the
    area of every segment's mask `(num_segments,)`. Only `chosen` segments `(num_segments,)` take part."""
    masks, scores = outputs.segment_masks[index], outputs.segment_scores[index]
    numbers = (scores > 0 if chosen is None else chosen & (scores > 0)).nonzero().flatten()
    area = torch.zeros_like(scores, dtype=torch.float32)  # float16 counts pixels to 65,504

    def votes(start: int, chunk: torch.Tensor) -> torch.Tensor:
        own = numbers[start : start + len(chunk)]
        probability = chunk.sigmoid()
        inside = probability > mask_threshold
        area[own] = inside.flatten(1).sum(dim=1).to(area.dtype)
        return probability * inside * scores[own, None, None]

    segment, vote = _highest(masks[numbers], _content_sizes(outputs, masks)[index], target_size, votes)
    segment = torch.cat([numbers, numbers.new_tensor([-1])])[segment]
    return torch.where(vote > 0, segment, -1), area


def _highest(maps: torch.Tensor, content_size, target_size, transform=lambda start, chunk: chunk):
    """Which of the maps `(num_maps, height, width)` is the highest at every pixel of their content resized to
    `target_size`, and its value there. `transform` sees each resized chunk and the number of its first map."""
    highest = torch.full(target_size, -torch.inf, device=maps.device)
    number = torch.full(target_size, -1, dtype=torch.int64, device=maps.device)
    for start in range(0, len(maps), MAPS_PER_CHUNK):
        chunk = resize_content(maps[start : start + MAPS_PER_CHUNK].float(), content_size, target_size)
        value, index = transform(start, chunk).max(dim=0)
        number = torch.where(value > highest, index + start, number)
        highest = torch.maximum(value, highest)
    return number, highest


def resize_content(maps: torch.Tensor, content_size, target_size) -> torch.Tensor:
    r"""
    The picture's part of `maps`, without the padding, bilinearly resized.

    maps (`torch.Tensor` of shape `(channels, height, width)`):
        With the picture in the upper left corner.
    content_size (`tuple[float, float]`):
        Height and width of that corner in cells, fractions allowed.
    target_size (`tuple[int, int]`):
        Height and width of the result `(channels, target_height, target_width)`.
    """
    coordinates = [
        # Centre of each target pixel, from cells to the range -1 .. 1 of grid_sample.
        ((torch.arange(int(target), device=maps.device) + 0.5) * content / target) * 2 / side - 1
        for target, content, side in zip(target_size, content_size, maps.shape[1:], strict=True)
    ]
    y, x = torch.meshgrid(*coordinates, indexing="ij")
    grid = torch.stack([x, y], dim=-1)[None].to(maps.dtype)
    return F.grid_sample(maps[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


class SamClipImageProcessorPil(SamClipPostProcessing, SamImageProcessorPil):
    pass


if is_torchvision_available():
    from transformers import SamImageProcessor

    class SamClipImageProcessor(SamClipPostProcessing, SamImageProcessor):
        pass

else:
    SamClipImageProcessor = SamClipImageProcessorPil  # type: ignore[misc]


__all__ = ["SamClipImageProcessor", "SamClipImageProcessorPil"]
