"""
Measures the search of images and segments, and prints one of two tables:

    python benchmarks/search.py quality   # precision and average precision on scenes of the miniature
    python benchmarks/search.py time      # seconds of a search among random embeddings, and of reading them

Quality: each scene has one object of one of 48 classes, and the classes have equally many scenes. A query by words is
the name of a class. A query by example is a scene, or the box around its object; its own scene is not searched. An
image is relevant if it has the class of the query. A segment is relevant if, in addition, its IoU with the object is at
least 0.5; of several such segments of one object, the first one counts and the others are wrong. An object without such
a segment counts as not found. Precision@1 is the fraction of queries whose first result is relevant. Everything mode
and the embeddings are those of `samclip index`.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from samclip_hf import SamClipForImageSegmentation, SamClipMaskGenerationPipeline, SamClipProcessor, miniature
from samclip_hf.images import decode_mask, mask_to_prompt_box
from samclip_hf.miniature.scenes import CLASS_NAMES, TEMPLATES, Scene, evaluation_scene
from samclip_hf.retrieval import EmbeddingIndex, embed_box, embed_images, embed_segments, embed_texts, write_index

MIN_IOU = 0.5


@dataclass
class Gallery:
    """
    What is searched: an index, the scene of each row, and whether a row shows the object of its scene.

    scenes (`numpy.ndarray` of shape `(num_rows,)`), is_object (`numpy.ndarray` of shape `(num_rows,)` and type bool).
    """

    index: EmbeddingIndex
    scenes: np.ndarray
    is_object: np.ndarray


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
    for number, scene in enumerate(scenes):
        image = Image.fromarray(scene.image)
        common = {"source": str(number), "height": image.height, "width": image.width}
        [embedding] = embed_images(model, processor.image_processor, [image])
        whole = {"kind": "image", "bbox": [0, 0, *image.size], "segmentation": None, "score": None}
        rows.append(common | whole | {"embedding": embedding})
        for segment in embed_segments(everything, image, **miniature.MASK_GENERATION):
            mask = decode_mask(segment["segmentation"])
            iou = (mask & scene.masks[0]).sum() / (mask | scene.masks[0]).sum()
            of_segments.append((number, iou >= MIN_IOU))
            rows.append(common | {"kind": "segment"} | segment)
    write_index(folder, rows, {"model": {}})
    numbers, is_object = (np.array(column) for column in zip(*of_segments, strict=True))
    all_images = np.arange(len(scenes))
    return (
        Gallery(EmbeddingIndex(folder, "image"), all_images, all_images >= 0),
        Gallery(EmbeddingIndex(folder, "segment"), numbers, is_object),
    )


def judge(gallery: Gallery, query: np.ndarray, class_id: int, class_ids: np.ndarray, left_out: int | None = None):
    """
    Precision@1 and average precision of a query.

    query (`numpy.ndarray` of shape `(num_embeddings, projection_dim)`), class_ids (`numpy.ndarray` of shape
    `(num_scenes,)`), left_out (`int`, *optional*): a scene that is not searched.
    """
    _, order = gallery.index.search(query, len(gallery.scenes))
    order = order[gallery.scenes[order] != left_out]
    is_relevant = (class_ids == class_id) & (np.arange(len(class_ids)) != left_out)
    found, hits = set(), []
    for number in order.tolist():
        scene = int(gallery.scenes[number])
        hits.append(is_relevant[scene] and bool(gallery.is_object[number]) and scene not in found)
        found |= {scene} if hits[-1] else set()
    return float(hits[0]), average_precision(np.array(hits), int(is_relevant.sum()))


def average_precision(hits: np.ndarray, num_relevant: int) -> float:
    """The mean, over all relevant results, of the precision at the rank of each; 0 for those that are not found.
    `hits` is `(num_results,)` of type bool, in the order of the ranking."""
    ranks = np.flatnonzero(hits) + 1
    return float((np.arange(1, len(ranks) + 1) / ranks).sum() / num_relevant)


def print_quality(arguments: argparse.Namespace) -> None:
    processor = SamClipProcessor.from_teachers(miniature.sam_teacher(), miniature.clip_teacher())
    print(f"{arguments.num_scenes} scenes of one object for each seed, {len(CLASS_NAMES)} classes\n")
    print("precision@1 / mean average precision: mean over the seeds (lowest - highest)\n")
    print("| model | searched | query | precision@1 | mAP |\n|---|---|---|---|---|")
    found = {}
    for name in arguments.models:
        model = load_model(name)
        results: dict[tuple[str, str], list[np.ndarray]] = {}
        fractions, per_scene = [], []
        for seed in arguments.seeds:
            scenes = [evaluation_scene(seed, index) for index in range(arguments.num_scenes)]
            class_ids = np.array([scene.class_ids[0] for scene in scenes])
            with tempfile.TemporaryDirectory() as folder:
                images, segments = build(folder, scenes, model, processor)
            fractions.append(len(set(segments.scenes[segments.is_object].tolist())) / len(scenes))
            per_scene.append(len(segments.scenes) / len(scenes))
            words = [embed_texts(model, processor.tokenizer, [own], TEMPLATES) for own in CLASS_NAMES]
            cases: dict[tuple[str, str], list] = {}
            for kind, gallery in (("images", images), ("segments", segments)):
                cases[kind, "words"] = [
                    judge(gallery, words[class_id], class_id, class_ids) for class_id in sorted(set(class_ids))
                ]
            cases["images", "example: whole image"] = [
                judge(images, images.index.embeddings[[number]], own, class_ids, number)
                for number, own in enumerate(class_ids)
            ]
            cases["segments", "example: box"] = [
                judge(segments, embed_object(model, processor, scenes[number]), own, class_ids, number)
                for number, own in enumerate(class_ids)
            ]
            for case, values in cases.items():
                results.setdefault(case, []).append(np.mean(values, axis=0))
        for (kind, query), values in results.items():
            cells = [f"{np.mean(own):.3f} ({min(own):.3f} - {max(own):.3f})" for own in np.transpose(values)]
            print(f"| {name} | {kind} | {query} | {' | '.join(cells)} |", flush=True)
        found[name] = f"{np.mean(fractions):.3f} of the objects, {np.mean(per_scene):.1f} segments for each scene"
    print("\nObjects with a segment of an IoU of at least 0.5, and segments:")
    for name, text in found.items():
        print(f"{name}: {text}")


def embed_object(model: SamClipForImageSegmentation, processor: SamClipProcessor, scene: Scene) -> np.ndarray:
    """The embedding of the object in its box `(1, projection_dim)`."""
    left, top, right, bottom = mask_to_prompt_box(scene.masks[0])
    image = Image.fromarray(scene.image)
    return embed_box(model, processor.image_processor, image, [left, top, right + 1, bottom + 1])


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"quality": print_quality, "time": print_time}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--models", nargs="+", choices=("shipped", "unmerged"), default=["shipped", "unmerged"])
    parser.add_argument("--num_scenes", type=int, default=192, help="scenes of each seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 201, 301])
    parser.add_argument("--num_rows", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--projection_dim", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    tables[arguments.table](arguments)


if __name__ == "__main__":
    main()
