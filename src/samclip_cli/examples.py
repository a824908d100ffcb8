"""`--examples`: classes defined by examples, in a COCO file or in a folder with a subfolder for each label."""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError, first_line, log
from .formats import CONTENT, CUTOUT
from .inputs import IMAGE_EXTENSIONS, read_image
from .models import LoadedModel

if TYPE_CHECKING:  # importing these takes seconds, see the docstring of the package
    import numpy as np
    from PIL import Image, ImageFile

    from samclip_hf import SamClipVocabulary

MAX_TRANSPARENT = 127  # the largest value of alpha, or of a mask, outside the object
MAX_SATURATION = 30  # largest difference between the channels of a gray pixel: JPEG compression adds some color
GRAY_MODES = ("1", "L", "I", "I;16", "I;16B", "F")
MASK_SUFFIX = "_mask"  # photo_mask.png is the mask of photo.jpg
EXAMPLES_HELP = """
examples:
  --examples is a COCO file (.json), whose images are found relative to its folder, or a folder with
  a subfolder for each label. A subfolder has cut-outs (PNG files that are transparent outside the
  object), or images with masks: photo.jpg and photo_mask.png, white inside the object.
"""


@dataclass
class ExampleImage:
    r"""
    An image with examples that has not been read yet.

    path (`Path`):
        The image.
    labels (`list[str]`):
        The label of each example.
    boxes (`list[list[float]]`):
        x1, y1, x2, y2 of each example in a COCO file whose annotations do not all have masks.
    segmentations (`list`):
        COCO's masks of the examples, otherwise.
    size (`tuple[int, int]`, *optional*):
        Width and height that the file of annotations states.
    mask (`Path`, *optional*):
        The mask of the only example, in a folder. The image itself if it is a cut-out.
    """

    path: Path
    labels: list[str]
    boxes: list[list[float]] = field(default_factory=list)
    segmentations: list[Any] = field(default_factory=list)
    size: tuple[int, int] | None = None
    mask: Path | None = None

    @property
    def is_cutout(self) -> bool:
        return self.mask == self.path

    def read(self) -> "Image.Image":
        """The image in RGB, gray where a cut-out is transparent. Raises `ValueError` if it cannot be used."""
        from PIL import Image

        if self.is_cutout:
            cutout = _read(self.path, lambda file: file.convert("RGBA"))
            image = Image.new("RGB", cutout.size, "gray")
            image.paste(cutout, mask=cutout)
            return image
        image = _read(self.path)
        if self.size is not None and image.size != self.size:
            raise ValueError(
                f"{self.path} has {image.width} x {image.height} pixels, but its annotations are for {self.size[0]} x "
                f"{self.size[1]}."
            )
        return image

    def masks(self) -> "Sequence[np.ndarray]":
        """The mask of each example, read or decoded at each access. Raises `ValueError` at access if it cannot be
        used."""
        from samclip_hf.tiling_samclip import ComputedSequence

        return ComputedSequence(len(self.labels), self._mask)

    def _mask(self, index: int) -> "np.ndarray":
        import numpy as np

        from samclip_hf.images import decode_mask

        if self.mask is None:
            try:
                return decode_mask(self.segmentations[index], None if self.size is None else self.size[::-1])
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.path}: {first_line(error)}") from error
        image = _read(self.mask, (lambda file: file.convert("RGBA")) if self.is_cutout else _to_mask)
        values = np.asarray(image.split()[-1])
        if 0 < values.max() <= MAX_TRANSPARENT:  # such as a mask of 0 and 1
            raise ValueError(
                f"{self.mask}: the largest value is {values.max()}. The object must be "
                + ("opaque." if self.is_cutout else "white, 255, and the rest black, 0.")
            )
        return values > MAX_TRANSPARENT


def _to_mask(file: "ImageFile.ImageFile") -> "Image.Image":
    """The gray values of a mask file. Raises `ValueError` for an image that is no mask: with colors, such as a
    photograph or a map of several classes, or with an alpha channel, such as a cut-out, whose gray values are those of
    the object."""
    import numpy as np

    if file.has_transparency_data and file.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise ValueError(
            "a mask must not be transparent: make it white inside the object and black outside, without an alpha "
            "channel. A cut-out is an example without another image."
        )
    if file.mode not in GRAY_MODES:
        colors = np.asarray(file.convert("RGB"), dtype=np.int16)
        if (colors.max(axis=-1) - colors.min(axis=-1)).max() > MAX_SATURATION:
            raise ValueError("a mask must not have colors: make it white inside the object and black outside.")
    return file.convert("L")


def _read(path: Path, convert: "Callable[[ImageFile.ImageFile], Any] | None" = None) -> Any:
    """As `read_image`, but all errors are a `ValueError` that names the image."""
    from PIL import Image

    try:
        return read_image(path, Image.MAX_IMAGE_PIXELS, convert)
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise ValueError(f"{path}: {first_line(error)}") from error


