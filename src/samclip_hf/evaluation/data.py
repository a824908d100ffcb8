"""
Data sets as their owners ship them, unpacked. Nothing is passed over: a file that should be there and is not, or holds
what it should not, is an error with its name.
"""

import io
import json
import re
import tarfile
from collections import Counter
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .samples import IGNORED, CaptionedImage, DataSet, ImageWithObjects, LabelledImage, SegmentedImage

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
VOC = "https://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
CITYSCAPES = "https://www.cityscapes-dataset.com"
COCO = "https://cocodataset.org/#download"
LVIS = "https://www.lvisdataset.org/dataset"


def open_classification(name: str, root: Path = Path()) -> DataSet[LabelledImage]:
    """
    name (`str`):
        A folder with a folder of images for every class, whose names are the classes' or stand, in their order, in a
        `classes.json` (names, or lists of synonyms) beside them; or a folder of webdataset tars whose images have a
        json with `"label"` and `"name"`.
    root (`Path`):
        What a relative name is looked up in, too.
    """
    folder = existing(name, root)
    if tars := sorted(folder.glob("*.tar")):
        return _classification_tars(name, tars)
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    if not folders:
        raise FileNotFoundError(f"{folder} holds neither folders, one for each class, nor tars.")
    names = [[path.name.replace("_", " ")] for path in folders]
    if (classes := folder / "classes.json").exists():
        names = _names(classes)
        if len(names) != len(folders):
            raise ValueError(f"{classes} names {len(names)} classes, but there are {len(folders)} folders beside it.")
    samples = [
        LabelledImage(f"{path.parent.name}/{path.name}", partial(read_image, path), label)
        for label, class_folder in enumerate(folders)
        for path in images_in(class_folder)
    ]
    return DataSet(name, samples, names, description={"data": name, "images": len(samples)})


def _classification_tars(name: str, tars: list[Path]) -> DataSet[LabelledImage]:
    names: dict[int, str] = {}
    samples = []
    for key, members in tar_samples(tars):
        entry = json.loads(read_member(*member(key, members, "json")))
        label, class_name = int(entry["label"]), str(entry["name"])
        if names.setdefault(label, class_name) != class_name:
            raise ValueError(f"{key}: label {label} is {class_name!r} here and {names[label]!r} elsewhere.")
        samples.append((key, partial(read_tar_image, *image_member(key, members)), label))
    doubled = Counter(names.values())  # "crane" is a bird and a machine: both remain, and can be told apart by no text
    labels = {label: place for place, label in enumerate(sorted(names))}
    return DataSet(
        name,
        [LabelledImage(key, image, labels[label]) for key, image, label in samples],
        [[names[label]] for label in sorted(names)],
        description={
            "data": name,
            "images": len(samples),
            "names that two classes share": sorted(n for n, count in doubled.items() if count > 1),
        },
    )


def open_captions(name: str, root: Path = Path()) -> DataSet[CaptionedImage]:
    """A folder of webdataset tars whose images have a txt, a caption on each line."""
    samples = []
    for key, members in tar_samples(tars_in(existing(name, root))):
        lines = read_member(*member(key, members, "txt")).decode().splitlines()
        captions = tuple(line.strip() for line in lines if line.strip())
        if not captions:
            raise ValueError(f"{key} has an empty caption.")
        samples.append(CaptionedImage(key, partial(read_tar_image, *image_member(key, members)), captions))
    return DataSet(name, samples, description={"data": name, "images": len(samples)})


