"""`samclip masks`: segments everything in images ("everything mode")."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .batch import process_images
from .formats import Prediction, coco_annotation
from .image_arguments import add_everything_arguments, add_tile_arguments, check_tiles, create_parser
from .models import load_model, mask_generation_options
from .plan import prepare
from .vocabulary import (
    LABELS_HELP,
    add_label_arguments,
    add_label_threshold,
    embed_labels,
    name_masks,
    read_label_threshold,
    read_labels,
)

if TYPE_CHECKING:
    from PIL import Image

DESCRIPTION = """\
Segments everything in images: prompts the model with a grid of points and filters the masks.

examples:
  samclip masks photo.jpg --sam facebook/sam-vit-base --clip openai/clip-vit-base-patch16 \\
      --output out/
  samclip masks photo.jpg --labels "cat, sofa" --background "wall, floor" --output out.png
  samclip masks 'photos/*.jpg' --pred_iou_thresh 0.7 --output results/ --formats cutouts,jsonl

The score of a mask is its IoU as the model predicts it, in descending order. With --labels, every
mask gets a name: "label", "label_id" and "label_score" in the JSON. The label_score is the
probability of the label among all labels and background texts. With --multi_label, "label_scores"
has an independent score of each label, and a mask whose scores are all below --threshold has no
label."""

RECORD = '"masks": [{"score": 0.97, "bbox": [...], "area": 5120,\n       "segmentation": {...}}, ...]'


def build_parser() -> argparse.ArgumentParser:
    parser = create_parser("masks", DESCRIPTION, RECORD, has_masks=True, help_text=LABELS_HELP)
    add_label_arguments(parser, "masks have no names")
    add_label_threshold(parser)
    add_everything_arguments(parser)
    add_tile_arguments(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    check_tiles(arguments)
    read_labels(arguments)
    read_label_threshold(arguments)
    plan = prepare(arguments)

    import numpy as np

    from samclip_hf import SamClipMaskGenerationPipeline
    from samclip_hf.tiling_samclip import ComputedSequence

    loaded = load_model(arguments)
    options = mask_generation_options(loaded, arguments)
    if arguments.labels is not None:
        embed_labels(arguments, loaded)
    generator = SamClipMaskGenerationPipeline(
        model=loaded.model, image_processor=loaded.image_processor, device=loaded.model.device
    )

    def predict_one(image: "Image.Image") -> Prediction:
        result = generator(
            image,
            output_rle_mask=True,
            output_segment_embeds=arguments.labels is not None,
            tile=arguments.tile,
            overlap=arguments.overlap,
            **options,
        )
        found = result["masks"]
        masks: Sequence[np.ndarray] = ComputedSequence(len(found), lambda index: np.asarray(found[index]))
        if arguments.tile is None:
            masks = list(masks)  # the masks of a large image may not fit into memory
        scores = result["scores"].tolist()
        records = [
            {"score": score} | coco_annotation(mask, segmentation)
            for score, mask, segmentation in zip(scores, masks, result["rle_mask"], strict=True)
        ]
        if arguments.labels is not None and masks:
            embeds = result["segment_embeds"]
            return name_masks(loaded, records, masks, embeds, arguments.multi_label, arguments.threshold)
        text = f"{len(masks)} masks, scores from {min(scores):.2f} to {max(scores):.2f}" if masks else "no masks"
        record = {"model": loaded.description, "masks": records}
        return Prediction(record, [(None, text)], loaded.caption, masks, list(range(1, len(masks) + 1)))

    def predict(images: "list[Image.Image]", names: list[str]) -> list[Prediction]:
        return [predict_one(image) for image in images]

    advice = "Lower --pred_iou_thresh and --stability_score_thresh find more masks."
    if arguments.labels is not None:
        advice += " With a lower --threshold, more masks get a label."
    return process_images(plan, predict, loaded, ("masks", advice))
