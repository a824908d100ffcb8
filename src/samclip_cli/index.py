"""`samclip index`: embeds images and their segments, and writes them to files that `samclip search` searches."""

import base64
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import CommandError
from .argument_types import CommandParser
from .batch import process_images
from .formats import Prediction
from .image_arguments import add_everything_arguments
from .inputs import INPUTS_HELP, ImageInput, add_batch_size, add_input_arguments
from .models import EVERYTHING_OPTIONS, add_model_arguments, load_model, mask_generation_options
from .plan import check_folder, prepare
from .run_record import SINGLE_PROCESS, RecordedOutputs

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    import numpy as np
    from PIL import Image

INDEX, TABLES = "index.json", "parquet/"  # as in samclip_hf.retrieval, which imports torch

DESCRIPTION = """\
Embeds images and their segments, and writes them to files that 'samclip search' searches.

examples:
  samclip index photos/ --sam facebook/sam-vit-base --clip openai/clip-vit-base-patch16 \\
      --output photos_index/
  samclip index 'shards/*.tar' --model runs/stage3 --no_segments --batch_size 8 --output index/

The segments are those of 'samclip masks' (everything mode), which takes most of the time."""

EPILOG = f"""
{INPUTS_HELP}

output:
  --output is a folder, which is created and gets:
    parquet/00000.parquet, ...  tables for datasets.load_dataset: a row for each image and segment
                                with source, height, width, kind, bbox, segmentation, score and
                                embedding
    index.json                  the model, its hashes, options, counts, and images that failed
    results.jsonl               the result of each image; an interrupted run continues from it
  The tables are written when a single process has completed all images. Existing files are
  replaced with --overwrite only.

exit status:
  0    success
  1    some images failed and are not in the index, or an output could not be written
  2    wrong arguments; no image was processed
  130  interrupted by Ctrl-C; run the same command to continue"""


def build_parser() -> CommandParser:
    parser = CommandParser(
        "index",
        usage="samclip index IMAGE [IMAGE ...] --output FOLDER [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_input_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--output", metavar="FOLDER", required=True, help="the folder of the index")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files and start again")
    parser.add_argument("--no_segments", action="store_true", help="embed whole images only")
    add_everything_arguments(parser)
    add_batch_size(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    given = [f"--{name}" for name in EVERYTHING_OPTIONS if getattr(arguments, name) is not None]
    if arguments.no_segments and given:
        raise CommandError(f"{given[0]} has no effect with --no_segments.")
    check_folder(arguments.output)
    arguments.formats = ("jsonl",)
    plan = prepare(arguments, [INDEX, TABLES])
    import pyarrow  # noqa: F401  # a missing extra is reported before the work

    from samclip_hf import SamClipMaskGenerationPipeline
    from samclip_hf.retrieval import describe_model, embed_images, embed_segments, write_index

    loaded = load_model(arguments)
    options = mask_generation_options(loaded, arguments)
    everything = SamClipMaskGenerationPipeline(
        model=loaded.model, image_processor=loaded.image_processor, device=loaded.model.device
    )

    def predict(images: "list[Image.Image]", names: list[str]) -> list[Prediction]:
        embeddings = embed_images(loaded.model, loaded.image_processor, images)
        predictions = []
        for image, embedding in zip(images, embeddings, strict=True):
            record: dict[str, Any] = {"embedding": _to_text(embedding)}
            if not arguments.no_segments:
                found = embed_segments(everything, image, **options)
                record["segments"] = [own | {"embedding": _to_text(own["embedding"])} for own in found]
            label_ids = [1] * len(record.get("segments", []))
            predictions.append(Prediction(record, [], loaded.caption, label_ids=label_ids))
        return predictions

    def write(
        results: Iterator[tuple[ImageInput, dict[str, Any]]], description: dict[str, Any], errors: dict[str, str]
    ) -> None:
        content = {
            "model": loaded.description | describe_model(loaded.model, loaded),
            "inputs": arguments.images,
            "samclip": description["samclip"],
            "options": description["options"],
            "mask_generation": None if arguments.no_segments else options,
            "failed": [{"image": key, "error": text} for key, text in errors.items()],
        }
        assert plan.output is not None
        outputs = RecordedOutputs(plan.output)
        written = write_index(
            plan.output,
            _rows(result for _, result in results),
            content,
            before_shard=lambda file: outputs.add([file], SINGLE_PROCESS),
        )
        outputs.delete_others(TABLES, {shard["file"] for shard in written["shards"]}, SINGLE_PROCESS)

    advice = "Lower --pred_iou_thresh and --stability_score_thresh find more segments."
    return process_images(plan, predict, loaded, None if arguments.no_segments else ("segments", advice), write)


def _rows(results: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of [`write_index`] of the lines of `results.jsonl`."""
    for result in results:
        height, width = result["height"], result["width"]
        common = {"source": result["image"], "height": height, "width": width}
        whole = {"kind": "image", "bbox": [0, 0, width, height], "segmentation": None, "score": None}
        yield common | whole | {"embedding": _to_array(result["embedding"])}
        for segment in result.get("segments", []):
            yield common | {"kind": "segment"} | segment | {"embedding": _to_array(segment["embedding"])}


def _to_text(embedding: "np.ndarray") -> str:
    """An embedding in base64, which is a quarter of the length of decimal numbers."""
    return base64.b64encode(embedding.astype("<f4").tobytes()).decode("ascii")


def _to_array(text: str) -> "np.ndarray":
    import numpy as np

    return np.frombuffer(base64.b64decode(text), "<f4")
