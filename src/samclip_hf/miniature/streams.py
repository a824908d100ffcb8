"""
The procedural scenes as sharded streams of `datasets`, drawn in about 1 ms each when they are read.

`images()` has the columns of webdataset tars with photographs, `masks()` those of SA-1B's tars, as
`load_dataset("webdataset", data_files=..., streaming=True)` returns them.
"""

import io
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from datasets import Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage
from pycocotools import mask as coco_mask

from .scenes import IMAGE_SIZE, Scene, render

IMAGE_FEATURES = Features({"jpg": Image(), "__key__": Value("string"), "__url__": Value("string")})
MASK_FEATURES = Features(
    {
        "jpg": Image(),
        "json": {
            "image": {
                "image_id": Value("int64"),
                "width": Value("int64"),
                "height": Value("int64"),
                "file_name": Value("string"),
            },
            "annotations": List(
                {
                    "id": Value("int64"),
                    "segmentation": {"size": List(Value("int64")), "counts": Value("string")},
                    "bbox": List(Value("float64")),
                    "area": Value("int64"),
                    "predicted_iou": Value("float64"),
                    "stability_score": Value("float64"),
                    "crop_box": List(Value("float64")),
                    "point_coords": List(List(Value("float64"))),
                }
            ),
        },
        "__key__": Value("string"),
        "__url__": Value("string"),
    }
)


def images(seed: int = 0, num_shards: int = 256, num_images: int = 131_072) -> IterableDataset:
    """
    Returns a stream of images for the CLIP loss, with the columns `jpg`, `__key__` and `__url__`. Half of the images
    contain a single object, the other half none to four. Held-out classes occur.
    """
    return IterableDataset.from_generator(
        _images, features=IMAGE_FEATURES, gen_kwargs={"shards": _shards(seed, num_shards, num_images)}
    )


def masks(seed: int = 0, num_shards: int = 128, num_images: int = 32_768) -> IterableDataset:
    """
    Returns a stream of images with annotations in SA-1B's format for the SAM loss, with the columns `jpg`, `json`,
    `__key__` and `__url__`. Each image contains one to four objects.
    """
    return IterableDataset.from_generator(
        _masks, features=MASK_FEATURES, gen_kwargs={"shards": _shards(seed, num_shards, num_images)}
    )


def _shards(seed: int, num_shards: int, num_images: int) -> list[tuple[int, int, int]]:
    """
    Returns `(seed, first index, end index)` of each shard. `datasets` distributes the entries of a list over workers
    and processes.
    """
    edges = np.linspace(0, num_images, num_shards + 1).astype(int).tolist()
    return [(seed, first, end) for first, end in itertools.pairwise(edges)]


def _images(shards: list[tuple[int, int, int]]) -> Iterator[dict]:
    for _, scene, row in _rows(shards, lambda index: 1 if index % 2 else None):
        yield {"jpg": _encode_image(scene.image), **row}


def _masks(shards: list[tuple[int, int, int]]) -> Iterator[dict]:
    for index, scene, row in _rows(shards, lambda index: 1 + index % 4):
        yield {"jpg": _encode_image(scene.image), "json": annotations(scene, index), **row}


def _rows(
    shards: list[tuple[int, int, int]], num_objects: Callable[[int], int | None]
) -> Iterator[tuple[int, Scene, dict[str, str]]]:
    """Yields the index, the scene and the columns `__key__` and `__url__` of every row."""
    for seed, first, end in shards:
        for index in range(first, end):
            row = {"__key__": f"sa_{index}", "__url__": f"miniature://{seed}/{first:06d}.tar"}
            yield index, render(seed, index, num_objects=num_objects(index)), row


def _encode_image(image: np.ndarray) -> dict[str, bytes | None]:
    # `datasets` stores encoded images. BMP is lossless and faster than PNG.
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, format="BMP")
    return {"bytes": buffer.getvalue(), "path": None}


def annotations(scene: Scene, image_id: int) -> dict:
    """
    Returns the masks of a scene in SA-1B's format: COCO's compressed run-length encoding, and boxes as
    `x, y, width, height` in pixels.
    """
    objects = []
    for number, mask in enumerate(scene.masks):
        encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        rows, columns = np.nonzero(mask)
        middle = len(rows) // 2
        objects.append(
            {
                "id": image_id * 8 + number,
                "segmentation": {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")},
                "bbox": coco_mask.toBbox(encoded).tolist(),
                "area": len(rows),
                "predicted_iou": 1.0,
                "stability_score": 1.0,
                "crop_box": [0.0, 0.0, float(IMAGE_SIZE), float(IMAGE_SIZE)],
                "point_coords": [[float(columns[middle]), float(rows[middle])]],
            }
        )
    image = {"image_id": image_id, "width": IMAGE_SIZE, "height": IMAGE_SIZE, "file_name": f"sa_{image_id}.jpg"}
    return {"image": image, "annotations": objects}
