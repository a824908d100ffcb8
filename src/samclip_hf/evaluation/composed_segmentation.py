"""Zero-shot semantic segmentation by both heads of SAM-CLIP (paper, section 5, table 5)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..datasets.samples import DataSet, SegmentedImage
from ..segmentation_samclip import POINTS_PER_CLASS, SamClipVocabulary
from ..templates import IMAGENET_TEMPLATES
from .adapters import SamClipAdapter, describe_sizes
from .semantic_segmentation import LabelMapEvaluator


class ComposedSegmentation(LabelMapEvaluator):
    """
    Segments with both heads of a SAM-CLIP by the composition in its configuration: in one pass of a merged model's
    image encoder, or in one pass of each encoder of an unmerged model.

    data, templates, background_threshold, background_templates:
        See [`LabelMapEvaluator`].
    size (`int`, *optional*):
        The image's longer side in pixels; the image is padded to a square. By default, the model's own size (1024 in
        the paper).
    """

    name = "composed"
    adapter_class = SamClipAdapter

    def __init__(
        self,
        data: DataSet[SegmentedImage],
        size: int | None = None,
        templates: Sequence[str] = IMAGENET_TEMPLATES,
        background_threshold: float | None = None,
        background_templates: bool = False,
    ):
        super().__init__(data, templates, background_threshold, background_templates)
        self.size = size

    def describe(self) -> dict[str, Any]:
        size = f"{self.size} px" if self.size else "the model's own"
        return {**super().describe(), "size": f"longer side {size}, padded to a square"}

    def describe_settings(self, model: SamClipAdapter) -> dict[str, Any]:
        config = model.model.config
        points = f"{POINTS_PER_CLASS} per class"  # the paper's composition
        if config.composition == "segments":
            points = f"{config.composition_points} per image"
        size = {"image size": f"longest edge {self.size} px"} if self.size else {}
        sizes = size | describe_sizes(model, has_own_size=self.size is None)
        segments = {} if config.merged else {"attention of segments": config.segment_attention}
        return {"composition": config.composition, "points": points, **segments, **sizes}

    def prepare(self, model: SamClipAdapter) -> None:
        text_embeds, labels = self.embed_vocabulary(model)
        self.vocabulary = SamClipVocabulary(
            text_embeds.to(model.model.dtype),
            labels.tolist(),
            dict(enumerate(self.label_names)),
            None if self.data.background is None else 0,
            self.background_threshold,
        )

    @torch.inference_mode()
    def predict(self, model: SamClipAdapter, image: Image.Image) -> np.ndarray:
        size = {"size": {"longest_edge": self.size}} if self.size else {}
        inputs = model.processor(image, return_tensors="pt", **size).to(model.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.model.dtype)
        outputs = model.model(**inputs, vocabulary=self.vocabulary)
        target_sizes = [(image.height, image.width)]
        return model.processor.post_process_semantic_segmentation(outputs, target_sizes)[0].cpu().numpy()
