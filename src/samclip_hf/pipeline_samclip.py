"""The pipeline `zero-shot-image-segmentation`: segmentation by texts that are passed with the call."""

from numbers import Real

import numpy as np
import torch
from PIL import Image
from transformers import ImageSegmentationPipeline

from .image_processing_samclip import load_image
from .segmentation_samclip import SamClipVocabulary, to_label_groups, to_texts


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
        subtask (`"panoptic"`, `"instance"` or `"semantic"`, defaults to `"panoptic"`):
            The kind of segmentation. `"panoptic"` and `"instance"` return segments that do not overlap, `"semantic"`
            one mask for each label.
        threshold, mask_threshold, overlap_mask_area_threshold (`float`, defaults to 0.5, 0.5 and 0.8):
            Thresholds of panoptic and instance segmentation, see
            [`SamClipImageProcessor.post_process_panoptic_segmentation`].
        batch_size (`int`, defaults to 1):
            Number of images in a forward pass of the model.

        Returns, for each image, a list of segments with `label`, `mask` (a black and white `PIL.Image.Image` of the
        image's size) and `score`, the probability of the label. `score` is `None` in semantic segmentation.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels=None,
        hypothesis_template=None,
        background=None,
        synonyms=None,
        background_templates=None,
        **kwargs,
    ):
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
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
        if not hasattr(self, "_forward_params"):
            self._defaults = given  # arguments of the constructor, which calls this method first
        given = self._defaults | given
        if given:
            if "labels" not in given:
                raise ValueError(f"Pass candidate_labels too: {', '.join(sorted(given))} cannot be used without them.")
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

    def preprocess(self, image, subtask=None, timeout=None):
        return super().preprocess(load_image(image, timeout), subtask)

    def _forward(self, model_inputs, vocabulary=None):
        target_size = model_inputs.pop("target_size")
        outputs = self.model(**model_inputs, vocabulary=vocabulary)
        outputs["target_size"] = target_size
        return outputs

    def postprocess(
        self,
        model_outputs,
        subtask="panoptic",
        threshold=0.5,
        mask_threshold=0.5,
        overlap_mask_area_threshold=0.8,
        id2label=None,
    ):
        id2label = self.model.config.id2label if id2label is None else id2label
        target_sizes = model_outputs["target_size"]
        if subtask == "semantic":
            label_map = self.image_processor.post_process_semantic_segmentation(model_outputs, target_sizes)[0]
            return [
                {"score": None, "label": id2label[label_id], "mask": _to_image(label_map == label_id)}
                for label_id in label_map.unique().tolist()
            ]
        if subtask not in ("panoptic", "instance", None):
            raise ValueError(f'subtask must be "panoptic", "instance" or "semantic", got {subtask!r}.')
        post_process = getattr(self.image_processor, f"post_process_{subtask or 'panoptic'}_segmentation")
        result = post_process(
            model_outputs,
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            target_sizes=target_sizes,
        )[0]
        return [
            {
                "score": segment["score"],
                "label": id2label[segment["label_id"]],
                "mask": _to_image(result["segmentation"] == segment["id"]),
            }
            for segment in result["segments_info"]
        ]


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


def _to_image(mask) -> Image.Image:
    """A boolean mask `(height, width)` as a black and white image."""
    return Image.fromarray(mask.numpy().astype(np.uint8) * 255)


__all__ = ["SamClipImageSegmentationPipeline"]