def add_examples_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--examples`."""
    parser.add_argument(
        "--examples",
        metavar="PATH",
        help="classes defined by examples: a COCO file, or a folder with a subfolder for each label. With "
        "--labels, both. Without --background, what surrounds the examples is background",
    )


def read_examples(arguments: argparse.Namespace) -> list[ExampleImage] | None:
    """The examples of `--examples`, or `None`; images are not read yet. Raises `CommandError` if they cannot be
    used."""
    if arguments.examples is None:
        return None
    if arguments.labels is None and arguments.labels_file is None and arguments.template is not None:
        raise CommandError("--template has no effect on --examples: remove it, or pass --labels.")
    path = Path(arguments.examples)
    if path.is_dir():
        images = _read_folder(path)
    elif path.suffix.lower() == ".json":
        images = _read_coco(path)
    else:
        raise CommandError(f"--examples {path} must be a COCO file (.json) or a folder.")
    has_surroundings = getattr(arguments, "background", ()) is None and not arguments.multi_label
    if has_surroundings and any(image.is_cutout for image in images):
        raise CommandError(
            "--examples has cut-outs, which have no surroundings: describe what is none of the objects, such as "
            '--background "wall, floor", or pass --multi_label.'
        )
    if not has_surroundings:  # images without examples show background only
        images = [image for image in images if image.labels]
    return images


def set_examples(arguments: argparse.Namespace, loaded: LoadedModel, images: list[ExampleImage]) -> None:
    """Sets the vocabulary of the model to the examples, with the words of `--labels` if there are any, which are the
    vocabulary of the model then. Also sets `loaded.names`. Raises `CommandError` if the examples cannot be used."""
    words: SamClipVocabulary | None = loaded.model.vocabulary if arguments.labels is not None else None
    counts = Counter(label for image in images for label in image.labels)
    for option, groups in (("labels", arguments.labels), ("background", [getattr(arguments, "background", None)])):
        _check_labels(counts, option, [group for group in groups or () if group])
    log(f"{counts.total()} examples of {len(counts)} labels in {len(images)} images: {_list(counts)}.")
    if any(image.boxes for image in images):
        located: dict[str, list] = {"boxes": [image.boxes for image in images]}
    else:
        located = {"masks": [image.masks() for image in images]}
    background: Any = getattr(arguments, "background", ())  # a command without it compares labels one by one
    if background is None:
        background = () if arguments.multi_label else "surroundings"
    elif words is not None:
        background = ()  # it is part of the words
    try:
        vocabulary = loaded.model.embed_examples(
            (image.read() for image in images),
            [image.labels for image in images],
            **located,
            processor=loaded.processor,
            background=background,
            vocabulary=words,
            multi_label=words is None and arguments.multi_label,
        )
    except (OSError, ValueError) as error:
        message = re.sub(r"\b[Ii]mage (\d+)", lambda found: str(images[int(found[1])].path), first_line(error))
        raise CommandError(f"--examples {arguments.examples}: {message}") from error
    loaded.model.set_vocabulary(vocabulary)
    loaded.names = [name for index, name in vocabulary.id2label.items() if index != vocabulary.background_label_id]


def _check_labels(counts: Counter[str], option: str, groups: Sequence[Sequence[str]]) -> None:
    """Raises `CommandError` if a label of the examples is a further name of a label in `--labels`, or a text of
    `--background`: the two would divide the probability of an object among them."""
    from samclip_hf.examples_samclip import simplify_name

    for names in groups:
        of_label = {simplify_name(name): name for name in (names[1:] if option == "labels" else names)}
        for label in counts:
            if (name := of_label.get(simplify_name(label))) is None:
                continue
            if option == "labels":
                raise CommandError(
                    f"the label {label!r} of --examples is a synonym of {names[0]!r} in --labels: name the examples "
                    f"{names[0]!r}, or make {name!r} a label of its own."
                )
            raise CommandError(f"{name!r} in --background is a label of --examples: remove one of them.")


def _list(counts: Counter[str]) -> str:
    shown = [f"{label} ({count})" for label, count in list(counts.items())[:10]]
    return ", ".join(shown) + (f" and {len(counts) - 10} more" if len(counts) > 10 else "")


def _read_folder(folder: Path) -> list[ExampleImage]:
    images = []
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files: dict[str, Path] = {}
        for path in _images_in(subfolder):
            if files.setdefault(path.stem, path) != path:
                raise CommandError(
                    f"--examples: {files[path.stem]} and {path} have the same name. Rename one of them."
                )
        for stem, path in files.items():
            if stem.endswith(MASK_SUFFIX):
                if stem.removesuffix(MASK_SUFFIX) not in files:
                    raise CommandError(f"--examples: there is no image for the mask {path}.")
                continue
            mask = files.get(stem + MASK_SUFFIX)
            if mask is None and not _is_cutout(path):
                raise CommandError(
                    f"--examples: {path} is neither a cut-out, which is transparent outside the object, nor is there "
                    f"a mask {stem}{MASK_SUFFIX}.png beside it."
                )
            images.append(ExampleImage(path, [subfolder.name], mask=mask or path))
        if not any(image.path.parent == subfolder for image in images):
            raise CommandError(f"--examples: the folder {subfolder} has no images.")
    if not images:
        raise CommandError(f"--examples {folder} has no subfolders: create one for each label.")
    if loose := _images_in(folder):
        log(
            f"--examples {folder}: skipping {len(loose)} images that are not in a subfolder of a label, such as "
            f"{loose[0]}."
        )
    return images


def _images_in(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return [path for path in paths if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()]


def _is_cutout(path: Path) -> bool:
    """Whether an image is transparent outside an object, or was written as a cut-out, whose object may fill it. Others
    with an alpha channel are images without a mask, such as screenshots."""

    def is_cutout(file: "ImageFile.ImageFile") -> bool:
        if not file.has_transparency_data:
            return False
        if file.info.get(CONTENT) == CUTOUT:
            return True
        alpha = file.convert("RGBA").getchannel("A")
        return bool(alpha.getextrema()[0] <= MAX_TRANSPARENT)  # type: ignore[operator]

    try:
        return _read(path, is_cutout)
    except ValueError as error:
        raise CommandError(f"--examples: {path} cannot be read: {str(error).removeprefix(f'{path}: ')}") from error


def _read_coco(path: Path) -> list[ExampleImage]:
    origin = f"--examples {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for key, field_name in (("categories", "id"), ("categories", "name"), ("images", "id")):
            counts = Counter(entry[field_name] for entry in content[key])
            if repeated := [value for value, count in counts.items() if count > 1]:
                raise ValueError(f"two {key} have the {field_name} {repeated[0]!r}, so annotations are ambiguous.")
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = {
            entry["id"]: ExampleImage(path.parent / entry["file_name"], [], size=_size(entry))
            for entry in content["images"]
        }
        annotations = [own for own in content["annotations"] if not own.get("iscrowd")]
        skipped = len(content["annotations"]) - len(annotations)
        num_masks = sum(bool(own.get("segmentation")) for own in annotations)
        has_masks = num_masks == len(annotations)
        for own in annotations:
            image, label = images[own["image_id"]], names[own["category_id"]]
            box = (0, 0, 1, 1) if has_masks else own["bbox"]
            if not isinstance(box, list | tuple) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
                raise ValueError(f"bbox must be left, top, width and height, got {box!r}.")
            left, top, width, height = box
            if not (width > 0 and height > 0):
                skipped += 1
                continue
            image.labels.append(label)
            if has_masks:
                image.segmentations.append(own["segmentation"])
            else:
                corners = [left, top, left + width, top + height]
                image.boxes.append(corners if image.size is None else _round_to_image(corners, image.size))
    except OSError as error:
        raise CommandError(f"{origin}: {error.strerror}.") from error
    except KeyError as error:
        raise CommandError(f"{origin} is not a COCO file of annotations: {error} is missing or unknown.") from error
    except (TypeError, ValueError) as error:
        raise CommandError(f"{origin} is not a COCO file of annotations: {first_line(error)}") from error
    if skipped:
        log(f"{origin}: {skipped} annotations of crowds or without area are skipped.")
    if 0 < num_masks < len(annotations):
        log(
            f"{origin}: {len(annotations) - num_masks} of {len(annotations)} annotations have no mask, so the boxes "
            "of all of them are used, and the masks are not."
        )
    used = {label for image in images.values() for label in image.labels}
    if unused := [name for name in names.values() if name not in used]:
        shown = ", ".join(unused[:10]) + (" ..." if len(unused) > 10 else "")
        log(f"{origin}: {len(unused)} of {len(names)} categories have no examples, so they are no labels: {shown}.")
    if not any(image.labels for image in images.values()):
        raise CommandError(f"{origin} has no annotations.")
    if missing := next((image.path for image in images.values() if not image.path.is_file()), None):
        raise CommandError(f"{origin}: there is no image {missing}. Put the file beside its images.")
    return list(images.values())


def _round_to_image(box: list[float], size: tuple[int, int]) -> list[float]:
    """Moves the sides of a box x1, y1, x2, y2 to those of the image (width, height) if they exceed it by less than a
    pixel, as some of COCO do by rounding. Boxes further outside are refused where the image is known."""
    sides = zip(box, size * 2, strict=True)
    return [min(max(value, 0), limit) if -1 < value < limit + 1 else value for value, limit in sides]


def _size(entry: dict) -> tuple[int, int] | None:
    return (entry["width"], entry["height"]) if "width" in entry and "height" in entry else None
