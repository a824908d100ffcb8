"""`samclip segment`: segments images by text."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import CommandError
from .argument_types import probability
from .batch import Predict, process_images
from .examples import EXAMPLES_HELP, ExampleImage, add_examples_argument, read_examples, set_examples
from .formats import Prediction, coco_annotation
from .image_arguments import add_tile_arguments, check_tiles, create_parser
from .inputs import add_batch_size
from .models import LoadedModel, load_model
from .plan import prepare
from .vocabulary import LABELS_HELP, add_label_arguments, embed_labels, label_legend, read_labels

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
  samclip segment photos/ --examples parts.json --output results/

The score of a segment is its label's probability among all labels and background texts. With a
single label and no --background, every score is 1: describe the rest of the image with
--background. With --multi_label, each score is independent of the other labels; segments may
overlap and have several labels."""

RECORD = (
    '"segments": [{"label": "cat", "label_id": 1, "score": 0.93, "bbox": [...], "area": 5120,\n'
    '       "segmentation": {...}}, ...]'
)
ADVICE = "A lower --threshold, other labels or another --background find more."


def build_parser() -> argparse.ArgumentParser:
    parser = create_parser("segment", DESCRIPTION, RECORD, has_masks=True, help_text=LABELS_HELP + EXAMPLES_HELP)
    add_segment_arguments(parser)
    return parser


def add_segment_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of segmentation by text and examples, also for `samclip annotate`."""
    add_label_arguments(parser, "the labels saved with the checkpoint")
    add_examples_argument(parser)
    parser.add_argument(
        "--threshold",
        type=probability,
        metavar="P",
        default=0.5,
        help="discard segments with a lower score, from 0 to 1 (default: %(default)s)",
    )
    add_tile_arguments(parser)
    add_batch_size(parser)


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    examples = read_segment_arguments(arguments)
    plan = prepare(arguments)
    loaded, predict = load_segmenter(arguments, examples)
    return process_images(plan, predict, loaded, ("segments", ADVICE))


def read_segment_arguments(arguments: argparse.Namespace) -> list[ExampleImage] | None:
    """Reads the labels into `arguments`, and returns the examples. Raises `CommandError` for arguments of
    [`add_segment_arguments`] that cannot be used."""
    check_tiles(arguments)
    examples = read_examples(arguments)
    read_labels(arguments)
    if arguments.labels is None and examples is None and arguments.sam is not None:
        raise CommandError('--sam and --clip have no labels: pass --labels, such as "cat, sofa", or --examples.')
    return examples


def load_segmenter(arguments: argparse.Namespace, examples: list[ExampleImage] | None) -> tuple[LoadedModel, Predict]:
    """The model with its vocabulary, and the function that segments images, see [`process_images`]. `examples` are
    those of [`read_segment_arguments`]."""
    import numpy as np

    from samclip_hf import SamClipImageSegmentationPipeline
    from samclip_hf.tiling_samclip import ComputedSequence

    loaded = load_model(arguments)
    if arguments.labels is not None or examples is None:
        embed_labels(arguments, loaded)
    if examples is not None:
        set_examples(arguments, loaded, examples)
    segmenter = SamClipImageSegmentationPipeline(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        image_processor=loaded.image_processor,
        device=loaded.model.device,
    )

    def describe(segments: Sequence[dict]) -> Prediction:
        def read_mask(index: int) -> np.ndarray:
            return np.asarray(segments[index]["mask"]) > 0

        masks: Sequence[np.ndarray] = ComputedSequence(len(segments), read_mask)
        if arguments.tile is None:
            masks = list(masks)  # the masks of a large image may not fit into memory
        records = []
        for segment, mask in zip(segments, masks, strict=True):
            label_id = loaded.names.index(segment["label"]) + 1
            named = {"label": segment["label"], "label_id": label_id, "score": segment["score"]}
            records.append(named | coco_annotation(mask))
        label_ids = [record["label_id"] for record in records]
        legend = label_legend(loaded.names, label_ids, [record["score"] for record in records], "segments")
        record = {"model": loaded.description, "segments": records}
        return Prediction(record, legend, loaded.caption, masks, label_ids, loaded.names)

    def predict(images: "list[Image.Image]", names: list[str]) -> list[Prediction]:
        results = segmenter(
            images,
            threshold=arguments.threshold,
            multi_label=arguments.multi_label,
            tile=arguments.tile,
            overlap=arguments.overlap,
            batch_size=arguments.batch_size,
        )
        return [describe(segments) for segments in results]

    return loaded, predict
