"""Evaluation sets for semantic segmentation."""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..images import RunLengthMask, read_mask
from .hub import HubSamples, image_source, open_hub, read_hub_image
from .layouts import (
    HUB_PREFIX,
    LAYOUTS,
    Split,
    find_folder,
    get,
    index_by_id,
    layout_of,
    list_images,
    list_paths,
    raise_missing,
    read_json,
    read_text,
    require,
)
from .samples import IGNORE_INDEX, DataSet, SegmentedImage, name_errors, read_image, read_sizes
from .vocabularies import Vocabulary, describe_shared_names, load_vocabulary, read_vocabulary

SEGMENTATION_NAMES = "voc20, voc21, context59, context60, ade150, stuff171, object81, panoptic133, cityscapes"
LABEL_MAPS = (
    "a folder with images/, labels/ (png of the same stems) and, in it or in its parent, classes.json or classes.txt"
)
CLASS_FILES = ("classes.json", "classes.txt")
COCO_STUFF_VALUES = range(182)  # in stuffthingmaps; some of them are unused
CITYSCAPES_VALUES = range(35)  # in labelIds files; 19 of them are evaluated. 255 stands for -1, license plates


def open_segmentation(name: str, root: str | Path, split: Split = "val") -> DataSet[SegmentedImage]:
    """
    Opens images with label maps.

    Args:
        name (`str`):
            - "voc21", "context60" and "object81", which have a background, below `root`; "voc20" and "context59", the
              same images with background ignored; "stuff171", "panoptic133", "ade150" and "cityscapes" (19 classes);
            - "hf://owner/name?classes=classes.json", with a column of images and a column of label maps;
            - a folder with `images/` and `labels/`, png files of the same stems. Their values are indices in the list
              of classes in `classes.json` or `classes.txt` (a name in each line) of the folder or of its parent, or
              255, which is ignored.
        root (`str` or `Path`):
            The folder that contains the named datasets and that relative paths refer to.
        split (`"train"` or `"val"`, *optional*, defaults to `"val"`):
            The split of a named dataset.

    Raises:
        FileNotFoundError: A file is missing. The message states the expected layout.
        ValueError: Images and label maps do not match. Also raised when a label map is read that has unknown values or
            another size than its image.
    """
    if name.startswith(HUB_PREFIX):
        return _open_hub(name)
    root, layout = Path(root), layout_of(name, split, LABEL_MAPS)
    if name == "panoptic133":
        return _open_panoptic(root / "coco", split)
    labels: dict[int, int]  # by value in the files
    if name in ("voc20", "voc21", "context59", "context60"):
        vocabulary = load_vocabulary("voc21" if name.startswith("voc") else "context60")
        labels = {value: value for value in range(len(vocabulary.names))}
        if name in ("voc20", "context59"):
            vocabulary = vocabulary._replace(names=vocabulary.names[1:], background=None)
            labels = {0: IGNORE_INDEX} | {1 + label: label for label in range(len(vocabulary.names))}
        year, task, maps = (
            ("VOC2012", "Segmentation", "SegmentationClass")
            if name.startswith("voc")
            else ("VOC2010", "SegmentationContext", "SegmentationClassContext")
        )
        folder = root / "VOCdevkit" / year
        stems = sorted(read_text(require(folder / f"ImageSets/{task}/{split}.txt", layout)).split())
        pairs = [(folder / f"JPEGImages/{stem}.jpg", folder / f"{maps}/{stem}.png") for stem in stems]
    elif name in ("stuff171", "object81"):
        vocabulary = load_vocabulary(name)
        assert vocabulary.ids is not None
        folder = root / "coco"
        pairs = _pair(folder / f"{split}2017", folder / f"stuffthingmaps/{split}2017", layout)
        has_background = len(vocabulary.names) > len(vocabulary.ids)  # which has no value of its own
        labels = dict.fromkeys(COCO_STUFF_VALUES, 0 if has_background else IGNORE_INDEX)
        labels |= {value: has_background + index for index, value in enumerate(vocabulary.ids)}
        if has_background:
            labels[255] = 0  # the literature counts unlabeled pixels as background
    elif name == "ade150":
        vocabulary = load_vocabulary("ade150")
        folder = root / "ADEChallengeData2016"
        subfolder = {"val": "validation", "train": "training"}[split]
        pairs = _pair(folder / "images" / subfolder, folder / "annotations" / subfolder, layout)
        labels = {0: IGNORE_INDEX} | {1 + label: label for label in range(150)}
    elif name == "cityscapes":
        vocabulary = load_vocabulary("cityscapes19")
        assert vocabulary.ids is not None
        folder = root / "cityscapes"
        pairs = []
        for city in list_paths(require(folder / "leftImg8bit" / split, layout)):
            for path in list_images(city, layout):
                label_map = path.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
                pairs.append((path, folder / "gtFine" / split / city.name / label_map))
        labels = dict.fromkeys(CITYSCAPES_VALUES, IGNORE_INDEX)
        labels |= {value: index for index, value in enumerate(vocabulary.ids)}
    else:
        accepted = f"{LABEL_MAPS}; {HUB_PREFIX}owner/name; or one of {SEGMENTATION_NAMES}"
        folder = find_folder(name, root, accepted)
        places = [place / name for place in (folder, folder.absolute().parent) for name in CLASS_FILES]
        of_parent = folder.absolute().parent / CLASS_FILES[0]
        vocabulary = read_vocabulary(next(filter(Path.exists, places), None) or require(of_parent, accepted))
        pairs = _pair(folder / "images", folder / "labels", accepted)
        labels = _labels_by_index(vocabulary, name)
    samples = [
        SegmentedImage(
            image.stem,
            partial(read_image, require(image, layout), annotated_size=partial(_read_map_size, label_map)),
            partial(_read_label_map, require(label_map, layout), image, {255: IGNORE_INDEX} | labels),
        )
        for image, label_map in pairs
    ]
    if not samples:
        raise_missing(folder, layout)
    description = {
        "path": str(folder),
        "images": len(samples),
        "names": vocabulary.source,
        **describe_shared_names(vocabulary.names),
    }
    description |= {"split": split} if name in LAYOUTS else {}
    return DataSet(name, samples, vocabulary.names, vocabulary.background, description)


