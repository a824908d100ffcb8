"""Evaluation sets for classification."""

from functools import partial
from pathlib import Path
from typing import Any

from datasets import ClassLabel

from .hub import HubSamples, open_hub, read_hub_image
from .layouts import (
    HUB_PREFIX,
    LAYOUTS,
    Split,
    find_folder,
    find_tars,
    layout_of,
    list_images,
    list_paths,
    parse_json,
    raise_missing,
    read_text,
    require,
)
from .samples import DataSet, LabeledImage, read_image
from .tar import index_samples
from .vocabularies import Vocabulary, describe_shared_names, load_vocabulary, read_vocabulary

CLASS_FOLDERS = "a folder with one folder of images per class, or webdataset tars with jpg and json (label, name)"


def open_classification(name: str, root: str | Path, split: Split = "val") -> DataSet[LabeledImage]:
    """
    Opens images with labels.

    Args:
        name (`str`):
            - "imagenet", "imagenet-v2" or "places365", below `root`;
            - "hf://owner/name", with one column of images and one of type `ClassLabel`;
            - a folder with a subfolder of images for each class. An optional `classes.json` lists the class names in
              the order of the subfolders: by number if all names of subfolders are numbers, otherwise alphabetical.
              Without it, the class names are the names of the subfolders;
            - a folder or a glob of webdataset tars with jpg and json files, `{"label": int, "name": str}`.
        root (`str` or `Path`):
            The folder that contains the named datasets and that relative paths refer to.
        split (`"train"` or `"val"`, *optional*, defaults to `"val"`):
            The split of "imagenet" or "places365".

    Raises:
        FileNotFoundError: A file is missing. The message states the expected layout.
        ValueError: Folders and classes do not match, or a sample is incomplete.
    """
    if name.startswith(HUB_PREFIX):
        return _open_hub(name)
    if name == "places365":
        return _open_places365(Path(root, "places365"), split)
    if name in ("imagenet", "imagenet-v2"):
        return _open_imagenet(name, root, split)
    if tars := find_tars(name, root):
        return _open_tars(name, tars)
    return _open_folder(name, root)


def _open_imagenet(name: str, root: str | Path, split: Split) -> DataSet[LabeledImage]:
    vocabulary = load_vocabulary("imagenet")
    assert vocabulary.ids is not None
    is_v2 = name == "imagenet-v2"
    if is_v2 and split == "train":
        raise ValueError("imagenet-v2 has no training images. Use those of imagenet.")
    folder = Path(root, "imagenetv2-matched-frequency-format-val" if is_v2 else f"imagenet/{split}")
    classes = [str(number) for number in range(1000)] if is_v2 else vocabulary.ids
    for path in [folder, *(folder / class_folder for class_folder in classes)]:
        require(path, layout_of(name, split))
    if unknown := {path.name for path in list_paths(folder) if path.is_dir()} - set(classes):
        raise ValueError(f"{folder} has folders that are not classes of {name}: {sorted(unknown)[:5]}.")
    description = {"path": str(folder), "split": "matched-frequency" if is_v2 else split}
    return _from_folders(name, folder, classes, vocabulary, description)


def _open_folder(name: str, root: str | Path) -> DataSet[LabeledImage]:
    accepted = f"{CLASS_FOLDERS}; {HUB_PREFIX}owner/name; or one of imagenet, imagenet-v2, places365"
    folder = find_folder(name, root, accepted)
    classes = [path.name for path in list_paths(folder) if path.is_dir()]
    if not classes:
        raise_missing(folder / "*/", CLASS_FOLDERS)
    vocabulary = Vocabulary("names of folders", [[class_folder.replace("_", " ")] for class_folder in classes])
    if (folder / "classes.json").exists():
        vocabulary = read_vocabulary(folder / "classes.json")
        if all(class_folder.isdecimal() for class_folder in classes):
            classes.sort(key=int)  # 10 after 9
    if len(vocabulary.names) != len(classes):
        raise ValueError(f"{folder} has {len(classes)} folders, but {len(vocabulary.names)} classes in classes.json.")
    return _from_folders(name, folder, classes, vocabulary, {"path": str(folder)})


