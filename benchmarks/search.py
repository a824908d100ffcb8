"""
Measures the search of images and segments, and prints one of two tables:

    python benchmarks/search.py quality   # precision and average precision on scenes of the miniature
    python benchmarks/search.py time      # seconds of a search among random embeddings, and of samclip index

Quality: the first objects of the scenes are of 48 classes in turn. A query by words is the name of a class. A query by
example is a scene of one object, or the box around the first object of a scene; its own scene is not searched. Queries
for which nothing is relevant are left out. An image is relevant if it has an object of the class. A segment is
relevant if it has an IoU of at least 0.5 with an object of the class; of several such segments of one object, the
first one counts and the others are wrong. An object without such a segment counts as not found. Precision@1 is the
fraction of queries whose first result is relevant. Everything mode and the embeddings are those of `samclip index`.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from samclip_cli import main as samclip
from samclip_hf import SamClipForImageSegmentation, SamClipMaskGenerationPipeline, SamClipProcessor, miniature
from samclip_hf.images import decode_mask, mask_to_prompt_box
from samclip_hf.miniature.scenes import CLASS_NAMES, TEMPLATES, Scene, evaluation_scene, render
from samclip_hf.retrieval import EmbeddingIndex, embed_box, embed_images, embed_segments, embed_texts, write_index

MIN_IOU = 0.5


@dataclass
class Gallery:
    """
    What is searched, and the truth. A target is an image, or an object in it.

    index ([`EmbeddingIndex`]):
        The rows.
    scenes (`numpy.ndarray` of shape `(num_rows,)`):
        The scene of each row.
    targets (`numpy.ndarray` of shape `(num_rows,)`):
        The target that each row shows, -1 for a segment of no object.
    target_scenes (`numpy.ndarray` of shape `(num_targets,)`):
        The scene of each target.
    target_classes (`numpy.ndarray` of shape `(num_targets, 48)` and type bool):
        The classes of each target: one of an object, and those of all objects of an image.
    """

    index: EmbeddingIndex
    scenes: np.ndarray
    targets: np.ndarray
    target_scenes: np.ndarray
    target_classes: np.ndarray

    @property
    def num_found(self) -> int:
        """Targets that a row shows."""
        return len(set(self.targets.tolist()) - {-1})


def draw(seed: int, index: int, num_objects: int) -> Scene:
    if num_objects == 1:
        return evaluation_scene(seed, index)
    return render(seed, index, num_objects, class_id=index % len(CLASS_NAMES))


def load_model(name: str) -> SamClipForImageSegmentation:
    if name == "unmerged":
        teachers = miniature.sam_teacher(), miniature.clip_teacher()
        return SamClipForImageSegmentation.from_teachers(*teachers, merged=False).eval()
    return SamClipForImageSegmentation.from_pretrained(miniature.checkpoint()).eval()


def build(
    folder: str, scenes: list[Scene], model: SamClipForImageSegmentation, processor: SamClipProcessor
) -> tuple[Gallery, Gallery]:
    """The galleries of images and of segments."""
    everything = SamClipMaskGenerationPipeline(model=model, image_processor=processor.image_processor)
    rows, of_segments = [], []
    objects = [(number, own) for number, scene in enumerate(scenes) for own in range(len(scene.masks))]
    for number, scene in enumerate(scenes):
        image = Image.fromarray(scene.image)
        common = {"source": str(number), "height": image.height, "width": image.width}
        [embedding] = embed_images(model, processor.image_processor, [image])
        whole = {"kind": "image", "bbox": [0, 0, *image.size], "segmentation": None, "score": None}
        rows.append(common | whole | {"embedding": embedding})
        for segment in embed_segments(everything, image, **miniature.MASK_GENERATION):
            mask = decode_mask(segment["segmentation"])
            ious = [(mask & own).sum() / (mask | own).sum() for own in scene.masks]
            target = objects.index((number, int(np.argmax(ious)))) if max(ious) >= MIN_IOU else -1
            of_segments.append((number, target))
            rows.append(common | {"kind": "segment"} | segment)
    write_index(folder, rows, {"model": {}})
    identity = np.eye(len(CLASS_NAMES), dtype=bool)
    object_scenes, object_classes = zip(*((n, identity[scenes[n].class_ids[own]]) for n, own in objects), strict=True)
    image_classes = np.stack([identity[list(scene.class_ids)].any(axis=0) for scene in scenes])
    numbers, targets = (np.array(column) for column in zip(*of_segments, strict=True))
    every = np.arange(len(scenes))
    return (
        Gallery(EmbeddingIndex(folder, "image"), every, every, every, image_classes),
        Gallery(
            EmbeddingIndex(folder, "segment"), numbers, targets, np.array(object_scenes), np.stack(object_classes)
        ),
    )


def judge(
    gallery: Gallery, query: np.ndarray, class_id: int, left_out: int | None = None
) -> tuple[float, float] | None:
    """
    Precision@1 and average precision of a query, `None` if nothing is relevant.

    query (`numpy.ndarray` of shape `(num_embeddings, projection_dim)`), class_id (`int`), left_out (`int`,
    *optional*): a scene that is not searched.
    """
    is_relevant = gallery.target_classes[:, class_id] & (gallery.target_scenes != left_out)
    if not is_relevant.any():
        return None
    _, order = gallery.index.search(query, len(gallery.scenes))
    found: set[int] = set()
    hits = []
    for target in gallery.targets[order[gallery.scenes[order] != left_out]].tolist():
        hits.append(target >= 0 and bool(is_relevant[target]) and target not in found)
        found.add(target)
    return float(hits[0]), average_precision(np.array(hits), int(is_relevant.sum()))


def average_precision(hits: np.ndarray, num_relevant: int) -> float:
    """The mean, over all relevant results, of the precision at the rank of each; 0 for those that are not found.
    `hits` is `(num_results,)` of type bool, in the order of the ranking."""
    ranks = np.flatnonzero(hits) + 1
    return float((np.arange(1, len(ranks) + 1) / ranks).sum() / num_relevant)


def print_quality(arguments: argparse.Namespace) -> None:
    processor = SamClipProcessor.from_teachers(miniature.sam_teacher(), miniature.clip_teacher())
    print(f"{arguments.num_scenes} scenes for each seed, {len(CLASS_NAMES)} classes; mean over the seeds ", end="")
    print(
        "(lowest - highest)\n\n| model | objects | searched | query | precision@1 | mAP |\n|---|---|---|---|---|---|"
    )
    about = []
    for name, num_objects in itertools.product(arguments.models, arguments.num_objects):
        model = load_model(name)
        results: dict[tuple[str, str], list[np.ndarray]] = {}
        found, per_scene = [], []
        for seed in arguments.seeds:
            scenes = [draw(seed, index, num_objects) for index in range(arguments.num_scenes)]
            with tempfile.TemporaryDirectory() as folder:
                images, segments = build(folder, scenes, model, processor)
            found.append(segments.num_found / len(segments.target_scenes))
            per_scene.append(len(segments.scenes) / len(scenes))
            words = [embed_texts(model, processor.tokenizer, [own], TEMPLATES) for own in CLASS_NAMES]
            cases = {
                ("images", "words"): [judge(images, query, number) for number, query in enumerate(words)],
                ("segments", "words"): [judge(segments, query, number) for number, query in enumerate(words)],
            }
            if num_objects == 1:
                cases["images", "example: whole image"] = [
                    judge(images, images.index.embeddings[[number]], scene.class_ids[0], number)
                    for number, scene in enumerate(scenes)
                ]
            cases["segments", "example: box"] = [
                judge(segments, embed_object(model, processor, scene), scene.class_ids[0], number)
                for number, scene in enumerate(scenes)
            ]
            for case, values in cases.items():
                answered = [own for own in values if own is not None] or [(np.nan, np.nan)]
                results.setdefault(case, []).append(np.mean(answered, axis=0))
        for (kind, query), values in results.items():
            cells = [f"{np.mean(own):.3f} ({min(own):.3f} - {max(own):.3f})" for own in np.transpose(values)]
            print(f"| {name} | {num_objects} | {kind} | {query} | {' | '.join(cells)} |", flush=True)
        about.append(f"| {name} | {num_objects} | {np.mean(found):.3f} | {np.mean(per_scene):.1f} |")
    print(f"\n| model | objects | objects with a segment of an IoU of {MIN_IOU} or more | segments for each scene |")
    print("|---|---|---|---|\n" + "\n".join(about))


def embed_object(model: SamClipForImageSegmentation, processor: SamClipProcessor, scene: Scene) -> np.ndarray:
    """The embedding of the object in its box `(1, projection_dim)`."""
    left, top, right, bottom = mask_to_prompt_box(scene.masks[0])
    image = Image.fromarray(scene.image)
    return embed_box(model, processor.image_processor, image, [left, top, right + 1, bottom + 1])


def index_seconds(num_images: int) -> dict[str, float]:
    """Seconds of `samclip index` in this process for scenes of the miniature, with loading the model."""
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name, "photos")
        photos.mkdir()
        for index in range(num_images):
            Image.fromarray(render(seed=0, index=index).image).save(photos / f"{index:06d}.png")
        command = ["index", str(photos), "--output"]
        samclip([*command, str(Path(name, "first")), "--no_segments"])  # imports libraries
        for part, options in (("with segments", []), ("`--no_segments`", ["--no_segments"])):
            start = time.perf_counter()
            assert samclip([*command, str(Path(name, part)), *options]) == 0
            seconds[part] = time.perf_counter() - start
    return seconds


def print_time(arguments: argparse.Namespace) -> None:
    generator = np.random.default_rng(0)

    def random(number: int) -> np.ndarray:
        values = generator.standard_normal((number, arguments.projection_dim), dtype=np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    def rows():
        for number, embedding in enumerate(random(arguments.num_rows)):
            common = {"source": f"{number}.jpg", "height": 480, "width": 640, "kind": "image"}
            yield common | {"bbox": [0, 0, 640, 480], "segmentation": None, "score": None, "embedding": embedding}

    with tempfile.TemporaryDirectory() as folder:
        write_index(folder, rows(), {"model": {}})
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
        start = time.perf_counter()
        index = EmbeddingIndex(folder, "image")
        reading = time.perf_counter() - start
        seconds = []
        for query in random(arguments.repeats + 1)[:, None]:
            start = time.perf_counter()
            index.search(query, 10)
            seconds.append(time.perf_counter() - start)
    print(f"{arguments.num_rows} rows of {arguments.projection_dim} numbers, {size / 1e6:.0f} MB of parquet files")
    print(f"{torch.get_num_threads()} threads, {arguments.repeats} searches\n\n| part | seconds |\n|---|---|")
    print(f"| read the index | {reading:.2f} |")
    print(f"| search, top 10: median (lowest - highest) | {np.median(seconds[1:]):.3f} ", end="")
    print(f"({min(seconds[1:]):.3f} - {max(seconds[1:]):.3f}) |")
    for part, own in index_seconds(arguments.num_images).items():
        rate = arguments.num_images / own
        print(f"| `samclip index`, {arguments.num_images} scenes, {part} | {own:.1f} ({rate:.1f} images/s) |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"quality": print_quality, "time": print_time}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--models", nargs="+", choices=("shipped", "unmerged"), default=["shipped", "unmerged"])
    parser.add_argument("--num_scenes", type=int, default=96, help="scenes of each seed (default: %(default)s)")
    parser.add_argument("--num_objects", type=int, nargs="+", default=[1, 3], help="objects in a scene, at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 201, 301])
    parser.add_argument("--num_rows", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--projection_dim", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--num_images", type=int, default=40, help="for samclip index (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    tables[arguments.table](arguments)


if __name__ == "__main__":
    main()
