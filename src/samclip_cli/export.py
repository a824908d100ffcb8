"""`samclip export`: exports a SAM-CLIP to ONNX."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .argument_types import CommandParser
from .models import check_model
from .outputs import check_writable

# Equal to samclip_hf.export.PART_NAMES and OPSETS, which cannot be imported without torch. A test compares them.
PARTS = ("image_encoder", "mask_decoder", "segment_encoder", "text_encoder")
OPSETS = range(18, 24)

DESCRIPTION = """\
Exports a SAM-CLIP to ONNX, one file for each part of the model.

examples:
  samclip export --model runs/stage3 --output_dir onnx
  samclip export --model runs/stage3 --output_dir onnx --parts image_encoder text_encoder
  samclip export --model runs/stage3 --output_dir onnx_int8 --quantize

Writes PART.onnx for every part and the files that are needed to run them without PyTorch:
samclip.json (preprocessing, image sizes, constants), tokenizer.json and, for a checkpoint with a
vocabulary, class_embeds.npy. Every part is checked with onnx, run with onnxruntime at several image
sizes, and compared with PyTorch. docs/export.md in the repository shows
how to combine the parts."""


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser("export", description=DESCRIPTION)
    parser.add_argument(
        "--model", metavar="NAME", help="a folder or a repository on the Hub (default: the shipped miniature)"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="FOLDER",
        required=True,
        help="a new folder, or the folder of an earlier export, which is replaced",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"any of {', '.join(PARTS)} (default: all parts of the model)",
    )
    parser.add_argument(
        "--opset",
        type=int,
        choices=OPSETS,
        metavar="N",
        default=OPSETS[0],
        help=f"ONNX operator set, {OPSETS[0]} to {OPSETS[-1]} (default: %(default)s)",
    )
    parser.add_argument(
        "--quantize",
        action="store_true",
        help="store the weights of matrix products as int8 (onnxruntime's dynamic quantization)",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.model is not None:
        check_model(arguments.model)
    check_writable(arguments.output_dir, "--output_dir")

    from samclip_hf import miniature
    from samclip_hf.export import export

    model = arguments.model or miniature.checkpoint()
    try:
        differences = export(
            model, arguments.output_dir, arguments.parts, arguments.opset, quantize=arguments.quantize
        )
    except (ImportError, ValueError, OSError) as error:
        sys.exit(f"samclip export: {error}")
    for name, difference in differences.items():
        size = sum(path.stat().st_size for path in arguments.output_dir.glob(f"{name}.onnx*")) / 1e6
        print(f"{name}.onnx: {size:.1f} MB, largest difference from PyTorch {difference:.0e} of the largest value")
    return 0
