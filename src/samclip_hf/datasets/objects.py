"""Evaluation sets for instance segmentation."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..images import decode_mask, mask_to_coco_box
from .layouts import LAYOUTS, find_tars, get, index_by_id, parse_json, raise_missing, read_json, require
from .samples import DataSet, ImageWithObjects, name_errors, read_image
from .tar import TarSample, index_samples

OBJECT_TARS = "tars in SA-1B's format, jpg and json"


def open_objects(name: str, root: str | Path, detections: str | Path | None = None) -> DataSet[ImageWithObjects]:
    """
    Opens images with object masks.

    Args:
        name (`str`):
            - "coco" (val2017) or "lvis" (v1 val), below `root`;
            - a folder or a glob of tars in SA-1B's format, with jpg and json files. All objects get the category 1.
        root (`str` or `Path`):
            The folder that contains the named datasets and that relative paths refer to.
        detections (`str` or `Path`, *optional*):
            A detector's results in COCO's format: a list of `{"image_id", "category_id", "bbox", "score"}`.

    Returns:
        `DataSet`: The description contains `"categories"`, the list in the annotation file, if there is one, and
        `"boxes"`, the file name of the detections, if they are given.

    Raises:
        FileNotFoundError: A file is missing. The message states the expected layout.
        ValueError: Annotations or detections are of images or categories that are not in the dataset.
    """
    if name in ("coco", "lvis"):
        samples, description = _open_coco(name, Path(root))
        categories = {category["id"] for category in description["categories"]}
    else:
        tars = find_tars(name, root)
        if not tars:
            raise_missing(name, f"{OBJECT_TARS}; or one of coco, lvis")
        samples, description, categories = _open_tars(tars), {"path": name}, {1}
    if detections is not None:
        by_image = _read_detections(Path(detections), {sample.image_info["id"] for sample in samples}, categories)
        samples = [
            ImageWithObjects(
                sample.key, sample.image, sample.objects, by_image.get(sample.image_info["id"], []), sample.image_info
            )
            for sample in samples
        ]
        description["boxes"] = Path(detections).name
    description["images"] = len(samples)
    return DataSet(name, samples, description=description)


def _open_coco(name: str, root: Path) -> tuple[list[ImageWithObjects], dict[str, Any]]:
    is_coco = name == "coco"
    file = root / ("coco/annotations/instances_val2017.json" if is_coco else "lvis/lvis_v1_val.json")
    content = read_json(require(file, LAYOUTS[name]))
    images, categories = (index_by_id(content, key, file) for key in ("images", "categories"))
    annotations: dict[Any, list[dict]] = {image_id: [] for image_id in images}
    for annotation in get(content, "annotations", file):
        image_id, category_id = (get(annotation, key, file) for key in ("image_id", "category_id"))
        if image_id not in images or category_id not in categories:
            raise ValueError(f"{file}: annotation {annotation.get('id')} is of an unknown image or category.")
        annotations[image_id].append({"iscrowd": 0, **annotation})
    samples = []
    for image_id in sorted(images):
        location = get(images[image_id], "file_name" if is_coco else "coco_url", file)
        parts = ["val2017", location] if is_coco else location.split("/")[-2:]  # LVIS has images of two splits
        path = require(root.joinpath("coco", *parts), LAYOUTS[name])
        size = _size(images[image_id], file)
        read = partial(_read_image, partial(read_image, path, annotated_size=size), size, str(path))
        objects = partial(_complete_objects, annotations[image_id], size, f"{file}: {location}")
        samples.append(ImageWithObjects(path.name, read, objects, image_info=images[image_id]))
    description = {"path": str(file), "split": "val2017" if is_coco else "v1 val", "categories": content["categories"]}
    return samples, description


def _open_tars(tars: list[Path]) -> list[ImageWithObjects]:
    samples: list[ImageWithObjects] = []
    image_ids = set()
    for sample in index_samples(tars):
        source = f"{sample.path}: {sample.name}.json"
        image_info = get(parse_json(sample.read("json"), source), "image", source)
        image_id = get(image_info, "image_id", source)
        if image_id in image_ids:
            raise ValueError(f"{source} has the image id {image_id} of another image.")
        image_ids.add(image_id)
        size = _size(image_info, source)
        read = partial(_read_image, sample.image_reader(size), size, sample.key)
        objects = partial(_read_sa1b_objects, sample, size, source)
        image_info = {**image_info, "id": image_id}
        samples.append(ImageWithObjects(sample.key, read, objects, image_info=image_info))
    return samples


def _size(image_info: dict[str, Any], source: str | Path) -> tuple[int, int]:
    """Returns the height and width of an image's entry in an annotation file."""
    return get(image_info, "height", source), get(image_info, "width", source)


def _read_image(read: Callable[[], Image.Image], size: tuple[int, int], name: str) -> Image.Image:
    """Reads an image. Raises `ValueError` if it does not have the size (height, width) of its annotations."""
    image = read()
    if (image.height, image.width) != size:
        raise ValueError(f"{name} has the size {(image.height, image.width)}, its annotations {size} (height, width).")
    return image


def _read_sa1b_objects(sample: TarSample, size: tuple[int, int], source: str) -> list[dict]:
    """Returns SA-1B's annotations in COCO's format. SA-1B has neither categories nor crowds."""
    annotations = get(parse_json(sample.read("json"), source), "annotations", source)
    return _complete_objects([{"category_id": 1, "iscrowd": 0, **a} for a in annotations], size, source)


def _complete_objects(annotations: list[dict], size: tuple[int, int], source: str) -> list[dict]:
    """Returns annotations with the area and the box of their masks, if they do not have them, and numbers for missing
    ids. Raises `ValueError` if a mask cannot be decoded, or does not have this size (height, width)."""
    completed = []
    for number, annotation in enumerate(annotations):
        annotation = {"id": number} | {name: value for name, value in annotation.items() if value is not None}
        with name_errors(f"{source}: annotation {annotation['id']}", "a mask"):
            mask = decode_mask(annotation["segmentation"], size)
        if mask.shape != size:
            raise ValueError(f"{source}: annotation {annotation['id']} has the size {mask.shape}, its image {size}.")
        completed.append({"area": int(mask.sum()), "bbox": mask_to_coco_box(mask), **annotation})
    return completed


def _read_detections(file: Path, image_ids: Iterable[Any], categories: set[int]) -> dict[Any, list[dict]]:
    """Returns the detections by image id. Images without detections are left out."""
    known_images = set(image_ids)
    by_image = defaultdict(list)
    for detection in read_json(require(file, "detections in COCO's result format")):
        if missing := {"image_id", "category_id", "bbox", "score"} - set(detection):
            raise ValueError(f"{file}: a detection has no {', '.join(sorted(missing))}: {detection}.")
        if detection["image_id"] not in known_images or detection["category_id"] not in categories:
            raise ValueError(f"{file}: a detection is of an unknown image or category: {detection}.")
        by_image[detection["image_id"]].append(detection)
    return by_image
