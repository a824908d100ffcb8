"""The base class of evaluators that train heads on frozen features, and the extraction of features to disk."""

import math
import shutil
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor

from ..datasets.samples import DataSet
from .adapters import ModelAdapter, SamAdapter, UnmergedAdapter
from .evaluator import EvaluationResult, Evaluator, named, shard_batches

BATCH_SIZE = 16


class Probing(Evaluator):
    """
    Base class. The paper states neither the hyperparameters of its heads nor which features they use; `describe`
    states both.

    train, test (`DataSet`):
        Datasets of known length, with the same classes and different images. Raises `ValueError` otherwise.
    size (`int`):
        Side in pixels of the squares to which images are stretched. For a SAM, its own size, the only one it accepts.
    seed (`int`, *optional*, defaults to 0):
        The seed of the heads' weights, of the order of samples, and of held-out samples.
    """

    excluded_class = UnmergedAdapter  # its features are those of its two models, which can be probed themselves

    def __init__(self, train: DataSet, test: DataSet, size: int, seed: int = 0):
        for data in (train, test):
            if not hasattr(data.samples, "__len__"):
                raise ValueError(f"{data.name} is a stream. Probing needs data with a known number of samples.")
        locations = [(data.description.get("path"), data.description.get("split")) for data in (train, test)]
        if locations[0] == locations[1] != (None, None):
            raise ValueError(f"{train.name} is used for training and for evaluation. Choose another split for one.")
        if train.names != test.names:
            raise ValueError(f"{train.name} and {test.name} do not have the same classes in the same order.")
        self.train, self.test, self.size, self.seed = train, test, size, seed

    def describe(self) -> dict[str, Any]:
        return {
            **self.test.description,
            "trained on": f"{self.train.name}, {len(self.train.samples)} images",  # type: ignore[arg-type]
            "size": f"{self.size} px, stretched to a square; SAM at its own size",
            "features": "float16; image encoder: its last layer's (before SAM's neck); CLIP head: its last layer's",
            "seed": self.seed,
        }

    def describe_settings(self, model: ModelAdapter) -> dict[str, Any]:
        return {"image size": f"{self.size_for(model)} x {self.size_for(model)} px"}

    def size_for(self, model: ModelAdapter) -> int:
        """Returns the side in pixels of the images for a model."""
        return model.model.config.vision_config.image_size if isinstance(model, SamAdapter) else self.size

    def run(self, model: ModelAdapter) -> EvaluationResult | None:
        """
        Extracts the features of all images in all processes, then trains and evaluates heads in the main process.

        The features are in a temporary folder. Raises `ValueError` if they do not fit on its disk.
        """
        start, size = time.perf_counter(), self.size_for(model)
        metrics = None
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(broadcast_object_list([temporary])[0])  # the main process's

            def compute(images: list[Image.Image]) -> dict[str, Tensor]:
                return self.features(model, images, size)

            shapes = feature_shapes(self.train, compute)
            num_images = len(self.train.samples) + len(self.test.samples)  # type: ignore[arg-type]
            num_bytes = 2 * num_images * sum(math.prod(shape) for shape in shapes.values())  # float16
            require_disk_space(folder, num_bytes, f"{self.name}, {model.name}: the features of {num_images:,} images")
            train, test = (
                extract_features(data, compute, shapes, folder / name, f"features of {data.name}, {model.name}")
                for name, data in (("train", self.train), ("test", self.test))
            )
            if PartialState().is_main_process:
                metrics = self.probe(model, train, test)
        if metrics is None:
            return None
        return EvaluationResult(metrics, len(self.test.samples), time.perf_counter() - start)  # type: ignore[arg-type]

    @abstractmethod
    def features(self, model: ModelAdapter, images: list[Image.Image], size: int) -> dict[str, Tensor]:
        """Returns features `(num_images, ...)`, by the name of the module that computes them."""

    @abstractmethod
    def probe(
        self, model: ModelAdapter, train: dict[str, np.ndarray], test: dict[str, np.ndarray]
    ) -> dict[str, float | None]:
        """Trains heads on the features of the training images, and returns their metrics for those of the test
        images."""


def feature_shapes(
    data: DataSet, compute: Callable[[list[Image.Image]], dict[str, Tensor]]
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of the features of one image, by the name of the module that computes them. Raises
    `ValueError` if there are no samples."""
    first = next(iter(data.samples), None)
    if first is None:
        raise ValueError(f"{data.name} has no samples.")
    return {source: tuple(values.shape[1:]) for source, values in compute([named(first).image()]).items()}


def require_disk_space(folder: Path, num_bytes: int, content: str) -> None:
    """Prints how much of the disk of a folder `content` needs. Raises `ValueError` in all processes if it is more than
    is free: a file that is mapped to memory ends the process with a bus error on a full disk."""
    free = broadcast_object_list([shutil.disk_usage(folder).free])[0]
    need = f"{content} need {num_bytes / 1e9:,.3g} GB in {folder.parent}, of which {free / 1e9:,.3g} GB are free"
    if num_bytes > free:
        raise ValueError(f"{need}. Set the environment variable TMPDIR to a folder on a larger disk.")
    PartialState().print(f"{need}.")


def extract_features(
    data: DataSet,
    compute: Callable[[list[Image.Image]], dict[str, Tensor]],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    title: str,
) -> dict[str, np.ndarray]:
    """
    Computes the features of all images. All processes must call it, and each writes a part.

    Args:
        data (`DataSet`):
            Data of known length.
        compute (`Callable`):
            Returns features `(num_images, ...)`, by the name of the module that computes them.
        shapes (`dict[str, tuple[int, ...]]`):
            The shape of the features of one image.
        folder (`Path`):
            The folder for the features, which must not exist.
        title (`str`):
            The title of the progress bar.

    Returns:
        `dict[str, numpy.ndarray]`: Features `(num_samples, ...)` of type float16, mapped from disk.
    """
    state = PartialState()
    samples: Any = data.samples
    if state.is_main_process:
        folder.mkdir(parents=True)
        for number, shape in enumerate(shapes.values()):
            np.lib.format.open_memmap(
                folder / f"{number}.npy", mode="w+", dtype=np.float16, shape=(len(samples), *shape)
            )
    state.wait_for_everyone()
    arrays = {source: np.load(folder / f"{number}.npy", mmap_mode="r+") for number, source in enumerate(shapes)}
    for start, batch in shard_batches(samples, BATCH_SIZE, title):
        for source, values in compute([sample.image() for sample in batch]).items():
            arrays[source][start : start + len(batch)] = values.half().cpu().numpy()
    state.wait_for_everyone()
    return arrays
