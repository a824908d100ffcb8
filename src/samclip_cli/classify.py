"""`samclip classify`: classifies images by text."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import CommandError
from .batch import prepare, process_images
from .formats import Prediction
from .image_arguments import check_template, create_parser, parse_names
from .models import load_pipeline

if TYPE_CHECKING:
    from PIL import Image

LEGEND_LENGTH = 10  # labels below an annotated image; the JSON has all of them

DESCRIPTION = """\
Classifies images by text: ranks the labels by their probability.

examples:
  samclip classify photo.jpg --labels "cat, dog, horse"
  samclip classify photos/ --labels "cat, dog, horse" > labels.jsonl
  samclip classify photos/ --labels "cat, dog, horse" --template "a drawing of a {}"

Scores are probabilities among the labels, in descending order."""

RECORD = '"labels": [{"label": "cat", "score": 0.93}, ...]'


def build_parser() -> argparse.ArgumentParser:
    parser = create_parser("classify", DESCRIPTION, RECORD, has_masks=False)
    parser.add_argument("--labels", required=True, metavar='"A, B"', help="comma-separated names")
    parser.add_argument(
        "--template",
        metavar='"a {}"',
        default="This is a photo of {}.",
        help='prompt template (default: "%(default)s")',
    )
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    labels, template = parse_names("--labels", arguments.labels), check_template(arguments.template)
    images, outputs = prepare(arguments)
    classifier = load_pipeline("zero-shot-image-classification", arguments.model, arguments.device)
    config = classifier.model.config
    if not config.has_text_tower:
        raise CommandError(f"--model {arguments.model} has no text tower, so it cannot embed labels.")
    from samclip_hf.stock_pipelines import to_candidate_labels

    try:
        to_candidate_labels(labels, classifier.tokenizer)
    except ValueError as error:
        raise CommandError(f"--labels: {error}") from error
    max_length = config.text_config.max_position_embeddings
    for label in labels:
        length = len(classifier.tokenizer(template.format(label))["input_ids"])
        if length > max_length:
            raise CommandError(
                f"--labels: {label!r} in its prompt template has {length} tokens; the text tower accepts "
                f"at most {max_length} tokens."
            )

    def predict(image: "Image.Image") -> Prediction:
        scores = classifier(image, candidate_labels=labels, hypothesis_template=template)
        lines = [f"{score['label']} {score['score']:.2f}" for score in scores[:LEGEND_LENGTH]]
        return Prediction({"labels": scores}, [(None, line) for line in lines])

    return process_images(images, outputs, predict, arguments.overwrite)
