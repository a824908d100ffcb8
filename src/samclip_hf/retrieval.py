"""
Search of images and segments by text or by example: embeddings of images and segments, files that contain them, and
their comparison with a query. Needs `pyarrow`, which the extra `train` installs.

An index is a folder with `index.json` and tables `parquet/00000.parquet`, ..., which `datasets.load_dataset` reads. A
row is an image or a segment, see [`write_index`].
"""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

from . import SamClipForImageSegmentation, SamClipImageProcessor, SamClipMaskGenerationPipeline
from .files import atomic_path, remove_temporary_files, write_atomically
from .identity import hash_configuration, hash_weights
from .images import compress_rle, mask_to_coco_box

INDEX = "index.json"
SHARDS = "parquet"
KINDS = ("image", "segment")
ROWS_PER_SHARD = 10_000
ROWS_PER_GROUP = 1000


@torch.inference_mode()
def embed_images(
    model: SamClipForImageSegmentation, image_processor: SamClipImageProcessor, images: Sequence[Image.Image]
) -> np.ndarray:
    """
    Embeds whole images in one batch: `(num_images, projection_dim)` in float32, of length 1. Raises `ValueError` if an
    embedding is not finite.
    """
    inputs = image_processor(images, return_tensors="pt").to(model.device)
    sizes = inputs["reshaped_input_sizes"]
    return _to_array(model.get_image_features(inputs["pixel_values"].to(model.dtype), sizes).pooler_output)


@torch.inference_mode()
def embed_texts(
    model: SamClipForImageSegmentation, tokenizer, texts: Sequence[str], templates: str | Sequence[str]
) -> np.ndarray:
    """
    Embeds texts in prompt templates, see [`SamClipForImageSegmentation.embed_vocabulary`]: `(num_texts,
    projection_dim)` in float32, of length 1. Raises `ValueError` for texts and templates that cannot be used.
    """
    return _to_array(model.embed_vocabulary([texts], templates=templates, tokenizer=tokenizer).class_embeds)


@torch.inference_mode()
def embed_box(
    model: SamClipForImageSegmentation,
    image_processor: SamClipImageProcessor,
    image: Image.Image,
    box: Sequence[float],
) -> np.ndarray:
    """
    Embeds the object in a box, x1, y1, x2, y2 in pixels: the SAM head predicts its mask, and the CLIP head embeds the
    mask, see [`SamClipForImageSegmentation.embed_examples`]. Returns `(1, projection_dim)` in float32, of length 1.
    Raises `ValueError` for a box outside the image, and if the SAM head finds no object.
    """
    # With the image processor alone, the embedding stays where those of images are.
    vocabulary = model.embed_examples([image], [["query"]], boxes=[[list(box)]], processor=image_processor)
    return _to_array(vocabulary.class_embeds)


def embed_segments(everything: SamClipMaskGenerationPipeline, image: Image.Image, **options) -> list[dict[str, Any]]:
    """
    Segments everything in an image and embeds the segments. `options` are arguments of the pipeline.

    Returns the columns `bbox`, `segmentation`, `score` and `embedding` of each segment, see [`write_index`], in
    descending order of the score. Raises `ValueError` if an embedding is not finite.
    """
    found = everything(image, output_rle_mask=True, output_segment_embeds=True, **options)
    embeddings = _to_array(found["segment_embeds"])
    return [
        {
            "bbox": mask_to_coco_box(np.asarray(mask)),
            "segmentation": compress_rle(encoding),
            "score": score,
            "embedding": embedding,
        }
        for mask, encoding, score, embedding in zip(
            found["masks"], found["rle_mask"], found["scores"].tolist(), embeddings, strict=True
        )
    ]


def _to_array(embeds: torch.Tensor) -> np.ndarray:
    array = F.normalize(embeds.float(), dim=-1).cpu().numpy()
    if not np.isfinite(array).all():
        raise ValueError("an embedding is not finite: the model may need a type with a larger range than float16.")
    return array


def describe_model(model: SamClipForImageSegmentation, processor) -> dict[str, str]:
    """The hashes of the weights and of the configuration of a model, on which its embeddings depend. A vocabulary that
    is saved with the model has no effect. `processor` is as in [`hash_configuration`]."""
    return {"weights": hash_weights(model), "configuration": hash_configuration(model, processor)}


