"""
Readers of data sets that protocols judge by.

Files are listed in a fixed order when a data set is opened, and nothing is decoded until it is asked for; samples can
be pickled. Data sets of the Hub stream. Nothing is passed over: an image without its label map, a missing file, a
value that the list of classes does not have are errors that name the file. Files and folders whose names begin with a
dot are not looked at.
"""

import glob
import json
import re
import tarfile
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn
from urllib.parse import parse_qsl

import numpy as np
from datasets import ClassLabel, List, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from .samples import IGNORED, CaptionedImage, DataSet, ImageWithObjects, LabelledImage, Sample, SegmentedImage

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
COCO_STUFF_IDS = range(182)  # of stuffthingmaps, some of which are no class
SEGMENTATIONS = "voc20, voc21, context59, context60, ade150, stuff171, object81, panoptic133, cityscapes"
CITYSCAPES_IDS = range(35)  # of labelIds files, of which 19 are judged; 255 is -1, the license plate
# Of the data sets known by name: what is expected below `root`, and who gives it.
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
Split = Literal["train", "val"]  # of data sets known by name; others have the split that their path has
CLASS_FOLDERS = "a folder with one folder of images per class, or webdataset tars with jpg and json (label, name)"
CAPTION_TARS = "webdataset tars with jpg and txt (a caption a line)"
OBJECT_TARS = "tars in SA-1B's format, jpg and json"
LABEL_MAPS = "a folder with images/, labels/ (png of the same stems) and, in it or in its parent, classes.json"
CAPTION_COLUMNS = ("caption", "captions", "sentences", "text", "alt_text")
HUB = "hf://"  # begins the names of data sets on the Hub; "hf://owner/name?config=...&split=...&classes=..."


class Vocabulary(NamedTuple):
    """A list of classes: where it comes from, synonyms of each class, texts of the background, names of folders or
    values in label maps."""

    source: str
    names: list[list[str]]
    background: list[str] | None = None
    ids: list[Any] | None = None


class _TarMember(NamedTuple):
    """A sample of a webdataset tar: where each of its files lies, by ending, as (offset, size)."""

    tar: Path
    stem: str
    files: dict[str, tuple[int, int]]

    @property
    def key(self) -> str:
        return f"{self.tar.stem}/{self.stem}"

    def read(self, ending: str) -> bytes:
        if ending not in self.files:
            raise ValueError(f"{self.tar}: {self.stem!r} has no {ending}.")
        return _read_at(self.tar, *self.files[ending])

    def image(self) -> partial:
        for ending in PICTURES:
            if ending[1:] in self.files:
                return partial(_read_image_at, self.tar, *self.files[ending[1:]])
        raise ValueError(f"{self.tar}: {self.stem!r} has no picture.")


def load_vocabulary(name: str) -> Vocabulary:
    """A list of classes of this package, such as "voc21"."""
    file = resources.files(__package__).joinpath("vocabularies", f"{name}.json")
    return Vocabulary(**json.loads(file.read_text(encoding="utf-8")))


def _layout(name: str, split: Split, otherwise: str) -> str:
    """What is expected of a data set."""
    layout = LAYOUTS.get(name, otherwise)
    return f"the training images in the place of these: {layout}" if split == "train" and name in LAYOUTS else layout