def open_coco_segmentation(
    file: str | Path, images: str | Path | None = None, background: Sequence[str] = ()
) -> DataSet[SegmentedImage]:
    """
    Opens the masks of a COCO file as label maps. Where masks overlap, a pixel has the label of the smallest one.

    Args:
        file (`str` or `Path`):
            Annotations with `"segmentation"`: polygons or run-length encodings.
        images (`str` or `Path`, *optional*):
            The folder that the file names of the images refer to. By default that of `file`.
        background (`Sequence[str]`, *optional*):
            Texts that describe the background: pixels without an annotation are then background, label 0. By default,
            they are ignored. Crowds are always ignored.

    Raises:
        FileNotFoundError: The file or an image is missing.
        ValueError: The file is not a COCO file, or an annotation has no mask. Also raised when a label map is read
            whose masks do not have the size of the image.
    """
    file = Path(file)
    content = read_json(require(file, "annotations in COCO's format"))
    categories = [category for _, category in sorted(index_by_id(content, "categories", file).items())]
    names = [[get(category, "name", file)] for category in categories]
    if background:
        names.insert(0, ["background"])
    if len(names) > IGNORE_INDEX:
        raise ValueError(f"{file} has {len(names)} classes, label maps at most {IGNORE_INDEX}.")
    labels = {category["id"]: label for label, category in enumerate(categories, start=int(bool(background)))}
    annotations: dict[Any, list[dict]] = {image_id: [] for image_id in index_by_id(content, "images", file)}
    for annotation in get(content, "annotations", file):
        image_id, category_id = (get(annotation, key, file) for key in ("image_id", "category_id"))
        if image_id not in annotations or category_id not in labels:
            raise ValueError(f"{file}: annotation {annotation.get('id')} is of an unknown image or category.")
        if not annotation.get("segmentation"):
            raise ValueError(
                f"{file}: annotation {annotation.get('id')} has no mask. samclip points --boxes makes masks of boxes."
            )
        annotations[image_id].append(annotation)
    folder = file.parent if images is None else Path(images)
    samples = []
    for image in content["images"]:
        path = require(folder / get(image, "file_name", file), "the folder of the images")
        size = get(image, "height", file), get(image, "width", file)
        objects = partial(_read_coco_objects, annotations[image["id"]], labels, size, path)
        samples.append(
            SegmentedImage(
                image["file_name"],
                partial(read_image, path, annotated_size=size),
                partial(_read_coco_map, objects, size, bool(background)),
                objects,
            )
        )
    if all(own.get("iscrowd") for own in itertools.chain.from_iterable(annotations.values())):
        raise ValueError(f"{file} has no annotations of objects, only crowds, which are ignored, or none at all.")
    description = {"path": str(file), "images": len(samples), "names": file.name, **describe_shared_names(names)}
    return DataSet(str(file), samples, names, list(background) or None, description)


