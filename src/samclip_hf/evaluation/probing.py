"""The base class of evaluators that train heads on frozen features, and the extraction of features to disk."""

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
from .adapters import CascadeAdapter, ModelAdapter, SamAdapter
from .evaluator import EvaluationResult, Evaluator, shard_batches

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

    def applies_to(self, model: ModelAdapter | type[ModelAdapter]) -> bool:
        return not issubclass(model if isinstance(model, type) else type(model), CascadeAdapter)

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

    @abstractmethod
    def run(self, model: ModelAdapter) -> EvaluationResult | None:
        """Trains and evaluates heads on the main process, after all processes have extracted the features."""


def shared_folder(folder: str) -> Path:
    """Returns the main process's folder in all processes of a machine."""
    return Path(broadcast_object_list([folder])[0])


def extract_features(
    data: DataSet, compute: Callable[[list[Image.Image]], dict[str, Tensor]], folder: Path, title: str
) -> dict[str, np.ndarray]:
    """
    Computes the features of all images. All processes must call it, and each writes a part.

    Args:
        data (`DataSet`):
            Data of known length.
        compute (`Callable`):
            Returns features `(num_images, ...)`, by the name of the module that computes them.
        folder (`Path`):
            The folder for the features, which must not exist.
        title (`str`):
            The title of the progress bar.

    Returns:
        `dict[str, numpy.ndarray]`: Features `(num_samples, ...)` of type float16, mapped from disk.

    Raises:
        ValueError: There are no samples.
    """
    state = PartialState()
    samples: Any = data.samples
    first = next(iter(samples), None)
    if first is None:
        raise ValueError(f"{data.name} has no samples.")
    shapes = {source: tuple(values.shape[1:]) for source, values in compute([first.image()]).items()}
    if state.is_main_process:
        folder.mkdir(parents=True)
        for number, shape in enumerate(shapes.values()):
            np.lib.format.open_memmap(
                folder / f"{number}.npy", mode="w+", dtype=np.float16, shape=(len(samples), *shape)
            )
    state.wait_for_everyone()
    arrays = {source: np.load(folder / f"{number}.npy", mmap_mode="r+") for number, source in enumerate(shapes)}
    for start, batch in shard_batches(samples, BATCH_SIZE, f"features of {data.name}, {title}"):
        for source, values in compute([sample.image() for sample in batch]).items():
            arrays[source][start : start + len(batch)] = values.half().cpu().numpy()
    state.wait_for_everyone()
    return arrays
