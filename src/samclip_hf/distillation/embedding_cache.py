"""
The embedding cache: the CLIP teacher's embeddings of the training images, which are computed once by `samclip embed`.
Training reads them with the images and does not run the teacher.

A cache is a folder with `embedding_cache.json`, a [`CacheDescription`], and a parquet file for each shard of the data.
A parquet file has a row for each sample of the shard, in the same order. Its columns are `key` and `embeds`, the
concatenated float16 embeddings of `num_crops` crops of the sample, or NaN if the sample cannot be used. The crops are
those of the first `num_crops` epochs of a training with the same seed. In later epochs, training repeats them.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.utils import logging

from ..datasets.streams import UNREADABLE_SHARD, SkippedSampleError, Stream, decode_image
from ..files import atomic_path, write_atomically
from ..modeling_samclip import SamClipModel
from .arguments import rename_deprecated_arguments
from .crops import cut, draw_crop, sample_rng
from .teachers import ClipTeacher, check_text_space

logger = logging.get_logger(__name__)

DESCRIPTION_NAME = "embedding_cache.json"
DEPRECATED_DESCRIPTION_NAME = "store.json"  # of version 0.1


@dataclass
class CacheDescription:
    """
    Describes the contents of a cache. Caches with equal descriptions have equal embeddings.

    Args:
        teacher (`str`):
            Name or folder of the CLIP teacher.
        text_space (`list[float]`):
            First values of the teacher's [`text_space`], which identify it.
        projection_dim (`int`):
            Dimension of the embeddings.
        image_size (`int`), resample (`int`), image_mean (`list[float]`), image_std (`list[float]`):
            The teacher's preprocessing. `resample` is a `PIL.Image.Resampling`.
        seed (`int`), min_crop_scale (`float`), num_crops (`int`):
            Seed, smallest relative area and number of the crops of each sample.
        shards (`list[list[str]]`):
            File names of the shards of each stream.
    """

    teacher: str
    text_space: list[float]
    projection_dim: int
    image_size: int
    resample: int
    image_mean: list[float]
    image_std: list[float]
    seed: int
    min_crop_scale: float
    num_crops: int
    shards: list[list[str]]


class EmbeddingCache:
    r"""
    A complete embedding cache, which can replace a [`ClipTeacher`].

    Args:
        folder (`str` or `Path`):
            The output folder of `samclip embed`.

    Raises:
        FileNotFoundError: If `folder` is not an embedding cache.
        ValueError: If shards are missing, if the cache was computed by an incompatible version, or if its description
            is a file of another program.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        description = _read_description(self.folder)
        if description is None:
            raise FileNotFoundError(f"{folder} is not an embedding cache. Compute one with `samclip embed`.")
        if description.keys() != CacheDescription.__dataclass_fields__.keys():
            raise ValueError(
                f"{folder} was computed by an incompatible version. Compute the embeddings again, in a new folder."
            )
        self.description = CacheDescription(**description)
        if not (self.folder / DESCRIPTION_NAME).is_file():
            logger.warning(
                f"{folder} was computed by version 0.1, which did not apply the EXIF orientation of photographs. "
                "Compute the embeddings again, in a new folder, if the images have one."
            )
        missing = [
            path
            for number, names in enumerate(self.description.shards)
            for shard in range(len(names))
            if not (path := shard_path(self.folder, number, shard)).is_file()
        ]
        if missing:
            raise ValueError(
                f"{folder} is incomplete: {len(missing)} shards are missing, the first is {missing[0]}. Run the same "
                "`samclip embed` command again to complete it."
            )

    def check(self, student: SamClipModel, streams: list[Stream], min_crop_scale: float, teacher: str) -> None:
        """
        Checks that the cache matches a training.

        Args:
            student ([`SamClipModel`]):
                The student, whose text tower must be the teacher's.
            streams (`list[Stream]`):
                The streams of `clip_data`.
            min_crop_scale (`float`), teacher (`str`):
                The arguments `min_crop_scale` and `clip_teacher`.

        Raises:
            ValueError: If the cache was computed with another teacher, other crops or other data.
        """
        cached_teacher = Path(self.description.teacher).name
        if Path(teacher).name not in (cached_teacher, "miniature"):
            raise ValueError(f"{self.folder} contains embeddings of {cached_teacher}, but clip_teacher is {teacher}.")
        check_text_space(student, torch.tensor(self.description.text_space))
        if min_crop_scale != self.description.min_crop_scale:
            raise ValueError(
                f"{self.folder} contains embeddings of crops with min_crop_scale {self.description.min_crop_scale}, "
                f"but min_crop_scale is {min_crop_scale}."
            )
        names = [shard_names(stream) for stream in streams]
        if names != self.description.shards:
            cached, given = ([len(of_stream) for of_stream in shards] for shards in (self.description.shards, names))
            raise ValueError(
                f"{self.folder} contains embeddings of other data: numbers or names of shards differ. The embedding "
                f"cache has {cached} shards, clip_data has {given}."
            )

    def checksum(self) -> str:
        """Returns a checksum of the description, without the teacher's name or folder, which may change."""
        description = asdict(self.description) | {"teacher": None}
        return f"{zlib.crc32(json.dumps(description).encode()):08x}"

    def attach(self, streams: list[Stream]) -> list[Stream]:
        """Returns the streams with the embeddings of each sample, `embeds` `(num_crops, projection_dim)`."""
        return [stream.with_embeddings(CachedEmbeddings(self.folder, number)) for number, stream in enumerate(streams)]


