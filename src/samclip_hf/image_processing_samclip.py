"""
Image processors for SAM-CLIP: SAM's preprocessing at any size, and post-processing for segmentation and detection.

`SamClipImageProcessor` uses torchvision. `SamClipImageProcessorPil` uses PIL and numpy, for installations without
torchvision. Post-processing for mask generation is in `mask_generation_samclip.py`.
"""

from .versions_samclip import MINIMUM_TRANSFORMERS_VERSION  # noqa: F401  # isort: skip  # first: raises on older versions

import base64
import io
import os
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import httpx  # version 2 uses a successor of httpx
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers import SamImageProcessorPil
from transformers.utils import is_torchvision_available, logging

from .code_samclip import save_code
from .mask_generation_samclip import SamClipMaskGenerationMixin, mask_to_box

logger = logging.get_logger(__name__)

# Maps are resized to the image in chunks, so that peak memory does not grow with the number of labels or segments.
MAPS_PER_CHUNK = 16
IGNORED_LABEL = 255  # of padding, and of 0 with do_reduce_labels, as in SegFormer's image processor


class SamClipImageProcessorKwargs(SamImageProcessorPil.valid_kwargs, total=False):  # type: ignore[name-defined,misc,call-arg]
    r"""
    do_reduce_labels (`bool`, *optional*, defaults to `False`):
        Whether to subtract 1 from the labels of `segmentation_maps`. 0 becomes 255, and 255 remains.
    """

    do_reduce_labels: bool


class SamClipImageProcessorMixin:
    """Preprocessing and post-processing for subclasses of SAM's image processors."""

    # Attributes of SAM's image processors.
    size: Any
    pad_size: Any
    mask_size: Any
    do_resize: bool
    valid_kwargs = SamClipImageProcessorKwargs
    do_reduce_labels = False

    def preprocess(self, images, segmentation_maps=None, size=None, pad_size=None, **kwargs):
        r"""
        Preprocesses images as SAM does: resizes the longest edge to `size`, normalizes, and pads to a square at the
        bottom and on the right.

        Four details differ from SAM's image processor. Passing `size` also sets the sizes that depend on it. Images of
        all modes and types are converted to 8 bits per channel and RGB, see [`convert_to_rgb`]; booleans and floats
        from 0 to 1 are scaled to 0 to 255 unless `do_rescale=False`. Arrays without a channel axis are grayscale
        images. Files of images and label maps are rotated according to their EXIF orientation; images in memory are
        not.

        Args:
            images (`ImageInput`):
                One image or a list of images: PIL images, arrays, tensors, paths or URLs.
            segmentation_maps (`ImageInput`, *optional*):
                A label map for each image: integers `(height, width)` as PIL images, arrays or tensors, of the aspect
                ratio of the image. They are resized to `mask_size` as in SAM's image processor, and padded to
                `mask_pad_size` with 255, which the loss of [`SamClipForImageSegmentation`] ignores.
            size (`int` or `dict[str, int]`, *optional*):
                Longest edge in pixels, as a number or as `{"longest_edge": number}`. Defaults to `self.size`. Another
                value also changes `pad_size`, and `mask_size` and `mask_pad_size` in proportion.
            pad_size (`dict[str, int]`, *optional*):
                Height and width after padding. Only one of them may differ from the longest edge.
            do_reduce_labels (`bool`, *optional*):
                Whether to subtract 1 from the labels of `segmentation_maps`, as SegFormer's image processor does: 0
                becomes 255, and 255 remains. Defaults to `self.do_reduce_labels`.

        Returns:
            `BatchFeature`: `pixel_values` `(batch_size, 3, height, width)`, and `original_sizes` and
            `reshaped_input_sizes`, heights and widths before and after resizing `(batch_size, 2)`. With
            `segmentation_maps`, also `labels`, the label maps `(batch_size, mask_height, mask_width)`.

        Raises:
            ValueError: The list of images is empty, an image has no pixels or pixels that are not finite, a size is
                not one of the above, or label maps do not match the images.
        """
        do_convert_rgb = kwargs.get("do_convert_rgb", self.do_convert_rgb)
        image_mean = kwargs.get("image_mean", self.image_mean)
        images = _standardize(
            images,
            kwargs.get("do_rescale", self.do_rescale),
            (len(image_mean) if isinstance(image_mean, list | tuple) else 3) if do_convert_rgb else None,
            kwargs.pop("input_data_format", None),
        )
        kwargs["input_data_format"] = "channels_first"
        self._set_sizes(kwargs, size, pad_size, with_maps=segmentation_maps is not None)
        if segmentation_maps is not None:
            segmentation_maps = _standardize_maps(segmentation_maps)
            reduces = kwargs.get("do_reduce_labels")
            if self.do_reduce_labels if reduces is None else reduces:
                segmentation_maps = [_reduce_labels(label_map) for label_map in segmentation_maps]
        inputs = super().preprocess(images, segmentation_maps, **kwargs)
        if self.do_resize and not kwargs.get("do_resize", True) and kwargs.get("do_pad", self.do_pad):
            self._check_padding(inputs["reshaped_input_sizes"], kwargs.get("pad_size", self.pad_size))
        if segmentation_maps is not None:
            self._check_maps(segmentation_maps, inputs["original_sizes"], inputs["labels"])
            edge = _longest_edge(kwargs.get("mask_size") or self.mask_size, "mask_size")
            is_resized = kwargs.get("do_resize", self.do_resize)
            for label_map, labels in zip(segmentation_maps, inputs["labels"], strict=True):
                shape = label_map.shape
                height, width = self._get_preprocess_shape(shape, edge) if is_resized else shape
                labels[height:] = IGNORED_LABEL
                labels[:, width:] = IGNORED_LABEL
        return inputs

    def _check_padding(self, sizes, pad_size) -> None:
        """Raises `ValueError` if images that were not resized are smaller than their padding in both directions."""
        height, width = (max(int(size[axis]) for size in sizes) for axis in (0, 1))
        if height != pad_size["height"] and width != pad_size["width"]:
            raise ValueError(
                f"Images of {height} x {width} pixels would be padded to {pad_size['height']} x {pad_size['width']}, "
                "which post_process_masks could not know. Set do_resize=False in the image processor, or pass a "
                "pad_size that the images fill, or do_pad=False."
            )

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As SAM's. The image processor of a published checkpoint is saved with the model's code."""
        save_code(self, save_directory)
        if auto_map := getattr(self, "auto_map", None):
            # Without the class, AutoProcessor asks whether to trust the code. AutoVideoProcessor, which pipelines try,
            # asks the same if there is one class instead of one for each backend.
            self.processor_class = "SamClipProcessor"
            module = "image_processing_samclip"
            classes = [f"{module}.SamClipImageProcessorPil", f"{module}.SamClipImageProcessor"]
            self.auto_map = auto_map | {"AutoImageProcessor": classes}
        return super().save_pretrained(save_directory, *args, **kwargs)

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
            if is_resized and not is_own and max(padding.values()) != edge:
                raise ValueError(
                    f"pad_size is {padding['height']} x {padding['width']}, but images are padded to their longest "
                    f"edge, {edge} pixels. Pass size={max(padding.values())} and no pad_size to resize the longest "
                    "edge to that many pixels."
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
            return _standardize_map(ImageOps.exif_transpose(image))  # as image files
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


def _reduce_labels(label_map: np.ndarray) -> np.ndarray:
    """Subtracts 1 from labels, as SegFormer's image processor: 0 and 255 become 255."""
    ignored = (label_map == 0) | (label_map == IGNORED_LABEL)
    return np.where(ignored, IGNORED_LABEL, label_map - 1).astype(label_map.dtype)


