"""Layouts of common datasets, and functions that find files or raise an error with the expected layout."""

import glob
import json
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

from PIL import Image

_PREFERRED_EXTENSIONS = (".jpg", ".jpeg", ".webp", ".png")
_STUBS = ("BUFR", "GRIB", "HDF5", "MPEG")  # formats that Pillow recognizes, but does not read
# Extensions of all formats that Pillow reads, those of photographs first.
IMAGE_EXTENSIONS = (
    *_PREFERRED_EXTENSIONS,
    *sorted(
        extension
        for extension, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _STUBS and extension not in _PREFERRED_EXTENSIONS
    ),
)
HUB_PREFIX = "hf://"  # of names of datasets on the Hub: "hf://owner/name?config=...&split=...&classes=..."
# Names of files and folders that are not data: hidden ones, such as macOS's `._000.jpg`, and those in double
# underscores, such as `__MACOSX`, which webdataset leaves out, too.
IGNORED_NAME = re.compile(r"(^|/)(\.[^./]|__[^/]*__(/|$)|__MACOSX/)")
# Folders of images that are annotations of other images, including those of the datasets in `LAYOUTS`.
# Splits and "images" are the only other words: `gas_mask` and `ski_mask` are classes of ImageNet.
ANNOTATION_FOLDER = re.compile(
    r"(^|/)((train|training|val|valid|validation|test|images?)[_-]?)?"
    r"(masks?|labels?|annotations?|segmentations?|segmentation(class|object)\w*|seg|gt|gt(fine|coarse)|"
    r"ground_?truth|stuffthingmaps\w*|panoptic_\w+|depths?|disparity|trimaps?|mattes?)"
    r"([_-]?(train|training|val|valid|validation|test|images?))?/",
    re.IGNORECASE,
)
# Names, without an extension, of images that are annotations of the image `stem`, if it is beside them.
ANNOTATION_NAME = re.compile(
    r"(?P<stem>.+)[._-](masks?|seg|segmentation|labels?|gt|depth|mattes?|alpha|trimaps?|instances?|semantic|panoptic)"
    r"([_-]?\d+)?",  # several masks of one image
    re.IGNORECASE,
)
COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|zstd|lz4|lzma|Z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)

Split = Literal["train", "val"]  # of datasets in `LAYOUTS`; a path has no splits

# The expected files of each named dataset in the folder `root`, and where to get them.
LAYOUTS = {
    "imagenet": "imagenet/val/<WordNet id>/*.JPEG, the validation images of ILSVRC2012 from https://image-net.org",
    "imagenet-v2": "imagenetv2-matched-frequency-format-val/<0 to 999>/*.jpeg, from "
    "https://huggingface.co/datasets/vaishaal/ImageNetV2",
    "places365": "places365 with categories_places365.txt, places365_val.txt and val_256/*.jpg, from "
    "http://places2.csail.mit.edu/download.html",
    "flickr30k": "flickr30k/dataset_flickr30k.json, Karpathy's splits from "
    "https://cs.stanford.edu/people/karpathy/deepimagesent, and flickr30k/flickr30k-images/*.jpg, from "
    "https://shannon.cs.illinois.edu/DenotationGraph",
    "coco-captions": "coco/dataset_coco.json, Karpathy's splits from "
    "https://cs.stanford.edu/people/karpathy/deepimagesent, and coco/val2014/*.jpg, from https://cocodataset.org",
    "coco": "coco/annotations/instances_val2017.json and coco/val2017/*.jpg, from https://cocodataset.org",
    "lvis": "lvis/lvis_v1_val.json, from https://www.lvisdataset.org, and coco/val2017/*.jpg and "
    "coco/train2017/*.jpg, from https://cocodataset.org",
    "voc21": "VOCdevkit/VOC2012 with ImageSets/Segmentation/val.txt, JPEGImages and SegmentationClass, from "
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
    "context60": "VOCdevkit/VOC2010 with ImageSets/SegmentationContext/val.txt, JPEGImages and "
    "SegmentationClassContext (values 0 to 59), from https://www.cs.stanford.edu/~roozbeh/pascal-context by "
    "mmsegmentation's tools/dataset_converters/pascal_context.py",
    "stuff171": "coco/stuffthingmaps/val2017/*.png, from https://github.com/nightrome/cocostuff, and "
    "coco/val2017/*.jpg, from https://cocodataset.org",
    "panoptic133": "coco/annotations/panoptic_val2017.json, coco/annotations/panoptic_val2017/*.png and "
    "coco/val2017/*.jpg, from https://cocodataset.org",
    "ade150": "ADEChallengeData2016 with images/validation/*.jpg and annotations/validation/*.png, from "
    "http://sceneparsing.csail.mit.edu",
    "cityscapes": "cityscapes with leftImg8bit/val/<city>/*_leftImg8bit.png and "
    "gtFine/val/<city>/*_gtFine_labelIds.png, from https://www.cityscapes-dataset.com",
}
LAYOUTS |= {"voc20": LAYOUTS["voc21"], "context59": LAYOUTS["context60"], "object81": LAYOUTS["stuff171"]}


