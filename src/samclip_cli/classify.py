"""`samclip classify`: classifies images by text."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import CommandError, first_line, log
from .batch import process_images
from .formats import Prediction
from .image_arguments import create_parser
from .inputs import add_batch_size
from .models import load_model
from .plan import prepare
from .vocabulary import LABELS_HELP, add_label_arguments, embed_labels, read_labels

if TYPE_CHECKING:
    from PIL import Image

LEGEND_LENGTH = 10  # labels below an annotated image; the JSON has all of them

DESCRIPTION = """\
Classifies images by text: ranks the labels by their probability.

examples:
  samclip classify photo.jpg --sam facebook/sam-vit-base --clip openai/clip-vit-base-patch16 \\
      --labels "cat, dog, horse"
  samclip classify photos/ --model runs/stage3 --labels "cat|kitten, dog|puppy" > labels.jsonl
  samclip classify photos/ --labels_file labels.txt --template "a drawing of a {}" --output out/

Scores are probabilities among the labels, in descending order. With --multi_label, each score is
independent of the other labels."""

BACKGROUND_HINT = (
    "an image gets one of the labels. For images with none of them, add a label, such as "
    '--labels "cat, dog, something else".'
)
RECORD = '"labels": [{"label": "cat", "score": 0.93}, ...]'


def build_parser() -> argparse.ArgumentParser:
    parser = create_parser("classify", DESCRIPTION, RECORD, False, LABELS_HELP, {"--background": BACKGROUND_HINT})
    add_label_arguments(parser, None, "This is a photo of {}.", has_background=False)
    add_batch_size(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    read_labels(arguments)
    if arguments.labels is None:
        raise CommandError('pass --labels, such as "cat, dog", or --labels_file.')
    plan = prepare(arguments)

    import torch
    import torch.nn.functional as F

    from samclip_hf.stock_pipelines import to_candidate_labels

    loaded = load_model(arguments)
    vocabulary = embed_labels(arguments, loaded)
    if len(arguments.labels) == 1 and not arguments.multi_label:
        log("with one label, every score is 1. Pass more labels, or --multi_label.")
    try:
        to_candidate_labels([name for synonyms in arguments.labels for name in synonyms], loaded.tokenizer)
    except ValueError as error:
        raise CommandError(f"--labels: {first_line(error)}") from error

    def predict(images: "list[Image.Image]", names: list[str]) -> list[Prediction]:
        inputs = loaded.image_processor(images, return_tensors="pt").to(loaded.model.device)
        with torch.inference_mode():
            features = loaded.model.get_image_features(
                inputs["pixel_values"].to(loaded.model.dtype), inputs["reshaped_input_sizes"]
            ).pooler_output
            logits = loaded.model.classify(F.normalize(features, dim=-1), vocabulary, arguments.multi_label).float()
        scores = logits.sigmoid() if arguments.multi_label else logits.softmax(dim=-1)
        return [describe(own) for own in scores]

    def describe(scores: torch.Tensor) -> Prediction:
        order = scores.argsort(descending=True, stable=True).tolist()
        ranking = [{"label": vocabulary.id2label[index], "score": scores[index].item()} for index in order]
        lines = [f"{label['label']} {label['score']:.2f}" for label in ranking[:LEGEND_LENGTH]]
        if len(ranking) > LEGEND_LENGTH:
            lines.append(f"{len(ranking) - LEGEND_LENGTH} more labels in the JSON")
        record = {"model": loaded.description, "labels": ranking}
        return Prediction(record, [(None, line) for line in lines], loaded.caption)

    return process_images(plan, predict, loaded)
