"""
Zero-shot semantic segmentation: by patches (paper, section 5, table 2), by both of SAM-CLIP's heads (table 5), and by
the cascade of a SAM and a CLIP (table 7). The literature differs in how background is decided, in sizes, windows and
upscaling; what is done here stands in every result.
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
from ..segmentation_samclip import SamClipVocabulary
from ..templates import IMAGENET_TEMPLATES
from ..visualization import with_labels
from .adapters import CascadeAdapter, ImageTextAdapter, ModelAdapter, SamClipAdapter
from .evaluator import SampleEvaluator
from .metrics import AccumulatingMetric, MeanIoU

NEVER = -1e9  # a logit; finite, because interpolation multiplies it by 0


class LabelMaps(SampleEvaluator[SegmentedImage]):
    """
    What the three have in common: names become labels, and label maps are compared at the images' own sizes.

    templates (`Sequence[str]`):
        Every name is filled into each; a name's embedding is the mean. CLIP's 80 by default, as in the paper. Texts of
        background are taken as they are. The most similar synonym of a label counts.
    background_threshold (`float`, *optional*):
        Where label 0 is background: it is where no class has this probability among the classes. By default, where the
        data's texts of background are more similar than any class.
    """

    batch_size = 8

    def __init__(
        self,
        data: DataSet[SegmentedImage],
        templates: Sequence[str] = IMAGENET_TEMPLATES,
        background_threshold: float | None = None,
    ):
        super().__init__(data)
        if not data.names:
            raise ValueError(f"{data.name} has no class names to segment by.")
        if background_threshold is not None and data.background is None:
            raise ValueError(f"{data.name} has no background, so that a threshold for it means nothing.")
        self.templates, self.background_threshold = templates, background_threshold
        self.label_names = [synonyms[0] for synonyms in data.names]

    def describe(self) -> dict[str, Any]:
        if self.data.background is None:
            background = "none: every pixel that counts belongs to a class"
        elif self.background_threshold is not None:
            background = f"where no class has a probability of {self.background_threshold}"
        else:
            background = f"{len(self.data.background)} texts: {', '.join(self.data.background)}"
        return {
            **self.data.description,
            "labels": len(self.label_names),
            "texts": sum(map(len, self.data.names or [])),
            "templates": len(self.templates),
            "background": background,
            "compared": "at the image's own size, labels absent from truth and prediction left out",
        }

    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        return {"mean_iou": MeanIoU(num_labels=len(self.label_names), ignore_index=IGNORE_INDEX)}

    @abstractmethod
    def predict(self, model: Any, image: Image.Image) -> np.ndarray:
        """Labels `(height, width)`."""

    def update(self, model: Any, samples: list[SegmentedImage], metrics) -> list[float]:
        scores = []
        for sample in samples:
            predicted, truth = self.predict(model, sample.image()), sample.label_map()
            metrics["mean_iou"].add(prediction=predicted, reference=truth)
            own = metrics["mean_iou"].image_mean_iou(predicted, truth)
            scores.append(1.0 if own is None else own)
        return scores

    def compute_metrics(self, metrics) -> dict[str, float | None]:
        figures = metrics["mean_iou"].compute()
        by_name = {
            f"iou: {name}": value
            for name, value in zip(self.label_names, figures["iou_per_label"], strict=True)
            if value is not None
        }
        return {key: figures[key] for key in ("mean_iou", "mean_accuracy", "overall_accuracy")} | by_name

    def visualize(self, model: Any, sample: SegmentedImage) -> list[tuple[str, np.ndarray]]:
        image = sample.image()
        pixels = np.asarray(image)
        has_background = self.data.background is not None
        return [
            ("image", pixels),
            ("truth", with_labels(pixels, sample.label_map(), self.label_names, has_background)),
            (self.name, with_labels(pixels, self.predict(model, image), self.label_names, has_background)),
        ]

    def texts(self, model: ImageTextAdapter) -> tuple[Tensor, Tensor]:
        """Embeddings `(num_texts, projection_dim)` of all names and, if they decide, of the texts of background; and
        each one's label."""
        assert self.data.names is not None
        by_texts = self.data.background is not None and self.background_threshold is None
        first = int(self.data.background is not None)  # label 0 has no name to look for
        classes = enumerate(self.data.names[first:], start=first)
        names = [(label, name) for label, synonyms in classes for name in synonyms]
        embeds = [model.embed_names([name for _, name in names], self.templates)]
        labels = [label for label, _ in names]
        if by_texts:
            embeds.append(model.embed_texts(self.data.background or []))
            labels += [0] * len(self.data.background or [])
        return torch.cat(embeds), torch.tensor(labels, device=embeds[0].device)

    def by_label(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits of texts `(num_texts, ...)` the highest of each label, `(num_labels, ...)`; `NEVER` where none."""
        index = labels.view(-1, *[1] * (logits.ndim - 1)).expand_as(logits)
        empty = logits.new_full((len(self.label_names), *logits.shape[1:]), NEVER)
        return empty.scatter_reduce(0, index, logits, "amax")

    def decide(self, logits: Tensor) -> Tensor:
        """The label of logits `(num_labels, ...)`."""
        highest, label = logits.max(dim=0)
        if self.background_threshold is None:
            return label
        unsure = (highest - logits.logsumexp(dim=0)).exp() < self.background_threshold
        return label.masked_fill(unsure, 0)


class SemanticSegmentation(LabelMaps):
    """
    Every patch of a SAM-CLIP's CLIP head, or of a CLIP, is compared with every text; the logits of labels are upscaled
    bilinearly to the image's size, and the highest wins (paper, section 5).

    size (`int`):
        Of the image's shorter side in pixels; 448 in the paper.
    window (`int`, *optional*), stride (`int`, *optional*, defaults to half of `window`):
        The resized image is seen through square windows of this side, and logits are averaged where they overlap, as
        is common for CLIPs. By default, in one piece.
    """

    name = "semantic"

    def __init__(self, data, size: int = 448, window: int | None = None, stride: int | None = None, **kwargs):
        super().__init__(data, **kwargs)
        if window is None and stride is not None:
            raise ValueError("A stride needs a window.")
        self.size, self.window = size, window
        self.stride = window // 2 if window is not None and stride is None else stride
        if self.window is not None and not 0 < (self.stride or 0) <= self.window:
            raise ValueError(f"Windows of {self.window} px every {self.stride} px would leave gaps.")

    def applies_to(self, model: ModelAdapter) -> bool:
        return isinstance(model, ImageTextAdapter)

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "size": f"shorter side {self.size} px, both to whole patches",
            "window": "none" if self.window is None else f"{self.window} px every {self.stride} px, averaged",
            "upscaling": "bilinear, of logits",
        }

    def prepare(self, model: ImageTextAdapter) -> None:
        self.text_embeds, self.labels = self.texts(model)

    @torch.inference_mode()
    def predict(self, model: ImageTextAdapter, image: Image.Image) -> np.ndarray:
        if self.window is None:
            logits = self._logits(model, image, self.size)
        else:
            logits = self._windows(model, image, self.window, self.stride or self.window)
        logits = F.interpolate(logits[None], size=(image.height, image.width), mode="bilinear", align_corners=False)
        return self.decide(logits[0]).cpu().numpy()

    def _logits(self, model: ImageTextAdapter, image: Image.Image, size: int) -> Tensor:
        """`(num_labels, grid_height, grid_width)`."""
        patches = model.embed_patches(image, size)
        return self.by_label(torch.tensordot(self.text_embeds, patches, 1) * model.logit_scale, self.labels)

    def _windows(self, model: ImageTextAdapter, image: Image.Image, window: int, stride: int) -> Tensor:
        """`(num_labels, height, width)` of the resized image."""
        scale = self.size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        total = torch.zeros(len(self.label_names), image.height, image.width, device=self.text_embeds.device)
        count = torch.zeros(image.height, image.width, device=total.device)
        for top in starts(image.height, window, stride):
            for left in starts(image.width, window, stride):
                box = (left, top, min(left + window, image.width), min(top + window, image.height))
                crop = image.crop(box)
                logits = self._logits(model, crop, min(crop.size))
                seen = np.s_[..., box[1] : box[3], box[0] : box[2]]
                total[seen] += F.interpolate(
                    logits[None], size=(crop.height, crop.width), mode="bilinear", align_corners=False
                )[0]
                count[seen] += 1
        return total / count


class ComposedSegmentation(LabelMaps):
    """
    Both heads of a SAM-CLIP, in one pass of its encoder, by the composition that its configuration names.

    size (`int`, *optional*):
        Of the image's longer side in pixels, padded to a square; by default the model's own (1024 in the paper).
    """

    name = "composed"

    def __init__(self, data, size: int | None = None, **kwargs):
        super().__init__(data, **kwargs)
        self.size = size

    def applies_to(self, model: ModelAdapter) -> bool:
        return isinstance(model, SamClipAdapter)

    def describe(self) -> dict[str, Any]:
        size = f"{self.size} px" if self.size else "the model's own"
        return {**super().describe(), "size": f"longer side {size}, padded to a square"}

    def prepare(self, model: SamClipAdapter) -> None:
        text_embeds, labels = self.texts(model)
        self.vocabulary = SamClipVocabulary(
            text_embeds.to(model.model.dtype),
            labels.tolist(),
            dict(enumerate(self.label_names)),
            None if self.data.background is None else 0,
            self.background_threshold,
        )

    @torch.inference_mode()
    def predict(self, model: SamClipAdapter, image: Image.Image) -> np.ndarray:
        keywords = {"size": {"longest_edge": self.size}} if self.size else {}
        inputs = model.processor(image, return_tensors="pt", **keywords).to(model.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.model.dtype)
        outputs = model.model(**inputs, vocabulary=self.vocabulary)
        target_sizes = [(image.height, image.width)]
        return model.processor.post_process_semantic_segmentation(outputs, target_sizes)[0].cpu().numpy()


class CascadeSegmentation(LabelMaps):
    """
    SAM draws everything, CLIP names every mask, and smaller masks lie on larger ones. Pixels in no mask are background
    or, where there is none, what the whole image is most similar to.

    generation (`dict`, *optional*):
        Arguments of the stock `mask-generation` pipeline, such as `pred_iou_thresh`; its own by default.
    """

    name = "cascade"
    batch_size = 1

    def __init__(self, data, generation: dict[str, Any] | None = None, **kwargs):
        super().__init__(data, **kwargs)
        self.generation = generation or {}

    def applies_to(self, model: ModelAdapter) -> bool:
        return isinstance(model, CascadeAdapter)

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "masks": f"everything mode, {self.generation or 'thresholds of the pipeline'}",
            "crops": "a mask's box, the rest of it in CLIP's mean colour, padded to a square",
        }

    def prepare(self, model: CascadeAdapter) -> None:
        self.text_embeds, self.labels = self.texts(model.clip)

    @torch.inference_mode()
    def predict(self, model: CascadeAdapter, image: Image.Image) -> np.ndarray:
        masks = model.sam.generate_masks(image, **self.generation)
        masks = masks[masks.any(axis=(1, 2))]
        masks = masks[np.argsort(-masks.sum(axis=(1, 2)), kind="stable")]
        whole = np.ones((1, image.height, image.width), dtype=bool)
        similarities = model.name_masks(image, np.concatenate([whole, masks]), self.text_embeds)
        labels = self.decide(self.by_label(similarities.T * model.clip.logit_scale, self.labels)).cpu().numpy()
        label_map = np.full((image.height, image.width), 0 if self.data.background is not None else labels[0])
        for mask, label in zip(masks, labels[1:], strict=True):
            label_map[mask] = label
        return label_map


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start so that they cover `length`, the last one ending with it."""
    return [*range(0, max(length - window, 0), stride), max(length - window, 0)]
