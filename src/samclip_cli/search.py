"""`samclip search`: searches an index of `samclip index` by text or by example."""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError, first_line, log
from .argument_types import CommandParser, positive_int
from .data_sets import draw_tile
from .inputs import ImageInput, InputError, find_inputs, read_image
from .models import MINIATURE_NAME, LoadedModel, add_model_arguments, check_models, load_model
from .outputs import check_outputs, check_writable
from .points import parse_boxes
from .vocabulary import TEMPLATE, check_template

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    import numpy as np

    from samclip_hf.retrieval import EmbeddingIndex

MAX_PER_IMAGE = 1  # default for segments: several segments of an image often show the same object

DESCRIPTION = """\
Searches an index of 'samclip index' by text or by example, and prints the most similar segments or
images.

examples:
  samclip search photos_index/ --text mug cup --output mugs.png
  samclip search photos_index/ --image photo.jpg --box 10,20,110,220 --top_k 50 --json > found.json
  samclip search photos_index/ --image photo.jpg

The similarity is the cosine of the embeddings. Several texts are synonyms: the highest similarity
counts. With --box, the SAM head segments the object in the box, and the CLIP head embeds it. By
default, the results contain only the most similar segment of each image; see --max_per_image."""

EPILOG = """
output:
  A table, or with --json an object with the query and the results. In both, bbox is [left, top,
  width, height] in pixels as in COCO, score is the predicted IoU of a segment's mask, and
  segmentation (JSON only) is COCO's compressed run-length encoding.
  --output FILE.png is a contact sheet: the images with the segments outlined. It reads the images
  of the index by the names on the command line of 'samclip index', so run both in the same folder,
  or index absolute paths.

exit status:
  0  success
  1  some images of the contact sheet cannot be read
  2  wrong arguments"""


