"""Image and text retrieval (paper, section 5, table 1)."""

from typing import Any

import numpy as np
import torch

from ..datasets.samples import CaptionedImage, DataSet
from ..visualization import draw_text
from .adapters import ImageTextAdapter, describe_crop, describe_sizes
from .evaluator import SampleEvaluator
from .metrics import AccumulatingMetric, RecallAtK


class Retrieval(SampleEvaluator[CaptionedImage]):
    """
    Retrieves images by captions and captions by images, without templates. The paper's R@1 corresponds to
    `mean_recall@1`, the mean of both directions: only with this definition, the paper's baselines match the original
    publications.

    data (`DataSet`):
        Images with captions.
    size (`int`, *optional*):
        As in [`ZeroShotClassification`].
    """

    name = "retrieval"
    adapter_class = ImageTextAdapter

    def __init__(self, data: DataSet[CaptionedImage], size: int | None = None):
        super().__init__(data)
        self.size = size

    def describe(self) -> dict[str, Any]:
        return {
            **self.data.description,
            **describe_crop(self.size),
            "captions": "as they are; cut where longer than the text tower reads",
            "ties": "count against",
        }

    def describe_settings(self, model: ImageTextAdapter) -> dict[str, Any]:
        return describe_sizes(model, has_own_size=self.size is None)

    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        return {"recall": RecallAtK()}

    def update(self, model: ImageTextAdapter, samples: list[CaptionedImage], metrics) -> list[float]:
        image_embeds = model.embed_images([sample.image() for sample in samples], self.size).cpu()
        text_embeds = model.embed_texts([caption for sample in samples for caption in sample.captions]).cpu()
        per_image = text_embeds.split([len(sample.captions) for sample in samples])
        metrics["recall"].add_batch(predictions=image_embeds.numpy(), references=[own.numpy() for own in per_image])
        # Ranks are known only at the end, so a sample's score is the similarity to its own captions.
        return [(own @ embed).mean().item() for embed, own in zip(image_embeds, per_image, strict=True)]

    def compute_metrics(self, metrics) -> dict[str, float | None]:
        recalls = metrics["recall"].compute()
        return {"mean_recall@1": recalls["mean_recall@1"], **recalls}

    def visualize(self, model: ImageTextAdapter, sample: CaptionedImage) -> list[tuple[str, np.ndarray]]:
        image = sample.image()
        with torch.inference_mode():
            similarities = model.embed_texts(sample.captions) @ model.embed_images([image], self.size)[0]
        lines = [f"{value:.2f} {text}" for text, value in zip(sample.captions, similarities.tolist(), strict=True)]
        pixels = np.asarray(image)
        return [("image", pixels), ("its captions", draw_text(pixels, lines))]
