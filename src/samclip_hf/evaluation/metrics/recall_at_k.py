"""Retrieval between images and captions, in both directions."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Features, List, Value

from .accumulating import AccumulatingMetric

IMAGE_BATCH_SIZE = 256  # compared with all captions at once: 51 MB of similarities for COCO's 25,000 captions
# Tolerance for equal cosines in float64: the rounding of a matrix product depends on the position of a column, so that
# two equal captions may differ by about 1e-16.
TOLERANCE = 1e-12


class RecallAtK(AccumulatingMetric):
    r"""
    Text to image: the fraction of captions whose image is among the k nearest images. Image to text: the fraction of
    images with one of their captions among the k nearest captions. `mean_recall@1`, the mean of both directions,
    corresponds to R@1 in the paper's table 1: only with this definition, its baselines match OpenCLIP's tables.

    Ties count as misses: if all embeddings are equal, the recall is 0. An image whose nearest caption is also the
    caption of another image is a miss at k = 1.

    predictions (arrays or tensors of shape `(num_images, embed_dim)`):
        Image embeddings, compared by cosine similarity in float64.
    references (list of arrays or tensors of shape `(num_captions, embed_dim)`):
        For each image, the embeddings of its captions, at least one.
    ks (`tuple[int, ...]`):
        Values of k. Values above the number of images are left out.

    The state contains all embeddings in float32. `compute` needs another 230 MB for 5,000 images with 25,000 captions
    in 512 dimensions. Raises `ValueError` if an image has no captions, shapes differ, or an embedding is zero or not
    finite.
    """

    input_features = Features({"predictions": List(Value("float32")), "references": List(List(Value("float32")))})

    def __init__(self, ks: Sequence[int] = (1, 5, 10), **module_arguments: Any):
        super().__init__(**module_arguments)
        self.ks = sorted(ks)

    def _measure(self, predictions: Iterable[Any], references: Iterable[Any]) -> dict[str, Any]:
        images, captions = list(map(_to_float32, predictions)), list(map(_to_float32, references))
        for image, own in zip(images, captions, strict=True):
            if image.ndim != 1 or own.ndim != 2 or len(own) == 0 or own.shape[1] != len(image):
                raise ValueError(
                    "An image must be (embed_dim,) and its captions (num_captions, embed_dim), "
                    f"got {image.shape} and {own.shape}."
                )
            lengths = np.linalg.norm(np.vstack([image, own]), axis=1)
            if not (np.isfinite(lengths) & (lengths > 0)).all():
                raise ValueError("An embedding is zero or not finite.")
        return {"images": images, "captions": captions}

    def _result(self, state: dict[str, Any]) -> dict[str, Any]:
        # Sorted, because the rounding of sums depends on the position in the matrix.
        samples = sorted(
            zip(state["images"], state["captions"], strict=True),
            key=lambda sample: (sample[0].tobytes(), sample[1].tobytes()),
        )
        image_embeds = _normalize(np.stack([image for image, _ in samples]))
        text_embeds = _normalize(np.concatenate([own for _, own in samples]))
        num_captions = [len(own) for _, own in samples]
        image_of_text = np.repeat(np.arange(len(samples)), num_captions)
        first_text = np.cumsum([0, *num_captions[:-1]])

        own_similarity = np.einsum("td,td->t", text_embeds, image_embeds[image_of_text])
        best_own_similarity = np.maximum.reduceat(own_similarity, first_text)
        images_ahead = np.full(len(text_embeds), -1)  # because its own image is counted below
        texts_ahead = np.empty(len(image_embeds), dtype=int)
        for start in range(0, len(image_embeds), IMAGE_BATCH_SIZE):
            chunk = slice(start, start + IMAGE_BATCH_SIZE)
            similarity = image_embeds[chunk] @ text_embeds.T + TOLERANCE
            images_ahead += (similarity >= own_similarity).sum(axis=0)
            others = image_of_text != np.arange(len(samples))[chunk, None]
            texts_ahead[chunk] = (others & (similarity >= best_own_similarity[chunk, None])).sum(axis=1)

        result = {}
        for k in self.ks:
            if k <= len(samples):
                text_to_image, image_to_text = (images_ahead < k).mean().item(), (texts_ahead < k).mean().item()
                result[f"text_to_image_recall@{k}"] = text_to_image
                result[f"image_to_text_recall@{k}"] = image_to_text
                result[f"mean_recall@{k}"] = (text_to_image + image_to_text) / 2
        return result


def _to_float32(embeds: Any) -> np.ndarray:
    """Returns a copy, because the caller may reuse the memory."""
    return torch.as_tensor(embeds).to("cpu", torch.float32, copy=True).numpy()


def _normalize(embeds: np.ndarray) -> np.ndarray:
    """Returns unit embeddings in float64."""
    embeds = embeds.astype(np.float64)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    return embeds
