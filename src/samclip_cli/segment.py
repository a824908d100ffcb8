"""`samclip segment`: segments images by text."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import CommandError, first_line
from .argument_types import probability
from .batch import prepare, process_images
from .formats import Prediction, coco_annotation
from .image_arguments import check_template, create_parser, parse_names
from .models import load_pipeline

if TYPE_CHECKING:
    from PIL import Image

DESCRIPTION = """\
Segments images by text: finds the regions of every label.

examples:
  samclip segment photo.jpg --labels "cat, sofa" --background "wall, floor" --output out.png
  samclip segment photo.jpg --labels "cat, sofa" --output out.json
  samclip segment one.jpg 'more/*.jpg' folder/ --labels "cat, sofa" --output results/

The score of a segment is its label's probability among all labels and background texts. With a
single label and no --background, every score is 1: describe the rest of the image with
--background."""

RECORD = (
    '"segments": [{"label": "cat", "score": 0.93, "bbox": [...], "area": 5120,\n       "segmentation": {...}}, ...]'
)


def build_parser() -> argparse.ArgumentParser:
    parser = create_parser("segment", DESCRIPTION, RECORD, has_masks=True)
    parser.add_argument(
        "--labels", metavar='"A, B"', help="comma-separated names (default: the labels saved with the checkpoint)"
    )
    parser.add_argument(
        "--background", metavar='"A, B"', help="comma-separated texts for regions that belong to none of the labels"
    )
    parser.add_argument("--template", metavar='"a {}"', help='prompt template (default: "a photo of a {}")')
    parser.add_argument(
        "--threshold",
        type=probability,
        metavar="P",
        default=0.5,
        help="discard segments with a lower score, from 0 to 1 (default: %(default)s)",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    labels = background = None
    if arguments.labels is not None:
        labels = parse_names("--labels", arguments.labels)
    elif arguments.background is not None or arguments.template is not None:
        raise CommandError("--background and --template require --labels.")
    if arguments.background is not None:
        background = parse_names("--background", arguments.background)
    templates = ["a photo of a {}" if arguments.template is None else check_template(arguments.template)]
    images, outputs = prepare(arguments)
    if labels is not None and len(labels) == 1 and background is None:
        print(
            "samclip: with one label and no --background, every region gets this label. Describe the rest of the "
            'image, such as --background "wall, floor".',
            file=sys.stderr,
        )

    import numpy as np

    from samclip_hf import SamClipImageSegmentationPipeline

    # The class is passed because a checkpoint from the Hub maps the task's name to the code in its own repository.
    segmenter = load_pipeline(
        "zero-shot-image-segmentation",
        arguments.model,
        arguments.device,
        pipeline_class=SamClipImageSegmentationPipeline,
    )
    try:
        if labels is not None:
            segmenter.model.set_vocabulary(labels, background, templates, segmenter.tokenizer)
        names = list(segmenter.model.vocabulary.id2label.values())
    except ValueError as error:
        raise CommandError(f"--labels: {first_line(error)}") from error

    def predict(image: "Image.Image") -> Prediction:
        segments = segmenter(image, threshold=arguments.threshold)
        masks = [np.asarray(segment["mask"]) > 0 for segment in segments]
        records = [
            {"label": segment["label"], "score": segment["score"]} | coco_annotation(mask)
            for segment, mask in zip(segments, masks, strict=True)
        ]
        legend: list[tuple[int | None, str]] = []
        for index, name in enumerate(names):
            scores = [segment["score"] for segment in segments if segment["label"] == name]
            if scores:
                count = f" ({len(scores)} segments)" if len(scores) > 1 else ""
                legend.append((index, f"{name} {max(scores):.2f}{count}"))
        colors = [names.index(segment["label"]) for segment in segments]
        return Prediction({"segments": records}, legend or [(None, "no segments")], masks, colors)

    return process_images(images, outputs, predict, arguments.overwrite)