def open_classification(name: str, root: str | Path, split: Split = "val") -> DataSet[LabelledImage]:
    """
    Args:
        name (`str`):
            "imagenet", "imagenet-v2" or "places365", below `root`. A data set of the Hub with a ClassLabel. Otherwise
            a folder with one folder per class, named by its folder or in order (of names or, where all are numbers, of
            numbers) by its `classes.json`, or a folder or a glob of webdataset tars with jpg and json,
            `{"label": int, "name": str}`, whose classes are sorted by label.
        root (`str` or `Path`):
            Where known data sets lie, and other ones may.
        split (`"train"` or `"val"`):
            Of "imagenet" ("imagenet/train") and "places365" ("places365_train_standard.txt" and "data_256").

    Raises:
        FileNotFoundError: Something is missing; says what is expected.
        ValueError: Folders and classes do not agree, or a sample lacks something.
    """
    if name.startswith(HUB):
        return open_hub(name, "classification")  # type: ignore[return-value]
    if name == "places365":
        return _places365(Path(root, "places365"), split)
    if name in ("imagenet", "imagenet-v2"):
        vocabulary = load_vocabulary("imagenet")
        assert vocabulary.ids is not None
        is_v2 = name == "imagenet-v2"
        if is_v2 and split == "train":
            raise ValueError("imagenet-v2 has no training images; those of imagenet belong to it.")
        folder = Path(root, "imagenetv2-matched-frequency-format-val" if is_v2 else f"imagenet/{split}")
        classes = [str(number) for number in range(1000)] if is_v2 else vocabulary.ids
        for path in [folder, *(folder / of_class for of_class in classes)]:
            _require(path, _layout(name, split, ""))
        if unknown := {path.name for path in _listed(folder) if path.is_dir()} - set(classes):
            raise ValueError(f"{folder} has folders that are no classes of {name}: {sorted(unknown)[:5]}.")
        description: dict[str, Any] = {"path": str(folder), "split": "matched-frequency" if is_v2 else split}
    elif tars := _find_tars(name, root):
        return _classification_of_tars(name, tars)
    else:
        folder = _find(name, root, f"{CLASS_FOLDERS}; {HUB}owner/name; or one of imagenet, imagenet-v2, places365")
        classes = [path.name for path in _listed(folder) if path.is_dir()]
        if not classes:
            _missing(folder / "*/", CLASS_FOLDERS)
        vocabulary = Vocabulary("names of folders", [[of_class.replace("_", " ")] for of_class in classes])
        if (folder / "classes.json").exists():
            vocabulary = _read_vocabulary(folder / "classes.json")
            if all(of_class.isdecimal() for of_class in classes):
                classes.sort(key=int)  # 10 comes after 9, as in the list
        if len(vocabulary.names) != len(classes):
            raise ValueError(f"{folder} has {len(classes)} folders, its classes.json {len(vocabulary.names)} classes.")
        description = {"path": str(folder)}
    samples = [
        LabelledImage(f"{of_class}/{path.name}", partial(_read_image, path), label)
        for label, of_class in enumerate(classes)
        for path in _pictures(folder / of_class, LAYOUTS.get(name, CLASS_FOLDERS))
    ]
    description |= {"images": len(samples), "names": vocabulary.source} | _doubled(vocabulary.names)
    return DataSet(name, samples, vocabulary.names, description=description)


def _doubled(names: list[list[str]]) -> dict[str, Any]:
    """What the results have to say of names that several classes share: those can be told apart by no text."""
    counts = Counter(synonyms[0] for synonyms in names)
    doubled = sorted(name for name, count in counts.items() if count > 1)
    return {"names that several classes share": doubled} if doubled else {}


def _places365(folder: Path, split: Split) -> DataSet[LabelledImage]:
    """Names are those of its categories: of "/b/bus_station/indoor", "indoor bus station"."""
    layout = _layout("places365", split, "")
    file = folder / ("places365_val.txt" if split == "val" else "places365_train_standard.txt")
    images = folder / ("val_256" if split == "val" else "data_256")
    classes: dict[int, str] = {}
    for category, label in _read_pairs(_require(folder / "categories_places365.txt", layout)):
        what, *where = category[3:].split("/")
        classes[label] = " ".join([*where, what]).replace("_", " ")
    names = [[classes[label]] for label in sorted(classes)]
    if sorted(classes) != list(range(len(classes))):
        raise ValueError(f"{folder / 'categories_places365.txt'} does not number its classes from 0 on.")
    samples = []
    for file_name, label in _read_pairs(_require(file, layout)):
        if label not in classes:
            raise ValueError(f"{file}: {file_name} has the label {label}, which is no class.")
        path = _require(images / file_name.removeprefix("/"), layout)
        samples.append(LabelledImage(file_name, partial(_read_image, path), label))
    source = "categories_places365.txt, indoor and outdoor put first"
    description = {"path": str(folder), "split": f"{split}, 256 px", "images": len(samples), "names": source}
    return DataSet("places365", samples, names, description=description | _doubled(names))


def _read_pairs(file: Path) -> list[tuple[str, int]]:
    """Of a file with a name and a number on each line."""
    pairs = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        words = line.rsplit(maxsplit=1)
        if len(words) != 2 or not words[1].isdigit():
            raise ValueError(f"{file}, line {number} is no name and number: {line!r}.")
        pairs.append((words[0], int(words[1])))
    return pairs


