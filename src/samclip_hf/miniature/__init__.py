"""
The miniature: procedural scenes, a small SAM and a small CLIP trained on them, and a SAM-CLIP distilled from both.

The weights are part of the package and the scenes are drawn when they are needed, so examples, tests and the demo run
offline. `streams` needs the extra `train`.
"""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"

# Arguments of everything mode for the miniature models, whose predicted IoUs and stability scores are below the
# default thresholds of the mask generation pipeline.
MASK_GENERATION = {
    "points_per_crop": 16,
    "pred_iou_thresh": 0.6,
    "stability_score_thresh": 0.3,
    "crops_nms_thresh": 0.5,
}


def sam_teacher() -> str:
    """Folder of the miniature SAM, for `SamModel.from_pretrained` and `SamProcessor.from_pretrained`."""
    return str(_WEIGHTS / "sam")


def clip_teacher() -> str:
    """Folder of the miniature CLIP, for `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained`."""
    return str(_WEIGHTS / "clip")


def checkpoint() -> str:
    """Folder of the miniature SAM-CLIP, the default checkpoint of the commands and examples."""
    return str(_WEIGHTS / "samclip")


__all__ = ["MASK_GENERATION", "checkpoint", "clip_teacher", "sam_teacher"]
