"""An embedded world: procedural scenes, a small SAM and a small CLIP trained on them, and a shipped SAM-CLIP.

Everything in this package that needs data or weights falls back on this world, so that it runs anywhere, offline.
Importing it costs nothing: `scenes` needs numpy alone, `streams` needs the extra `train`.
"""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"


def sam_teacher() -> str:
    """Folder of the miniature SAM, for `SamModel.from_pretrained` and `SamProcessor.from_pretrained`."""
    return str(_WEIGHTS / "sam")


def clip_teacher() -> str:
    """Folder of the miniature CLIP, for `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained`."""
    return str(_WEIGHTS / "clip")


def checkpoint() -> str:
    """Folder of the shipped miniature SAM-CLIP: the default checkpoint of every command and example."""
    return str(_WEIGHTS / "samclip")


__all__ = ["checkpoint", "clip_teacher", "sam_teacher"]
