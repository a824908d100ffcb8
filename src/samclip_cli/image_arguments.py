"""Arguments that `samclip segment`, `classify` and `masks` have in common."""

import argparse

from . import CommandError

COMMON_HELP = """
images:
  IMAGE is a file, a folder (all images in it, without subfolders) or a pattern. '**' in a quoted
  pattern matches subfolders. Repeated images are processed once. The EXIF orientation is applied
  before prediction.

output:
  Existing files are replaced with --overwrite only, and input images never.
  Without --output, JSON is written to standard output, one line per image:
    {"image": "photo.jpg", "height": 480, "width": 640,
     %s}
%s
exit status:
  0    success
  1    some images failed, or an output could not be written; all other outputs are complete
  2    wrong arguments; no image was processed
  130  interrupted by Ctrl-C; all outputs written before are complete"""

MASKS_HELP = """\
  bbox is [left, top, width, height] in pixels and segmentation is an uncompressed run-length
  encoding, both as in COCO. To read a mask with pycocotools:
    pycocotools.mask.frPyObjects(segmentation, *segmentation["size"])
"""


def create_parser(command: str, description: str, record: str, has_masks: bool) -> argparse.ArgumentParser:
    """A parser with the arguments of all three commands. `record` is an example of the JSON for `--help`."""
    parser = argparse.ArgumentParser(
        prog=f"samclip {command}",
        description=description,
        epilog=COMMON_HELP % (record, MASKS_HELP if has_masks else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, a folder, or a pattern such as 'a/*.jpg'")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a .png file (annotated image), a .json file, or an existing folder, which gets both for every image",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing output files; input images are never replaced"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a SAM-CLIP checkpoint: a folder or a repository on the Hub (default: the miniature that ships with the "
        "package; it is trained on synthetic scenes, not on photographs)",
    )
    parser.add_argument("--device", help="such as cpu, cuda:1 or mps (default: a GPU if one is available)")
    return parser


def parse_names(option: str, text: str) -> list[str]:
    """Splits comma-separated names. Raises `CommandError` for an empty or repeated name."""
    names = [" ".join(name.split()) for name in text.split(",")]
    if not any(names):
        raise CommandError(f'{option} is empty: pass comma-separated names, such as "cat, sofa".')
    if "" in names:
        raise CommandError(f"{option} has an empty name: remove the extra comma in {text!r}.")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CommandError(f"{option} has repeated names: {', '.join(repeated)}.")
    if any(
        0xD800 <= ord(letter) < 0xE000 for letter in text
    ):  # surrogates stand for undecodable bytes of the argument
        raise CommandError(f"{option} is not valid UTF-8: {text!r}.")
    return names


def check_template(text: str) -> str:
    """Returns the prompt template. Raises `CommandError` unless it has exactly one `{}`."""
    if text.count("{}") != 1 or "{" in text.replace("{}", "") or "}" in text.replace("{}", ""):
        raise CommandError(
            f'--template must contain {{}} once, in the place of the label, such as "a photo of a {{}}": got {text!r}.'
        )
    return text