def open_objects(name: str, root: Path = Path(), detections: str | None = None) -> DataSet[ImageWithObjects]:
    """
    name (`str`):
        "coco" (`coco/annotations/instances_val2017.json` and `coco/val2017`), "lvis" (`lvis/lvis_v1_val.json` and
        COCO's images), or a folder of SA-1B's tars.
    detections (`str`, *optional*):
        A file in COCO's result format with `"image_id"`, `"category_id"`, `"bbox"` and `"score"`.
    """
    if name not in ("coco", "lvis"):
        if detections is not None:
            raise ValueError(f"Detections belong to COCO or LVIS, not to {name}.")
        return _sa1b(name, tars_in(existing(name, root)))
    if name == "coco":
        annotations = expected(root / "coco" / "annotations" / "instances_val2017.json", COCO)
    else:
        annotations = expected(root / "lvis" / "lvis_v1_val.json", LVIS)
    content = json.loads(annotations.read_text())
    objects: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    found: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    if detections is not None:
        for detection in json.loads(Path(detections).read_text()):
            if detection["image_id"] not in found:
                raise ValueError(f"{detections}: image {detection['image_id']} is not in {annotations.name}.")
            found[detection["image_id"]].append(detection)
    samples = []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        parts = image["coco_url"].split("/")[-2:] if name == "lvis" else ["val2017", image["file_name"]]
        path = expected(root / "coco" / Path(*parts), COCO)
        own: partial[list[dict]] = partial(list, objects[image["id"]])
        samples.append(ImageWithObjects(path.name, partial(read_image, path), own, found[image["id"]], image))
    description: dict[str, Any] = {"data": annotations.name, "images": len(samples)}
    if detections is not None:
        description["boxes"] = Path(detections).name
    return DataSet(name, samples, description=description | {"categories": content["categories"]})


def _sa1b(name: str, tars: list[Path]) -> DataSet[ImageWithObjects]:
    samples = []
    for key, members in tar_samples(tars):
        image, info = image_member(key, members), member(key, members, "json")
        samples.append(ImageWithObjects(key, partial(read_tar_image, *image), partial(_sa1b_objects, *info)))
    return DataSet(name, samples, description={"data": name, "images": len(samples), "format": "SA-1B"})


def _sa1b_objects(tar: Path, offset: int, size: int) -> list[dict]:
    return json.loads(read_member(tar, offset, size))["annotations"]


def open_segmentation(name: str, root: Path = Path()) -> DataSet[SegmentedImage]:
    """
    name (`str`):
        "voc21", "voc20" (background does not count; both `VOCdevkit/VOC2012`), "cityscapes" (`cityscapes/leftImg8bit`
        and `gtFine`), or a folder with `images`, `labels` (png files of the same names, in which 255 does not count)
        and, there or in its parent, `classes.json`: names, or lists of synonyms.
    """
    if name in ("voc20", "voc21"):
        return _voc(name, root / "VOCdevkit" / "VOC2012")
    if name == "cityscapes":
        return _cityscapes(root / "cityscapes")
    folder = existing(name, root)
    classes = next((p for p in (folder / "classes.json", folder.parent / "classes.json") if p.exists()), None)
    if classes is None:
        raise FileNotFoundError(f"Neither {folder} nor its parent holds a classes.json with the labels' names.")
    names = _names(classes)
    values = {value: value for value in range(len(names))} | {IGNORED: IGNORED}
    samples = []
    for path in images_in(folder / "images"):
        labels = expected(folder / "labels" / f"{path.stem}.png", "the label map of that image")
        samples.append(segmented(path, labels, values))
    return DataSet(name, samples, names, description={"data": name, "images": len(samples)})


def _voc(name: str, folder: Path) -> DataSet[SegmentedImage]:
    vocabulary = read_vocabulary("voc21")
    keys = expected(folder / "ImageSets" / "Segmentation" / "val.txt", VOC).read_text().split()
    values = {value: value for value in range(21)} | {IGNORED: IGNORED}
    names, background = vocabulary["names"], vocabulary["background"]
    if name == "voc20":
        values = {value: value - 1 for value in range(1, 21)} | {0: IGNORED, IGNORED: IGNORED}
        names, background = names[1:], None
    samples = [
        segmented(
            expected(folder / "JPEGImages" / f"{key}.jpg", VOC),
            expected(folder / "SegmentationClass" / f"{key}.png", VOC),
            values,
        )
        for key in keys
    ]
    description = {"data": "VOC2012 val", "images": len(samples), "names from": vocabulary["source"]}
    return DataSet(name, samples, names, background, description)