def _read_coco_objects(
    annotations: list[dict], labels: Mapping[int, int], size: tuple[int, int], image: Path
) -> list[tuple[RunLengthMask, int]]:
    """Reads the masks of the annotations of an image and their labels. The label of crowds is `IGNORE_INDEX`."""
    if size not in read_sizes(image):
        raise ValueError(f"{image} has the size {read_sizes(image)[0]}, its annotations {size} (height, width).")
    objects = []
    for annotation in annotations:
        with name_errors(f"{image}: annotation {annotation.get('id')}", "a mask"):
            mask = read_mask(annotation["segmentation"], size)
        if mask.shape != size:
            raise ValueError(f"{image} has the size {size}, its annotation {annotation.get('id')} {mask.shape}.")
        objects.append((mask, IGNORE_INDEX if annotation.get("iscrowd") else labels[annotation["category_id"]]))
    return objects


def _read_coco_map(
    read_objects: Callable[[], list[tuple[RunLengthMask, int]]],
    size: tuple[int, int],
    has_background: bool,
    objects: list[tuple[RunLengthMask, int]] | None = None,
) -> np.ndarray:
    """Draws the objects of an image as a label map of its size, the largest masks first. Reads them if they are not
    passed."""
    objects = read_objects() if objects is None else objects
    label_map = np.full(size, 0 if has_background else IGNORE_INDEX, dtype=np.uint8)
    for mask, label in sorted(objects, key=lambda pair: (pair[1] != IGNORE_INDEX, -pair[0].area)):  # crowds first
        label_map[mask.decode()] = label
    return label_map


def _labels_by_index(vocabulary: Vocabulary, name: str) -> dict[int, int]:
    if len(vocabulary.names) > IGNORE_INDEX:
        raise ValueError(f"{name} has {len(vocabulary.names)} classes, label maps at most {IGNORE_INDEX}.")
    return {label: label for label in range(len(vocabulary.names))}


def _open_panoptic(coco: Path, split: Split) -> DataSet[SegmentedImage]:
    """Opens the things and stuff of COCO's panoptic task. Pixels outside all segments are ignored."""
    layout, file = layout_of("panoptic133", split), coco / f"annotations/panoptic_{split}2017.json"
    content = read_json(require(file, layout))
    categories = [category for _, category in sorted(index_by_id(content, "categories", file).items())]
    labels = {category["id"]: label for label, category in enumerate(categories)}
    # "wall-other-merged" becomes "wall".
    names = [
        [re.sub("(-other|-stuff|-merged)+$", "", get(category, "name", file)).replace("-", " ")]
        for category in categories
    ]
    images = index_by_id(content, "images", file)
    file_names = {image_id: get(image, "file_name", file) for image_id, image in images.items()}
    samples = []
    for annotation in sorted(get(content, "annotations", file), key=lambda entry: get(entry, "image_id", file)):
        segments = get(annotation, "segments_info", file)
        segment_categories = {get(segment, "category_id", file) for segment in segments}
        if annotation["image_id"] not in file_names or not segment_categories <= set(labels):
            raise ValueError(f"{file}: {annotation.get('file_name')} is of an unknown image or category.")
        image = require(coco / f"{split}2017" / file_names[annotation["image_id"]], layout)
        segment_map = coco / f"annotations/panoptic_{split}2017" / get(annotation, "file_name", file)
        segment_labels = {0: IGNORE_INDEX} | {
            get(segment, "id", file): labels[segment["category_id"]] for segment in segments
        }
        read_label_map = partial(_read_panoptic_map, require(segment_map, layout), image, segment_labels)
        read = partial(read_image, image, annotated_size=partial(_read_map_size, segment_map))
        samples.append(SegmentedImage(image.stem, read, read_label_map))
    description = {
        "path": str(file),
        "images": len(samples),
        "names": f"{file.name}, without the endings -other, -stuff and -merged",
        "split": f"{split}2017",
        **describe_shared_names(names),
    }
    return DataSet("panoptic133", samples, names, description=description)


