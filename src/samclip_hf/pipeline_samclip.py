"""
The pipeline `zero-shot-image-segmentation`: segmentation by texts that are passed with the call. And
`pipeline("mask-generation")` for large images.
"""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real

import numpy as np
import torch
from PIL import Image
from transformers import ImageSegmentationPipeline, MaskGenerationPipeline, SamImageProcessorPil

from .image_processing_samclip import load_image, resize_content
from .mask_generation_samclip import decode_rle, distinct_boxes
from .segmentation_samclip import SamClipVocabulary, to_label_groups, to_texts
from .tiling_samclip import OVERVIEW, ComputedSequence, ImageTiles, TiledMasks, TiledSegmentation

# Arguments of transformers' pipeline. `pipeline(...)` passes its deprecated `torch_dtype` to the constructor.
STOCK_ARGUMENTS = {
    *("subtask", "timeout", "threshold", "mask_threshold", "overlap_mask_area_threshold"),
    "torch_dtype",
}


class SamClipImageSegmentationPipeline(ImageSegmentationPipeline):
    """
    Segmentation by text. In contrast to `pipeline("image-segmentation")`, a vocabulary can be passed to the pipeline
    or to a call; it replaces the checkpoint's.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from samclip_hf import miniature

    >>> segmenter = pipeline("zero-shot-image-segmentation", model=miniature.checkpoint())
    >>> segments = segmenter("photo.png", candidate_labels=["green zigzag shape"], background=["a wall"])
    ```"""

    _load_tokenizer = True

    def __call__(self, inputs, **kwargs):
        r"""
        inputs (`str`, `PIL.Image.Image`, or a list, generator or dataset of them):
            Paths, URLs or images.
        candidate_labels (`Iterable`, *optional*):
            Names, or lists of synonyms, as in [`SamClipForImageSegmentation.embed_vocabulary`]. They are embedded only
            if they, the weights of the text tower or the tokenizer differ from those of the last call. By default the
            checkpoint's vocabulary.
        hypothesis_template (`str` or `list[str]`, defaults to `"a photo of a {}"`):
            Sentences with a `{}` for the name.
        background (`list[str]` or `float`, *optional*):
            Texts that describe the background, or a threshold: a pixel or segment is background if no class has at
            least this probability.
        synonyms (`"max"` or `"mean"`, *optional*):
            How the synonyms of a label are combined.
        background_templates (`bool`, *optional*):
            Whether the templates are also used for the texts of the background.
        multi_label (`bool`, *optional*, defaults to `False`):
            Whether the scores of the labels are independent, so that none of them may be found, see
            [`SamClipForImageSegmentation.classify`]. Segments are then proposed in the whole image, without regard to
            the labels, and may overlap. The result has an entry for each segment and each label whose score reaches
            the threshold, in descending order of scores. Other candidate labels do not change it.
        subtask (`"panoptic"`, `"instance"` or `"semantic"`, *optional*):
            The kind of segmentation. `"panoptic"` (default) and `"instance"` (default with `multi_label=True`) return
            segments, which do not overlap without `multi_label=True`, `"semantic"` one mask for each label.
        threshold, mask_threshold, overlap_mask_area_threshold (`float`, defaults to 0.5, 0.5 and 0.8):
            Thresholds of panoptic and instance segmentation, see
            [`SamClipImageProcessor.post_process_panoptic_segmentation`].
        batch_size (`int`, defaults to 1):
            Number of images, or of tiles of one image, in a forward pass of the model.
        tile (`int`, *optional*):
            For large images: side of the overlapping tiles that are segmented one by one and merged, in pixels of the
            image. An image that is not larger than a tile is segmented as a whole. Objects may cross tiles. Segments
            that are larger than a tile come from an additional pass over the whole image at a lower resolution,
            except with `config.composition = "classes"`. Memory depends on the tile, except for the image and one map
            of its size.
        overlap (`float`, defaults to 0.25):
            Overlap of neighboring tiles as a fraction of `tile`, above 0 and at most 0.5.

        Returns, for each image, a list of segments with `label`, `mask` (a black and white `PIL.Image.Image` of the
        image's size) and `score`, the probability of the label. `score` is `None` in semantic segmentation, or with
        `multi_label=True` the highest score of a segment. For an image of several tiles, the list is a `Sequence`
        whose masks are computed at each access.

        Raises `TypeError` for arguments with other names, and `ValueError` for other values.
        """
        if kwargs.get("tile", self._preprocess_params.get("tile")) is not None:
            batch_size = kwargs.pop("batch_size", None) or self._batch_size or 1
            kwargs |= {"batch_size": 1, "tiles_per_batch": batch_size}
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels=None,
        hypothesis_template=None,
        background=None,
        synonyms=None,
        background_templates=None,
        multi_label=None,
        tile=None,
        overlap=None,
        tiles_per_batch=None,
        **kwargs,
    ):
        if unknown := sorted(kwargs.keys() - STOCK_ARGUMENTS):  # the stock pipeline ignores them
            raise TypeError(
                f"The pipeline has no argument {', '.join(unknown)}. See its documentation for those it has."
            )
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        tiling = {
            "tile": tile,
            "overlap": overlap,
            "mask_threshold": kwargs.get("mask_threshold"),
            "multi_label": multi_label,
        }
        preprocess_params |= {name: value for name, value in tiling.items() if value is not None}
        if tiles_per_batch is not None:
            forward_params["tiles_per_batch"] = tiles_per_batch
        given: dict = {}
        if candidate_labels is not None:
            given["labels"] = to_label_groups(candidate_labels)
        if hypothesis_template is not None:
            given["templates"] = to_texts("hypothesis_template", hypothesis_template, 1)
        if background is not None:
            is_list = not isinstance(background, str | Real)
            given["background"] = to_texts("background", background) if is_list else background
        if synonyms is not None:
            given["synonyms"] = synonyms
        if background_templates is not None:
            given["background_templates"] = background_templates
        if multi_label is not None:
            given["multi_label"] = multi_label
        if not hasattr(self, "_forward_params"):
            self._defaults = given  # arguments of the constructor, which calls this method first
        given = self._defaults | given
        if "multi_label" in given:
            if given["multi_label"] and "background" in given:
                raise ValueError(
                    "With multi_label=True, every label has its own score, and background has no effect: remove it, "
                    "or add its texts to candidate_labels."
                )
            forward_params["multi_label"] = postprocess_params["multi_label"] = given["multi_label"]
        unused = sorted(given.keys() - {"labels", "multi_label"})
        if unused and "labels" not in given:
            raise ValueError(f"Pass candidate_labels too: {', '.join(unused)} cannot be used without them.")
        if "labels" in given:
            vocabulary = self._embed_vocabulary(given)
            forward_params["vocabulary"] = vocabulary
            postprocess_params["id2label"] = vocabulary.id2label
        return preprocess_params, forward_params, postprocess_params

    def _embed_vocabulary(self, arguments: dict) -> SamClipVocabulary:
        """Embeds a vocabulary, or returns the last one if the arguments, the tokenizer and the weights of the text
        tower are the same."""
        key = (arguments, self.tokenizer, _weights_of_texts(self.model))
        if getattr(self, "_vocabulary", (None, None))[0] != key:
            self._vocabulary = key, self.model.embed_vocabulary(**arguments, tokenizer=self.tokenizer)
        return self._vocabulary[1]

    def preprocess(
        self, image, subtask=None, timeout=None, tile=None, overlap=None, mask_threshold=0.5, multi_label=False
    ):
        image = load_image(image, timeout)
        tiles = _divide(image, tile, overlap)
        if tiles is None:
            return super().preprocess(image, subtask)
        has_labels_of_pixels = subtask == "semantic" and not multi_label
        if has_labels_of_pixels:
            mask_threshold = 0.5  # as for an image without tiles
        return {"image": image, "merged": TiledSegmentation(tiles, mask_threshold, with_map=has_labels_of_pixels)}

    def _forward(self, model_inputs, vocabulary=None, multi_label=False, tiles_per_batch=1):
        if "merged" not in model_inputs:
            target_size = model_inputs.pop("target_size")
            outputs = self._predict(model_inputs, vocabulary, multi_label)
            outputs["target_size"] = target_size
            return outputs
        image, merged = model_inputs["image"], model_inputs["merged"]
        boxes = merged.tiles.boxes

        def predict(crops: list[Image.Image]):
            inputs = self.image_processor(images=crops, return_tensors="pt").to(self.dtype)
            inputs = self._ensure_tensor_on_device(inputs, device=self.device)
            return self._predict(inputs, vocabulary, multi_label)

        if self.model.config.composition == "segments":
            merged.add_overview(predict([_shrink(image, boxes[0], self.image_processor)]))
        for start in range(0, len(boxes), tiles_per_batch):
            merged.add(predict([image.crop(box) for box in boxes[start : start + tiles_per_batch]]))
        return {"merged": merged}

    def _predict(self, inputs, vocabulary, multi_label: bool):
        """The outputs of the model with `label_scores` `(batch_size, num_segments, num_labels)`."""
        vocabulary = self.model.vocabulary if vocabulary is None else vocabulary
        if not multi_label:
            outputs = self.model(**inputs, vocabulary=vocabulary)
            if outputs.segment_logits is not None:
                outputs["label_scores"] = outputs.segment_logits.softmax(dim=-1)
            return outputs
        if self.model.config.composition != "segments":
            raise ValueError('multi_label=True needs the segments of config.composition = "segments".')
        # Without background, segments are proposed in the whole image and do not depend on the labels.
        classes = replace(vocabulary, background_label_id=None, background_threshold=None)
        outputs = self.model(**inputs, vocabulary=classes)
        scores = self.model.classify(outputs.segment_embeds, classes, multi_label=True).sigmoid()
        if vocabulary.background_label_id is not None:
            scores[..., vocabulary.background_label_id] = 0  # background is not a segment
        outputs["label_scores"] = scores * (outputs.segment_scores > 0)[..., None]
        return outputs

    def postprocess(
        self,
        model_outputs,
        subtask=None,
        threshold=0.5,
        mask_threshold=0.5,
        overlap_mask_area_threshold=None,
        id2label=None,
        multi_label=False,
    ):
        id2label = self.model.config.id2label if id2label is None else id2label
        if multi_label and (subtask not in ("instance", "semantic", None) or overlap_mask_area_threshold is not None):
            raise ValueError(
                'With multi_label=True, segments may overlap: subtask must be "instance" or "semantic", and '
                "overlap_mask_area_threshold has no effect."
            )
        if subtask not in ("panoptic", "instance", "semantic", None):
            raise ValueError(f'subtask must be "panoptic", "instance" or "semantic", got {subtask!r}.')
        merged = model_outputs.get("merged")
        if multi_label and merged is None:
            return _independent_segments(model_outputs, id2label, subtask == "semantic", threshold, mask_threshold)
        if multi_label:
            entries = merged.independent_segments(threshold, subtask == "semantic")
            return _computed_segments([(score, id2label[label], encoding) for score, label, encoding in entries])
        if subtask == "semantic":
            if merged is None:
                sizes = model_outputs["target_size"]
                label_map = self.image_processor.post_process_semantic_segmentation(model_outputs, sizes)[0]
            else:
                label_map = merged.post_process_semantic_segmentation()
            # By rows, because torch.unique of a large map needs several times its memory.
            label_ids = sorted({label_id for row in label_map for label_id in row.unique().tolist()})
            found = [(None, id2label[label_id], label_id) for label_id in label_ids]
        else:
            thresholds = {
                "threshold": threshold,
                "overlap_mask_area_threshold": (
                    0.8 if overlap_mask_area_threshold is None else overlap_mask_area_threshold
                ),
            }
            if merged is None:
                post_process = getattr(self.image_processor, f"post_process_{subtask or 'panoptic'}_segmentation")
                thresholds["mask_threshold"] = mask_threshold
                result = post_process(model_outputs, **thresholds, target_sizes=model_outputs["target_size"])[0]
            else:
                result = merged.post_process_panoptic_segmentation(**thresholds)
            label_map = result["segmentation"]
            found = [(info["score"], id2label[info["label_id"]], info["id"]) for info in result["segments_info"]]

        if merged is None:
            return [
                {"score": score, "label": label, "mask": _to_image((label_map == number).numpy())}
                for score, label, number in found
            ]
        encodings = merged.encode_segments(label_map, [number for _, _, number in found])
        return _computed_segments([(*entry[:2], encoding) for entry, encoding in zip(found, encodings, strict=True)])


