"""ONNX export of a SAM-CLIP; needs the extra `export`."""

from .writer import PART_NAMES, export

__all__ = ["PART_NAMES", "export"]
