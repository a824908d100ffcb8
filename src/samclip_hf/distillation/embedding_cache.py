"""
Embedding caches: the CLIP teacher's embeddings of crops of `clip_data` ([`EmbeddingCache`]) or regions of `sam_data`
([`RegionEmbeddingCache`]), which are computed once by `samclip embed`. Training reads them with the images and does
not run the teacher.

A cache is a folder with `embedding_cache.json`, a description, and a parquet file for each shard of the data. The file
has a row for each sample of the shard, in the same order. Its columns are `key` and `embeds`, the concatenated float16
embeddings of the sample in `num_crops` epochs, or NaN if the sample cannot be used. An epoch has one crop, or
`regions_per_image` regions, of which those that an image lacks are NaN. Crops and regions are those of the first
`num_crops` epochs of a training with the same seed. In later epochs, training repeats them.
"""

import json
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.utils import logging

from ..datasets.streams import UNREADABLE_SHARD, SampleImage, SkippedSampleError, Stream
from ..files import atomic_path, write_atomically
from ..modeling_samclip import SamClipModel
from .arguments import rename_deprecated_arguments
from .crops import cut, draw_crop, sample_rng
from .teachers import ClipTeacher, RegionTeacher, check_text_space

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


@dataclass
class RegionCacheDescription:
    """
    Describes the contents of a cache of regions. Caches with equal descriptions have equal embeddings.

    Args:
        teacher (`str`), text_space (`list[float]`), projection_dim (`int`):
            As in [`CacheDescription`].
        image_mean (`list[float]`), image_std (`list[float]`):
            The teacher's normalization.
        sam_image_size (`int`):
            The size to which the longest edge of an image is resized first, as for the SAM loss.
        region_image_size (`int`):
            The resolution at which the teacher embeds regions, see [`RegionTeacher`].
        seed (`int`), regions_per_image (`int`), num_crops (`int`):
            Seed, number of regions of a sample in an epoch, and number of epochs.
        shards (`list[list[str]]`):
            File names of the shards of each stream.
    """

    teacher: str
    text_space: list[float]
    projection_dim: int
    image_mean: list[float]
    image_std: list[float]
    sam_image_size: int
    region_image_size: int
    seed: int
    regions_per_image: int
    num_crops: int
    shards: list[list[str]]


class _Cache:
    r"""
    A complete cache.

    Args:
        folder (`str` or `Path`):
            The output folder of `samclip embed`.

    Raises:
        FileNotFoundError: If `folder` is not an embedding cache.
        ValueError: If shards are missing, if the cache was computed by an incompatible version, or if its description
            is a file of another program.
    """

    description_class: ClassVar[Any] = CacheDescription
    contents: ClassVar[str] = "crops of clip_data"

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        description = _read_description(self.folder)
        if description is None:
            raise FileNotFoundError(f"{folder} is not an embedding cache. Compute one with `samclip embed`.")
        if description.keys() != {field.name for field in fields(self.description_class)}:
            raise ValueError(
                f"{folder} contains no embeddings of {self.contents}, or was computed by an incompatible version. "
                "Compute them with `samclip embed`, in a new folder."
            )
        self.description = self.description_class(**description)
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

    def _check(self, student: SamClipModel, streams: list[Stream], teacher: str, data: str, **settings: Any) -> None:
        """Raises `ValueError` if the cache was computed with another teacher, other settings or other data."""
        cached_teacher = Path(self.description.teacher).name
        if Path(teacher).name not in (cached_teacher, "miniature"):
            raise ValueError(f"{self.folder} contains embeddings of {cached_teacher}, but clip_teacher is {teacher}.")
        check_text_space(student, torch.tensor(self.description.text_space))
        for name, value in settings.items():
            if value != (cached := getattr(self.description, name)):
                raise ValueError(
                    f"{self.folder} contains embeddings of {self.contents} with {name} {cached}, but {name} is "
                    f"{value}."
                )
        names = [shard_names(stream) for stream in streams]
        if names != self.description.shards:
            cached, given = ([len(of_stream) for of_stream in shards] for shards in (self.description.shards, names))
            raise ValueError(
                f"{self.folder} contains embeddings of other data: numbers or names of shards differ. The embedding "
                f"cache has {cached} shards, {data} has {given}."
            )

    def checksum(self) -> str:
        """Returns a checksum of the description, without the teacher's name or folder, which may change."""
        description = asdict(self.description) | {"teacher": None}
        return f"{zlib.crc32(json.dumps(description).encode()):08x}"

    def attach(self, streams: list[Stream]) -> list[Stream]:
        """Returns the streams with the embeddings of each sample, `embeds`, see [`CachedEmbeddings`]."""
        return [stream.with_embeddings(CachedEmbeddings(self.folder, number)) for number, stream in enumerate(streams)]