class SamClipMaskGenerationPipeline(MaskGenerationPipeline):
    """
    The `mask-generation` pipeline of transformers ("everything mode") with tiles for large images and with embeddings
    of the masks.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from samclip_hf import SamClipMaskGenerationPipeline, miniature

    >>> everything = pipeline(
    ...     "mask-generation", model=miniature.checkpoint(), pipeline_class=SamClipMaskGenerationPipeline
    ... )
    >>> found = everything("photo.png", tile=64, **miniature.MASK_GENERATION)
    ```"""

    def __call__(self, image, **kwargs):
        r"""
        Arguments and result are those of transformers' pipeline, and:

        tile (`int`, *optional*):
            For large images: side of the overlapping tiles that are processed one by one, in pixels of the image. Each
            tile has its own grid of points. Parts of one object in several tiles become one mask. A mask that its tile
            cuts off, and that no other tile completes, is removed. Masks that are larger than a tile come from an
            additional pass over the whole image at a lower resolution. An image that is not larger than a tile is
            processed as a whole. Memory depends on the tile, except for the image, one mask of its size, and the
            run-length encodings.
        overlap (`float`, defaults to 0.25):
            Overlap of neighboring tiles as a fraction of `tile`, above 0 and at most 0.5.
        output_segment_embeds (`bool`, *optional*, defaults to `False`):
            Whether to return `segment_embeds` `(num_masks, projection_dim)`, for `model.classify`. They are those of
            [`SamClipForImageSegmentation.embed_masks`], without another pass of the image encoder; with tiles, those
            of the largest part of a mask in its tile. The model must be a [`SamClipForImageSegmentation`].

        For an image of several tiles, `masks` is a `Sequence` whose masks are computed at each access.

        Raises `ValueError` for a `batch_size` or `crops_n_layers` with `tile` or `output_segment_embeds`, because the
        tiles are processed one by one.
        """
        given = self._preprocess_params | kwargs
        has_tiles = given.get("tile") is not None or given.get("output_segment_embeds")
        if has_tiles and (kwargs.get("batch_size") or self._batch_size or 1) != 1:
            raise ValueError(
                "With tile or output_segment_embeds, batch_size has no effect: remove it. points_per_batch is the "
                "number of points in a forward pass of the mask decoder."
            )
        return super().__call__(image, **kwargs)

    def _sanitize_parameters(self, tile=None, overlap=None, output_segment_embeds=None, **kwargs):
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        own = {"tile": tile, "overlap": overlap, "output_segment_embeds": output_segment_embeds}
        preprocess_params |= {name: value for name, value in own.items() if value is not None}
        if "crops_nms_thresh" in kwargs:
            forward_params["crops_nms_thresh"] = kwargs["crops_nms_thresh"]
        if output_segment_embeds and not hasattr(self.model, "embed_masks"):
            raise ValueError(
                f"{type(self.model).__name__} cannot embed masks: pass model=SamClipForImageSegmentation."
                "from_pretrained(name) to the pipeline."
            )
        return preprocess_params, forward_params, postprocess_params

    def preprocess(
        self, image, tile=None, overlap=None, output_segment_embeds=False, timeout=None, points_per_batch=64, **kwargs
    ):
        image = load_image(image, timeout)
        tiles = _divide(image, tile, overlap)
        if tiles is None and not output_segment_embeds:
            yield from super().preprocess(image, points_per_batch=points_per_batch, **kwargs)
            return
        if kwargs.get("crops_n_layers"):
            name = "output_segment_embeds" if tiles is None else "tile"
            raise ValueError(f"The image is not divided in two ways: pass either {name} or crops_n_layers.")
        views = [(0, image)]
        if tiles is not None:
            views = [(OVERVIEW, _shrink(image, tiles.boxes[0], self.image_processor))]
            views += [(index, image.crop(box)) for index, box in enumerate(tiles.boxes)]
        for position, (index, view) in enumerate(views):
            yield {
                "view": view,
                "tile_index": index,
                "tiles": tiles,
                "points_per_batch": points_per_batch,
                "points_per_crop": kwargs.get("points_per_crop", 32),
                "with_embeds": output_segment_embeds,
                "is_last": position == len(views) - 1,
            }

    def _forward(self, model_inputs, crops_nms_thresh=0.7, **thresholds):
        if "view" not in model_inputs:
            return super()._forward(model_inputs, **thresholds)
        view, with_embeds = model_inputs["view"], model_inputs["with_embeds"]
        size = self.image_processor.size
        crop_boxes, points, _, labels = self.image_processor.generate_crop_boxes(
            view, size.get("longest_edge", size.get("height")), points_per_crop=model_inputs["points_per_crop"]
        )
        inputs = self.image_processor(images=view, return_tensors="pt").to(self.dtype)
        inputs = self._ensure_tensor_on_device(inputs, device=self.device)
        pixel_values, sizes = inputs.pop("pixel_values"), inputs.get("reshaped_input_sizes")
        vision_embeds = self.model.get_vision_embeds(pixel_values, sizes) if with_embeds else None
        image_embeddings = (
            self.model.get_image_embeddings(pixel_values) if vision_embeds is None else vision_embeds.last_hidden_state
        )
        step = points.shape[1] if model_inputs["points_per_batch"] is None else model_inputs["points_per_batch"]
        outputs = []
        for start in range(0, points.shape[1], step):
            chunk = {
                "input_points": points[:, start : start + step],
                "input_labels": labels[:, start : start + step],
                "input_boxes": crop_boxes,
                "is_last": False,
                "full_image_size": inputs["original_sizes"][0],
                "image_embeddings": image_embeddings,
                **inputs,
            }
            outputs.append(super()._forward(self._ensure_tensor_on_device(chunk, device=self.device), **thresholds))
        encodings = [encoding for output in outputs for encoding in output["masks"]]
        scores, boxes = (torch.cat([output[name] for output in outputs]) for name in ("iou_scores", "boxes"))
        kept = distinct_boxes(boxes, scores, crops_nms_thresh)
        encodings = [encodings[index] for index in kept]
        embeds = None
        if vision_embeds is not None:
            masks = [decode_rle(encoding) for encoding in encodings]
            embeds = self.model.embed_masks([masks], reshaped_input_sizes=sizes, vision_embeds=vision_embeds)[0]
        found = {"masks": encodings, "iou_scores": scores[kept], "boxes": boxes[kept], "segment_embeds": embeds}
        return found | {name: model_inputs[name] for name in ("tile_index", "tiles", "is_last")}

    def postprocess(self, model_outputs, output_rle_mask=False, output_bboxes_mask=False, crops_nms_thresh=0.7):
        if "tile_index" not in model_outputs[0]:
            return super().postprocess(model_outputs, output_rle_mask, output_bboxes_mask, crops_nms_thresh)
        tiles = model_outputs[0]["tiles"]
        found = [
            (output["masks"], output["iou_scores"], output["boxes"], output["segment_embeds"])
            for output in model_outputs
        ]
        if tiles is None:
            [(encodings, scores, boxes, embeds)] = found
        else:
            merged = TiledMasks(tiles)
            for output, own in zip(model_outputs, found, strict=True):
                if output["tile_index"] == OVERVIEW:
                    merged.add_overview(own[0], own[1], own[3])
                else:
                    merged.add(output["tile_index"], *own)
            encodings, scores, boxes, embeds = merged.merge(crops_nms_thresh)
            if embeds is None and found[0][3] is not None:  # no masks
                embeds = found[0][3][:0]

        def to_mask(index: int) -> torch.Tensor | np.ndarray:
            mask = decode_rle(encodings[index])
            return mask if isinstance(self.image_processor, SamImageProcessorPil) else torch.from_numpy(mask)

        masks = ComputedSequence(len(encodings), to_mask)
        return {
            "masks": list(masks) if tiles is None else masks,
            "scores": scores,
            **({"rle_mask": encodings} if output_rle_mask else {}),
            **({"bounding_boxes": boxes} if output_bboxes_mask else {}),
            **({} if embeds is None else {"segment_embeds": embeds}),
        }


