"""The pictures by which one sees a student learn, and forget."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling_samclip import SamClipModel


@dataclass
class PanelRow:
    """One image of the panel; all arrays have its height and width."""

    image: np.ndarray  # uint8, (height, width, 3)
    teacher_mask: np.ndarray | None = None  # bool
    student_mask: np.ndarray | None = None
    point: np.ndarray | None = None  # x and y
    box: np.ndarray | None = None  # x1, y1, x2, y2
    texts: np.ndarray | None = None  # number of the text that is most similar to the CLIP head's patch


@torch.no_grad()
def text_map(model: SamClipModel, pixel_values: Tensor, text_embeds: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The most similar of the texts `(num_texts, projection_dim)` to each patch of one image, as a map of `size`."""
    dense_embeds = model(pixel_values=pixel_values).dense_embeds.float()
    similarity = torch.einsum("bdhw,td->bthw", F.normalize(dense_embeds, dim=1), text_embeds.float())
    similarity = F.interpolate(similarity, size=size, mode="bilinear", align_corners=False)
    return similarity[0].argmax(dim=0).cpu().numpy()


def resize_mask(logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Mask logits `(height, width)` as a mask of another size."""
    resized = F.interpolate(logits[None, None].float(), size=size, mode="bilinear", align_corners=False)
    return (resized[0, 0] > 0).cpu().numpy()


def draw_panel(path: Path, rows: list[PanelRow], texts: list[str], title: str) -> None:
    """Images in rows; the prompt, both masks and the texts' places in columns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    columns = ["image"]
    if any(row.student_mask is not None for row in rows):
        columns += ["SAM teacher", "SAM-CLIP"]
    if any(row.texts is not None for row in rows):
        columns.append("CLIP head, by text")
    size = (2.4 * len(columns), 2.4 * len(rows) + 0.8)
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title)
    colours = plt.get_cmap("tab20")
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=9)
    for row, own_axes in zip(rows, axes, strict=True):
        for axis, column in zip(own_axes, columns, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.imshow(row.image)
            mask = {"SAM teacher": row.teacher_mask, "SAM-CLIP": row.student_mask}.get(column)
            if mask is not None:
                axis.imshow(np.where(mask[..., None], (0.1, 1.0, 0.1, 0.45), (0.0, 0.0, 0.0, 0.5)))
            if column == "image" and row.point is not None:
                axis.plot(*row.point, marker="*", color="lime", markeredgecolor="black", markersize=12)
            if column == "image" and row.box is not None:
                x1, y1, x2, y2 = row.box
                axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="lime")
            if column == "CLIP head, by text" and row.texts is not None:
                axis.imshow(colours(row.texts % 20), alpha=0.6)
    if "CLIP head, by text" in columns:
        handles = [Patch(color=colours(number % 20), label=text) for number, text in enumerate(texts)]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def to_image(images: Tensor, content_size: Tensor | None) -> np.ndarray:
    """One uint8 image `(3, height, width)` without its padding, channels last."""
    height, width = images.shape[-2:] if content_size is None else content_size.tolist()
    return images[:, :height, :width].permute(1, 2, 0).cpu().numpy()
