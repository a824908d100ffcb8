"""ONNX export of a SAM-CLIP. Needs the extra `export`."""

from .modules import PART_NAMES, Part, create_parts
from .writer import OPSETS, export

__all__ = ["OPSETS", "PART_NAMES", "Part", "create_parts", "export"]