@dataclass
class CachedEmbeddings:
    """The embeddings of the samples of stream `number` of the cache in `folder`."""

    folder: Path
    number: int

    def read(self, shard: int) -> tuple[list[str], np.ndarray]:
        """Reads the keys of a shard's samples and their embeddings `(num_samples, num_crops, projection_dim)`,
        float16."""
        table = pq.read_table(shard_path(self.folder, self.number, shard))
        num_crops = int(table.schema.metadata[b"num_crops"])
        values = table.column("embeds").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return table.column("key").to_pylist(), values.reshape(len(table), num_crops, -1)


def shard_path(folder: Path, number: int, shard: int) -> Path:
    """Returns the path of the embeddings of a shard of stream `number`."""
    return folder / f"{number:02d}" / f"{shard:06d}.parquet"


def shard_names(stream: Stream) -> list[str]:
    """Returns the file names of a stream's shards. Folders are excluded, because they may change."""
    return [Path(name).name for name in stream.shards.names]


def describe_cache(
    teacher: ClipTeacher, streams: list[Stream], seed: int, min_crop_scale: float, num_crops: int
) -> CacheDescription:
    """Returns the description of a cache with the embeddings of these streams."""
    return CacheDescription(
        teacher=str(teacher.model.name_or_path),
        projection_dim=len(teacher.text_space),
        text_space=teacher.text_space.flatten()[:64].tolist(),
        image_size=teacher.image_size,
        resample=int(teacher.resample),
        image_mean=list(teacher.image_mean),
        image_std=list(teacher.image_std),
        seed=seed,
        min_crop_scale=min_crop_scale,
        num_crops=num_crops,
        shards=[shard_names(stream) for stream in streams],
    )


def _read_description(folder: Path) -> dict[str, Any] | None:
    for name in (DESCRIPTION_NAME, DEPRECATED_DESCRIPTION_NAME):
        if (folder / name).is_file():
            try:
                description = rename_deprecated_arguments(json.loads((folder / name).read_text()))
            except (AttributeError, UnicodeDecodeError, json.JSONDecodeError):
                description = {}
            if not {"teacher", "shards"} <= description.keys():
                raise ValueError(f"{folder / name} is not a file of `samclip embed`. Choose another folder.")
            return description
    return None


