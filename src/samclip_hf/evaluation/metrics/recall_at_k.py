"""Retrieval between images and captions, in both directions."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Features, List, Value

from .accumulating import AccumulatingMetric

IMAGES_AT_A_TIME = 256  # against all captions; 51 MB of similarities with COCO's 25,000
# Of cosines in float64 that are the same but for rounding: a matrix product rounds by a column's place in it, so that
# two equal captions may differ by about 1e-16.
ROUNDING = 1e-12


class RecallAtK(AccumulatingMetric):
    r"""
    Text to image: the share of captions whose image is among the k nearest of all images. Image to text: the share of
    images one of whose captions is among the k nearest of all captions. `mean_recall@1`, of both directions, is what
    the paper's table 1 calls R@1: its baselines equal OpenCLIP's tables only that way.

    Equal similarities count against: embeddings that are all the same have 0, and an image whose nearest caption is,
    word for word, another image's too does not find it at k = 1.

    predictions (arrays or tensors of shape `(num_images, embed_dim)`):
        Image embeddings of any length; their directions are compared, in float64.
    references (list of arrays or tensors of shape `(num_captions, embed_dim)`):
        Of each image the embeddings of its own captions, one or more.
    ks (`tuple[int, ...]`):
        Those above the number of images are left out.

    The state holds all embeddings in float32. `compute` needs 230 MB beside it for 5,000 images with 25,000
    captions in 512 dimensions. `ValueError` where an image has no captions, shapes do not fit, or an embedding has no
    direction: zero or not finite.
    """

    input_features = Features({"predictions": List(Value("float32")), "references": List(List(Value("float32")))})

    def __init__(self, ks: Sequence[int] = (1, 5, 10), **module_arguments: Any):
        super().__init__(**module_arguments)
        self.ks = sorted(ks)

    def _measure(self, predictions: Iterable[Any], references: Iterable[Any]) -> dict[str, Any]:
        images, captions = list(map(float32_copy, predictions)), list(map(float32_copy, references))
        for image, own in zip(images, captions, strict=True):
            if image.ndim != 1 or own.ndim != 2 or len(own) == 0 or own.shape[1] != len(image):
                raise ValueError(
                    "An image is (embed_dim,) and its captions (num_captions, embed_dim), "
                    f"not {image.shape} and {own.shape}."
                )
            lengths = np.linalg.norm(np.vstack([image, own]), axis=1)
            if not (np.isfinite(lengths) & (lengths > 0)).all():
                raise ValueError("An embedding is zero or not finite.")
        return {"images": images, "captions": captions}

    def _result(self, state: dict[str, Any]) -> dict[str, Any]:
        # In an order of their own, since sums are rounded by the place in the matrix.
        samples = sorted(
            zip(state["images"], state["captions"], strict=True),
            key=lambda sample: (sample[0].tobytes(), sample[1].tobytes()),
        )
        image_embeds = directions(np.stack([image for image, _ in samples]))
        text_embeds = directions(np.concatenate([own for _, own in samples]))
        num_captions = [len(own) for _, own in samples]
        image_of_text = np.repeat(np.arange(len(samples)), num_captions)
        first_text = np.cumsum([0, *num_captions[:-1]])

        own_similarity = np.einsum("td,td->t", text_embeds, image_embeds[image_of_text])
        best_own_similarity = np.maximum.reduceat(own_similarity, first_text)
        images_ahead = np.full(len(text_embeds), -1)  # its own image will be counted too
        texts_ahead = np.empty(len(image_embeds), dtype=int)
        for start in range(0, len(image_embeds), IMAGES_AT_A_TIME):
            chunk = slice(start, start + IMAGES_AT_A_TIME)
            similarity = image_embeds[chunk] @ text_embeds.T + ROUNDING
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


def float32_copy(embeds: Any) -> np.ndarray:
    """A copy, since the caller may use the memory again."""
    return torch.as_tensor(embeds).to("cpu", torch.float32, copy=True).numpy()


def directions(embeds: np.ndarray) -> np.ndarray:
    embeds = embeds.astype(np.float64)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    return embeds
