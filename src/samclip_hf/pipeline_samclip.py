"""A pipeline that segments by any text: the vocabulary comes with the call."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from transformers import ImageSegmentationPipeline


class SamClipImageSegmentationPipeline(ImageSegmentationPipeline):
    """
    Segmentation by text. As the stock `pipeline("image-segmentation")`, with a vocabulary for the call or the pipeline
    in place of the checkpoint's own.

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
        inputs (`str`, `PIL.Image.Image`, a list, generator or data set of them):
            Paths, URLs or pictures.
        candidate_labels (`list`, *optional*):
            Names, or lists of synonyms, as in [`SamClipForImageSegmentation.embed_vocabulary`]. Embedded once for as
            long as they stay the same. By default the checkpoint's own vocabulary.
        hypothesis_template (`str` or `list[str]`, defaults to `"a photo of a {}"`):
            Sentences for the names.
        background (`list[str]` or `float`, *optional*):
            Texts of what belongs to no class, or the probability below which nothing does.
        synonyms (`"max"` or `"mean"`, *optional*):
            How synonyms count together.
        subtask (`"panoptic"`, `"instance"` or `"semantic"`, defaults to `"panoptic"`):
            Segments that do not overlap, or a label for every pixel.
        threshold, mask_threshold, overlap_mask_area_threshold (`float`, default to 0.5, 0.5 and 0.8):
            Of panoptic and instance segmentation; see
            [`SamClipImageProcessor.post_process_panoptic_segmentation`].
        batch_size (`int`, defaults to 1):
            Images that pass through the model together.

        Returns, per image, a list of `label`, `mask` (a black and white picture of the image's size) and `score`, the
        probability of the label among all labels, `None` in semantic segmentation.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, candidate_labels=None, hypothesis_template=None, background=None, synonyms=None, **kwargs
    ):
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        names = ("candidate_labels", "hypothesis_template", "background", "synonyms")
        asked = dict(zip(names, (candidate_labels, hypothesis_template, background, synonyms), strict=True))
        asked = {name: value for name, value in asked.items() if value is not None}
        if asked:
            # What was said when the pipeline was made holds for a call that says nothing of it.
            asked = getattr(self, "_defaults", {}) | asked
            if "candidate_labels" not in asked:
                raise ValueError(f"{', '.join(sorted(asked))} belong to candidate_labels, and there are none.")
            if not hasattr(self, "_forward_params"):  # the pipeline is being made
                self._defaults = asked
            vocabulary = self._embed_vocabulary(**asked)
            forward_params["vocabulary"] = vocabulary
            postprocess_params["id2label"] = vocabulary.id2label
        return preprocess_params, forward_params, postprocess_params

    def _embed_vocabulary(self, candidate_labels: Sequence, hypothesis_template=None, **options):
        """The same vocabulary as last time, if it is asked for again."""
        if hypothesis_template is not None:
            is_one = isinstance(hypothesis_template, str)
            options["templates"] = [hypothesis_template] if is_one else hypothesis_template
        key = (repr(candidate_labels), repr(options))
        if getattr(self, "_vocabulary", (None, None))[0] != key:
            self._vocabulary = key, self.model.embed_vocabulary(candidate_labels, tokenizer=self.tokenizer, **options)
        return self._vocabulary[1]

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
                {"score": None, "label": id2label[label_id], "mask": _picture(label_map == label_id)}
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
                "mask": _picture(result["segmentation"] == segment["id"]),
            }
            for segment in result["segments_info"]
        ]


def _picture(mask) -> Image.Image:
    """A mask `(height, width)` in black and white."""
    return Image.fromarray(mask.numpy().astype(np.uint8) * 255)


__all__ = ["SamClipImageSegmentationPipeline"]