def _from_folders(
    name: str, folder: Path, classes: list[str], vocabulary: Vocabulary, description: dict[str, Any]
) -> DataSet[LabeledImage]:
    samples = [
        LabeledImage(f"{class_folder}/{path.name}", partial(read_image, path), label)
        for label, class_folder in enumerate(classes)
        for path in list_images(folder / class_folder, LAYOUTS.get(name, CLASS_FOLDERS))
    ]
    description |= {"images": len(samples), "names": vocabulary.source, **describe_shared_names(vocabulary.names)}
    return DataSet(name, samples, vocabulary.names, description=description)


def _open_places365(folder: Path, split: Split) -> DataSet[LabeledImage]:
    """The category "/b/bus_station/indoor" is named "indoor bus station"."""
    layout = layout_of("places365", split)
    file = folder / ("places365_val.txt" if split == "val" else "places365_train_standard.txt")
    images = folder / ("val_256" if split == "val" else "data_256")
    classes: dict[int, str] = {}
    for category, label in _read_pairs(require(folder / "categories_places365.txt", layout)):
        place, *attributes = category[3:].split("/")
        classes[label] = " ".join([*attributes, place]).replace("_", " ")
    names = [[classes[label]] for label in sorted(classes)]
    if sorted(classes) != list(range(len(classes))):
        raise ValueError(
            f"The class numbers in {folder / 'categories_places365.txt'} must be consecutive and start at 0."
        )
    samples = []
    for file_name, label in _read_pairs(require(file, layout)):
        if label not in classes:
            raise ValueError(f"{file}: {file_name} has the unknown label {label}.")
        path = require(images / file_name.removeprefix("/"), layout)
        samples.append(LabeledImage(file_name, partial(read_image, path), label))
    source = "categories_places365.txt, indoor and outdoor put first"
    description = {"path": str(folder), "split": f"{split}, 256 px", "images": len(samples), "names": source}
    return DataSet("places365", samples, names, description=description | describe_shared_names(names))


def _read_pairs(file: Path) -> list[tuple[str, int]]:
    """Reads a file with a name and a number in each line."""
    pairs = []
    for line_number, line in enumerate(read_text(file).splitlines(), start=1):
        fields = line.rsplit(maxsplit=1)
        if len(fields) != 2 or not fields[1].isdigit():
            raise ValueError(f"{file}, line {line_number}: expected a name and a number, got {line!r}.")
        pairs.append((fields[0], int(fields[1])))
    return pairs


def _open_tars(name: str, tars: list[Path]) -> DataSet[LabeledImage]:
    labels: list[int] = []
    names: dict[int, str] = {}
    tar_samples = list(index_samples(tars))
    for sample in tar_samples:
        source = f"{sample.path}: {sample.name}.json"
        content = parse_json(sample.read("json"), source)
        label, class_name = content.get("label"), content.get("name")
        if not isinstance(label, int) or not isinstance(class_name, str):
            raise ValueError(f"{source} must have an integer 'label' and a 'name'.")
        if names.setdefault(label, class_name) != class_name:
            raise ValueError(f"{source} names class {label} {class_name!r}, other samples {names[label]!r}.")
        labels.append(label)
    indices = {label: index for index, label in enumerate(sorted(names))}
    samples = [
        LabeledImage(sample.key, sample.image_reader(), indices[label])
        for sample, label in zip(tar_samples, labels, strict=True)
    ]
    class_names = [[names[label]] for label in indices]
    description = {"path": name, "images": len(samples), "names": "of the samples"}
    return DataSet(name, samples, class_names, description=description | describe_shared_names(class_names))


def _open_hub(name: str) -> DataSet[LabeledImage]:
    split = open_hub(name)
    image_column = split.single_image_column()
    features = split.rows.features
    label_columns = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(label_columns) != 1:
        raise ValueError(f"{name} must have one column of type ClassLabel; it has {label_columns or 'none'}.")
    names = [[label.replace("_", " ")] for label in features[label_columns[0]].names]
    description = {**split.description, "names": f"of its column {label_columns[0]}", **describe_shared_names(names)}
    samples: Any = HubSamples(split, partial(_build_hub_sample, image_column, label_columns[0]))
    return DataSet(name, samples, names, description=description)


def _build_hub_sample(image_column: str, label_column: str, key: str, row: dict[str, Any]) -> LabeledImage:
    label = row[label_column]
    if not isinstance(label, int) or label < 0:
        raise ValueError(f"{key} has no label: {label}.")
    return LabeledImage(key, partial(read_hub_image, row[image_column], key), label)
