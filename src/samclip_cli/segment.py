"""`samclip segment`: segments images by text."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import CommandError, first_line
from .argument_types import probability
from .batch import process_images
from .formats import Prediction, coco_annotation
from .image_arguments import add_label_arguments, check_template, create_parser, parse_names, read_labels
from .inputs import add_batch_size
from .models import load_model
from .plan import prepare

if TYPE_CHECKING:
    from PIL import Image

DESCRIPTION = """\
Segments images by text: finds the regions of every label.

examples:
  samclip segment photo.jpg --sam facebook/sam-vit-base --clip openai/clip-vit-base-patch16 \\
      --labels "cat, sofa" --background "wall, floor" --output out/
  samclip segment photo.jpg --model runs/stage3 --labels "cat|kitten, sofa" --output out.png
  samclip segment one.jpg 'more/*.jpg' folder/ --labels_file labels.txt \\
      --output results/ --formats overlay,masks
  samclip segment photo.jpg --labels "cat, sofa" --output out.json

The score of a segment is its label's probability among all labels and background texts. With a
single label and no --background, every score is 1: describe the rest of the image with
--background."""

RECORD = (
    '"segments": [{"label": "cat", "label_id": 1, "score": 0.93, "bbox": [...], "area": 5120,\n'
    '       "segmentation": {...}}, ...]'
)


def build_parser() -> argparse.ArgumentParser:
    parser = create_parser("segment", DESCRIPTION, RECORD, has_masks=True)
    add_label_arguments(parser, "the labels saved with the checkpoint")
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
    add_batch_size(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    labels, background = read_labels(arguments), None
    if labels is None and (arguments.background is not None or arguments.template is not None):
        raise CommandError("--background and --template require --labels.")
    if labels is None and arguments.sam is not None:
        raise CommandError('--sam and --clip have no labels: pass --labels, such as "cat, sofa".')
    if arguments.background is not None:
        background = parse_names("--background", arguments.background)
    templates = ["a photo of a {}" if arguments.template is None else check_template(arguments.template)]
    plan = prepare(arguments)
    if labels is not None and len(labels) == 1 and background is None:
        print(
            "samclip: with one label and no --background, every region gets this label. Describe the rest of the "
            'image, such as --background "wall, floor".',
            file=sys.stderr,
        )

    import numpy as np

    from samclip_hf import SamClipImageSegmentationPipeline

    loaded = load_model(arguments)
    try:
        if labels is not None:
            loaded.model.set_vocabulary(labels, background, templates, loaded.tokenizer)
        vocabulary = loaded.model.vocabulary
    except ValueError as error:
        raise CommandError(f"--labels: {first_line(error)}") from error
    loaded.names = [
        name for label_id, name in vocabulary.id2label.items() if label_id != vocabulary.background_label_id
    ]
    segmenter = SamClipImageSegmentationPipeline(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        image_processor=loaded.image_processor,
        device=loaded.model.device,
    )

    def describe(segments: list[dict]) -> Prediction:
        masks = [np.asarray(segment["mask"]) > 0 for segment in segments]
        label_ids = [loaded.names.index(segment["label"]) + 1 for segment in segments]
        records = [
            {"label": segment["label"], "label_id": label_id, "score": segment["score"]} | coco_annotation(mask)
            for segment, label_id, mask in zip(segments, label_ids, masks, strict=True)
        ]
        legend: list[tuple[int | None, str]] = []
        for label_id in sorted(set(label_ids)):
            scores = [record["score"] for record in records if record["label_id"] == label_id]
            count = f" ({len(scores)} segments)" if len(scores) > 1 else ""
            legend.append((label_id, f"{loaded.names[label_id - 1]} {max(scores):.2f}{count}"))
        record = {"model": loaded.description, "segments": records}
        return Prediction(record, legend or [(None, "no segments")], loaded.caption, masks, label_ids, loaded.names)

    def predict(images: "list[Image.Image]", names: list[str]) -> list[Prediction]:
        results = segmenter(images, threshold=arguments.threshold, batch_size=len(images))
        return [describe(segments) for segments in results]

    return process_images(plan, predict, loaded)