def _classification_of_tars(name: str, tars: list[Path]) -> DataSet[LabelledImage]:
    labels: list[int] = []
    names: dict[int, str] = {}
    members = list(_tar_members(tars))
    for member in members:
        content = _parse(member.read("json"), f"{member.tar}: {member.stem}.json")
        label, of_class = content.get("label"), content.get("name")
        if not isinstance(label, int) or not isinstance(of_class, str):
            raise ValueError(f"{member.tar}: {member.stem}.json has no label (a number) and name.")
        if names.setdefault(label, of_class) != of_class:
            raise ValueError(f"{member.tar}: {member.stem}.json calls {label} {of_class!r}, others {names[label]!r}.")
        labels.append(label)
    places = {label: place for place, label in enumerate(sorted(names))}
    samples = [
        LabelledImage(member.key, member.image(), places[label]) for member, label in zip(members, labels, strict=True)
    ]
    class_names = [[names[label]] for label in places]
    description = {"path": name, "images": len(samples), "names": "of the samples", **_doubled(class_names)}
    return DataSet(name, samples, class_names, description=description)


def open_captions(name: str, root: str | Path) -> DataSet[CaptionedImage]:
    """
    Args:
        name (`str`):
            "flickr30k" or "coco-captions", below `root`: the test images of Karpathy's splits with all of their
            captions. A data set of the Hub with captions. Otherwise a folder or a glob of webdataset tars with jpg
            and txt, a caption a line.
        root (`str` or `Path`):
            Where known data sets lie, and other ones may.

    Raises:
        FileNotFoundError: Something is missing; says what is expected.
        ValueError: An image has no caption.
    """
    if name.startswith(HUB):
        return open_hub(name, "captions")  # type: ignore[return-value]
    if name in ("flickr30k", "coco-captions"):
        folder = Path(root, "flickr30k" if name == "flickr30k" else "coco")
        file = _require(
            folder / ("dataset_flickr30k.json" if name == "flickr30k" else "dataset_coco.json"), LAYOUTS[name]
        )
        samples = []
        for entry in _get(_read_json(file), "images", file):
            if _get(entry, "split", file) == "test":
                subfolder = "flickr30k-images" if name == "flickr30k" else _get(entry, "filepath", file)
                path = _require(folder / subfolder / _get(entry, "filename", file), LAYOUTS[name])
                captions = tuple(_get(s, "raw", file).strip() for s in _get(entry, "sentences", file))
                samples.append(_captioned(path.name, partial(_read_image, path), captions, file))
        if not samples:
            raise ValueError(f"{file} has no images of the split test.")
        samples.sort(key=lambda sample: sample.key)
        description = {"path": str(file), "split": "Karpathy's test", "images": len(samples)}
        return DataSet(name, samples, description=description)
    samples = []
    for member in _tar_members(
        _find_tars(name, root)
        or _missing(name, f"{CAPTION_TARS}; {HUB}owner/name; or one of flickr30k, coco-captions")
    ):
        lines = (line.strip() for line in member.read("txt").decode().splitlines())
        samples.append(_captioned(member.key, member.image(), tuple(line for line in lines if line), member.tar))
    return DataSet(name, samples, description={"path": name, "images": len(samples)})


def _captioned(key: str, image: partial, captions: tuple[str, ...], file: str | Path) -> CaptionedImage:
    if not captions:
        raise ValueError(f"{file}: {key!r} has no caption.")
    return CaptionedImage(key, image, captions)