def write_index(
    folder: str | os.PathLike[str],
    rows: Iterable[dict[str, Any]],
    description: dict[str, Any],
    before_shard: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    r"""
    Writes an index. An index in `folder` is replaced: the shards that its `index.json` names are deleted if they are
    not written again. `index.json` is deleted first and written last, so that a folder with `index.json` is complete.

    Args:
        folder (`str` or `PathLike`):
            The folder.
        rows (iterable of `dict`):
            The rows, with the columns

            - `source` (`str`): the name of the image,
            - `height` and `width` (`int`): size of the image in pixels,
            - `kind` (`str`): `"image"` or `"segment"`,
            - `bbox` (`list[int]`): left, top, width and height in pixels, of a segment or of the whole image,
            - `segmentation` (`dict`): COCO's compressed run-length encoding of a segment, `None` for an image,
            - `score` (`float`): the predicted IoU of a segment's mask, `None` for an image,
            - `embedding` (`numpy.ndarray` of shape `(projection_dim,)` and type float32): of length 1.
        description (`dict`):
            Further entries of `index.json`. `"model"` has those of [`describe_model`].
        before_shard (`Callable[[str], None]`, *optional*):
            Called with the name of each shard in `folder`, such as `"parquet/00000.parquet"`, before it is written.

    Returns the content of `index.json`.
    """
    folder = Path(folder)
    num_old_shards = 0
    with contextlib.suppress(ValueError):  # no index, or one that is not complete
        num_old_shards = len(read_index(folder)["shards"])
    (folder / INDEX).unlink(missing_ok=True)
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    remove_temporary_files(folder / INDEX)
    counts: Counter[str] = Counter()
    with_segments: set[str] = set()
    shards, dimension, remaining = [], 0, iter(rows)
    for number in itertools.count():
        if (first := next(remaining, None)) is None:
            break
        dimension = dimension or len(first["embedding"])
        path = folder / SHARDS / f"{number:05d}.parquet"
        if before_shard is not None:
            before_shard(f"{SHARDS}/{path.name}")
        remove_temporary_files(path)
        own = itertools.chain([first], itertools.islice(remaining, ROWS_PER_SHARD - 1))
        num_rows = _write_shard(path, own, dimension, counts, with_segments)
        shards.append({"file": f"{SHARDS}/{path.name}", "rows": num_rows})
    for number in range(len(shards), num_old_shards):
        (folder / SHARDS / f"{number:05d}.parquet").unlink(missing_ok=True)
    content = {
        **description,
        "projection_dim": dimension,
        "num_images": counts["image"],
        "num_segments": counts["segment"],
        "num_images_without_segments": counts["image"] - len(with_segments),
        "shards": shards,
    }
    write_atomically(folder / INDEX, json.dumps(content, indent=1) + "\n")
    return content


def _write_shard(
    path: Path, rows: Iterable[dict[str, Any]], dimension: int, counts: Counter[str], with_segments: set[str]
) -> int:
    """Writes rows, counts their kinds, collects the sources of segments, and returns the number of rows."""
    schema = pa.schema(
        {
            "source": pa.string(),
            "height": pa.int32(),
            "width": pa.int32(),
            "kind": pa.string(),
            "bbox": pa.list_(pa.int32(), 4),
            "segmentation": pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()}),
            "score": pa.float64(),
            "embedding": pa.list_(pa.float32(), dimension),
        }
    )
    total, remaining = 0, iter(rows)
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, use_dictionary=["source", "kind"]) as writer,
    ):
        while group := list(itertools.islice(remaining, ROWS_PER_GROUP)):
            embeddings = np.concatenate([row["embedding"] for row in group])  # as one array: lists would be slow
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(embeddings, pa.float32()), dimension)
                if field.name == "embedding"
                else pa.array([row[field.name] for row in group], field.type)
                for field in schema
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            counts.update(row["kind"] for row in group)
            with_segments.update(row["source"] for row in group if row["kind"] == "segment")
            total += len(group)
    return total


