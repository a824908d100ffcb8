"""Arguments that `samclip segment`, `classify`, `masks` and `points` have in common."""

import argparse
import re
import textwrap

from . import CommandError
from .formats import FORMATS, WITHOUT_MASKS, parse_formats
from .inputs import INPUTS_HELP, add_input_arguments
from .models import add_model_arguments

COMMON_HELP = """
%(inputs_help)s
%(labels_help)s
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

LABELS_HELP = """
labels:
  "cat|kitten, sofa" are two labels, and the first one has a synonym. A backslash before a comma or
  bar makes it a part of the name: "blue\\, bright". A --labels_file has one label on each line;
  commas need no backslash there.
"""

MASKS_HELP = """\
  bbox is [left, top, width, height] in pixels and segmentation is an uncompressed run-length
  encoding, both as in COCO. To read a mask with pycocotools:
    pycocotools.mask.frPyObjects(segmentation, *segmentation["size"])
  To read the COCO results:
    pycocotools.coco.COCO("out/coco_dataset.json").loadRes("out/coco_results.json")
"""


def create_parser(
    command: str, description: str, record: str, has_masks: bool, has_labels: bool = True
) -> argparse.ArgumentParser:
    """A parser with the arguments of all image commands. `description` has examples, and `record` is an example of the
    JSON, for `--help`."""
    names = [name for name in FORMATS if has_masks or name in WITHOUT_MASKS]
    lines = []
    for name in names:
        path, meaning = FORMATS[name]
        first, *rest = textwrap.wrap(meaning, 64)
        lines += [f"    {name:<9} {path.format('NAME'):<17} {first}", *(" " * 32 + line for line in rest)]
    parser = argparse.ArgumentParser(
        prog=f"samclip {command}",
        usage=f"samclip {command} IMAGE [IMAGE ...] [options]",
        description=description,
        epilog=COMMON_HELP
        % {
            "inputs_help": INPUTS_HELP,
            "record": record,
            "masks_help": MASKS_HELP if has_masks else "",
            "labels_help": LABELS_HELP if has_labels else "",
            "formats_help": "\n".join(lines),
        },
        formatter_class=argparse.RawDescriptionHelpFormatter,
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


def add_label_arguments(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Adds `--labels` and `--labels_file`. `default` says in the help what is done without them."""
    suffix = "" if default is None else f" (default: {default})"
    parser.add_argument("--labels", metavar='"A, B"', help=f"comma-separated names{suffix}")
    parser.add_argument("--labels_file", metavar="FILE", help="a text file with one label on each line")


def read_labels(arguments: argparse.Namespace) -> list[list[str]] | None:
    """The labels of `--labels` or `--labels_file` as lists of synonyms, or `None` without both. Stores them as
    `arguments.labels`. Raises `CommandError` if they cannot be used."""
    if arguments.labels is not None and arguments.labels_file is not None:
        raise CommandError("pass either --labels or --labels_file, not both.")
    if arguments.labels_file is not None:
        arguments.labels = _read_labels_file(arguments.labels_file)
    elif arguments.labels is not None:
        arguments.labels = parse_labels("--labels", arguments.labels)
    return arguments.labels


def _read_labels_file(path: str) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line for line in file.read().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise CommandError(f"--labels_file {path}: not a text file in UTF-8.") from error
    except OSError as error:
        raise CommandError(f"--labels_file {path}: {error.strerror}.") from error
    if not lines:
        raise CommandError(f"--labels_file {path} has no labels: write one on each line.")
    return _check_labels(f"--labels_file {path}", _split("\n".join(lines), "\n"))


def parse_labels(option: str, text: str) -> list[list[str]]:
    """Splits "cat|kitten, sofa" into labels and their synonyms. A backslash before a comma, a bar or a backslash makes
    it a part of the name. Raises `CommandError` for an empty or repeated name."""
    if not text.replace(",", "").strip():
        raise CommandError(f'{option} is empty: pass comma-separated names, such as "cat, sofa".')
    # Surrogates stand for bytes of the argument that cannot be decoded.
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        raise CommandError(f"{option} is not valid UTF-8: {text!r}.")
    return _check_labels(option, _split(text, ","))


def parse_names(option: str, text: str) -> list[str]:
    """Splits comma-separated names without synonyms. Otherwise as [`parse_labels`]."""
    return [name for synonyms in parse_labels(option, text) for name in synonyms]


def _split(text: str, separator: str) -> list[list[str]]:
    groups = [[""]]
    for token in re.findall(r"\\[\\,|]|.", text, re.DOTALL):  # a character or one with a backslash before it
        if token == separator:
            groups.append([""])
        elif token == "|":
            groups[-1].append("")
        else:
            groups[-1][-1] += token[-1]
    return [[" ".join(name.split()) for name in group] for group in groups]


def _check_labels(option: str, labels: list[list[str]]) -> list[list[str]]:
    names = [name for synonyms in labels for name in synonyms]
    if "" in names:
        raise CommandError(f"{option} has an empty name: remove the extra comma or bar.")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CommandError(f"{option} has repeated names: {', '.join(repeated)}.")
    return labels


def check_template(text: str) -> str:
    """Returns the prompt template. Raises `CommandError` unless it has exactly one `{}`."""
    if text.count("{}") != 1 or "{" in text.replace("{}", "") or "}" in text.replace("{}", ""):
        raise CommandError(
            f'--template must contain {{}} once, in the place of the label, such as "a photo of a {{}}": got {text!r}.'
        )
    return text