def open_objects(name: str, root: str | Path, detections: str | Path | None = None) -> DataSet[ImageWithObjects]:
    """
    Args:
        name (`str`):
            "coco" (val2017) or "lvis" (v1 val), below `root`. Otherwise a folder or a glob of tars in SA-1B's format,
            jpg and json with run lengths, whose objects all get the category 1.
        root (`str` or `Path`):
            Where known data sets lie, and other ones may.
        detections (`str` or `Path`, *optional*):
            Of a detector, in COCO's result format: a list of `{"image_id", "category_id", "bbox", "score"}`.

    Returns:
        `DataSet`: In its description `"categories"`, the annotation file's list, where there is one, and `"boxes"`,
        the name of the file of detections, if given.

    Raises:
        FileNotFoundError: Something is missing; says what is expected.
        ValueError: Annotations or detections are of images or categories that the data set does not have.
    """
    objects: dict[Any, Any] = {}  # by image id: what reads them
    if name in ("coco", "lvis"):
        coco = Path(root, "coco")
        file = coco / "annotations/instances_val2017.json" if name == "coco" else Path(root, "lvis/lvis_v1_val.json")
        content = _read_json(_require(file, LAYOUTS[name]))
        entries = {_get(entry, "id", file): entry for entry in _get(content, "images", file)}
        categories = {_get(category, "id", file) for category in _get(content, "categories", file)}
        annotations: dict[Any, list[dict]] = {number: [] for number in entries}
        for annotation in _get(content, "annotations", file):
            image_id, category_id = (_get(annotation, key, file) for key in ("image_id", "category_id"))
            if image_id not in entries or category_id not in categories:
                raise ValueError(
                    f"{file}: annotation {annotation.get('id')} is of an image or a category not in the file."
                )
            annotations[annotation["image_id"]].append({"iscrowd": 0, **annotation})
        objects = {number: partial(list, of_image) for number, of_image in annotations.items()}
        images = {}
        for number, entry in entries.items():
            is_coco = name == "coco"
            url = _get(entry, "file_name" if is_coco else "coco_url", file)
            place = ["val2017", url] if is_coco else url.split("/")[-2:]
            path = _require(coco.joinpath(*place), LAYOUTS[name])
            images[number] = (path.name, partial(_read_image, path))
        description: dict[str, Any] = {"path": str(file), "split": "val2017" if name == "coco" else "v1 val"}
        description["categories"] = content["categories"]
    else:
        entries, images = {}, {}
        for member in _tar_members(_find_tars(name, root) or _missing(name, f"{OBJECT_TARS}; or one of coco, lvis")):
            where = f"{member.tar}: {member.stem}.json"
            entry = _get(_parse(member.read("json"), where), "image", where)
            number = _get(entry, "image_id", where)
            if number in entries:
                raise ValueError(f"{where} has the image id {number} of another one.")
            entries[number] = {**entry, "id": number}
            images[number] = (member.key, member.image())
            objects[number] = partial(_read_sa1b_at, member.tar, *member.files["json"])
        description = {"path": name}
        categories = {1}
    of_detector: dict[Any, list[dict]] = {}
    if detections is not None:
        of_detector = _read_detections(Path(detections), set(entries), categories)
        description["boxes"] = Path(detections).name
    description["images"] = len(entries)
    numbers = sorted(entries) if name in ("coco", "lvis") else list(entries)
    samples = [
        ImageWithObjects(*images[number], objects[number], of_detector.get(number, []), entries[number])
        for number in numbers
    ]
    return DataSet(name, samples, description=description)


def _read_detections(file: Path, images: set, categories: set[int]) -> dict[Any, list[dict]]:
    """Of each image that has any."""
    of_images = defaultdict(list)
    for detection in _read_json(_require(file, "detections in COCO's result format")):
        if missing := {"image_id", "category_id", "bbox", "score"} - set(detection):
            raise ValueError(f"{file}: a detection has no {', '.join(sorted(missing))}: {detection}.")
        if detection["image_id"] not in images or detection["category_id"] not in categories:
            raise ValueError(f"{file}: a detection is of an image or a category not in the data set: {detection}.")
        of_images[detection["image_id"]].append(detection)
    return of_images


