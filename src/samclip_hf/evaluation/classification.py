"""Zero-shot classification (paper, section 5, tables 1 and 6)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..datasets.samples import DataSet, LabeledImage
from ..templates import IMAGENET_TEMPLATES
from ..visualization import draw_text
from .adapters import ImageTextAdapter, describe_crop, describe_sizes
from .evaluator import SampleEvaluator, describe_names, describe_templates
from .metrics import AccumulatingMetric, TopK


class ZeroShotClassification(SampleEvaluator[LabeledImage]):
    """
    Assigns each image to the class with the most similar embedding. The embedding of a class is the mean over
    templates.

    data (`DataSet`):
        Images with labels.
    size (`int`, *optional*):
        Side in pixels of the center square. By default, each model's own image processor prepares the images.
    templates (`Sequence[str]`, *optional*):
        Templates of class names. By default CLIP's 80, as in the paper.
    """

    name = "classification"
    adapter_class = ImageTextAdapter

    def __init__(
        self,
        data: DataSet[LabeledImage],
        size: int | None = None,
        templates: Sequence[str] = IMAGENET_TEMPLATES,
    ):
        super().__init__(data)
        if not data.names:
            raise ValueError(f"{data.name} has no class names. Classification needs them.")
        self.size, self.templates = size, templates
        self.class_names = [synonyms[0] for synonyms in data.names]

    def describe(self) -> dict[str, Any]:
        return {
            **self.data.description,
            **describe_crop(self.size),
            "templates": describe_templates(self.templates),
            "classes": describe_names([[name] for name in self.class_names]),
            "ties": "as argmax: the first class",
        }

    def describe_settings(self, model: ImageTextAdapter) -> dict[str, Any]:
        return describe_sizes(model, has_own_size=self.size is None)

    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        return {"top_k": TopK(num_labels=len(self.class_names))}

    def prepare(self, model: ImageTextAdapter) -> None:
        self.class_embeds = model.embed_names(self.class_names, self.templates)

    def update(self, model: ImageTextAdapter, samples: list[LabeledImage], metrics) -> list[float]:
        similarities = self._similarities(model, samples)
        labels = np.array([sample.label for sample in samples])
        metrics["top_k"].add_batch(predictions=similarities, references=labels)
        rows = np.arange(len(labels))
        others = similarities.copy()
        others[rows, labels] = -np.inf
        return (similarities[rows, labels] - others.max(axis=1)).tolist()  # the margin of the true class

    def _similarities(self, model: ImageTextAdapter, samples: list[LabeledImage]) -> np.ndarray:
        """Returns `(num_samples, num_classes)`."""
        image_embeds = model.embed_images([sample.image() for sample in samples], self.size)
        return (image_embeds @ self.class_embeds.T).cpu().numpy()

    def compute_metrics(self, metrics) -> dict[str, float | None]:
        return {name: value for name, value in metrics["top_k"].compute().items() if isinstance(value, float)}

    def visualize(self, model: ImageTextAdapter, sample: LabeledImage) -> list[tuple[str, np.ndarray]]:
        similarities = self._similarities(model, [sample])[0]
        best = (-similarities).argsort(kind="stable")[:5]
        predictions = [f"{self.class_names[label]} {similarities[label]:.2f}" for label in best]
        image = np.asarray(sample.image())
        return [(self.class_names[sample.label], image), ("predictions", draw_text(image, predictions))]
