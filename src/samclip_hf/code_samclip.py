"""
The model's code in the folder of a checkpoint.

A published checkpoint contains this code, and `auto_map` and `custom_pipelines` of its configuration refer to it. When
such a checkpoint is loaded and saved elsewhere, transformers writes these entries, but not the files.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Never executed. transformers downloads a file together with the files of its relative imports. Because of these
    # imports, it downloads all files with any of them.
    from .pipeline_samclip import SamClipImageSegmentationPipeline  # noqa: F401
    from .processing_samclip import SamClipProcessor  # noqa: F401


def save_code(saved: Any, folder: str | Path) -> None:
    """
    Copies the model's code to a folder if what is saved there comes from a published checkpoint.

    Args:
        saved ([`PreTrainedConfig`] or a processor):
            If it has an `auto_map`, the code is copied, and `auto_map` is changed to refer to the copy.
        folder (`str` or `Path`):
            The folder, which is created if it does not exist.
    """
    auto_map = getattr(saved, "auto_map", None)
    if not auto_map:
        return
    source, target = Path(__file__).parent, Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if source.resolve() != target.resolve():
        for file in source.glob("*_samclip.py"):
            shutil.copy(file, target)
    saved.auto_map = {name: without_repository(reference) for name, reference in auto_map.items()}


def without_repository(reference: Any) -> Any:
    """A reference to a class, or a list of references, without the repository on the Hub: "owner/name--file.Class"
    becomes "file.Class"."""
    if isinstance(reference, list | tuple):
        return [without_repository(part) for part in reference]
    return reference.rpartition("--")[2]


__all__ = ["save_code", "without_repository"]
