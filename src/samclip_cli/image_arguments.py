"""Arguments that `samclip segment`, `classify`, `masks` and `points` have in common."""

import argparse
import textwrap

from . import CommandError
from .argument_types import CommandParser, positive_int, probability
from .formats import FORMATS, WITHOUT_MASKS, parse_formats
from .inputs import INPUTS_HELP, add_input_arguments
from .models import add_model_arguments

COMMON_HELP = """
%(inputs_help)s
%(help_text)s
output:
  --output is a .png file (overlay), a .json file, or a folder, which is created and gets the files
  of --formats:
%(formats_help)s
  Existing files are replaced with --overwrite only, and input images never.
  Without --output, JSON is written to standard output, one line per image:
    {"image": "photo.jpg", "height": 480, "width": 640, "model": {"sam": "...", "clip": "..."},
     %(record)s}
%(masks_help)s
exit status:
  0    success
  1    some images failed, or an output could not be written; all other outputs are complete
  2    wrong arguments; no image was processed
  130  interrupted by Ctrl-C; all outputs written before are complete"""

MASKS_HELP = """\
  bbox is [left, top, width, height] in pixels and segmentation is an uncompressed run-length
  encoding, both as in COCO. To read a mask with pycocotools:
    pycocotools.mask.frPyObjects(segmentation, *segmentation["size"])
  To read the COCO results:
    pycocotools.coco.COCO("out/coco_dataset.json").loadRes("out/coco_results.json")
"""


def create_parser(
    command: str,
    description: str,
    record: str,
    has_masks: bool,
    help_text: str,
    hints: dict[str, str] | None = None,
) -> CommandParser:
    """A parser with the arguments of all image commands. `description` has examples, `record` is an example of the
    JSON, and `help_text` explains arguments of the command, for `--help`. See [`CommandParser`] for `hints`."""
    names = [name for name in FORMATS if has_masks or name in WITHOUT_MASKS]
    lines = []
    for name in names:
        path, meaning = FORMATS[name]
        first, *rest = textwrap.wrap(meaning, 64)
        lines += [f"    {name:<9} {path.format('NAME'):<17} {first}", *(" " * 32 + line for line in rest)]
    parser = CommandParser(
        command,
        hints,
        usage=f"samclip {command} IMAGE [IMAGE ...] [options]",
        description=description,
        epilog=COMMON_HELP
        % {
            "inputs_help": INPUTS_HELP,
            "record": record,
            "masks_help": MASKS_HELP if has_masks else "",
            "help_text": help_text,
            "formats_help": "\n".join(lines),
        },
    )
    add_input_arguments(parser)
    add_model_arguments(parser)
    defaults = ("overlay", "labelmap", "json", "coco") if has_masks else ("overlay", "json")
    parser.set_defaults(default_formats=defaults)
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a .png file, a .json file, or a folder (default: JSON on standard output)",
    )
    parser.add_argument(
        "--formats",
        type=lambda text: parse_formats(text, has_masks),
        metavar="A,B",
        help=f"comma-separated formats for a folder as --output, see below (default: {','.join(defaults)})",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing output files; input images are never replaced"
    )
    return parser


def add_tile_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--tile` and `--overlap`, for large images."""
    parser.add_argument(
        "--tile",
        type=positive_int,
        metavar="N",
        help="divide large images into overlapping tiles of N x N pixels and merge the results, so that small objects "
        "are found; larger objects are found in the whole image at a lower resolution (default: whole images)",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        metavar="F",
        help="overlap of neighboring tiles as a fraction of --tile, above 0 and at most 0.5 (default: 0.25)",
    )


def add_everything_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of everything mode: those of [`mask_generation_options`]."""
    parser.add_argument(
        "--points_per_crop",
        type=positive_int,
        metavar="N",
        help="prompt the model with a grid of N x N points (default: 32; 16 for the shipped miniature)",
    )
    parser.add_argument(
        "--pred_iou_thresh",
        type=probability,
        metavar="P",
        help="discard masks with a lower score, from 0 to 1 (default: 0.88; 0.6 for the shipped miniature)",
    )
    parser.add_argument(
        "--stability_score_thresh",
        type=probability,
        metavar="P",
        help="discard masks with a lower stability score, from 0 to 1: the IoU between the masks of a higher and a "
        "lower mask threshold (default: 0.95; 0.3 for the shipped miniature)",
    )


def check_tiles(arguments: argparse.Namespace) -> None:
    """Raises `CommandError` for an `--overlap` out of range or without `--tile`."""
    if arguments.overlap is None:
        return
    if arguments.tile is None:
        raise CommandError("--overlap has no effect without --tile.")
    if not 0 < arguments.overlap <= 0.5 or arguments.tile * arguments.overlap < 1:
        raise CommandError(
            "--overlap must be a fraction of --tile, above 0 and at most 0.5, and at least one pixel: got "
            f"{arguments.overlap}."
        )