def load_image(image: str | os.PathLike | Image.Image, timeout: float | None = None) -> Image.Image:
    r"""
    Loads an image as RGB and rotates it according to its EXIF orientation. Unlike `load_image` of transformers, it
    converts pixels with [`convert_to_rgb`]: transformers turns images with 16 bits per channel white and float images
    black.

    Args:
        image (`str`, `os.PathLike` or `PIL.Image.Image`):
            A path, a URL, a base64 string, or an image.
        timeout (`float`, *optional*):
            Seconds to wait for a URL.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        response = httpx.get(image, timeout=timeout, follow_redirects=True)
        response.raise_for_status()
        return load_image(Image.open(io.BytesIO(response.content)))
    if isinstance(image, str | os.PathLike) and os.path.isfile(image):
        with Image.open(image) as opened:
            return load_image(opened)
    if isinstance(image, Image.Image):
        return convert_to_rgb(image, apply_orientation=True)
    if not isinstance(image, str):
        raise TypeError(f"An image must be a PIL image, a path, a URL or a base64 string, got {type(image).__name__}.")
    try:
        encoded = image.partition(",")[2] if image.startswith("data:image/") else image
        return load_image(Image.open(io.BytesIO(base64.b64decode("".join(encoded.split()), validate=True))))
    except (ValueError, UnidentifiedImageError) as error:
        raise ValueError(f"{image[:200]!r} is not an image file, a URL or an image in base64.") from error


def convert_to_rgb(image: Image.Image, apply_orientation: bool = False) -> Image.Image:
    r"""
    Converts a PIL image of any mode to RGB. An alpha channel is dropped, as in `image.convert("RGB")`.

    An RGB image that is not a file is returned as it is, without a copy.

    Unlike `image.convert`, this function scales images with more than 8 bits per channel: values up to 65535, if any
    value is above 255, and float values from 0 to 1. Only the first frame of an animated image is read, and a warning
    is logged.

    Args:
        image (`PIL.Image.Image`):
            The image.
        apply_orientation (`bool`, *optional*, defaults to `False`):
            Whether to rotate and flip the image according to its EXIF orientation.

    Raises:
        ValueError: The image has no pixels, or values out of these ranges.
    """
    if 0 in image.size:
        raise ValueError(f"An image of {image.width} x {image.height} has no pixels.")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: photographs with a preview
        logger.warning_once("An image has several frames or pages. Only the first one of each image is read.")
    if apply_orientation and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose copies any image
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image)).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("La", "RGBa"):  # colors multiplied by alpha, which PIL converts only to this mode
        image = image.convert(image.mode[:-1] + "A")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # without this step, Pillow warns of several transparent colors
    is_rgb = image.mode == "RGB" and type(image) is Image.Image  # and not a file, which may be closed
    return image if is_rgb else image.convert("RGB")


def _to_8_bits(pixels):
    """
    Scales an array or tensor to values from 0 to 255: integers up to 65535 and floats up to 65535, if there are any
    above 255; floats from 0 to 1; and booleans. Integers become uint8, floats keep their fractions.

    Raises `ValueError` for values out of these ranges and for values that are not finite numbers.
    """
    if isinstance(pixels, torch.Tensor):
        is_float, is_bool = pixels.is_floating_point(), pixels.dtype == torch.bool
        is_number, uint8 = not pixels.is_complex(), torch.uint8
        # Other types support few operations.
        if not is_bool and pixels.dtype not in (uint8, torch.float32, torch.float64):
            pixels = pixels.to(torch.float32 if is_float else torch.int64)
    else:
        is_float, is_bool = pixels.dtype.kind == "f", pixels.dtype.kind == "b"
        is_number, uint8 = pixels.dtype.kind in "biuf", np.uint8
        pixels = pixels.astype(np.float32) if pixels.dtype == np.float16 else pixels

    def as_uint8(pixels):
        return pixels.to(uint8) if isinstance(pixels, torch.Tensor) else pixels.astype(uint8)

    if not is_number:
        raise ValueError(f"An image must have numbers as pixels, got {pixels.dtype}.")
    if pixels.dtype == uint8 or is_bool:
        return as_uint8(pixels) * 255 if is_bool else pixels
    lowest, highest = _value_range(pixels)
    if lowest < 0 or highest > 65535:
        raise ValueError(
            f"An image has values from {lowest:g} to {highest:g}. Scale them to 0 to 255, or floats to 0 to 1. If the "
            "image is normalized already, pass do_rescale=False and do_normalize=False to the image processor."
        )
    if is_float:
        return pixels * 255 if highest <= 1 else pixels / 257 if highest > 255 else pixels
    return as_uint8(pixels // 257 if highest > 255 else pixels)


def _value_range(pixels) -> tuple[float, float]:
    """The lowest and the highest value of an array or tensor. Raises `ValueError` for values that are not finite."""
    lowest, highest = float(pixels.min()), float(pixels.max())
    if not np.isfinite([lowest, highest]).all():
        raise ValueError("An image contains pixels that are not finite numbers.")
    return lowest, highest


def _standardize(images, do_rescale: bool, num_channels: int | None, input_data_format=None) -> list:
    """Converts an image or a list of images, which may be nested, to a list of arrays or tensors `(channels, height,
    width)` with values that SAM's image processors read correctly. `num_channels` is `None` if channels are kept."""
    if isinstance(images, list | tuple):
        if len(images) == 0:
            raise ValueError("The list of images is empty.")
        arguments = (do_rescale, num_channels, input_data_format)
        return [image for nested in images for image in _standardize(nested, *arguments)]
    if isinstance(images, str | os.PathLike):
        images = load_image(images)
    if isinstance(images, Image.Image):
        images = np.array(convert_to_rgb(images) if num_channels is not None else images)
        input_data_format = "channels_last"
    if not isinstance(images, np.ndarray | torch.Tensor):
        raise ValueError(
            f"An image must be a PIL image, an array, a tensor, a path or a URL, got {type(images).__name__}."
        )
    if 0 in images.shape:
        raise ValueError(f"An image of shape {tuple(images.shape)} has no pixels.")
    if images.ndim == 4:
        return [image for one in images for image in _standardize(one, do_rescale, num_channels, input_data_format)]
    images = _channels_first(images, num_channels, input_data_format)
    if do_rescale or "float" not in str(images.dtype):
        return [_to_8_bits(images)]
    _value_range(images)  # raises for values that are not finite
    return [images]


