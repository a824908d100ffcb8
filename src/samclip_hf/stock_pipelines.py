"""
SAM-CLIP models in transformers' own pipelines.

transformers chooses the class of a pipeline by its task, not by its model. The methods of these classes are therefore
extended: with a SAM-CLIP model they read images with this package's `load_image`, check labels and refuse tiles. With
another model they do what they did before.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from transformers import (
    ImageFeatureExtractionPipeline,
    ImageSegmentationPipeline,
    MaskGenerationPipeline,
    Pipeline,
    PreTrainedTokenizerBase,
    ZeroShotImageClassificationPipeline,
    ZeroShotObjectDetectionPipeline,
)

from .configuration_samclip import SamClipConfig, SamClipVisionConfig
from .image_processing_samclip import load_image
from .modeling_samclip import check_tokenizer
from .segmentation_samclip import to_label_groups

MODEL_TYPES = (SamClipConfig.model_type, SamClipVisionConfig.model_type)
STOCK_PIPELINES = (
    ImageFeatureExtractionPipeline,
    ImageSegmentationPipeline,
    MaskGenerationPipeline,
    ZeroShotImageClassificationPipeline,
    ZeroShotObjectDetectionPipeline,
)
PIPELINES_OF_TEXTS = (ZeroShotImageClassificationPipeline, ZeroShotObjectDetectionPipeline)
TILE_ARGUMENTS = ("tile", "overlap")  # of this package's pipelines
PIPELINES_WITH_TILES = {
    ImageSegmentationPipeline: 'use pipeline("zero-shot-image-segmentation")',
    MaskGenerationPipeline: "pass pipeline_class=SamClipMaskGenerationPipeline to pipeline()",
}


def extend_stock_pipelines() -> None:
    """Extends the methods of transformers' pipelines. Can be called more than once; later calls change nothing."""
    for pipeline_class in STOCK_PIPELINES:
        _extend(pipeline_class, "preprocess", _with_image)
        _extend(pipeline_class, "_sanitize_parameters", _with_checks)
    _extend(MaskGenerationPipeline, "check_model_type", _without_table)


def to_candidate_labels(labels: Iterable, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    r"""
    Returns labels of zero-shot image classification as a list.

    labels (`Iterable`):
        A list, tuple, array, column of a table or generator of names.
    tokenizer ([`PreTrainedTokenizerBase`]):
        The tokenizer of the model.

    Raises `ValueError` for another type, no labels, an empty or repeated name, and names with the same tokens, such
    as "Cat" and "cat" for CLIP: they would divide their probability among them.
    """
    groups = to_label_groups(labels)
    if lists := [group for group in groups if len(group) > 1]:
        raise ValueError(f"Image classification has no synonyms: pass one name for each label, not {lists[0]}.")
    names = [group[0] for group in groups]
    tokens = [tuple(own) for own in tokenizer(names, verbose=False)["input_ids"]]
    counts = Counter(tokens)
    if same := [name for name, own in zip(names, tokens, strict=True) if counts[own] > 1]:
        raise ValueError(f"The tokenizer cannot distinguish these labels from others: {same}. Remove or rename them.")
    return names


def _detection_inputs(inputs: dict, timeout: float | None) -> dict:
    """The inputs of object detection with a decoded image and a list of labels. As in transformers, a text has labels
    that are separated by commas."""
    labels = inputs["candidate_labels"]
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(",")]
    groups = to_label_groups(labels)
    if lists := [group for group in groups if len(group) > 1]:
        raise ValueError(f"Object detection has no synonyms: pass one name for each label, not {lists[0]}.")
    labels = [group[0] for group in groups]
    return inputs | {"image": load_image(inputs["image"], timeout), "candidate_labels": labels}


def _extend(pipeline_class: type[Pipeline], name: str, extension: Callable) -> None:
    stock = getattr(pipeline_class, name)
    if not hasattr(stock, "samclip_extension"):
        extended: Any = functools.wraps(stock)(extension(stock))
        extended.samclip_extension = True
        setattr(pipeline_class, name, extended)


def _is_samclip(pipeline: Pipeline) -> bool:
    return getattr(pipeline.model.config, "model_type", None) in MODEL_TYPES


def _with_image(preprocess: Callable) -> Callable:
    """`preprocess`, after reading the image. transformers would turn images with 16 bits per channel white, and float
    images black, before any image processor sees them."""

    def extended(self, inputs, *args, **kwargs):
        if _is_samclip(self):
            timeout = kwargs.get("timeout")
            is_detection = isinstance(self, ZeroShotObjectDetectionPipeline)
            inputs = _detection_inputs(inputs, timeout) if is_detection else load_image(inputs, timeout)
        return preprocess(self, inputs, *args, **kwargs)

    return extended


def _without_table(check_model_type: Callable) -> Callable:
    """`check_model_type` of mask generation, whose table has one class of models for SAM-CLIP. transformers would log
    an error that [`SamClipForImageSegmentation`] is not supported, although it is."""

    def extended(self, supported_models):
        if not _is_samclip(self):
            check_model_type(self, supported_models)

    return extended


def _with_checks(sanitize_parameters: Callable) -> Callable:
    """`_sanitize_parameters`, with an error for tiles, which transformers would ignore, and for a tokenizer without a
    vocabulary, which it makes if the tokenizer's files are missing. In zero-shot image classification, labels and
    template are also checked: transformers would read a text as a list of characters and a generator as no labels, and
    rank all labels equally in a template without `{}`."""

    def extended(self, *args, **kwargs):
        if _is_samclip(self):
            _refuse_tiles(self, kwargs)
            if isinstance(self, PIPELINES_OF_TEXTS):
                check_tokenizer(self.tokenizer, self.tokenizer.name_or_path)
        preprocess_params, *others = sanitize_parameters(self, *args, **kwargs)
        if _is_samclip(self) and isinstance(self, ZeroShotImageClassificationPipeline):
            template = preprocess_params.get("hypothesis_template", "{}")
            if not isinstance(template, str) or template.count("{}") != 1:
                raise ValueError(f"hypothesis_template must be a text that contains {{}} once, got {template!r}.")
            if "candidate_labels" in preprocess_params:
                labels = to_candidate_labels(preprocess_params["candidate_labels"], self.tokenizer)
                preprocess_params = preprocess_params | {"candidate_labels": labels}
        return preprocess_params, *others

    return extended


def _refuse_tiles(pipeline: Pipeline, arguments: dict) -> None:
    given = [name for name in TILE_ARGUMENTS if arguments.get(name) is not None]
    if not given:
        return
    message = f"transformers' {type(pipeline).__name__} has no {' and '.join(given)}"
    for pipeline_class, instruction in PIPELINES_WITH_TILES.items():
        if isinstance(pipeline, pipeline_class):
            raise ValueError(f"{message}. For tiled inference, {instruction}.")
    raise ValueError(f"{message}: it processes images as a whole. Remove {' and '.join(given)}.")