def open_segmentation(name: str, root: str | Path, split: Split = "val") -> DataSet[SegmentedImage]:
    """
    Args:
        name (`str`):
            The images below `root` of "voc21", "context60" and "object81", which have a background; "voc20"
            and "context59", the same ones with background ignored; "stuff171", "panoptic133", "ade150" and
            "cityscapes" (19 classes). A data set of the Hub with images and label images, whose names stand in the
            json file that it names as `classes`. Otherwise a folder with `images/`, `labels/`, where png files of the
            same stems hold places in `classes.json` of the folder or of its parent, 255 ignored.
        root (`str` or `Path`):
            Where known data sets lie, and other ones may.
        split (`"train"` or `"val"`):
            Of those known by name: the files whose owners call them so, "train" where the list of `val` says "val".

    Raises:
        FileNotFoundError: Something is missing; says what is expected.
        ValueError: Images and label maps do not agree. When one is read: it has values that are no classes, or another
            size than its image.
    """
    if name.startswith(HUB):
        return open_hub(name, "segmentation")  # type: ignore[return-value]
    root, layout = Path(root), _layout(name, split, LABEL_MAPS)
    if name == "panoptic133":
        return _panoptic(root / "coco", split)
    if name in ("voc20", "voc21", "context59", "context60"):
        vocabulary = load_vocabulary("voc21" if name.startswith("voc") else "context60")
        places = {value: value for value in range(len(vocabulary.names))}
        if name in ("voc20", "context59"):
            vocabulary = vocabulary._replace(names=vocabulary.names[1:], background=None)
            places = {0: IGNORED} | {1 + place: place for place in range(len(vocabulary.names))}
        year, task, labels = (
            ("VOC2012", "Segmentation", "SegmentationClass")
            if name.startswith("voc")
            else ("VOC2010", "SegmentationContext", "SegmentationClassContext")
        )
        folder = root / "VOCdevkit" / year
        stems = sorted(_require(folder / f"ImageSets/{task}/{split}.txt", layout).read_text().split())
        pairs = [(folder / f"JPEGImages/{stem}.jpg", folder / f"{labels}/{stem}.png") for stem in stems]
    elif name in ("stuff171", "object81"):
        vocabulary = load_vocabulary(name)
        assert vocabulary.ids is not None
        folder = root / "coco"
        pairs = _pair(folder / f"{split}2017", folder / f"stuffthingmaps/{split}2017", layout)
        first = len(vocabulary.names) - len(vocabulary.ids)  # of the labels with a value of their own
        places = dict.fromkeys(COCO_STUFF_IDS, 0 if first else IGNORED)
        places |= {value: first + place for place, value in enumerate(vocabulary.ids)}
        if first:
            places[255] = 0  # the literature scores what nobody labelled as background
    elif name == "ade150":
        vocabulary = load_vocabulary("ade150")
        folder = root / "ADEChallengeData2016"
        of_ade = {"val": "validation", "train": "training"}[split]
        pairs = _pair(folder / "images" / of_ade, folder / "annotations" / of_ade, layout)
        places = {0: IGNORED} | {1 + place: place for place in range(150)}
    elif name == "cityscapes":
        vocabulary = load_vocabulary("cityscapes19")
        assert vocabulary.ids is not None
        folder = root / "cityscapes"
        pairs = []
        for city in _listed(_require(folder / "leftImg8bit" / split, layout)):
            for path in _pictures(city, layout):
                label_map = path.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
                pairs.append((path, folder / "gtFine" / split / city.name / label_map))
        places = dict.fromkeys(CITYSCAPES_IDS, IGNORED)
        places |= {value: place for place, value in enumerate(vocabulary.ids)}
    else:
        known = f"{LABEL_MAPS}; {HUB}owner/name; or one of {SEGMENTATIONS}"
        folder = _find(name, root, known)
        own, of_parent = folder / "classes.json", folder.absolute().parent / "classes.json"
        vocabulary = _read_vocabulary(own if own.exists() else _require(of_parent, known))
        pairs = _pair(folder / "images", folder / "labels", known)
        places = _own_places(vocabulary, name)
    samples = [
        SegmentedImage(
            image.stem,
            partial(_read_image, _require(image, layout)),
            partial(_read_label_map, _require(label_map, layout), image, {255: IGNORED} | places),
        )
        for image, label_map in pairs
    ]
    if not samples:
        _missing(folder, layout)
    description = {
        "path": str(folder),
        "images": len(samples),
        "names": vocabulary.source,
        **_doubled(vocabulary.names),
    }
    description |= {"split": split} if name in LAYOUTS else {}
    return DataSet(name, samples, vocabulary.names, vocabulary.background, description)


def _own_places(vocabulary: Vocabulary, name: str) -> dict[int, int]:
    if len(vocabulary.names) > IGNORED:
        raise ValueError(f"{name} has {len(vocabulary.names)} classes; label maps can hold {IGNORED}.")
    return {place: place for place in range(len(vocabulary.names))}