class EmbeddingIndex:
    """
    The images or the segments of an index, in memory: 4 * `projection_dim` bytes each, and their other columns.

    Args:
        folder (`str` or `PathLike`):
            The folder.
        kind (`"image"` or `"segment"`):
            What is searched. Similarities of images and of segments are not compared with each other.

    Attributes:
        description (`dict`): The content of `index.json`.
        table (`pyarrow.Table`): The columns of [`write_index`] but `embedding`.
        embeddings (`numpy.ndarray` of shape `(num_rows, projection_dim)` and type float32): Of length 1.
        source_numbers (`numpy.ndarray` of shape `(num_rows,)`): A number for each `source`.

    Raises `ValueError` if the folder is not a complete index, or if it has no rows of this kind.
    """

    def __init__(self, folder: str | os.PathLike[str], kind: str):
        if kind not in KINDS:
            raise ValueError(f'kind must be "image" or "segment", got {kind!r}.')
        self.folder, self.kind = Path(folder), kind
        self.description = read_index(folder)
        total, dimension = self.description[f"num_{kind}s"], self.description["projection_dim"]
        if not total:
            reason = "no image could be read" if kind == "image" else "it was made without them, or none were found"
            raise ValueError(f"{folder} has no {kind}s: {reason}.")
        self.embeddings = np.empty((total, dimension), dtype=np.float32)
        tables, end = [], 0
        for shard in self.description["shards"]:
            table = self._read_shard(shard)
            part = table["embedding"].combine_chunks()
            start, end = end, end + len(table)
            self.embeddings[start:end] = part.flatten().to_numpy().reshape(-1, dimension)
            tables.append(table.drop_columns(["embedding"]))
        self.table = pa.concat_tables(tables)
        sources = self.table["source"].combine_chunks().dictionary_encode()
        self.source_numbers = sources.indices.to_numpy(zero_copy_only=False)

    def _read_shard(self, shard: dict[str, Any]) -> pa.Table:
        path = self.folder / shard["file"]
        try:
            has_all = pq.read_metadata(path).num_rows == shard["rows"]
            table = pq.read_table(path, filters=[("kind", "=", self.kind)])
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path} cannot be read ({error}): index the images again.") from error
        if not has_all:
            rows = shard["rows"]
            raise ValueError(f"{path} does not have the {rows} rows that {INDEX} lists: index the images again.")
        return table

    def check_model(self, model: SamClipForImageSegmentation, processor) -> None:
        """Raises `ValueError` if a model is not the one that the index was made with. `processor` is as in
        [`hash_configuration`]."""
        recorded = self.description["model"]
        found = describe_model(model, processor)
        different = [name for name in found if found[name] != recorded.get(name)]
        if different:
            name = recorded.get("name") or " + ".join(str(recorded[key]) for key in ("sam", "clip") if key in recorded)
            raise ValueError(
                f"{self.folder} was indexed with another model ({name or 'without a name'}; the "
                f"{' and the '.join(different)} differ): search with that model, or index the images again."
            )

    def search(self, query: np.ndarray, top_k: int, max_per_image: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        r"""
        Finds the rows that are most similar to a query.

        Args:
            query (`numpy.ndarray` of shape `(num_embeddings, projection_dim)`):
                Embeddings of length 1. With several of them, such as synonyms, the highest similarity counts.
            top_k (`int`):
                The number of rows, 1 or more; all rows if there are fewer.
            max_per_image (`int`, *optional*):
                The largest number of rows with the same `source`, 1 or more: of the segments of an image, only the
                most similar ones are found. No limit by default.

        Returns:
            `tuple[numpy.ndarray, numpy.ndarray]`: Cosine similarities `(top_k,)` in descending order, and the numbers
            of the rows `(top_k,)`. Rows with the same similarity are in the order of the index.

        Raises:
            ValueError: The query has another shape, or `top_k` or `max_per_image` is below 1.
        """
        if query.ndim != 2 or not len(query) or query.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"A query has the shape (num_embeddings, {self.embeddings.shape[1]}), but this one has {query.shape}."
            )
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        if max_per_image is not None and max_per_image < 1:
            raise ValueError(f"max_per_image must be at least 1, got {max_per_image}.")
        similarities = (self.embeddings @ query.astype(np.float32).T).max(axis=1)
        numbers = np.arange(len(similarities))
        if max_per_image is not None:
            order = np.argsort(-similarities, kind="stable")
            order = order[np.argsort(self.source_numbers[order], kind="stable")]  # by image, then by similarity
            sources = self.source_numbers[order]
            rank = numbers - np.searchsorted(sources, sources)  # within the image
            numbers = np.sort(order[rank < max_per_image])
        if top_k < len(numbers):
            lowest = np.partition(similarities[numbers], -top_k)[-top_k]
            numbers = numbers[similarities[numbers] >= lowest]  # more than top_k, if several rows are equal
        numbers = numbers[np.argsort(-similarities[numbers], kind="stable")][:top_k]
        return similarities[numbers], numbers

    def row(self, number: int) -> dict[str, Any]:
        """The columns of a row but `embedding`."""
        [row] = self.table.slice(number, 1).to_pylist()
        return row


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of `index.json`. Raises `ValueError` if the folder is not a complete index."""
    path = Path(folder) / INDEX
    try:
        content = json.loads(path.read_bytes())
        [content[name] for name in ("model", "projection_dim", "num_images", "num_segments", "shards")]
    except OSError as error:
        raise ValueError(
            f"{folder} is not an index, or an index that is not complete: run 'samclip index' until it ends."
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not the description of an index: index the images again.") from error
    return content


__all__ = [
    "EmbeddingIndex",
    "describe_model",
    "embed_box",
    "embed_images",
    "embed_segments",
    "embed_texts",
    "read_index",
    "write_index",
]
