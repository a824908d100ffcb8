"""Zero-shot semantic segmentation by the cascade of a SAM and a CLIP (paper, section 5, table 7)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..datasets.samples import DataSet, SegmentedImage
from ..mask_generation_samclip import MASK_GENERATION_DEFAULTS
from ..templates import IMAGENET_TEMPLATES
from .adapters import UnmergedAdapter, describe_sizes
from .semantic_segmentation import LabelMapEvaluator


class CascadeSegmentation(LabelMapEvaluator):
    """
    SAM generates masks in everything mode, and CLIP classifies a crop of each of them. Where masks overlap, the
    smallest one counts. Pixels outside all masks are background or, if the data has none, have the class of the whole
    image. Both models are those of an unmerged SAM-CLIP, which segments in another way by itself
    ([`ComposedSegmentation`]).

    data, templates, background_threshold, background_templates:
        See [`LabelMapEvaluator`].
    generation (`dict`, *optional*):
        Arguments of the stock `mask-generation` pipeline, such as `pred_iou_thresh`. Others keep the pipeline's
        defaults, [`MASK_GENERATION_DEFAULTS`].
    masked_crops (`bool`, *optional*, defaults to `True`):
        Whether pixels of a crop outside the mask have CLIP's mean color. The paper does not state it.
    """

    name = "cascade"
    adapter_class = UnmergedAdapter
    batch_size = 1

    def __init__(
        self,
        data: DataSet[SegmentedImage],
        generation: dict[str, Any] | None = None,
        masked_crops: bool = True,
        templates: Sequence[str] = IMAGENET_TEMPLATES,
        background_threshold: float | None = None,
        background_templates: bool = False,
    ):
        super().__init__(data, templates, background_threshold, background_templates)
        self.masked_crops = masked_crops
        self.generation = MASK_GENERATION_DEFAULTS | (generation or {})

    def describe(self) -> dict[str, Any]:
        outside = ", the rest of it in CLIP's mean color" if self.masked_crops else ""
        return {
            **super().describe(),
            "masks": "everything mode, " + ", ".join(f"{name} {value}" for name, value in self.generation.items()),
            "crops": f"a mask's box{outside}, padded to a square, bicubic to CLIP's own size",
        }

    def describe_settings(self, model: UnmergedAdapter) -> dict[str, Any]:
        size = model.model.config.clip_vision_config.image_size
        return describe_sizes(model) | {"image size of CLIP": f"{size} x {size} px"}

    def prepare(self, model: UnmergedAdapter) -> None:
        self.text_embeds, self.labels = self.embed_vocabulary(model)

    @torch.inference_mode()
    def predict(self, model: UnmergedAdapter, image: Image.Image) -> np.ndarray:
        masks = model.generate_masks(image, **self.generation)
        masks = masks[masks.any(axis=(1, 2))]
        masks = masks[np.argsort(-masks.sum(axis=(1, 2)), kind="stable")]
        whole_image = np.ones((1, image.height, image.width), dtype=bool)
        similarities = model.compare_crops(
            image, np.concatenate([whole_image, masks]), self.text_embeds, self.masked_crops
        )
        label_logits = self.to_label_logits(similarities.T * model.logit_scale, self.labels)
        image_label, *mask_labels = self.to_labels(label_logits).tolist()
        label_map = np.full((image.height, image.width), 0 if self.data.background is not None else image_label)
        for mask, label in zip(masks, mask_labels, strict=True):
            label_map[mask] = label
        return label_map