def write_description(folder: Path, description: CacheDescription) -> None:
    """
    Creates an embedding cache without embeddings, or checks the description of an existing one.

    Raises:
        ValueError: If `folder` is an embedding cache with another description, if it contains embeddings without a
            description, or if its description is a file of another program.
    """
    existing = _read_description(folder)
    if existing is None:
        if found := next(folder.glob("[0-9][0-9]/*.parquet"), None):
            raise ValueError(
                f"{folder} has no {DESCRIPTION_NAME}, so it is unknown what the embeddings in {found} are. Choose "
                "another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / DESCRIPTION_NAME, json.dumps(asdict(description), indent=1) + "\n")
    elif changed := [name for name, value in asdict(description).items() if existing.get(name) != value]:
        raise ValueError(
            f"{folder} is an embedding cache with different values of {', '.join(changed)}. Choose another folder."
        )


class ShardCrops(IterableDataset):
    """The crops of whole shards in batches. Shards are divided among the data loader workers."""

    def __init__(
        self, streams: list[Stream], shards: list[tuple[int, int]], description: CacheDescription, batch_size: int
    ):
        self.streams, self.shards, self.description, self.batch_size = streams, shards, description, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        own_shards = self.shards[info.id :: info.num_workers] if info else self.shards
        for number, shard in own_shards:
            part: dict[str, Any] = {"shard": (number, shard), "keys": [], "images": [], "usable": [], "causes": []}
            for _, sample in self.streams[number].read(shard):
                crops, cause = self._crops(sample)
                part["keys"].append(sample["key"])
                part["usable"].append(cause is None)
                part["causes"] += [] if cause is None else [cause]
                part["images"] += crops
                if len(part["keys"]) == self.batch_size:
                    yield part | {"is_last": False}
                    part = {"shard": (number, shard), "keys": [], "images": [], "usable": [], "causes": []}
            yield part | {"is_last": True}

    def _crops(self, sample: dict[str, Any]) -> tuple[list[np.ndarray], str | None]:
        try:
            image = decode_image(sample)
        except SkippedSampleError as error:
            return [], str(error)
        crops = [
            draw_crop(image, self.description.min_crop_scale, sample_rng(self.description.seed, epoch, sample["key"]))
            for epoch in range(self.description.num_crops)
        ]
        size, resample = self.description.image_size, Image.Resampling(self.description.resample)
        return [cut(image, crop, size, resample) for crop in crops], None


def embed_shards(
    folder: Path,
    teacher: ClipTeacher,
    streams: list[Stream],
    description: CacheDescription,
    shards: list[tuple[int, int]],
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    r"""
    Computes and writes the embeddings of shards that are not in the cache yet. A shard that cannot be read completely
    is not written.

    Args:
        folder (`Path`):
            The folder of the cache, after [`write_description`].
        teacher ([`ClipTeacher`]):
            The teacher, on `device`.
        streams (`list[Stream]`), description (`CacheDescription`):
            The data and the description of the cache.
        shards (`list[tuple[int, int]]`):
            The shards to embed, as pairs of the number of the stream and the number of its shard.
        batch_size (`int`):
            Number of crops in a forward pass of the teacher.
        num_workers (`int`):
            Number of data loader workers.

    Yields:
        `dict[str, Any]`: For every batch: the number of its `samples`; `causes`, the cause for each sample that cannot
        be used; `is_last`, whether the batch completes its shard.
    """
    missing = [shard for shard in shards if not shard_path(folder, *shard).is_file()]
    crops = ShardCrops(streams, missing, description, max(1, batch_size // description.num_crops))
    embeds: dict[tuple[int, int], list[np.ndarray]] = {}
    keys: dict[tuple[int, int], list[str]] = {}
    unreadable: set[tuple[int, int]] = set()
    for part in DataLoader(crops, batch_size=None, collate_fn=no_collation, num_workers=num_workers):
        shard = part["shard"]
        usable = np.array(part["usable"], dtype=bool)
        values = np.full((len(usable), description.num_crops, description.projection_dim), np.nan, np.float16)
        if usable.any():
            values[usable] = _embed(teacher, part["images"], device).reshape(-1, *values.shape[1:])
        embeds.setdefault(shard, []).append(values)
        keys.setdefault(shard, []).extend(part["keys"])
        if UNREADABLE_SHARD in part["causes"]:
            unreadable.add(shard)
        if part["is_last"]:
            shard_keys, shard_embeds = keys.pop(shard), embeds.pop(shard)
            if shard not in unreadable:
                _write(shard_path(folder, *shard), shard_keys, np.concatenate(shard_embeds))
        yield {"samples": len(usable), "causes": part["causes"], "is_last": part["is_last"]}


def _embed(teacher: ClipTeacher, images: list[np.ndarray], device: torch.device) -> np.ndarray:
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        embeds: Tensor = teacher(batch.to(device))
    # The loss depends on the direction only, and values of unit vectors cannot overflow float16.
    return torch.nn.functional.normalize(embeds.float(), dim=-1).cpu().numpy().astype(np.float16)


def _write(path: Path, keys: list[str], embeds: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(embeds.reshape(-1)), int(np.prod(embeds.shape[1:])))
    table = pa.table({"key": pa.array(keys, pa.string()), "embeds": flat})
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata({"num_crops": str(embeds.shape[1])}), temporary)


def no_collation(part: Any) -> Any:
    """Returns its argument. As `collate_fn` of a data loader, it prevents the conversion of numbers to tensors."""
    return part