def _shrink(image: Image.Image, tile_box: Sequence[int], image_processor) -> Image.Image:
    """The image at the resolution of the model, or of a tile if it is higher, for an overview."""
    longest = max(image.size)
    edge = max(tile_box[2] - tile_box[0], tile_box[3] - tile_box[1], image_processor.size["longest_edge"])
    if edge >= longest:
        return image
    size = [max(1, round(side * edge / longest)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BILINEAR)


def _divide(image: Image.Image, tile: int | None, overlap: float | None) -> ImageTiles | None:
    """The tiles of an image, or `None` if it is processed as a whole. Raises `ValueError` for an overlap without a
    tile."""
    if tile is None:
        if overlap is not None:
            raise ValueError("overlap has no effect without tile: pass tile, the side of the tiles in pixels.")
        return None
    tiles = ImageTiles(image.height, image.width, tile, overlap)
    return tiles if len(tiles) > 1 else None


def _weights_of_texts(model) -> list:
    """Properties that differ after almost any change of the weights of the text tower: identity, type, number of
    in-place operations, and sum. Some changes through `weight.data` cannot be detected, because they change none of
    these. Sums are not computed for quantized and offloaded weights. All sums are read in one transfer, because each
    transfer from a GPU waits for it."""
    parts = (part for part in (model.text_model, model.text_projection) if part is not None)
    weights = [weight for part in parts for weight in part.parameters()]
    sums = [
        weight.detach().sum(dtype=torch.float32)
        for weight in weights
        if type(weight.data) is torch.Tensor
        and weight.is_floating_point()
        and weight.element_size() > 1
        and not weight.is_meta
    ]
    values = torch.stack([value.to(sums[0].device) for value in sums]).tolist() if sums else []
    versions = (None if weight.is_inference() else weight._version for weight in weights)
    return [*((id(w), w.dtype, version) for w, version in zip(weights, versions, strict=True)), *values]


def _independent_segments(
    outputs, id2label: dict[int, str], is_semantic: bool, threshold: float, mask_threshold: float
) -> list[dict]:
    """The result of the pipeline with `multi_label=True` for the outputs of one image: an entry for each segment and
    label whose score reaches the threshold or, in semantic segmentation, for each label, with the union of its
    segments."""
    size = tuple(int(side) for side in outputs["target_size"][0])
    cells = outputs.segment_masks.shape[-1] / outputs.logits.shape[-1]
    found = []
    for number, scores in enumerate(outputs["label_scores"][0]):
        labels = (scores >= threshold).nonzero().flatten().tolist() if outputs.segment_scores[0, number] > 0 else []
        if not labels:
            continue
        mask_logits = outputs.segment_masks[0, number : number + 1].float()
        mask = resize_content(mask_logits, outputs.content_sizes[0] * cells, size)[0].sigmoid() > mask_threshold
        if mask.any():
            found += [(float(scores[label]), label, mask) for label in labels]
    if is_semantic:
        by_label: dict[int, tuple] = {}
        for score, label, mask in found:
            highest, union = by_label.get(label, (score, mask))
            by_label[label] = max(score, highest), union | mask
        found = [(score, label, mask) for label, (score, mask) in by_label.items()]
    found.sort(key=lambda entry: -entry[0])
    return [
        {"score": score, "label": id2label[label], "mask": _to_image(mask.numpy())} for score, label, mask in found
    ]


def _computed_segments(entries: Sequence[tuple[float | None, str, dict]]) -> ComputedSequence:
    """The segments of a large image from score, label and run-length encoding."""

    def to_segment(index: int) -> dict:
        score, label, encoding = entries[index]
        return {"score": score, "label": label, "mask": _to_image(decode_rle(encoding))}

    return ComputedSequence(len(entries), to_segment)


def _to_image(mask: np.ndarray) -> Image.Image:
    """A boolean mask `(height, width)` as a black and white image."""
    return Image.fromarray(mask.view(np.uint8) * np.uint8(255))


__all__ = ["SamClipImageSegmentationPipeline", "SamClipMaskGenerationPipeline"]
