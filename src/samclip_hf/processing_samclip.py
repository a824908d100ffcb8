"""SAM-CLIP's processor: images, prompts in pixels of the original images, and text."""

from .versions_samclip import MINIMUM_TRANSFORMERS_VERSION  # noqa: F401  # isort: skip  # raises on older versions

import numpy as np
import torch
from tokenizers import Tokenizer, normalizers
from transformers import BatchFeature, GemmaTokenizer, PreTrainedTokenizerFast, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs, Unpack

from .code_samclip import save_code
from .image_processing_samclip import SamClipImageProcessor
from .modeling_samclip import check_tokenizer, load_tokenizer

POINT_PADDING = -10  # label of a point that SAM's prompt encoder ignores


class SamClipProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]  # mypy sees no TypedDict
    _defaults = {
        "text_kwargs": {"padding": True, "return_tensors": "pt"},
        "images_kwargs": {"return_tensors": "pt"},
    }


class SamClipBatchFeature(BatchFeature):
    """The outputs of [`SamClipProcessor`]. Coordinates remain float32 when the other tensors are cast to another type,
    because bfloat16 rounds coordinates between 512 and 1024 to multiples of 4."""

    def to(self, *args, **kwargs) -> "SamClipBatchFeature":
        """As in [`BatchFeature`], but `input_points` and `input_boxes` are only moved to the device, not cast."""
        coordinates = {name: self[name] for name in ("input_points", "input_boxes") if name in self}
        super().to(*args, **kwargs)
        for name, value in coordinates.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(self[name].device, non_blocking=kwargs.get("non_blocking", False))
        return self


class SamClipProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer of SAM-CLIP, and prompts in the pixels of the original images.

    image_processor ([`SamClipImageProcessor`]):
        SAM's preprocessing.
    tokenizer ([`PreTrainedTokenizerBase`]):
        The tokenizer of the CLIP or SigLIP teacher. A conversion to lower case is added to SigLIP 2's tokenizer, which
        is Gemma's, because SigLIP 2 was trained on texts in lower case.

    Raises `ValueError` for a tokenizer without a vocabulary, which transformers makes if its files are missing.
    """

    valid_processor_kwargs = SamClipProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None):
        if tokenizer is not None:
            check_tokenizer(tokenizer, tokenizer.name_or_path)
        if isinstance(tokenizer, GemmaTokenizer):
            tokenizer = _with_lower_case(tokenizer)
        super().__init__(image_processor, tokenizer)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in [`ProcessorMixin`]. The processor of a published checkpoint is saved with the model's code."""
        if auto_map := getattr(self.image_processor, "auto_map", None):  # transformers does not keep the processor's
            self.auto_map = auto_map
            save_code(self, save_directory)
            self.image_processor.auto_map = self.auto_map
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_teachers(cls, sam, clip) -> "SamClipProcessor":
        r"""
        The processor of [`SamClipModel.from_teachers`]: SAM's image processor and CLIP's tokenizer.

        sam, clip (`str` or `os.PathLike`):
            Repositories on the Hub or folders.

        Raises `ValueError` if there is no tokenizer, and `OSError` if there is no image processor.
        """
        return cls(SamClipImageProcessor.from_pretrained(sam), load_tokenizer(str(clip)))

    def __call__(
        self,
        images=None,
        text=None,
        segmentation_maps=None,
        input_points=None,
        input_labels=None,
        input_boxes=None,
        **kwargs: Unpack[SamClipProcessorKwargs],
    ) -> SamClipBatchFeature:
        r"""
        images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
            Passed to the image processor.
        text (`str` or `list[str]`, *optional*):
            Passed to the tokenizer, by default with padding to the longest text. SigLIP's text tower adds the padding
            that it needs.
        segmentation_maps (*optional*):
            Label maps, passed to the image processor and returned as `labels`, with 255 in the padding. With
            `do_reduce_labels=True`, 1 is subtracted from the labels.
        input_points (nested lists or array of shape `(num_images, num_prompts, num_points, 2)`, *optional*):
            x and y in pixels of the original image. Images with fewer prompts, and prompts with fewer points, are
            padded. Padding prompts do not change other masks. Padding points are inputs of the mask decoder, as in
            transformers' SAM, and change the mask of their prompt slightly. If the level of prompts is left out, every
            image has one prompt, as in SAM's processor.
        input_labels (nested lists or array of shape `(num_images, num_prompts, num_points)`, *optional*):
            1 for a point inside the object, 0 for a point outside, -1 for no point; 1 by default. Nested like the
            points.
        input_boxes (nested lists or array of shape `(num_images, num_boxes, 4)`, *optional*):
            x1, y1, x2, y2 in pixels of the original image. Images with fewer boxes are padded.

        Returns, by default as torch tensors, the output of the image processor (`pixel_values`, `original_sizes`,
        `reshaped_input_sizes`), `input_ids`, `attention_mask`, and the prompts in pixels of `pixel_values`. If prompts
        were padded, the output also contains `num_prompts` `(num_images,)`, their number without padding, for
        `post_process_masks`. Points and boxes stay float32 in `inputs.to(device, torch.bfloat16)`.

        Raises `ValueError` if prompts and images do not match or a prompt is outside its image.
        """
        if images is None and text is None:
            raise ValueError("Pass images, text or both.")
        if images is None and any(p is not None for p in (input_points, input_labels, input_boxes)):
            raise ValueError("Prompts need images.")
        merged = self._merge_kwargs(SamClipProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        inputs = SamClipBatchFeature()
        if images is not None:
            inputs.update(self.image_processor(images, segmentation_maps, **merged["images_kwargs"]))
        if text is not None:
            inputs.update(self.tokenizer(text, **merged["text_kwargs"]))
        if input_points is not None:
            inputs.update(self._prepare_points(input_points, input_labels, inputs))
        elif input_labels is not None:
            raise ValueError("input_labels need input_points.")
        if input_boxes is not None:
            inputs.update(self._prepare_boxes(input_boxes, inputs))
        counts = inputs.pop("num_prompts", None)
        if counts is not None and len(counts.unique()) > 1:  # some images are padded
            inputs["num_prompts"] = counts
        if merged["images_kwargs"]["return_tensors"] != "pt":  # the type of the other outputs
            arrays = {name: value.numpy() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            inputs.update(arrays)
        return inputs

    def _prepare_points(self, input_points, input_labels, inputs) -> dict[str, torch.Tensor]:
        """Padded points `(num_images, num_prompts, num_points, 2)` and their labels."""
        nested = _by_prompt("input_points", input_points, ("image", "prompt", "point", "x and y"))
        points = [[_coordinates("input_points", p, "x and y", 2) for p in prompts] for prompts in nested]
        if input_labels is None:
            labels = [[np.ones(len(p)) for p in prompts] for prompts in points]
        else:
            nested = _by_prompt("input_labels", input_labels, ("image", "prompt", "point"))
            labels = [[np.asarray(p, dtype=np.float64).reshape(-1) for p in prompts] for prompts in nested]
        if [[len(p) for p in prompts] for prompts in points] != [[len(p) for p in prompts] for prompts in labels]:
            raise ValueError("input_labels must have exactly one label for each of the input_points.")
        if unknown := {v.item() for prompts in labels for p in prompts for v in p} - {1, 0, -1, POINT_PADDING}:
            raise ValueError(f"input_labels must be 1, 0 or -1, got {sorted(unknown)}.")
        counts = self._count_prompts("input_points", points, inputs)

        num_prompts = max(map(len, points))
        num_points = max(len(p) for prompts in points for p in prompts)
        padded_points = np.zeros((len(points), num_prompts, num_points, 2), dtype=np.float32)
        padded_labels = np.full((len(points), num_prompts, num_points), POINT_PADDING, dtype=np.int64)
        for i, prompts in enumerate(points):
            for j, prompt in enumerate(prompts):
                padded_points[i, j, : len(prompt)] = self._rescale("input_points", prompt, i, inputs)
                padded_labels[i, j, : len(prompt)] = labels[i][j]
        return {
            "input_points": torch.from_numpy(padded_points),
            "input_labels": torch.from_numpy(padded_labels),
            **counts,
        }

    def _prepare_boxes(self, input_boxes, inputs) -> dict[str, torch.Tensor]:
        """Padded boxes `(num_images, num_boxes, 4)`."""
        if _depth("input_boxes", input_boxes) != 3:
            raise ValueError(
                "input_boxes must be nested by image, box, and x1, y1, x2, y2: three levels, such as "
                f"[[[10, 20, 60, 90]]] for one image with one box; got {_depth('input_boxes', input_boxes)}."
            )
        boxes = [_coordinates("input_boxes", b, "x1, y1, x2 and y2", 4) for b in input_boxes]
        counts = self._count_prompts("input_boxes", boxes, inputs)
        padded = np.zeros((len(boxes), max(map(len, boxes)), 4), dtype=np.float32)
        for i, own in enumerate(boxes):
            if (own[:, 2:] < own[:, :2]).any():
                raise ValueError("A box is x1, y1, x2, y2 with x1 <= x2 and y1 <= y2.")
            padded[i, : len(own)] = self._rescale("input_boxes", own.reshape(-1, 2), i, inputs).reshape(-1, 4)
        return {"input_boxes": torch.from_numpy(padded), **counts}

    def _count_prompts(self, name: str, prompts, inputs) -> dict[str, torch.Tensor]:
        """`num_prompts` `(num_images,)`. Raises `ValueError` if the numbers of images and prompts, or of points and
        boxes, differ."""
        num_images = len(inputs["original_sizes"])
        if len(prompts) != num_images:
            raise ValueError(f"{name} are for {len(prompts)} images, but there are {num_images}.")
        counts = torch.tensor([len(own) for own in prompts])
        if "num_prompts" in inputs and not torch.equal(counts, inputs["num_prompts"]):
            raise ValueError(
                "Points and boxes in one call describe the same objects and must be equal in number for every "
                f"image: got {inputs['num_prompts'].tolist()} prompts of points and {counts.tolist()} boxes."
            )
        return {"num_prompts": counts}

    def _rescale(self, name: str, points: np.ndarray, image_index: int, inputs) -> np.ndarray:
        """Points `(num_points, 2)` in pixels of the original image -> in pixels of `pixel_values`."""
        height, width = (int(side) for side in inputs["original_sizes"][image_index])
        if not np.isfinite(points).all() or (points < 0).any() or (points > (width, height)).any():
            raise ValueError(
                f"{name} of image {image_index} are outside the image, which is {width} wide and {height} high: "
                f"{points.tolist()} (x first, then y, in pixels of the original image)."
            )
        new_height, new_width = (int(side) for side in inputs["reshaped_input_sizes"][image_index])
        return points * np.array([new_width / width, new_height / height], dtype=np.float32)

    def post_process_masks(self, masks, original_sizes, reshaped_input_sizes, num_prompts=None, **kwargs):
        """Mask logits -> binary masks of the sizes of the original images, see
        [`SamImageProcessor.post_process_masks`]. With `num_prompts`, masks of padding prompts are removed."""
        masks = self.image_processor.post_process_masks(masks, original_sizes, reshaped_input_sizes, **kwargs)
        return masks if num_prompts is None else [m[:n] for m, n in zip(masks, num_prompts, strict=True)]

    def post_process_semantic_segmentation(self, outputs, target_sizes=None):
        """See [`SamClipImageProcessor.post_process_semantic_segmentation`]."""
        return self.image_processor.post_process_semantic_segmentation(outputs, target_sizes)

    def post_process_instance_segmentation(self, outputs, **kwargs):
        """See [`SamClipImageProcessor.post_process_instance_segmentation`]."""
        return self.image_processor.post_process_instance_segmentation(outputs, **kwargs)

    def post_process_panoptic_segmentation(self, outputs, **kwargs):
        """See [`SamClipImageProcessor.post_process_panoptic_segmentation`]."""
        return self.image_processor.post_process_panoptic_segmentation(outputs, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """The outputs for an image and a text, without prompts, as in SAM's processor."""
        return [*super().model_input_names, "original_sizes", "reshaped_input_sizes"]


def _with_lower_case(tokenizer: GemmaTokenizer) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that converts texts to lower case first. Its class is the generic one, because Gemma's class
    would remove the conversion when the tokenizer is loaded."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    options = {name: getattr(tokenizer, name) for name in ("padding_side", "model_input_names", "model_max_length")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options, **tokenizer.special_tokens_map)


def _coordinates(name: str, nested, meaning: str, size: int) -> np.ndarray:
    """Nested lists -> array `(number, size)`."""
    if any(len(own) != size for own in nested):
        raise ValueError(f"{name} need {meaning}, {size} numbers each, got {[len(own) for own in nested]}.")
    return np.asarray(nested, dtype=np.float32).reshape(-1, size)


def _depth(name: str, nested) -> int:
    """Number of levels of lists or array axes above the numbers."""
    if isinstance(nested, str):
        raise ValueError(f"{name} must be numbers, got {nested!r}.")
    if not hasattr(nested, "__len__") or (hasattr(nested, "ndim") and nested.ndim == 0):
        return 0
    if len(nested) == 0:
        raise ValueError(f"Every image needs at least one prompt in {name}, and every prompt a point or a box.")
    depths = {_depth(name, inner) for inner in nested}
    if len(depths) > 1:
        raise ValueError(f"{name} are nested unevenly: {nested!r}.")
    return 1 + depths.pop()


def _by_prompt(name: str, nested, levels: tuple[str, ...]) -> list:
    """Adds the level of prompts to `nested` if it is missing: one prompt for each image."""
    depth = _depth(name, nested)
    if depth == len(levels):
        return nested
    if depth == len(levels) - 1:
        return [[prompt] for prompt in nested]
    raise ValueError(
        f"{name} must be nested by {', '.join(levels)}: {len(levels)} levels, or one less for a single prompt for "
        f"each image; got {depth}."
    )


__all__ = ["SamClipProcessor"]
