"""Predictions for an image and the formats in which they are written."""

import io
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    import numpy as np
    from PIL import Image


@dataclass
class Prediction:
    r"""
    Result of a pipeline for one image.

    record (`dict`):
        Content of the JSON output, without the image's name and size.
    legend (`list[tuple[int | None, str]]`):
        Rows of the annotated image's legend: the index of a color, or `None`, and a text.
    masks (`list[numpy.ndarray]` of shape `(height, width)`):
        Boolean masks to draw.
    colors (`list[int]`):
        Index of each mask's color.
    """

    record: dict[str, Any]
    legend: list[tuple[int | None, str]]
    masks: list["np.ndarray"] = field(default_factory=list)
    colors: list[int] = field(default_factory=list)


def coco_annotation(mask: "np.ndarray", segmentation: dict | None = None) -> dict[str, Any]:
    """
    COCO's fields of a mask: `bbox`, `area` and `segmentation`.

    mask (`numpy.ndarray` of shape `(height, width)`):
        Boolean.
    segmentation (`dict`, *optional*):
        The mask's run-length encoding, if it is available.
    """
    from samclip_hf.images import encode_mask, mask_to_coco_box

    return {
        "bbox": mask_to_coco_box(mask),
        "area": int(mask.sum()),
        "segmentation": encode_mask(mask) if segmentation is None else segmentation,
    }


def encode(extension: str, image: "Image.Image", record: dict, prediction: Prediction) -> bytes:
    if extension == ".json":
        return (json.dumps(record) + "\n").encode()
    from samclip_hf.visualization import draw_segments

    file = io.BytesIO()
    draw_segments(image, prediction.masks, prediction.colors, prediction.legend).save(file, "PNG")
    return file.getvalue()