def layout_of(name: str, split: Split = "val", default: str = "") -> str:
    """Returns the expected layout of a dataset's split, or `default` for a name that is not in `LAYOUTS`."""
    layout = LAYOUTS.get(name, default)
    return f"the training images instead of these: {layout}" if split == "train" and name in LAYOUTS else layout


def require(path: Path, layout: str) -> Path:
    """Returns the path if it exists. Raises `FileNotFoundError` with the expected layout otherwise."""
    return path if path.exists() else raise_missing(path, layout)


def raise_missing(path: str | Path, layout: str) -> NoReturn:
    raise FileNotFoundError(f"{path} does not exist. Expected: {layout}.")


def find_folder(name: str, root: str | Path, layout: str) -> Path:
    """Returns the folder `name` or `root / name`. Raises `FileNotFoundError` if there is none, and `ValueError` for a
    file."""
    for folder in (Path(name), Path(root, name)):
        if folder.is_dir():
            return folder
        if folder.exists():
            raise ValueError(f"{folder} is not a folder. Expected: {layout}.")
    raise_missing(name, layout)


def find_tars(name: str, root: str | Path) -> list[Path]:
    """
    Returns the tars of a folder, a glob or a path, absolute or below `root`. Empty if there are none.

    Raises `ValueError` for compressed tars, and for a folder with tars in its subfolders only, which may be splits.
    """
    for place in (name, str(Path(root, name))):
        is_folder = Path(place).is_dir()
        pattern = f"{glob.escape(place)}/*" if is_folder else place
        files = [place] if os.path.isfile(place) else sorted(glob.glob(pattern, recursive=True))
        raise_if_compressed(files)
        if tars := [Path(file) for file in files if file.lower().endswith(".tar") and Path(file).is_file()]:
            return tars
        if is_folder and (nested := glob.glob(f"{glob.escape(place)}/**/*.tar", recursive=True)):
            raise ValueError(
                f"{place} has tars in its subfolders only, such as {min(nested)}. Pass one of its subfolders, or a "
                f"glob such as '{place}/*/*.tar'."
            )
    return []


def list_files(place: str) -> list[str]:
    """Returns the sorted files of a folder and its subfolders, or those that a glob matches. Hidden files in folders
    are left out. Raises `OSError` for a folder that cannot be read."""
    matches = [place] if os.path.exists(place) else sorted(glob.glob(place, recursive=True))
    return [file for match in matches for file in (_walk(match) if os.path.isdir(match) else [match])]


def _walk(root: str) -> list[str]:
    files = []
    for folder, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
        files += [os.path.join(folder, name) for name in names if not IGNORED_NAME.search(name)]
        subfolders[:] = [name for name in subfolders if not IGNORED_NAME.search(f"{name}/")]
        for name in list(subfolders):
            path = os.path.join(folder, name)
            if os.path.islink(path) and Path(folder).resolve().is_relative_to(Path(path).resolve()):
                subfolders.remove(name)  # a link to a parent folder
    return sorted(files)


def _raise(error: OSError) -> NoReturn:
    raise error


def raise_if_compressed(paths: Iterable[str]) -> None:
    """Raises `ValueError` if one of the paths is a compressed tar."""
    for path in paths:
        if COMPRESSED_TAR.search(path):
            raise ValueError(
                f"{path} is a compressed tar, which cannot be read from a given position. Decompress it, for example "
                "with gunzip, unxz or zstd -d. Compression hardly reduces the size of images."
            )


def list_paths(folder: Path) -> list[Path]:
    """Returns the sorted paths in a folder, without those whose names begin with a dot."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def list_images(folder: Path, layout: str) -> list[Path]:
    """Returns the sorted images of a folder. Raises `FileNotFoundError` if it is empty, and `ValueError` if it has
    other files."""
    paths = list_paths(folder)
    if not paths:
        raise_missing(folder / "*", layout)
    for path in paths:
        if path.suffix.lower() not in IMAGE_EXTENSIONS or not path.is_file():
            raise ValueError(f"{path} is not an image of a format that Pillow reads. Move it out of this folder.")
    return paths


def read_json(file: Path) -> Any:
    return parse_json(file.read_bytes(), str(file))


def read_text(file: Path) -> str:
    """Reads a text file. Raises a `ValueError` that names it if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file in UTF-8: {error}.") from error


def parse_json(content: bytes, source: str) -> Any:
    """Parses JSON. Raises a `ValueError` that names the source if it is invalid."""
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON: {error}.") from error


def get(content: Any, key: str, source: str | Path) -> Any:
    """Returns `content[key]`. Raises a `ValueError` that names the source if the key is missing."""
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{source} has no {key!r} in {textwrap.shorten(str(content), 100)}.")
    return content[key]


def index_by_id(content: Any, key: str, source: str | Path) -> dict[Any, dict[str, Any]]:
    """Returns the entries of `content[key]`, such as COCO's categories or images, by their ids, in their order. Raises
    a `ValueError` that names the source if an id is missing or repeated: annotations refer to ids."""
    entries: dict[Any, dict[str, Any]] = {}
    for entry in get(content, key, source):
        if entries.setdefault(get(entry, "id", source), entry) is not entry:
            raise ValueError(f"{source}: two {key} have the id {entry['id']}, so annotations are ambiguous.")
    return entries