class EmbeddingCache(_Cache):
    """A complete cache of crops, which can replace a [`ClipTeacher`]. Arguments and errors as in [`_Cache`]."""

    description: CacheDescription

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
        self._check(student, streams, teacher, "clip_data", min_crop_scale=min_crop_scale)


class RegionEmbeddingCache(_Cache):
    """A complete cache of regions, which can replace a [`RegionTeacher`]. Arguments and errors as in [`_Cache`]."""

    description_class = RegionCacheDescription
    contents = "regions of sam_data"
    description: RegionCacheDescription

    def check(
        self,
        student: SamClipModel,
        streams: list[Stream],
        teacher: str,
        sam_image_size: int,
        regions_per_image: int,
        region_image_size: int | None,
    ) -> None:
        """
        Checks that the cache matches a training.

        Args:
            student ([`SamClipModel`]):
                The student, whose text tower must be the teacher's.
            streams (`list[Stream]`):
                The streams of `sam_data`.
            teacher (`str`), regions_per_image (`int`), region_image_size (`int`, *optional*):
                The arguments `clip_teacher`, `regions_per_image` and `region_image_size`.
            sam_image_size (`int`):
                Resolution of the images for the SAM loss.

        Raises:
            ValueError: If the cache was computed with another teacher, other regions or other data.
        """
        settings = {"sam_image_size": sam_image_size, "regions_per_image": regions_per_image}
        if region_image_size is not None:
            settings["region_image_size"] = region_image_size
        self._check(student, streams, teacher, "sam_data", **settings)


@dataclass
class CachedEmbeddings:
    """The embeddings of the samples of stream `number` of the cache in `folder`."""

    folder: Path
    number: int

    def read(self, shard: int) -> tuple[list[str], np.ndarray]:
        """Reads the keys of a shard's samples and their embeddings, float16: of crops `(num_samples, num_crops,
        projection_dim)`, of regions `(num_samples, num_crops, regions_per_image, projection_dim)`."""
        table = pq.read_table(shard_path(self.folder, self.number, shard))
        shape = [int(table.schema.metadata[b"num_crops"])]
        if b"regions_per_image" in table.schema.metadata:
            shape.append(int(table.schema.metadata[b"regions_per_image"]))
        values = table.column("embeds").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return table.column("key").to_pylist(), values.reshape(len(table), *shape, -1)


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