def _panoptic(coco: Path, split: Split) -> DataSet[SegmentedImage]:
    """Things and stuff of COCO's panoptic task; what no segment covers is ignored."""
    layout, file = _layout("panoptic133", split, ""), coco / f"annotations/panoptic_{split}2017.json"
    content = _read_json(_require(file, layout))
    categories = sorted(_get(content, "categories", file), key=lambda category: _get(category, "id", file))
    places = {category["id"]: place for place, category in enumerate(categories)}
    names = [[_get(category, "name", file)] for category in categories]
    for synonyms in names:  # "wall-other-merged" and "window-other" say how they came about
        synonyms[0] = re.sub("(-other|-stuff|-merged)+$", "", synonyms[0]).replace("-", " ")
    images = {_get(image, "id", file): _get(image, "file_name", file) for image in _get(content, "images", file)}
    samples = []
    for annotation in sorted(_get(content, "annotations", file), key=lambda entry: _get(entry, "image_id", file)):
        segments = _get(annotation, "segments_info", file)
        if annotation["image_id"] not in images or not {_get(s, "category_id", file) for s in segments} <= set(places):
            raise ValueError(f"{file}: {annotation.get('file_name')} is of an image or a category not in the file.")
        image = _require(coco / f"{split}2017" / images[annotation["image_id"]], layout)
        segment_map = coco / f"annotations/panoptic_{split}2017" / _get(annotation, "file_name", file)
        of_segments = {0: IGNORED} | {_get(s, "id", file): places[s["category_id"]] for s in segments}
        reader = partial(_read_segment_map, _require(segment_map, layout), image, of_segments)
        samples.append(SegmentedImage(image.stem, partial(_read_image, image), reader))
    source = f"{file.name}, without the endings -other, -stuff and -merged"
    description = {
        "path": str(file),
        "images": len(samples),
        "names": source,
        "split": f"{split}2017",
        **_doubled(names),
    }
    return DataSet("panoptic133", samples, names, description=description)


def _pair(images: Path, label_maps: Path, layout: str) -> list[tuple[Path, Path]]:
    """Images and label maps by their stems, of which both folders have the same, each once."""
    of_images, of_label_maps = (
        _pictures(_require(images, layout), layout),
        _pictures(_require(label_maps, layout), layout),
    )
    if alone := {path.stem for path in of_images} ^ {path.stem for path in of_label_maps}:
        raise ValueError(
            f"{images} and {label_maps} do not have the same stems; in one of them only: {sorted(alone)[:5]}."
        )
    if len(of_images) != len(of_label_maps):
        raise ValueError(f"{images} or {label_maps} has two files of one stem.")
    return sorted(zip(sorted(of_images, key=_stem), sorted(of_label_maps, key=_stem), strict=True))


def _stem(path: Path) -> str:
    return path.stem


def _read_label_map(file: Path, image_file: Path, places: dict[int, int]) -> np.ndarray:
    """`(height, width)` unsigned bytes: what `places` has for the file's values."""
    with Image.open(file) as label_map, Image.open(image_file) as image:
        return _placed(np.asarray(label_map), places, image.size, str(file))


def _read_segment_map(file: Path, image_file: Path, places: dict[int, int]) -> np.ndarray:
    """The same, of a file whose values are written as colours, red first (COCO's panoptic format)."""
    with Image.open(file) as segment_map, Image.open(image_file) as image:
        values = np.asarray(segment_map.convert("RGB")).astype(np.int64) @ (1, 256, 256**2)
        return _placed(values, places, image.size, str(file))


def _placed(values: np.ndarray, places: dict[int, int], size: tuple[int, int], where: str) -> np.ndarray:
    """`(height, width)` unsigned bytes: what `places` has for the values. `size` is the image's (width, height)."""
    if values.ndim != 2:
        raise ValueError(f"{where} is no label map: it has {values.shape[2]} channels.")
    if values.shape != size[::-1]:
        raise ValueError(f"{where} is {values.shape}, its image {size[::-1]} (height, width).")
    present, inverse = np.unique(values, return_inverse=True)
    if unknown := set(present.tolist()) - set(places):
        raise ValueError(f"{where} has values that are no classes: {sorted(unknown)[:5]}.")
    return np.array([places[value] for value in present.tolist()], dtype=np.uint8)[inverse].reshape(values.shape)