def _channels_first(image, num_channels: int | None, input_data_format):
    """An array or tensor `(height, width)`, `(channels, height, width)` or `(height, width, channels)` with its
    channels first. They become `num_channels`, unless that is `None`: gray is repeated, and an alpha channel is
    dropped."""
    if image.ndim == 2:
        image = image[None]
    elif image.ndim != 3:
        raise ValueError(f"An image must have two or three axes, got shape {tuple(image.shape)}.")
    else:
        channels = (1, 3, 4) if 2 in image.shape[::2] and {1, 3, 4} & {*image.shape[::2]} else (1, 2, 3, 4)
        first = image.shape[0] in channels
        if input_data_format is not None:
            first = str(getattr(input_data_format, "value", input_data_format)) == "channels_first"
        elif not first and image.shape[2] not in channels:
            raise ValueError(f"An image must have 1, 3 or 4 channels, first or last, got shape {tuple(image.shape)}.")
        if not first:
            image = image.permute(2, 0, 1) if isinstance(image, torch.Tensor) else np.moveaxis(image, 2, 0)
    if num_channels is None or len(image) == num_channels:
        return image
    if len(image) in (1, 2):
        shape = (num_channels, *image.shape[1:])
        return image[:1].expand(shape) if isinstance(image, torch.Tensor) else np.broadcast_to(image[:1], shape).copy()
    return image[:num_channels]


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

    def resize(chunk: slice) -> torch.Tensor:
        return transform(chunk.start, resize_content(maps[chunk].float(), content_size, target_size))

    return argmax_in_chunks(len(maps), resize, target_size, maps.device)


