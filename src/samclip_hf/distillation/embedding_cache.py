"""
The CLIP teacher's embeddings, computed once: training reads them beside the images and never runs the teacher.

A store is a folder with `store.json`, which says what they are embeddings of, and a parquet file for each shard of the
data: a row for each of its samples, in order, with `key` and `embeds`, float16, one after the other for each of
`num_crops` crops of the sample; not a number where the sample cannot be used. The crops are those that training would
draw in its first `num_crops` passes, and draws again with the store.
"""

import json
import os
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

from ..datasets.streams import UNREADABLE_SHARD, SkippedSampleError, Stream, decode_image
from ..modeling_samclip import SamClipModel
from .crops import cut, draw_crop, sample_rng
from .teachers import ClipTeacher, check_text_space

DESCRIPTION_NAME = "store.json"


@dataclass
class CacheDescription:
    """What the embeddings in a store are of; stores with equal descriptions are equal."""

    teacher: str
    text_space: list[float]  # its first values, by which a student knows its teacher
    projection_dim: int
    image_size: int
    resample: int  # PIL's number of the filter
    image_mean: list[float]
    image_std: list[float]
    seed: int
    min_crop_scale: float
    num_crops: int
    shards: list[list[str]]  # file names by data set


class EmbeddingCache:
    r"""
    A finished store.

    folder (`str` or `Path`):
        From `training/cache_teacher.py`.

    Raises `FileNotFoundError` where there is none, `ValueError` where shards are missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / DESCRIPTION_NAME
        if not path.is_file():
            raise FileNotFoundError(f"There is no store in {str(folder)!r}: cache_teacher.py makes one.")
        description = json.loads(path.read_text())
        if description.keys() != CacheDescription.__dataclass_fields__.keys():
            raise ValueError(f"{folder} was made by another version of cache_teacher.py: make it anew, elsewhere.")
        self.description = CacheDescription(**description)
        missing = [
            shard_path(self.folder, number, shard)
            for number, names in enumerate(self.description.shards)
            for shard in range(len(names))
            if not shard_path(self.folder, number, shard).is_file()
        ]
        if missing:
            raise ValueError(
                f"{folder} is not finished: {len(missing)} shards are missing, the first is {missing[0]}. The same "
                "cache_teacher.py command goes on with it."
            )

    def check(self, student: SamClipModel, streams: list[Stream], min_crop_scale: float, teacher: str) -> None:
        """Raises `ValueError` where the embeddings are not those that this training needs."""
        own, asked = Path(self.description.teacher).name, Path(teacher).name
        if asked not in (own, "miniature"):
            raise ValueError(f"{self.folder} holds embeddings of {own}, and clip_teacher is {teacher}.")
        check_text_space(student, torch.tensor(self.description.text_space))
        if min_crop_scale != self.description.min_crop_scale:
            raise ValueError(
                f"{self.folder} holds embeddings of crops with min_crop_scale {self.description.min_crop_scale}, not {min_crop_scale}."
            )
        names = [shard_names(stream) for stream in streams]
        if names != self.description.shards:
            counts = [len(of_stream) for of_stream in names], [len(of_store) for of_store in self.description.shards]
            raise ValueError(
                f"{self.folder} holds embeddings of other data: {counts[1]} shards where clip_data has {counts[0]}, "
                "or ones of other names."
            )

    def attach(self, streams: list[Stream]) -> list[Stream]:
        """Returns streams whose samples have their embeddings as `embeds` `(num_crops, projection_dim)`."""
        return [stream.with_embeddings(CachedEmbeds(self.folder, number)) for number, stream in enumerate(streams)]


@dataclass
class CachedEmbeds:
    """The embeddings of one data set's samples."""

    folder: Path
    number: int

    def read(self, shard: int) -> tuple[list[str], np.ndarray]:
        """Keys of a shard's samples and their embeddings `(num_samples, num_crops, projection_dim)`, float16."""
        path = shard_path(self.folder, self.number, shard)
        table = pq.read_table(path)
        num_crops = int(table.schema.metadata[b"num_crops"])
        values = table.column("embeds").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return table.column("key").to_pylist(), values.reshape(len(table), num_crops, -1)


def shard_path(folder: Path, number: int, shard: int) -> Path:
    """Where the embeddings of a shard of data set `number` are."""
    return folder / f"{number:02d}" / f"{shard:06d}.parquet"


def shard_names(stream: Stream) -> list[str]:
    """Of a stream, without the folder, in which the data may lie elsewhere next time."""
    return [Path(name).name for name in stream.shards.names]