def build_parser() -> CommandParser:
    parser = CommandParser(
        "search",
        usage="samclip search FOLDER (--text TEXT [TEXT ...] | --image FILE [--box X1,Y1,X2,Y2]) [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("folder", metavar="FOLDER", help="an index, the --output of 'samclip index'")
    query = parser.add_mutually_exclusive_group()
    query.add_argument("--text", nargs="+", metavar="TEXT", help="search by text; several texts are synonyms")
    query.add_argument("--image", metavar="FILE", help="search by example: an image")
    parser.add_argument("--box", metavar="X1,Y1,X2,Y2", help="a box around an object in --image, in pixels")
    parser.add_argument(
        "--template", metavar='"a {}"', help=f'prompt template of --text (default: "{TEMPLATE}"); "{{}}" for none'
    )
    parser.add_argument(
        "--kind",
        choices=("segment", "image"),
        help="what is searched (default: segment for --text and --box if the index has segments, otherwise image)",
    )
    parser.add_argument("--top_k", type=positive_int, metavar="N", default=10, help="results (default: %(default)s)")
    parser.add_argument(
        "--max_per_image",
        type=positive_int,
        metavar="N",
        help=f"largest number of segments of one image in the results (default: {MAX_PER_IMAGE})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", metavar="FILE.png", help="a contact sheet of the results")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    add_model_arguments(parser, "the model of the index is loaded by its recorded name.")
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    check_query(arguments)
    box = None if arguments.box is None else read_box(arguments.box)
    import pyarrow  # noqa: F401  # a missing extra is reported before the work

    from samclip_hf.retrieval import EmbeddingIndex, read_index

    try:
        description = read_index(arguments.folder)
        set_model(arguments, description)
        check_models(arguments)
        if arguments.kind is None:
            is_whole_image = arguments.image is not None and box is None
            has_segments = box is not None or description["num_segments"] > 0
            arguments.kind = "segment" if has_segments and not is_whole_image else "image"
        if arguments.kind == "image" and arguments.max_per_image is not None:
            raise CommandError("--max_per_image has no effect on a search of images: pass --kind segment.")
        index = EmbeddingIndex(arguments.folder, arguments.kind)
        if arguments.output is not None and arguments.overwrite:
            check_sources(Path(arguments.output), index)
        loaded = load_model(arguments)
        index.check_model(loaded.model, loaded)
    except ValueError as error:
        raise CommandError(first_line(error)) from error
    query = embed_query(arguments, box, loaded)
    if arguments.kind == "segment" and arguments.max_per_image is None:
        arguments.max_per_image = MAX_PER_IMAGE
    similarities, numbers = index.search(query, arguments.top_k, arguments.max_per_image)
    results = [
        {"rank": rank, "similarity": similarity} | index.row(number)
        for rank, (similarity, number) in enumerate(zip(similarities.tolist(), numbers.tolist(), strict=True), start=1)
    ]
    if arguments.json:
        print(json.dumps(describe(arguments, box, index, results), indent=1))
    else:
        print_table(index, results)
    return 0 if arguments.output is None else write_contact_sheet(arguments, index, results)


def check_query(arguments: argparse.Namespace) -> None:
    """Raises `CommandError` for options that do not fit together, and for an output that cannot be written. Sets the
    default of `arguments.template`."""
    if arguments.text is None and arguments.image is None and arguments.box is None:
        raise CommandError("pass --text, such as mug, or --image.")
    if arguments.box is not None and arguments.image is None:
        raise CommandError("--box is a box in an image: pass --image, too.")
    if arguments.box is not None and arguments.kind == "image":
        raise CommandError("--box is an object, which is compared with segments: remove --kind image.")
    if arguments.image is not None and not Path(arguments.image).is_file():
        raise CommandError(
            f"--image {arguments.image or repr('')}: no such file. Pass an image file; extract images of tars and "
            "datasets first."
        )
    if arguments.template is not None and arguments.text is None:
        raise CommandError("--template has no effect without --text.")
    if arguments.template is None:
        arguments.template = TEMPLATE
    else:
        check_template(arguments.template)
    if arguments.output is None:
        if arguments.overwrite:
            raise CommandError("--overwrite has no effect without --output.")
        return
    path = Path(arguments.output)
    if path.suffix.lower() != ".png":
        raise CommandError(f"--output {arguments.output} must end in .png.")
    if not path.parent.is_dir():
        raise CommandError(f"--output {arguments.output}: the folder {path.parent} does not exist.")
    check_writable(path.parent, "--output")
    check_outputs([path], [] if arguments.image is None else [Path(arguments.image)], arguments.overwrite)


def check_sources(output: Path, index: "EmbeddingIndex") -> None:
    """Raises `CommandError` if the output is an image of the index, also by another name: images are never
    replaced."""
    if output.exists():
        check_outputs([output], map(Path, index.table["source"].unique().to_pylist()), overwrite=True)


def read_box(text: str) -> list[float]:
    """The numbers of `--box`. Raises `CommandError`."""
    boxes = parse_boxes(text, "--box")
    if len(boxes) > 1:
        raise CommandError(f"--box is one box, but {text!r} has {len(boxes)}.")
    return boxes[0]


def set_model(arguments: argparse.Namespace, description: dict[str, Any]) -> None:
    """Without a model on the command line, sets the arguments to the model of the index."""
    if arguments.model is None and arguments.sam is None and arguments.clip is None:
        own = description["model"]
        if own.get("name") != MINIATURE_NAME:
            arguments.model, arguments.sam, arguments.clip = (own.get(key) for key in ("name", "sam", "clip"))
            arguments.clip_image_size = arguments.clip_image_size or own.get("clip_image_size")


def embed_query(arguments: argparse.Namespace, box: list[float] | None, loaded: LoadedModel) -> "np.ndarray":
    """The embeddings of the query `(num_embeddings, projection_dim)`. Raises `CommandError` if it cannot be
    embedded."""
    from PIL import Image

    from samclip_hf.retrieval import embed_box, embed_images, embed_texts

    if arguments.text is not None and loaded.tokenizer is None:
        raise CommandError("the model has no text tower, so it cannot embed --text: search with --image.")
    origin = "--text" if arguments.text is not None else f"--image {arguments.image}"
    try:
        if arguments.text is not None:
            return embed_texts(loaded.model, loaded.tokenizer, arguments.text, arguments.template)
        image = read_image(Path(arguments.image), Image.MAX_IMAGE_PIXELS)
        if box is None:
            return embed_images(loaded.model, loaded.image_processor, [image])
        return embed_box(loaded.model, loaded.image_processor, image, box)
    except (OSError, ValueError) as error:
        raise CommandError(f"{origin}: {first_line(error)}") from error


def describe(
    arguments: argparse.Namespace, box: list[float] | None, index: "EmbeddingIndex", results: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of `--json`."""
    query = {"text": arguments.text, "template": arguments.template}
    if arguments.image is not None:
        query = {"image": arguments.image, "box": box}
    return {
        "index": arguments.folder,
        "model": index.description["model"],
        "query": query,
        "num_searched": len(index.embeddings),
        "max_per_image": arguments.max_per_image,
        "results": results,
    }


def print_table(index: "EmbeddingIndex", results: list[dict[str, Any]]) -> None:
    """Prints the results on standard output, one on each line."""
    rows = [("rank", "similarity", "score", "bbox", "source")]
    for result in results:
        score = "" if result["score"] is None else f"{result['score']:.2f}"
        box = ",".join(map(str, result["bbox"]))
        rows.append((str(result["rank"]), f"{result['similarity']:.3f}", score, box, result["source"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    of_images = "" if index.kind == "image" else f" of {index.description['num_images']} images"
    print(f"{len(results)} of {len(index.embeddings)} {index.kind}s{of_images}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_contact_sheet(arguments: argparse.Namespace, index: "EmbeddingIndex", results: list[dict[str, Any]]) -> int:
    """Draws the results that can be read, and returns the exit status. Images that cannot be read, or that have
    another size than in the index, are reported."""
    from PIL import Image

    from samclip_hf.files import write_atomically
    from samclip_hf.images import decode_mask
    from samclip_hf.visualization import arrange

    inputs = find_sources({result["source"] for result in results}, index.description.get("inputs", []))
    tiles = []
    for result in results:
        key, masks = result["source"], []
        try:
            if key not in inputs:
                raise ValueError("there is no such image. Run the command in the folder where it was indexed.")
            image = read_image(inputs[key].source, Image.MAX_IMAGE_PIXELS)
            if image.size != (result["width"], result["height"]):
                raise ValueError("the image has another size than when it was indexed.")
            if result["segmentation"] is not None:
                masks = [decode_mask(result["segmentation"])]
        except Exception as error:  # Pillow's decoders raise many kinds of errors
            log(f"{key}: {first_line(error)}")
            continue
        text = f"{result['rank']}: {result['similarity']:.3f}"
        tiles.append(draw_tile(image, masks, [1] * len(masks), [(1 if masks else None, text)], key, 0))
    file = io.BytesIO()
    arrange(tiles).save(file, "PNG")
    write_atomically(arguments.output, file.getvalue(), arguments.overwrite)
    if missing := len(results) - len(tiles):
        log(f"{missing} of {len(results)} results are not on {arguments.output}.")
    return 1 if missing else 0


def find_sources(keys: set[str], patterns: Sequence[str]) -> dict[str, ImageInput]:
    """The images of an index by their keys. Members of tars and rows of datasets are found through the inputs of
    'samclip index'. Images that are not found are left out."""
    found = {key: ImageInput(key, Path(key).stem, Path(key), Path(key)) for key in keys if Path(key).is_file()}
    for pattern in patterns if len(found) < len(keys) else ():
        try:
            for image in find_inputs([pattern]):
                if image.key in keys:
                    found.setdefault(image.key, image)
                if len(found) == len(keys):
                    return found
        except (CommandError, InputError) as error:
            log(str(error))
    return found
