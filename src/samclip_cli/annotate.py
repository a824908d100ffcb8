"""`samclip annotate`: annotates a dataset by text or examples, and writes one dataset."""

import argparse
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import CommandError
from .argument_types import CommandParser, positive_int
from .batch import process_images
from .data_sets import DATA_SET_FORMATS, DataSetWriter, data_set_files
from .examples import EXAMPLES_HELP
from .formats import Prediction, parse_names
from .inputs import INPUTS_HELP, add_input_arguments
from .models import add_model_arguments
from .plan import check_folder, prepare
from .segment import ADVICE, add_segment_arguments, load_segmenter, read_segment_arguments
from .vocabulary import LABELS_HELP

if TYPE_CHECKING:
    from PIL import Image

DESCRIPTION = """\
Annotates a dataset by text or examples, and writes one dataset with the masks.

examples:
  samclip annotate photos/ --sam facebook/sam-vit-base --clip openai/clip-vit-base-patch16 \\
      --labels "cat, sofa" --background "wall, floor" --output annotated/
  samclip annotate photos.tar --examples parts.json --threshold 0.7 --output annotated/ \\
      --formats coco,parquet,webdataset --review 50

The segments and scores are those of 'samclip segment'."""

EPILOG = """
%(inputs_help)s
%(help_text)s
output:
  --output is a folder, which is created and gets the files of --formats:
%(formats_help)s
    contact_sheet.png         random images with their segments
    review.json               with --review: the images whose scores are closest to --threshold
    report.json               options, counts, and images that failed with the cause
    results.jsonl             the result of each image; an interrupted run continues from it
  The dataset is written when a single process has completed all images. Existing files are
  replaced with --overwrite only, and input images never.

exit status:
  0    success
  1    some images failed and are not in the dataset, or an output could not be written
  2    wrong arguments; no image was processed
  130  interrupted by Ctrl-C; run the same command to continue"""


def build_parser() -> argparse.ArgumentParser:
    lines = []
    for path, meaning in DATA_SET_FORMATS.values():
        first, *rest = textwrap.wrap(meaning, 66)
        lines += [f"    {path:<25} {first}", *(" " * 30 + line for line in rest)]
    parser = CommandParser(
        "annotate",
        usage="samclip annotate IMAGE [IMAGE ...] --output FOLDER [options]",
        description=DESCRIPTION,
        epilog=EPILOG
        % {"inputs_help": INPUTS_HELP, "help_text": LABELS_HELP + EXAMPLES_HELP, "formats_help": "\n".join(lines)},
    )
    add_input_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--output", metavar="FOLDER", required=True, help="the folder of the dataset")
    parser.add_argument(
        "--formats",
        dest="data_set_formats",
        type=lambda text: parse_names(text, DATA_SET_FORMATS),
        metavar="A,B",
        default=("coco",),
        help=f"comma-separated formats: {', '.join(DATA_SET_FORMATS)} (default: coco)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files and start again")
    add_segment_arguments(parser)
    parser.add_argument(
        "--max_per_image",
        type=positive_int,
        metavar="N",
        help="keep the N annotations of an image with the highest scores; the others are counted in report.json",
    )
    parser.add_argument("--polygons", action="store_true", help="write polygons instead of run lengths to COCO's file")
    parser.add_argument(
        "--no_images", action="store_true", help="write parquet files with the names of the images only"
    )
    parser.add_argument(
        "--contact_sheet",
        type=positive_int,
        metavar="N",
        default=16,
        help="number of random images on contact_sheet.png (default: %(default)s)",
    )
    parser.add_argument(
        "--review", type=positive_int, metavar="N", help="write the N most uncertain images to review.json"
    )
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    formats = arguments.data_set_formats
    if arguments.polygons and "coco" not in formats:
        raise CommandError("--polygons has no effect without the format coco.")
    if arguments.no_images and "parquet" not in formats:
        raise CommandError("--no_images has no effect without the format parquet.")
    check_folder(arguments.output)
    examples = read_segment_arguments(arguments)
    arguments.formats = ("jsonl",)
    plan = prepare(arguments, data_set_files(formats, arguments.review))
    if "parquet" in formats:
        import datasets  # noqa: F401  # a missing extra is reported before the work
    if arguments.polygons:
        import pycocotools  # noqa: F401
        import scipy  # noqa: F401

    loaded, segment = load_segmenter(arguments, examples)

    def predict(images: "list[Image.Image]", names: list[str]) -> list[Prediction]:
        return [keep_best(prediction, arguments.max_per_image) for prediction in segment(images, names)]

    assert plan.output is not None
    writer = DataSetWriter(
        plan.output,
        formats,
        loaded.names,
        arguments.threshold,
        arguments.polygons,
        not arguments.no_images,
        arguments.contact_sheet,
        arguments.review,
    )
    return process_images(plan, predict, loaded, ("segments", ADVICE), writer.write)


def keep_best(prediction: Prediction, max_per_image: int | None) -> Prediction:
    """Keeps the segments with the highest scores in the JSON of a prediction, in their order, and adds the number of
    the others as `"left_out"`. Without `max_per_image`, all are kept."""
    segments = prediction.record["segments"]
    order = sorted(range(len(segments)), key=lambda number: -segments[number]["score"])
    kept = [segments[number] for number in sorted(order[:max_per_image])]
    prediction.record = prediction.record | {"segments": kept, "left_out": len(segments) - len(kept)}
    return prediction