def describe(
    teacher: ClipTeacher, streams: list[Stream], seed: int, min_crop_scale: float, num_crops: int
) -> CacheDescription:
    """What a store of these is."""
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


def begin(folder: Path, description: CacheDescription) -> None:
    """Writes what the store is; raises `ValueError` where `folder` already holds another one."""
    path = folder / DESCRIPTION_NAME
    if path.is_file():
        other = json.loads(path.read_text())
        if changed := [name for name, value in asdict(description).items() if other.get(name) != value]:
            raise ValueError(f"{folder} holds a store with other {', '.join(changed)}: name another folder.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(description), indent=1) + "\n")
    temporary.replace(path)


class Crops(IterableDataset):
    """The crops of whole shards in batches; every data loader worker has shards of its own."""

    def __init__(
        self, streams: list[Stream], shards: list[tuple[int, int]], description: CacheDescription, batch: int
    ):
        self.streams, self.shards, self.description, self.batch = streams, shards, description, batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        own = self.shards[info.id :: info.num_workers] if info else self.shards
        for number, shard in own:
            part: dict[str, Any] = {"shard": (number, shard), "keys": [], "images": [], "usable": [], "causes": []}
            for _, sample in self.streams[number].read(shard):
                crops, cause = self._crops(sample)
                part["keys"].append(sample["key"])
                part["usable"].append(cause is None)
                part["causes"] += [] if cause is None else [cause]
                part["images"] += crops
                if len(part["keys"]) == self.batch:
                    yield part | {"is_last": False}
                    part = {"shard": (number, shard), "keys": [], "images": [], "usable": [], "causes": []}
            yield part | {"is_last": True}

    def _crops(self, sample: dict[str, Any]) -> tuple[list[np.ndarray], str | None]:
        try:
            image = decode_image(sample)
        except SkippedSampleError as error:
            return [], str(error)
        crops = [
            draw_crop(image, self.description.min_crop_scale, sample_rng(self.description.seed, number, sample["key"]))
            for number in range(self.description.num_crops)
        ]
        size, resample = self.description.image_size, Image.Resampling(self.description.resample)
        return [cut(image, crop, size, resample) for crop in crops], None


def fill(
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
    Writes the shards (number of the data set, number in it) that are not there yet; yields after every batch what came
    of it: number of `samples`, `causes` for which some cannot be used, and whether that ended a shard. A shard that
    cannot be read to its end is not written.
    """
    missing = [one for one in shards if not shard_path(folder, *one).is_file()]
    crops = Crops(streams, missing, description, max(1, batch_size // description.num_crops))
    embeds: dict[tuple[int, int], list[np.ndarray]] = {}
    keys: dict[tuple[int, int], list[str]] = {}
    unreadable: set[tuple[int, int]] = set()
    for part in DataLoader(crops, batch_size=None, collate_fn=as_it_is, num_workers=num_workers):
        shard = part["shard"]
        usable = np.array(part["usable"], dtype=bool)
        values = np.full((len(usable), description.num_crops, description.projection_dim), np.nan, np.float16)
        if usable.any():
            values[usable] = _embed(teacher, part["images"], device).reshape(-1, *values.shape[1:])
        embeds.setdefault(shard, []).append(values)
        keys.setdefault(shard, []).extend(part["keys"])
        if UNREADABLE_SHARD in part["causes"]:
            unreadable.add(shard)
        if part["is_last"] and shard in unreadable:  # the next time it may be read
            del keys[shard], embeds[shard]
        elif part["is_last"]:
            _write(shard_path(folder, *shard), keys.pop(shard), np.concatenate(embeds.pop(shard)))
        yield {"samples": len(usable), "causes": part["causes"], "is_last": part["is_last"]}


def _embed(teacher: ClipTeacher, images: list[np.ndarray], device: torch.device) -> np.ndarray:
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        embeds: Tensor = teacher(batch.to(device))
    # Only their direction is learnt; of unit length they cannot overflow float16.
    return torch.nn.functional.normalize(embeds.float(), dim=-1).cpu().numpy().astype(np.float16)


def _write(path: Path, keys: list[str], embeds: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(embeds.reshape(-1)), int(np.prod(embeds.shape[1:])))
    table = pa.table({"key": pa.array(keys, pa.string()), "embeds": flat})
    temporary = path.with_suffix(".partial")
    try:
        pq.write_table(table.replace_schema_metadata({"num_crops": str(embeds.shape[1])}), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def as_it_is(part: Any) -> Any:
    """For a data loader, whose own collation would turn numbers and counts into tensors."""
    return part