def describe_region_cache(
    teacher: ClipTeacher,
    region_teacher: RegionTeacher,
    streams: list[Stream],
    seed: int,
    sam_image_size: int,
    regions_per_image: int,
    num_crops: int,
) -> RegionCacheDescription:
    """Returns the description of a cache with the embeddings of the regions of these streams."""
    return RegionCacheDescription(
        teacher=str(teacher.model.name_or_path),
        projection_dim=len(teacher.text_space),
        text_space=teacher.text_space.flatten()[:64].tolist(),
        image_mean=list(teacher.image_mean),
        image_std=list(teacher.image_std),
        sam_image_size=sam_image_size,
        region_image_size=region_teacher.tower.image_size,
        seed=seed,
        regions_per_image=regions_per_image,
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


def write_description(folder: Path, description: CacheDescription | RegionCacheDescription) -> None:
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


class ShardSamples(IterableDataset, ABC):
    """The inputs of the teacher for whole shards, in batches. Shards are divided among the data loader workers."""

    def __init__(self, streams: list[Stream], shards: list[tuple[int, int]], num_crops: int, batch_size: int):
        self.streams, self.shards, self.num_crops = streams, shards, num_crops
        self.batch_size = max(1, batch_size // num_crops)  # in samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        own_shards = self.shards[info.id :: info.num_workers] if info else self.shards
        for number, shard in own_shards:
            part: dict[str, Any] = {"shard": (number, shard), "keys": [], "inputs": [], "usable": [], "causes": []}
            for _, sample in self.streams[number].read(shard):
                part["keys"].append(sample["key"])
                try:
                    part["inputs"] += self.inputs(sample, part["causes"])
                except SkippedSampleError as error:
                    part["usable"].append(False)
                    part["causes"].append(str(error))
                else:
                    part["usable"].append(True)
                if len(part["keys"]) == self.batch_size:
                    yield part | {"is_last": False}
                    part = {"shard": (number, shard), "keys": [], "inputs": [], "usable": [], "causes": []}
            yield part | {"is_last": True}

    @abstractmethod
    def inputs(self, sample: dict[str, Any], causes: list[str]) -> list[Any]:
        """Returns an input for each of `num_crops` epochs. Appends the causes of skipped annotations to `causes`.
        Raises [`SkippedSampleError`] if the sample cannot be used."""


class ShardCrops(ShardSamples):
    """The crops of whole shards: uint8 arrays of shape `(image_size, image_size, 3)`."""

    def __init__(
        self, streams: list[Stream], shards: list[tuple[int, int]], description: CacheDescription, batch_size: int
    ):
        super().__init__(streams, shards, description.num_crops, batch_size)
        self.description = description

    def inputs(self, sample: dict[str, Any], causes: list[str]) -> list[np.ndarray]:
        image = SampleImage(sample)
        crops = [
            draw_crop(image, self.description.min_crop_scale, sample_rng(self.description.seed, epoch, sample["key"]))
            for epoch in range(self.num_crops)
        ]
        size, resample = self.description.image_size, Image.Resampling(self.description.resample)
        return [cut(image, crop, size, resample) for crop in crops]


class RegionSamples(Protocol):
    """The part of [`SamBatches`] that draws regions."""

    def regions(self, raw: dict[str, Any], seed: int, epoch: int) -> tuple[dict[str, np.ndarray], Counter[str]]:
        """Returns the arrays of an image with its regions, and the number of skipped annotations by cause."""


class ShardRegions(ShardSamples):
    """The regions of whole shards: the arrays `images`, `content_sizes` and `region_masks` of `batches`."""

    def __init__(
        self,
        streams: list[Stream],
        shards: list[tuple[int, int]],
        description: RegionCacheDescription,
        batches: RegionSamples,
        batch_size: int,
    ):
        super().__init__(streams, shards, description.num_crops, batch_size)
        self.description, self.batches = description, batches

    def inputs(self, sample: dict[str, Any], causes: list[str]) -> list[dict[str, np.ndarray]]:
        draws = []
        for epoch in range(self.num_crops):
            arrays, skipped = self.batches.regions(sample, self.description.seed, epoch)
            draws.append(arrays)
            if epoch == 0:
                causes += skipped.elements()
        return draws


def embed_shards(
    folder: Path,
    samples: ShardSamples,
    embed: Callable[[list[Any]], np.ndarray],
    shape: tuple[int, ...],
    num_workers: int,
) -> Iterator[dict[str, Any]]:
    r"""
    Computes and writes the embeddings of shards that are not in the cache yet. A shard that cannot be read completely
    is not written.

    Args:
        folder (`Path`):
            The folder of the cache, after [`write_description`].
        samples ([`ShardSamples`]):
            The inputs of the teacher. Its shards that are in the cache are skipped.
        embed (`Callable[[list], numpy.ndarray]`):
            Returns the embeddings of inputs, `(num_inputs, *shape[1:])`, see [`embed_crops`] and [`embed_regions`].
        shape (`tuple[int, ...]`):
            Shape of a sample's embeddings: `(num_crops, projection_dim)`, or `(num_crops, regions_per_image,
            projection_dim)`.
        num_workers (`int`):
            Number of data loader workers.

    Yields:
        `dict[str, Any]`: For every batch: the number of its `samples`; `causes`, the causes for which samples or
        annotations cannot be used; `is_last`, whether the batch completes its shard.
    """
    samples.shards = [shard for shard in samples.shards if not shard_path(folder, *shard).is_file()]
    embeds: dict[tuple[int, int], list[np.ndarray]] = {}
    keys: dict[tuple[int, int], list[str]] = {}
    unreadable: set[tuple[int, int]] = set()
    for part in DataLoader(samples, batch_size=None, collate_fn=no_collation, num_workers=num_workers):
        shard = part["shard"]
        usable = np.array(part["usable"], dtype=bool)
        values = np.full((len(usable), *shape), np.nan, np.float16)
        if usable.any():
            values[usable] = embed(part["inputs"]).reshape(-1, *shape)
        embeds.setdefault(shard, []).append(values)
        keys.setdefault(shard, []).extend(part["keys"])
        if UNREADABLE_SHARD in part["causes"]:
            unreadable.add(shard)
        if part["is_last"]:
            shard_keys, shard_embeds = keys.pop(shard), embeds.pop(shard)
            if shard not in unreadable:
                _write(shard_path(folder, *shard), shard_keys, np.concatenate(shard_embeds))
        yield {"samples": len(usable), "causes": part["causes"], "is_last": part["is_last"]}


def embed_crops(teacher: ClipTeacher, device: torch.device, images: list[np.ndarray]) -> np.ndarray:
    """Returns the teacher's embeddings `(num_images, projection_dim)` of crops, of length 1, float16."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        embeds = teacher(batch.to(device))
    return _unit_vectors(embeds)


def embed_regions(teacher: RegionTeacher, device: torch.device, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    """Returns the teacher's embeddings `(num_samples, regions_per_image, projection_dim)` of regions, of length 1,
    float16. They are NaN for empty regions."""
    images, sizes, masks = (
        torch.from_numpy(np.stack([sample[name] for sample in samples])).to(device)
        for name in ("images", "content_sizes", "region_masks")
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        embeds = teacher(images.permute(0, 3, 1, 2), sizes, masks)
    values = _unit_vectors(embeds)
    values[~(masks > 0).flatten(2).any(dim=2).cpu().numpy()] = np.nan
    return values


def _unit_vectors(embeds: Tensor) -> np.ndarray:
    # The losses depend on the direction only, and values of unit vectors cannot overflow float16.
    return torch.nn.functional.normalize(embeds.float(), dim=-1).cpu().numpy().astype(np.float16)


def _write(path: Path, keys: list[str], embeds: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(embeds.reshape(-1)), int(np.prod(embeds.shape[1:])))
    table = pa.table({"key": pa.array(keys, pa.string()), "embeds": flat})
    names = ("num_crops", "regions_per_image")[: embeds.ndim - 2]
    metadata = {name: str(size) for name, size in zip(names, embeds.shape[1:-1], strict=True)}
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary)


def no_collation(part: Any) -> Any:
    """Returns its argument. As `collate_fn` of a data loader, it prevents the conversion of numbers to tensors."""
    return part
