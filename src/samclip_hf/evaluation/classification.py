"""Zero-shot classification (paper, section 5, tables 1 and 6)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..datasets.samples import DataSet, LabeledImage
from ..templates import IMAGENET_TEMPLATES
from ..visualization import captioned
from .adapters import ImageTextAdapter, ModelAdapter
from .evaluator import SampleEvaluator
from .metrics import AccumulatingMetric, TopK


class ZeroShotClassification(SampleEvaluator[LabeledImage]):
    """
    An image belongs to the class whose name, filled into every template and averaged, is most similar.

    size (`int`, *optional*):
        Side in pixels of the middle square that a model sees. By default every model's own image processor decides.
    templates (`Sequence[str]`):
        CLIP's 80 by default, as in the paper.
    """

    name = "classification"

    def __init__(
        self,
        data: DataSet[LabeledImage],
        size: int | None = None,
        templates: Sequence[str] = IMAGENET_TEMPLATES,
    ):
        super().__init__(data)
        if not data.names:
            raise ValueError(f"{data.name} has no class names to classify by.")
        self.size, self.templates = size, templates
        self.class_names = [synonyms[0] for synonyms in data.names]

    def applies_to(self, model: ModelAdapter) -> bool:
        return isinstance(model, ImageTextAdapter)

    def describe(self) -> dict[str, Any]:
        return {
            **self.data.description,
            "size": self.size or "each model's own image processor",
            "crop": "middle square" if self.size else "each model's own image processor",
            "templates": len(self.templates),
            "classes": len(self.class_names),
        }

    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        return {"top_k": TopK(num_labels=len(self.class_names))}

    def prepare(self, model: ImageTextAdapter) -> None:
        self.class_embeds = model.embed_names(self.class_names, self.templates)

    def update(self, model: ImageTextAdapter, samples: list[LabeledImage], metrics) -> list[float]:
        scores = self._scores(model, samples)
        labels = np.array([sample.label for sample in samples])
        metrics["top_k"].add_batch(predictions=scores, references=labels)
        others = scores.copy()
        others[np.arange(len(labels)), labels] = -np.inf
        return (scores[np.arange(len(labels)), labels] - others.max(axis=1)).tolist()  # how far ahead the truth is

    def _scores(self, model: ImageTextAdapter, samples: list[LabeledImage]) -> np.ndarray:
        image_embeds = model.embed_images([sample.image() for sample in samples], self.size)
        return (image_embeds @ self.class_embeds.T).cpu().numpy()

    def compute_metrics(self, metrics) -> dict[str, float | None]:
        return {name: value for name, value in metrics["top_k"].compute().items() if isinstance(value, float)}

    def visualize(self, model: ImageTextAdapter, sample: LabeledImage) -> list[tuple[str, np.ndarray]]:
        scores = self._scores(model, [sample])[0]
        best = scores.argsort()[::-1][:5]
        answers = [f"{self.class_names[label]} {scores[label]:.2f}" for label in best]
        image = np.asarray(sample.image())
        return [(self.class_names[sample.label], image), ("answers", captioned(image, answers))]
