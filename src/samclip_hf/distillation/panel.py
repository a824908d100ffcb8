"""The panel of an evaluation: masks of teacher and student, and the most similar texts, for a few held-out images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import normalize
from ..modeling_samclip import SamClipModel
from ..visualization import draw_prompts, overlay_labels, overlay_masks
from .teachers import SamTeacher

MAX_IMAGES = 4


@torch.no_grad()
def panel_rows(
    model: SamClipModel,
    inputs: dict[str, dict[str, Tensor]],
    sam_teacher: SamTeacher | None,
    image_mean: list[float],
    image_std: list[float],
    texts: list[str],
    text_embeds: Tensor | None,
    text_image_size: int,
) -> list[list[tuple[str, np.ndarray]]]:
    r"""
    Returns the rows of a panel, one for each image. With SAM batches, a row shows the first prompt of the image and
    the masks of teacher and student for it. With texts, it shows the most similar text of each pixel.

    Args:
        model ([`SamClipModel`]):
            The student.
        inputs (`dict[str, dict[str, Tensor]]`):
            A micro-batch of [`StepLoader`] without tasks that have no usable sample.
        sam_teacher ([`SamTeacher`], *optional*):
            The SAM teacher.
        image_mean, image_std (`list[float]`):
            Normalization of the student's images.
        texts (`list[str]`), text_embeds (`torch.Tensor` of shape `(num_texts, projection_dim)`, *optional*):
            Texts and their normalized embeddings.
        text_image_size (`int`):
            Resolution in pixels at which images are compared with the texts.

    Returns:
        `list[list[tuple[str, numpy.ndarray]]]`: For each image its titled visualizations, uint8 `(height, width, 3)`.
    """
    if not inputs:
        return []
    batch = dict(inputs.get("sam") or next(iter(inputs.values())))
    images, content_sizes = batch.pop("images"), batch.pop("content_sizes", None)
    rows = []
    for index in range(min(MAX_IMAGES, len(images))):
        image = images[index : index + 1]
        height, width = image.shape[-2:] if content_sizes is None else content_sizes[index].tolist()
        content = image[:, :, :height, :width]
        pixels = content[0].permute(1, 2, 0).cpu().numpy()
        row = [("image", pixels)]
        if content_sizes is not None and sam_teacher is not None:
            prompt: dict[str, Any] = {
                name: batch[name][index : index + 1, :1] for name in batch if name.startswith("input_")
            }
            points, boxes = (
                prompt[name].reshape(-1, size).cpu().numpy() if name in prompt else None
                for name, size in (("input_points", 2), ("input_boxes", 4))
            )
            prompt["multimask_output"] = False
            size = content_sizes[index : index + 1]
            teacher_masks, _ = sam_teacher(image, size, **prompt)
            pixel_values = normalize(image, image_mean, image_std, size)
            student_masks = model(pixel_values=pixel_values, **prompt).pred_masks
            masks = [
                _resize_mask(logits[0, 0, 0], image.shape[-2:])[:height, :width]
                for logits in (teacher_masks, student_masks)
            ]
            row = [("prompt", draw_prompts(pixels, points, boxes))]
            row += [
                (title, overlay_masks(pixels, [mask]))
                for title, mask in zip(("SAM teacher", "SAM-CLIP"), masks, strict=True)
            ]
        if text_embeds is not None:
            square = F.interpolate(content.float(), (text_image_size,) * 2, mode="bilinear", antialias=True)
            pixel_values = normalize(square, image_mean, image_std)
            labels = most_similar_text(model, pixel_values, text_embeds, (height, width))
            row.append(("most similar text", overlay_labels(pixels, labels, texts, has_background=False)))
        rows.append(row)
    return rows


@torch.no_grad()
def most_similar_text(
    model: SamClipModel, pixel_values: Tensor, text_embeds: Tensor, size: tuple[int, int]
) -> np.ndarray:
    """Returns the index of the most similar of the texts `(num_texts, projection_dim)` for each pixel of an image
    `(1, 3, height, width)`, as an array of shape `size`."""
    dense_embeds = model(pixel_values=pixel_values).dense_embeds.float()
    similarity = torch.einsum("bdhw,td->bthw", F.normalize(dense_embeds, dim=1), text_embeds.float())
    similarity = F.interpolate(similarity, size=size, mode="bilinear", align_corners=False)
    return similarity[0].argmax(dim=0).cpu().numpy()


def _resize_mask(logits: Tensor, size: Sequence[int]) -> np.ndarray:
    resized = F.interpolate(logits[None, None].float(), size=tuple(size), mode="bilinear", align_corners=False)
    return (resized[0, 0] > 0).cpu().numpy()