def _read_image(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _read_at(file: Path, offset: int, size: int) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def _read_image_at(file: Path, offset: int, size: int) -> Image.Image:
    with Image.open(BytesIO(_read_at(file, offset, size))) as image:
        return image.convert("RGB")


def _read_sa1b_at(file: Path, offset: int, size: int) -> list[dict]:
    """SA-1B's annotations, which have no categories and no crowds, in COCO's format."""
    annotations = json.loads(_read_at(file, offset, size))["annotations"]
    return [{"category_id": 1, "iscrowd": 0, **annotation} for annotation in annotations]


def _find(name: str, root: str | Path, layout: str) -> Path:
    """A folder as it is named, or below `root`."""
    return next((folder for folder in (Path(name), Path(root, name)) if folder.is_dir()), None) or _missing(
        name, layout
    )


def _find_tars(name: str, root: str | Path) -> list[Path]:
    """Of a folder, a glob or a path, as it is named or below `root`; none if it is something else."""
    for place in (name, str(Path(root, name))):
        files = [Path(file) for file in sorted(glob.glob(f"{place}/*.tar" if Path(place).is_dir() else place))]
        if tars := [file for file in files if file.suffix == ".tar" and file.is_file()]:
            return tars
    return []


def _tar_members(tars: list[Path]) -> Iterator[_TarMember]:
    """Samples of webdataset tars, in their order: files with one name up to its first dot."""
    for file in tars:
        samples: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    if member.isfile():
                        folder, _, file_name = member.name.rpartition("/")
                        stem, _, ending = file_name.partition(".")
                        stem = f"{folder}/{stem}" if folder else stem
                        samples[stem][ending.lower()] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ValueError(f"{file} is no tar that can be read: {error}.") from error
        for stem, files in samples.items():
            yield _TarMember(file, stem, files)


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _pictures(folder: Path, layout: str) -> list[Path]:
    """All files of a folder, sorted, which are to be pictures and at least one."""
    paths = _listed(folder)
    if not paths:
        _missing(folder / "*", layout)
    for path in paths:
        if path.suffix.lower() not in PICTURES or not path.is_file():
            raise ValueError(f"{path} is no picture ({', '.join(PICTURES)}).")
    return paths


def _read_vocabulary(file: Path) -> Vocabulary:
    """A list of names or of lists of synonyms, or this package's own format."""
    content = _read_json(file)
    if isinstance(content, list):
        content = {"names": content}
    names = [[name] if isinstance(name, str) else list(name) for name in _get(content, "names", file)]
    if not names or not all(name and all(isinstance(synonym, str) for synonym in name) for name in names):
        raise ValueError(f"{file} is no list of names or of lists of synonyms.")
    return Vocabulary(content.get("source", str(file)), names, content.get("background"))


def _read_json(file: Path) -> Any:
    return _parse(file.read_bytes(), str(file))


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}.") from error


def _get(content: Any, key: str, where: str | Path) -> Any:
    """Raises `ValueError` where the key is missing."""
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{where} is not as expected: no {key!r} in {textwrap.shorten(str(content), 100)}.")
    return content[key]


def _require(path: Path, layout: str) -> Path:
    return path if path.exists() else _missing(path, layout)


def _missing(path: str | Path, layout: str) -> NoReturn:
    raise FileNotFoundError(f"{path} is not there. Expected: {layout}.")


# ---- The Hub ----


class HubSamples:
    """A split of a data set on the Hub, or of a folder in one of its formats, streamed each time it is iterated."""

    def __init__(self, rows: Any, name: str, build: Callable[[str, dict], Sample]):
        self.rows, self.name, self.build = rows, name, build

    def __iter__(self) -> Iterator[Sample]:
        for number, row in enumerate(self.rows):
            yield self.build(f"{self.name} {number}", row)


