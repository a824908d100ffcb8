"""
Zero-shot semantic segmentation from patch embeddings (paper, section 5, table 2), and the base class of all evaluators
that compare label maps. Publications differ in the rule for background, in image sizes, windows and upsampling, so
every result states them.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..datasets.samples import IGNORE_INDEX, DataSet, SegmentedImage
from ..segmentation_samclip import apply_background_threshold, max_over_synonyms
from ..templates import IMAGENET_TEMPLATES
from ..visualization import overlay_labels
from .adapters import ImageTextAdapter
from .evaluator import SampleEvaluator, describe_names, describe_templates
from .metrics import AccumulatingMetric, MeanIoU

MIN_LOGIT = -1e9  # of labels without texts: finite after sums over windows and after interpolation


class LabelMapEvaluator(SampleEvaluator[SegmentedImage]):
    """
    Base class: embeds the class names, and compares label maps at the size of the image.

    data (`DataSet`):
        Images with label maps.
    templates (`Sequence[str]`, *optional*):
        Templates of class names; an embedding is the mean over them. By default CLIP's 80, as in the paper. The
        similarity of a label is that of its most similar synonym.
    background_threshold (`float`, *optional*):
        For data with background: a pixel is background if no class has at least this probability. By default, a pixel
        is background if one of the texts that describe the background is more similar than any class.
    background_templates (`bool`, *optional*, defaults to `False`):
        Whether the templates are also applied to all texts that describe the background. By default, these texts are
        used without templates.
    """

    batch_size = 8

    def __init__(
        self,
        data: DataSet[SegmentedImage],
        templates: Sequence[str] = IMAGENET_TEMPLATES,
        background_threshold: float | None = None,
        background_templates: bool = False,
    ):
        super().__init__(data)
        if not data.names:
            raise ValueError(f"{data.name} has no class names. Segmentation by text needs them.")
        if background_threshold is not None and data.background is None:
            raise ValueError(f"background_threshold cannot be used: {data.name} has no background.")
        has_texts = bool(data.background) and background_threshold is None
        if background_templates and not has_texts:
            raise ValueError(f"background_templates cannot be used: {data.name} has no texts for background.")
        if data.background is not None and background_threshold is None and not has_texts:
            raise ValueError(f"{data.name} has a background without texts: pass background_threshold.")
        self.templates, self.background_templates = templates, background_templates
        self.background_threshold = background_threshold
        self.label_names = [synonyms[0] for synonyms in data.names]

    def describe(self) -> dict[str, Any]:
        if self.data.background is None:
            background = "none: every pixel that counts belongs to a class"
        elif self.background_threshold is not None:
            background = f"where no class has a probability of {self.background_threshold}"
        else:
            through = "through the templates" if self.background_templates else "without templates"
            background = f"{len(self.data.background)} texts, {through}: {', '.join(self.data.background)}"
        return {
            **self.data.description,
            "classes": describe_names(self.data.names or []),
            "templates": describe_templates(self.templates),
            "background": background,
            "compared": "at the image's own size, labels absent from truth and prediction left out",
        }

    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        return {"mean_iou": MeanIoU(num_labels=len(self.label_names), ignore_index=IGNORE_INDEX)}

    @abstractmethod
    def predict(self, model: Any, image: Image.Image) -> np.ndarray:
        """Returns labels `(height, width)`."""

    def update(self, model: Any, samples: list[SegmentedImage], metrics) -> list[float]:
        scores = []
        for sample in samples:
            prediction, truth = self.predict(model, sample.image()), sample.label_map()
            metrics["mean_iou"].add(prediction=prediction, reference=truth)
            score = metrics["mean_iou"].image_mean_iou(prediction, truth)
            scores.append(1.0 if score is None else score)
        return scores

    def compute_metrics(self, metrics) -> dict[str, float | None]:
        values = metrics["mean_iou"].compute()
        per_label = {
            f"iou: {name}": value
            for name, value in zip(self.label_names, values["iou_per_label"], strict=True)
            if value is not None
        }
        return {key: values[key] for key in ("mean_iou", "mean_accuracy", "overall_accuracy")} | per_label

    def visualize(self, model: Any, sample: SegmentedImage) -> list[tuple[str, np.ndarray]]:
        image = sample.image()
        pixels = np.asarray(image)
        has_background = self.data.background is not None
        return [
            ("image", pixels),
            ("ground truth", overlay_labels(pixels, sample.label_map(), self.label_names, has_background)),
            (self.name, overlay_labels(pixels, self.predict(model, image), self.label_names, has_background)),
        ]

    def embed_vocabulary(self, model: ImageTextAdapter) -> tuple[Tensor, Tensor]:
        """Returns embeddings `(num_texts, projection_dim)` of all names and, without a threshold, of the texts that
        describe the background; and the label of each text `(num_texts,)`."""
        assert self.data.names is not None
        first_class = int(self.data.background is not None)  # label 0 is background
        classes = enumerate(self.data.names[first_class:], start=first_class)
        names = [(label, name) for label, synonyms in classes for name in synonyms]
        embeds = [model.embed_names([name for _, name in names], self.templates)]
        labels = [label for label, _ in names]
        if self.data.background is not None and self.background_threshold is None:
            embeds.append(
                model.embed_names(self.data.background, self.templates if self.background_templates else ["{}"])
            )
            labels += [0] * len(self.data.background)
        return torch.cat(embeds), torch.tensor(labels, device=embeds[0].device)

    def to_label_logits(self, text_logits: Tensor, labels: Tensor) -> Tensor:
        """Returns logits of labels `(num_labels, ...)` for logits of texts `(num_texts, ...)`: for each label, the
        highest one."""
        return max_over_synonyms(text_logits, labels, len(self.label_names), dim=0).clamp_min(MIN_LOGIT)

    def to_labels(self, label_logits: Tensor) -> Tensor:
        """Returns the labels `(...)` for logits `(num_labels, ...)`."""
        if self.background_threshold is not None:
            label_logits = apply_background_threshold(label_logits, 0, self.background_threshold, dim=0)
        return label_logits.argmax(dim=0)


class SemanticSegmentation(LabelMapEvaluator):
    """
    Compares each patch embedding, of SAM-CLIP's CLIP head or of a CLIP, with each text. The logits of labels are
    upsampled bilinearly to the size of the image, and each pixel has the label with the highest logit (paper, section
    5).

    data, templates, background_threshold, background_templates:
        See [`LabelMapEvaluator`].
    size (`int`, *optional*, defaults to 448):
        The image's shorter side in pixels. The default is the paper's.
    window (`int`, *optional*):
        Side in pixels of sliding windows on the resized image, which are common for CLIPs. The logits of overlapping
        windows are averaged. By default, the image is processed as a whole.
    stride (`int`, *optional*):
        Distance of the windows in pixels. Defaults to half of `window`.
    """

    name = "semantic"
    adapter_class = ImageTextAdapter

    def __init__(
        self,
        data: DataSet[SegmentedImage],
        size: int = 448,
        window: int | None = None,
        stride: int | None = None,
        templates: Sequence[str] = IMAGENET_TEMPLATES,
        background_threshold: float | None = None,
        background_templates: bool = False,
    ):
        super().__init__(data, templates, background_threshold, background_templates)
        if window is None and stride is not None:
            raise ValueError("stride requires window.")
        self.size, self.window = size, window
        self.stride = window // 2 if window is not None and stride is None else stride
        if self.window is not None and not 0 < (self.stride or 0) <= self.window:
            raise ValueError(f"Windows of {self.window} px with a stride of {self.stride} px leave gaps.")

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "size": f"shorter side {self.size} px, both to whole patches",
            "window": "none" if self.window is None else f"{self.window} px every {self.stride} px, averaged",
            "upscaling": "bilinear, of logits",
        }

    def describe_settings(self, model: ImageTextAdapter) -> dict[str, Any]:
        return {"patches": model.patch_rule}

    def prepare(self, model: ImageTextAdapter) -> None:
        self.text_embeds, self.labels = self.embed_vocabulary(model)

    @torch.inference_mode()
    def predict(self, model: ImageTextAdapter, image: Image.Image) -> np.ndarray:
        if self.window is None:
            logits = self._patch_logits(model, image, self.size)
        else:
            logits = self._window_logits(model, image, self.window, self.stride or self.window)
        logits = F.interpolate(logits[None], size=(image.height, image.width), mode="bilinear", align_corners=False)
        return self.to_labels(logits[0]).cpu().numpy()

    def _patch_logits(self, model: ImageTextAdapter, image: Image.Image, size: int) -> Tensor:
        """Returns `(num_labels, grid_height, grid_width)`."""
        patches = model.embed_patches(image, size)
        text_logits = torch.tensordot(self.text_embeds, patches, 1) * model.logit_scale
        return self.to_label_logits(text_logits, self.labels)

    def _window_logits(self, model: ImageTextAdapter, image: Image.Image, window: int, stride: int) -> Tensor:
        """Returns `(num_labels, height, width)` for the resized image."""
        scale = self.size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        total = torch.zeros(len(self.label_names), image.height, image.width, device=self.text_embeds.device)
        count = torch.zeros(image.height, image.width, device=total.device)
        for top in window_starts(image.height, window, stride):
            for left in window_starts(image.width, window, stride):
                right, bottom = min(left + window, image.width), min(top + window, image.height)
                crop = image.crop((left, top, right, bottom))
                logits = self._patch_logits(model, crop, min(crop.size))
                covered = np.s_[..., top:bottom, left:right]
                total[covered] += F.interpolate(
                    logits[None], size=(crop.height, crop.width), mode="bilinear", align_corners=False
                )[0]
                count[covered] += 1
        return total / count


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Returns the starts of windows that cover `length`. The last window ends at `length`."""
    return [*range(0, max(length - window, 0), stride), max(length - window, 0)]