def argmax_in_chunks(num_maps: int, compute, target_size, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Returns, for each pixel, the index of the highest map and its value. Few maps are in memory at the same time.

    Args:
        num_maps (`int`):
            Number of maps.
        compute (`Callable[[slice], torch.Tensor]`):
            Returns maps `(chunk_length, height, width)` for a slice of the indices.
        target_size (`tuple[int, int]`):
            Height and width of the maps.
        device (`torch.device`, *optional*):
            Device of the maps.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Indices of type `torch.int64`, -1 if there are no maps, and values, both
        `(height, width)`.
    """
    highest = torch.full(target_size, -torch.inf, device=device)
    argmax = torch.full(target_size, -1, dtype=torch.int64, device=device)
    for start in range(0, num_maps, MAPS_PER_CHUNK):
        value, index = compute(slice(start, start + MAPS_PER_CHUNK)).max(dim=0)
        argmax = torch.where(value > highest, index + start, argmax)
        highest = torch.maximum(value, highest)
    return argmax, highest


def resize_content(
    maps: torch.Tensor,
    content_size,
    target_size,
    region: tuple[int, int, int, int] | None = None,
    origin: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    r"""
    Removes the padding of maps and resizes them bilinearly.

    Args:
        maps (`torch.Tensor` of shape `(channels, height, width)`):
            Maps of a padded image, with the image in the upper left corner.
        content_size (`tuple[float, float]`):
            Height and width of the image in cells of the maps. Fractions of a cell are allowed.
        target_size (`tuple[int, int]`):
            Height and width of the resized maps.
        region (`tuple[int, int, int, int]`, *optional*):
            Left, top, right and bottom, exclusive, of the part of the resized maps that is computed. Default: all.
        origin (`tuple[int, int]`, *optional*):
            Row and column of the first cell, if `maps` are cut out of larger maps.

    Returns:
        `torch.Tensor`: Maps `(channels, target_height, target_width)`, or of the size of the region.
    """
    left, top, right, bottom = (0, 0, *target_size[::-1]) if region is None else region
    coordinates = [
        # Centers of the target pixels, converted from cells to the range [-1, 1] of grid_sample.
        ((torch.arange(int(start), int(end), device=maps.device) + 0.5) * content / target - first) * 2 / side - 1
        for start, end, target, content, first, side in zip(
            (top, left), (bottom, right), target_size, content_size, origin, maps.shape[1:], strict=True
        )
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
            if image.dtype.kind == "f" and image.max() > 1:
                image = image.round().astype(np.uint8)
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


__all__ = ["SamClipImageProcessor", "SamClipImageProcessorPil", "convert_to_rgb", "load_image"]