def open_hub(name: str, kind: Literal["classification", "captions", "segmentation"]) -> DataSet:
    """
    Args:
        name (`str`):
            "hf://owner/name", or "hf://" and a folder, and after a question mark what is not clear without: `config`,
            `split`, and for segmentation `classes`, a json file of names. Columns are known by their types: one image,
            and a ClassLabel, texts or a second image.

    Raises:
        ValueError: No such data set, split or columns.
    """
    path, _, query = name.removeprefix(HUB).partition("?")
    options = dict(parse_qsl(query))
    if unknown := sorted(options.keys() - {"config", "split", "classes"}):
        raise ValueError(f"{name} asks for {', '.join(unknown)}; it can have config, split and classes.")
    try:
        splits = load_dataset(path, options.get("config"), streaming=True)
    except Exception as error:  # datasets fails in many ways
        raise ValueError(f"{name} cannot be opened: {error}") from error
    split = options.get("split") or (next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        raise ValueError(f"{name}: say by ?split= which of its splits is meant: {', '.join(splits)}.")
    rows = splits[split]
    if rows.features is None:
        raise ValueError(f"{name} does not say what its columns are.")
    images = [column for column, feature in rows.features.items() if isinstance(feature, ImageFeature)]
    for column in images:
        rows = rows.cast_column(column, ImageFeature(decode=False))
    description = {"path": f"{path}, {options.get('config', 'default')}", "split": split}
    if kind == "segmentation":
        if len(images) != 2 or "classes" not in options:
            raise ValueError(f"{name} must have an image and a label image, and ?classes=; it has {images}.")
        vocabulary = _read_vocabulary(_require(Path(options["classes"]), "a list of the classes' names"))
        places = _own_places(vocabulary, name) | {255: IGNORED}
        build: Callable = partial(_hub_segmented, images[0], images[1], places)
        description["names"] = vocabulary.source
        return DataSet(name, HubSamples(rows, path, build), vocabulary.names, vocabulary.background, description)
    if len(images) != 1:
        raise ValueError(f"{name} must have one column of images; it has {images or 'none'}.")
    if kind == "captions":
        texts = [column for column, feature in rows.features.items() if _is_text(feature)]
        texts = [column for column in texts if column in CAPTION_COLUMNS] or texts
        if len(texts) != 1:
            raise ValueError(f"{name} must have one column of captions, such as caption; it has {texts or 'none'}.")
        return DataSet(
            name, HubSamples(rows, path, partial(_hub_captioned, images[0], texts[0])), description=description
        )
    labels = [column for column, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    if len(labels) != 1:
        raise ValueError(f"{name} must have one column of type ClassLabel; it has {labels or 'none'}.")
    names = [[label.replace("_", " ")] for label in rows.features[labels[0]].names]
    description |= {"names": f"of its column {labels[0]}", **_doubled(names)}
    samples = HubSamples(rows, path, partial(_hub_labelled, images[0], labels[0]))
    return DataSet(name, samples, names, description=description)


def _is_text(feature: Any) -> bool:
    """A text, or a list of texts."""
    inner = feature.feature if isinstance(feature, List) else feature
    return isinstance(inner, Value) and inner.dtype in ("string", "large_string")


def _hub_labelled(image: str, label: str, key: str, row: dict) -> LabelledImage:
    if not isinstance(row[label], int) or row[label] < 0:
        raise ValueError(f"{key} has no label: {row[label]}.")
    return LabelledImage(key, partial(_decode, row[image], key), row[label])


def _hub_captioned(image: str, text: str, key: str, row: dict) -> CaptionedImage:
    captions = [row[text]] if isinstance(row[text], str) else row[text] or []
    return _captioned(key, partial(_decode, row[image], key), tuple(c for c in map(str.strip, captions) if c), key)


def _hub_segmented(image: str, label_image: str, places: dict[int, int], key: str, row: dict) -> SegmentedImage:
    label_map = partial(_decode_label_map, row[label_image], row[image], places, key)
    return SegmentedImage(key, partial(_decode, row[image], key), label_map)


def _decode(cell: dict, key: str) -> Image.Image:
    if cell is None:
        raise ValueError(f"{key} has no image.")
    with Image.open(BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]) as image:
        return image.convert("RGB")


def _decode_label_map(cell: dict, image_cell: dict, places: dict[int, int], key: str) -> np.ndarray:
    if cell is None:
        raise ValueError(f"{key} has no label map.")
    with Image.open(BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]) as label_map:
        return _placed(np.asarray(label_map), places, _decode(image_cell, key).size, key)
