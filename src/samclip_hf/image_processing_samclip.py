"""
Image processors for SAM-CLIP: SAM's preprocessing at any size, and post-processing for segmentation and detection.

`SamClipImageProcessor` uses torchvision. `SamClipImageProcessorPil` uses PIL and numpy, for installations without
torchvision. Post-processing for mask generation is in `mask_generation_samclip.py`.
"""

from .versions_samclip import MINIMUM_TRANSFORMERS_VERSION  # noqa: F401  # isort: skip  # first: raises on older versions

import os
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import SamImageProcessorPil
from transformers.utils import is_torchvision_available, logging

from .mask_generation_samclip import SamClipMaskGenerationMixin, mask_to_box

logger = logging.get_logger(__name__)

# Maps are resized to the image in chunks, so that peak memory does not grow with the number of labels or segments.
MAPS_PER_CHUNK = 16


class SamClipImageProcessorMixin:
    """Preprocessing and post-processing for subclasses of SAM's image processors."""

    def preprocess(self, images, segmentation_maps=None, size=None, pad_size=None, **kwargs):
        r"""
        Preprocesses images as SAM does: resizes the longest edge to `size`, normalizes, and pads to a square at the
        bottom and on the right.

        Four details differ from SAM's image processor. Passing `size` also sets `pad_size` for that call. Images with
        16 bits per channel are scaled to 8 bits (SAM's clips them at 255). Arrays without a channel axis are grayscale
        images. Image files are rotated according to their EXIF orientation; images in memory are not.

        Args:
            images (`ImageInput`):
                One image or a list of images: PIL images, arrays, tensors, paths or URLs.
            segmentation_maps (`ImageInput`, *optional*):
                A label map for each image: integers `(height, width)` as PIL images, arrays or tensors, of the aspect
                ratio of the image. They are resized and padded to `mask_size` and `mask_pad_size` as in SAM's image
                processor.
            size (`int` or `dict[str, int]`, *optional*):
                Longest edge in pixels, as a number or as `{"longest_edge": number}`. Defaults to `self.size`. Another
                value also changes `pad_size`, and `mask_size` and `mask_pad_size` in proportion.
            pad_size (`dict[str, int]`, *optional*):
                Height and width after padding. Only one of them may differ from the longest edge.

        Returns:
            `BatchFeature`: `pixel_values` `(batch_size, 3, height, width)`, and `original_sizes` and
            `reshaped_input_sizes`, heights and widths before and after resizing `(batch_size, 2)`.

        Raises:
            ValueError: The list of images is empty, an image has no pixels or pixels that are not finite, a size is
                not one of the above, or label maps do not match the images.
        """
        images = _standardize(images, kwargs.get("do_rescale", self.do_rescale))
        self._set_sizes(kwargs, size, pad_size, with_maps=segmentation_maps is not None)
        if segmentation_maps is None:
            return super().preprocess(images, **kwargs)
        segmentation_maps = _standardize_maps(segmentation_maps)
        inputs = super().preprocess(images, segmentation_maps, **kwargs)
        self._check_maps(segmentation_maps, inputs["original_sizes"], inputs["labels"])
        return inputs

    def _set_sizes(self, kwargs: dict, size, pad_size, with_maps: bool) -> None:
        """Adds the sizes that are determined by `size` to the keyword arguments of a call. Images are padded to their
        longest edge, so that `post_process_masks` can compute the padding. Only with `self.size`, or without resizing,
        `self.pad_size` may be larger."""
        own_edge = _longest_edge(self.size, "size")
        edge = own_edge if size is None else _longest_edge(size, "size")
        is_resized = kwargs.get("do_resize", self.do_resize)
        if edge != own_edge:
            if not is_resized:
                raise ValueError(f"size={size} has no effect with do_resize=False.")
            kwargs["size"] = {"longest_edge": edge}
            pad_size = edge if pad_size is None else pad_size
        if pad_size is not None:
            padding = {"height": pad_size, "width": pad_size} if isinstance(pad_size, Integral) else dict(pad_size)
            if padding.keys() != {"height", "width"}:
                raise ValueError(f'pad_size must be {{"height": number, "width": number}}, got {pad_size}.')
            is_own = padding == dict(self.pad_size) and edge == own_edge
            if not is_own and (not is_resized or max(padding.values()) != edge):
                raise ValueError(
                    f"pad_size is {padding['height']} x {padding['width']}, but images are padded to their longest "
                    f"edge{f', {edge} pixels' if is_resized else ''}. Pass size={max(padding.values())} and no "
                    "pad_size to resize the longest edge to that many pixels."
                )
            kwargs["pad_size"] = padding
        if with_maps:
            mask_edge, rest = divmod(edge * _longest_edge(self.mask_size, "mask_size"), own_edge)
            if "mask_size" in kwargs:
                mask_edge, rest = _longest_edge(kwargs["mask_size"], "mask_size"), 0
            elif rest:
                raise ValueError(
                    f"With size={edge}, label maps would not have a whole number of pixels: size and mask_size of the "
                    f"image processor are {own_edge} and {_longest_edge(self.mask_size, 'mask_size')}. Pass mask_size."
                )
            if edge != own_edge or "mask_size" in kwargs:
                kwargs["mask_size"] = {"longest_edge": mask_edge}
                kwargs.setdefault("mask_pad_size", {"height": mask_edge, "width": mask_edge})

    def _check_maps(self, maps: list[np.ndarray], image_sizes, labels) -> None:
        """Raises `ValueError` unless there is one label map for each image, and of its aspect ratio."""
        if len(maps) != len(image_sizes):
            raise ValueError(f"Got {len(maps)} segmentation_maps for {len(image_sizes)} images.")
        edge = max(labels[0].shape)
        for index, (label_map, image_size) in enumerate(zip(maps, image_sizes, strict=True)):
            own, expected = (
                self._get_preprocess_shape(tuple(map(int, s)), edge) for s in (label_map.shape, image_size)
            )
            if max(abs(a - b) for a, b in zip(own, expected, strict=True)) > 1:
                raise ValueError(
                    f"Label map {index} is {label_map.shape[0]} x {label_map.shape[1]} (height x width), which is "
                    f"not the aspect ratio of its image, {int(image_size[0])} x {int(image_size[1])}."
                )

    def _get_preprocess_shape(self, old_shape, longest_edge):
        """As SAM's, but at least one pixel per side: SAM's rounds the short side of very long images to 0."""
        height, width = super()._get_preprocess_shape(old_shape, longest_edge)
        return max(1, height), max(1, width)

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        r"""
        Converts outputs to label maps.

        With both heads, a pixel has the label of a segment that contains it. If there are several, it is the one with
        the highest product of mask probability and `segment_scores`. Pixels outside all segments are background or, if
        the vocabulary has no background, have the most probable label of the CLIP head. With the CLIP head alone,
        every pixel has the most probable label.

        Args:
            outputs ([`SamClipSegmentationOutput`]):
                Outputs of [`SamClipForImageSegmentation`].
            target_sizes (`list[tuple[int, int]]`, *optional*):
                Height and width of each label map, usually the original image size. Defaults to the size of the masks
                or, without segments, of the logits.

        Returns:
            `list[torch.Tensor]`: One label map `(height, width)` of type `torch.int64` per image.
        """
        label_maps = []
        for index, target_size in enumerate(_target_sizes(outputs, target_sizes)):
            background = int(outputs.background_label_ids[index])
            if outputs.get("segment_masks") is None or background < 0:
                content_size = _content_sizes(outputs, outputs.logits)[index]
                label_map, _ = _argmax_maps(outputs.logits[index], content_size, target_size)
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
        Converts outputs to instances: [`post_process_panoptic_segmentation`] without fused labels.
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
        Converts outputs to segments that do not overlap, each with a label and a score. Background is not a segment.

        Args:
            outputs ([`SamClipSegmentationOutput`]):
                Outputs of [`SamClipForImageSegmentation`] with both heads.
            threshold (`float`, *optional*, defaults to 0.5):
                Segments with a lower score are removed before pixels are assigned to segments. The score is the
                probability of the label among all labels of the vocabulary. It does not measure the mask quality.
            mask_threshold (`float`, *optional*, defaults to 0.5):
                A mask contains the pixels with a probability above this value.
            overlap_mask_area_threshold (`float`, *optional*, defaults to 0.8):
                A pixel in several masks is assigned to one of them, as in [`post_process_semantic_segmentation`].
                Segments to which a smaller fraction of their mask than this value is assigned are removed; their
                pixels are unassigned.
            label_ids_to_fuse (`set[int]`, *optional*):
                Labels with at most one segment per image, such as sky. Segments of these labels are merged; the
                merged segment has the highest score.
            target_sizes (`list[tuple[int, int]]`, *optional*):
                Height and width of each segmentation, usually the original image size. Defaults to the size of the
                masks.

        Returns:
            `list[dict]`: For each image, `segmentation`, a tensor `(height, width)` of type `torch.int32` with the
            segment id of each pixel (0 if unassigned), and `segments_info`, a list of dicts with `id`, `label_id`,
            `was_fused` and `score`.

        Raises:
            ValueError: The outputs contain no segments, because only the CLIP head was used.
        """
        if outputs.get("segment_masks") is None:
            raise ValueError("The outputs contain no segments. Call the model with both_heads=True.")
        results = []
        for index, target_size in enumerate(_target_sizes(outputs, target_sizes)):
            probability, label = outputs.segment_logits[index].softmax(dim=-1).max(dim=-1)
            selected = (probability >= threshold) & (label != outputs.background_label_ids[index])
            segment, area = _segment_map(outputs, index, target_size, selected, mask_threshold)
            segmentation = torch.zeros(target_size, dtype=torch.int32, device=segment.device)
            segments: list[dict] = []
            fused: dict[int, dict] = {}
            for number in segment.unique().tolist():
                pixels = segment == number
                if number < 0 or pixels.sum() < overlap_mask_area_threshold * area[number]:
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
                segmentation[pixels] = info["id"]
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results

    def post_process_object_detection(
        self, outputs, threshold: float = 0.1, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        r"""
        Converts outputs to boxes around the segments that match a text.

        Args:
            outputs ([`SamClipObjectDetectionOutput`]):
                Outputs of [`SamClipForObjectDetection`].
            threshold (`float`, *optional*, defaults to 0.1):
                Only segments with a score above this value are returned.
            target_sizes (`list[tuple[int, int]]`, *optional*):
                Height and width of each image, usually the original size. Defaults to the size of the masks.

        Returns:
            `list[dict]`: For each image, in descending order of scores, `scores` `(num_boxes,)`, `boxes`
            `(num_boxes, 4)` as x1, y1, x2, y2 in pixels, and `labels` `(num_boxes,)`, all 0 because there is one text.
        """
        results = []
        for index, target_size in enumerate(_target_sizes(outputs, target_sizes)):
            scores, order = outputs.object_scores[index].sort(descending=True, stable=True)
            content_size = _content_sizes(outputs, outputs.segment_masks)[index]
            boxes, kept = [], []
            for number in order[scores > threshold].tolist():
                mask = outputs.segment_masks[index, number : number + 1].float()
                mask = resize_content(mask, content_size, target_size)[0] > 0
                if (box := mask_to_box(mask.cpu().numpy())) is not None:
                    boxes.append(box)
                    kept.append(number)
            results.append(
                {
                    "scores": outputs.object_scores[index, kept],
                    "boxes": torch.tensor(boxes, dtype=torch.float32, device=order.device).reshape(-1, 4),
                    "labels": order.new_zeros(len(kept)),
                }
            )
        return results


def _longest_edge(size, name: str) -> int:
    """The longest edge in `size`. Raises `ValueError` if `size` contains something else."""
    edge = size
    if hasattr(size, "get"):  # dict, or SizeDict of transformers
        others = [key for key in ("height", "width", "shortest_edge", "max_height", "max_width") if size.get(key)]
        edge = None if others else size.get("longest_edge")
    if not isinstance(edge, Integral) or isinstance(edge, bool) or edge < 1:
        raise ValueError(
            f'{name} must be the longest edge in pixels, such as 512 or {{"longest_edge": 512}}; images keep their '
            f"aspect ratio. Got {size!r}."
        )
    return int(edge)


def _standardize_maps(maps) -> list[np.ndarray]:
    """Converts a label map, or a list of them, to integer arrays `(height, width)`."""
    shape = getattr(maps, "shape", ())
    is_single = isinstance(maps, Image.Image | str | os.PathLike) or len(shape) == 2 or shape[2:] == (1,)
    return [_standardize_map(label_map) for label_map in ([maps] if is_single else maps)]


def _standardize_map(label_map) -> np.ndarray:
    if isinstance(label_map, str | os.PathLike):
        with Image.open(label_map) as image:
            return _standardize_map(image)
    if isinstance(label_map, torch.Tensor):
        label_map = label_map.numpy(force=True)
    array = np.array(label_map)  # a copy: PyTorch warns of arrays that cannot be written
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array.reshape(array.shape[:2] if array.shape[-1] == 1 else array.shape[1:])
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"A label map must be of shape (height, width), got {array.shape}: one integer for each pixel."
        )
    if array.dtype.kind not in "iub" and not (array.dtype.kind == "f" and (array == array.round()).all()):
        raise ValueError(f"A label map must have integers, got {array.dtype}.")
    if array.dtype != np.uint8 and (array.min() < -(2**24) or array.max() > 2**24):
        raise ValueError("The labels of a label map must not exceed 16,777,216.")
    return array if array.dtype == np.uint8 else array.astype(np.float32)  # exact up to 2^24 while it is resized


def convert_to_rgb(image: Image.Image) -> Image.Image:
    r"""
    Converts a PIL image of any mode to RGB.

    Images with 16 bits per channel are scaled to 8 bits; `image.convert("RGB")` alone turns most of them white. Raises
    `ValueError` for an image without pixels.
    """
    return _scale_to_8_bits(image).convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scales PIL's modes with 16 bits per channel, "I;16" and "I", to 8 bits. Returns images of other modes as they
    are."""
    if 0 in image.size:
        raise ValueError(f"An image of {image.width} x {image.height} has no pixels.")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    # Mode "I" also occurs with 8-bit values, which need no scaling.
    return Image.fromarray((pixels // (257 if pixels.max() > 255 else 1)).astype(np.uint8))


def _standardize(images, do_rescale: bool):
    """Converts an image, or a list of images, to types and ranges that SAM's image processors read correctly."""
    if isinstance(images, list | tuple):
        if len(images) == 0:
            raise ValueError("The list of images is empty.")
        return [_standardize(image, do_rescale) for image in images]
    if isinstance(images, str | os.PathLike) and os.path.isfile(images):
        with Image.open(images) as image:
            return convert_to_rgb(ImageOps.exif_transpose(image))
    if isinstance(images, Image.Image):
        return _scale_to_8_bits(images)
    if not isinstance(images, np.ndarray | torch.Tensor):
        return images  # SAM's image processor downloads URLs and raises an error for other types
    if 0 in images.shape:
        raise ValueError(f"An image of shape {tuple(images.shape)} has no pixels.")
    if isinstance(images, np.ndarray):
        images = (images // 257).astype(np.uint8) if images.dtype == np.uint16 else images
        images = images[..., None].repeat(3, axis=-1) if images.ndim == 2 else images
    else:
        images = (images.int() // 257).to(torch.uint8) if images.dtype == torch.uint16 else images
        images = images[None].expand(3, -1, -1) if images.ndim == 2 else images
    if "float" in str(images.dtype):
        lowest, highest = float(images.min()), float(images.max())
        if not np.isfinite([lowest, highest]).all():
            raise ValueError("An image contains pixels that are not finite numbers.")
        if do_rescale and lowest >= 0 and highest <= 1:
            logger.warning_once(
                "An image has float values between 0 and 1, but values up to 255 are expected. Pass do_rescale=False "
                "if the image is already rescaled."
            )
    return images


def _content_sizes(outputs, maps: torch.Tensor) -> list[list[float]]:
    """Returns height and width of the content (the image without padding) in cells of `maps` `(..., height, width)`,
    for each image."""
    return (outputs.content_sizes * maps.shape[-1] / outputs.logits.shape[-1]).tolist()


def _target_sizes(outputs, target_sizes) -> list[tuple[int, int]]:
    """Returns height and width of the result for each image; by default, those of the content of the masks, or of the
    logits if there are no masks."""
    if target_sizes is None:
        maps = outputs.logits if outputs.get("segment_masks") is None else outputs.segment_masks
        target_sizes = _content_sizes(outputs, maps)
    if len(target_sizes) != len(outputs.logits):
        raise ValueError(f"Got {len(target_sizes)} target_sizes for {len(outputs.logits)} images.")
    return [(round(float(height)), round(float(width))) for height, width in target_sizes]


def _segment_map(
    outputs,
    index: int,
    target_size: tuple[int, int],
    selected: torch.Tensor | None = None,
    mask_threshold: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, for one image, the index of the segment that each pixel belongs to `(height, width)`, -1 outside all
    segments, and the mask area of each segment `(num_segments,)` in pixels. `selected` `(num_segments,)` restricts
    both to a subset of the segments."""
    masks, scores = outputs.segment_masks[index], outputs.segment_scores[index]
    indices = (scores > 0 if selected is None else selected & (scores > 0)).nonzero().flatten()
    area = torch.zeros_like(scores, dtype=torch.float32)  # float16 cannot count beyond 65,504

    def weight_masks(start: int, chunk: torch.Tensor) -> torch.Tensor:
        chunk_indices = indices[start : start + len(chunk)]
        probability = chunk.sigmoid()
        inside = probability > mask_threshold
        area[chunk_indices] = inside.flatten(1).sum(dim=1).to(area.dtype)
        return probability * inside * scores[chunk_indices, None, None]

    segment, weight = _argmax_maps(masks[indices], _content_sizes(outputs, masks)[index], target_size, weight_masks)
    segment = torch.cat([indices, indices.new_tensor([-1])])[segment]
    return torch.where(weight > 0, segment, -1), area


def _argmax_maps(maps: torch.Tensor, content_size, target_size, transform=lambda start, chunk: chunk):
    """Resizes the content of maps `(num_maps, height, width)` to `target_size` and returns, for each pixel, the index
    of the highest map and its value. `transform(start, chunk)` is applied to each chunk of resized maps; `start` is
    the index of its first map."""
    highest = torch.full(target_size, -torch.inf, device=maps.device)
    argmax = torch.full(target_size, -1, dtype=torch.int64, device=maps.device)
    for start in range(0, len(maps), MAPS_PER_CHUNK):
        chunk = resize_content(maps[start : start + MAPS_PER_CHUNK].float(), content_size, target_size)
        value, index = transform(start, chunk).max(dim=0)
        argmax = torch.where(value > highest, index + start, argmax)
        highest = torch.maximum(value, highest)
    return argmax, highest


def resize_content(maps: torch.Tensor, content_size, target_size) -> torch.Tensor:
    r"""
    Removes the padding of maps and resizes them bilinearly.

    Args:
        maps (`torch.Tensor` of shape `(channels, height, width)`):
            Maps of a padded image, with the image in the upper left corner.
        content_size (`tuple[float, float]`):
            Height and width of the image in cells of the maps. Fractions of a cell are allowed.
        target_size (`tuple[int, int]`):
            Height and width of the result.

    Returns:
        `torch.Tensor`: Maps `(channels, target_height, target_width)`.
    """
    coordinates = [
        # Centers of the target pixels, converted from cells to the range [-1, 1] of grid_sample.
        ((torch.arange(int(target), device=maps.device) + 0.5) * content / target) * 2 / side - 1
        for target, content, side in zip(target_size, content_size, maps.shape[1:], strict=True)
    ]
    y, x = torch.meshgrid(*coordinates, indexing="ij")
    grid = torch.stack([x, y], dim=-1)[None].to(maps.dtype)
    return F.grid_sample(maps[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


class SamClipImageProcessorPil(SamClipImageProcessorMixin, SamClipMaskGenerationMixin, SamImageProcessorPil):
    """Image processor for SAM-CLIP that uses PIL and numpy."""

    def resize(self, image: np.ndarray, size, resample=None, **kwargs) -> np.ndarray:
        """As in SAM's image processor, but for labels of any value, `(channels, height, width)`. SAM's converts arrays
        to PIL images of 8 bits."""
        if resample != Image.Resampling.NEAREST:
            return super().resize(image, size, resample, **kwargs)
        height, width = self._get_preprocess_shape(image.shape[1:], size["longest_edge"])
        channels = [Image.fromarray(channel.astype(np.float32)) for channel in image]
        resized = [channel.resize((width, height), Image.Resampling.NEAREST) for channel in channels]
        return np.stack([np.asarray(channel) for channel in resized]).astype(image.dtype)


if is_torchvision_available():
    from transformers import SamImageProcessor

    class SamClipImageProcessor(SamClipImageProcessorMixin, SamClipMaskGenerationMixin, SamImageProcessor):
        """Image processor for SAM-CLIP that uses torchvision."""

else:
    SamClipImageProcessor = SamClipImageProcessorPil  # type: ignore[misc]


__all__ = ["SamClipImageProcessor", "SamClipImageProcessorPil", "convert_to_rgb"]
