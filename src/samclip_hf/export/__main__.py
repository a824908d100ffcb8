"""`python -m samclip_hf.export` is `samclip export`."""

import argparse
import sys
from pathlib import Path

from .. import miniature
from . import OPSETS, PART_NAMES, export


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m samclip_hf.export", description="Exports a SAM-CLIP to ONNX.")
    parser.add_argument("--model", default=miniature.checkpoint())
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PART_NAMES)
    parser.add_argument("--opset", type=int, default=OPSETS[0])
    arguments = parser.parse_args(argv)
    try:
        differences = export(arguments.model, arguments.output_dir, arguments.parts, arguments.opset)
    except (ImportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, difference in differences.items():
        size = sum(path.stat().st_size for path in arguments.output_dir.glob(f"{name}.onnx*")) / 1e6
        print(f"{name}.onnx: {size:.1f} MB, differs from PyTorch by {difference:.0e} of the largest value")


if __name__ == "__main__":
    main()