def _pair(images: Path, label_maps: Path, layout: str) -> list[tuple[Path, Path]]:
    """Pairs the images and the label maps of two folders by their stems. Raises `ValueError` if a stem is missing in
    one folder or occurs twice."""
    image_paths = sorted(list_images(require(images, layout), layout), key=lambda path: path.stem)
    map_paths = sorted(list_images(require(label_maps, layout), layout), key=lambda path: path.stem)
    if unpaired := {path.stem for path in image_paths} ^ {path.stem for path in map_paths}:
        raise ValueError(
            f"{images} and {label_maps} have different stems; in one of them only: {sorted(unpaired)[:5]}."
        )
    if len(image_paths) != len(map_paths):
        raise ValueError(f"{images} or {label_maps} has two files with one stem.")
    return sorted(zip(image_paths, map_paths, strict=True))


def _read_label_map(file: Path, image_file: Path, labels: Mapping[int, int]) -> np.ndarray:
    """Reads a label map whose values are indices. See [`_map_values`]."""
    label_map = _open_map(file, str(file))
    return _map_values(np.asarray(label_map), labels, read_sizes(image_file), str(file))


def _read_panoptic_map(file: Path, image_file: Path, labels: Mapping[int, int]) -> np.ndarray:
    """Reads a label map whose values are colors, red first (COCO's panoptic format). See [`_map_values`]."""
    values = np.asarray(_open_map(file, str(file)).convert("RGB")).astype(np.int64) @ (1, 256, 256**2)
    return _map_values(values, labels, read_sizes(image_file), str(file))


def _open_map(source: Path | str | bytes, name: str) -> Image.Image:
    """Decodes a label map and applies its EXIF orientation. Raises `ValueError` if it cannot be read, or is a JPEG."""
    with (
        name_errors(name, "a label map"),
        Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as label_map,
    ):
        if label_map.format == "JPEG":
            raise ValueError("the compression of JPEG changes labels. Save label maps as PNG.")
        return ImageOps.exif_transpose(label_map)


def _read_map_size(source: Path | str | bytes, name: str | None = None) -> tuple[int, int]:
    """Returns the height and width of a label map."""
    return read_sizes(source, name)[0]


def _map_values(
    values: np.ndarray, labels: Mapping[int, int], image_sizes: list[tuple[int, int]], source: str
) -> np.ndarray:
    """
    Maps the values of a file to labels, `(height, width)` uint8.

    Raises `ValueError` if the values `(height, width)` are not those of a label map, do not have one of the image's
    sizes, or are not all in `labels`.
    """
    if values.ndim != 2:
        raise ValueError(f"{source} is not a label map: it has {values.shape[2]} channels.")
    if values.shape not in image_sizes:
        raise ValueError(f"{source} has the size {values.shape}, its image {image_sizes[0]} (height, width).")
    present, inverse = np.unique(values, return_inverse=True)
    if unknown := set(present.tolist()) - set(labels):
        raise ValueError(f"{source} has values without a class: {sorted(unknown)[:5]}.")
    return np.array([labels[value] for value in present.tolist()], dtype=np.uint8)[inverse].reshape(values.shape)


def _open_hub(name: str) -> DataSet[SegmentedImage]:
    split = open_hub(name)
    if len(split.image_columns) != 2 or "classes" not in split.options:
        raise ValueError(
            f"{name} must have a column of images, a column of label maps, and ?classes=; its image columns: "
            f"{split.image_columns or 'none'}."
        )
    vocabulary = read_vocabulary(require(Path(split.options["classes"]), "a list of the classes' names"))
    labels = _labels_by_index(vocabulary, name) | {255: IGNORE_INDEX}
    image_column, map_column = split.image_columns
    samples: Any = HubSamples(split, partial(_build_hub_sample, image_column, map_column, labels))
    description = {**split.description, "names": vocabulary.source}
    return DataSet(name, samples, vocabulary.names, vocabulary.background, description)


def _build_hub_sample(
    image_column: str, map_column: str, labels: dict[int, int], key: str, row: dict[str, Any]
) -> SegmentedImage:
    map_size = partial(_read_hub_map_size, row[map_column], key)
    read_label_map = partial(_read_hub_label_map, row[map_column], row[image_column], labels, key)
    return SegmentedImage(key, partial(read_hub_image, row[image_column], key, map_size), read_label_map)


def _read_hub_map_size(cell: dict[str, Any] | None, key: str) -> tuple[int, int]:
    return _read_map_size(image_source(cell, key, "label map"), key)


def _read_hub_label_map(
    cell: dict[str, Any] | None, image_cell: dict[str, Any] | None, labels: dict[int, int], key: str
) -> np.ndarray:
    label_map = _open_map(image_source(cell, key, "label map"), key)
    return _map_values(np.asarray(label_map), labels, read_sizes(image_source(image_cell, key), key), key)