def _cityscapes(folder: Path) -> DataSet[SegmentedImage]:
    vocabulary = read_vocabulary("cityscapes")
    values = dict.fromkeys(range(35), IGNORED) | {IGNORED: IGNORED}
    values |= {value: label for label, value in enumerate(vocabulary["ids"])}
    samples = []
    for path in sorted(expected(folder / "leftImg8bit" / "val", CITYSCAPES).glob("*/*_leftImg8bit.png")):
        stem = path.name.removesuffix("_leftImg8bit.png")
        labels = folder / "gtFine" / "val" / path.parent.name / f"{stem}_gtFine_labelIds.png"
        samples.append(segmented(path, expected(labels, CITYSCAPES), values))
    description = {"data": "Cityscapes val, fine", "images": len(samples), "names from": vocabulary["source"]}
    return DataSet("cityscapes", samples, vocabulary["names"], description=description)


def segmented(path: Path, labels: Path, values: dict[int, int]) -> SegmentedImage:
    return SegmentedImage(path.name, partial(read_image, path), partial(read_labels, labels, values))


def read_image(path: Path) -> Image.Image:
    """As it is stored, in RGB: label maps and masks are of the stored pixels."""
    with Image.open(path) as image:
        return image.convert("RGB")


def read_labels(path: Path, values: dict[int, int]) -> np.ndarray:
    """`(height, width)` labels. `values` tells what the file's numbers stand for; raises `ValueError` for others."""
    with Image.open(path) as image:
        numbers = np.asarray(image)
    if numbers.ndim != 2:
        raise ValueError(f"{path} is no label map: it has {numbers.shape[2]} channels.")
    unknown = sorted(set(np.unique(numbers).tolist()) - set(values))
    if unknown:
        raise ValueError(f"{path} holds {unknown}, which stand for no class.")
    table = np.zeros(max(values) + 1, dtype=np.int64)
    table[list(values)] = list(values.values())
    return table[numbers]


def read_vocabulary(name: str) -> dict[str, Any]:
    """A class list that comes with this package, with its source."""
    return json.loads((resources.files(__package__) / "vocabularies" / f"{name}.json").read_text())


def _names(path: Path) -> list[list[str]]:
    names = json.loads(path.read_text())
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path} must hold a list of names, or of lists of synonyms.")
    return [[name] if isinstance(name, str) else list(name) for name in names]


def existing(name: str, root: Path) -> Path:
    """A folder, as it is named or below `root`."""
    for folder in (Path(name), root / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{name} is neither a data set that is known by name nor a folder, here or in {root}.")


def expected(path: Path, source: str) -> Path:
    """Raises `FileNotFoundError` that says where to get it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. It comes from {source}")
    return path


def images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return paths


def tars_in(folder: Path) -> list[Path]:
    if not (tars := sorted(folder.glob("*.tar"))):
        raise FileNotFoundError(f"{folder} holds no tars.")
    return tars


def tar_samples(tars: list[Path]) -> list[tuple[str, dict[str, tuple[Path, int, int]]]]:
    """By key, where each file of a sample lies: tar, offset and size. Files of one key are one sample, as in
    webdataset."""
    samples: dict[str, dict[str, tuple[Path, int, int]]] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for info in tar:
                if info.isfile():
                    matched = re.fullmatch(r"((?:.*/)?[^./]+)\.(.+)", info.name)
                    if matched is None:
                        raise ValueError(f"{path}: {info.name} has no suffix that says what it is.")
                    key, suffix = matched.groups()
                    files = samples.setdefault(f"{path.name}/{key}", {})
                    files[suffix.lower()] = (path, info.offset_data, info.size)
    return list(samples.items())


def member(key: str, members: dict[str, tuple[Path, int, int]], suffix: str) -> tuple[Path, int, int]:
    if suffix not in members:
        raise ValueError(f"{key} has no {suffix}, only {sorted(members)}.")
    return members[suffix]


def image_member(key: str, members: dict[str, tuple[Path, int, int]]) -> tuple[Path, int, int]:
    for suffix in members:
        if f".{suffix}" in IMAGE_SUFFIXES:
            return members[suffix]
    raise ValueError(f"{key} has no image, only {sorted(members)}.")


def read_member(tar: Path, offset: int, size: int) -> bytes:
    with tar.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def read_tar_image(tar: Path, offset: int, size: int) -> Image.Image:
    with Image.open(io.BytesIO(read_member(tar, offset, size))) as image:
        return image.convert("RGB")
