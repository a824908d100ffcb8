"""The base classes of all evaluators, and the loop over a dataset, which can run in any number of processes."""

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Generic

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from ..datasets.samples import DataSet, SampleType
from ..identity import hash_json
from ..templates import IMAGENET_TEMPLATES
from .adapters import ModelAdapter
from .metrics import AccumulatingMetric


@dataclass
class EvaluationResult:
    """
    The result of one evaluator for one model.

    metrics (`dict[str, float | None]`):
        Values in [0, 1] unless the name has a unit. The first metric is the main one. `None` if a metric is undefined
        for the data.
    num_samples (`int`):
        The number of samples, of all processes.
    seconds (`float`):
        The duration.
    extremes (`dict[str, int]`):
        Indices of the samples with the "best", "median" and "worst" score, if the evaluator scores single samples.
    """

    metrics: dict[str, float | None]
    num_samples: int
    seconds: float
    extremes: dict[str, int] = field(default_factory=dict)


class Evaluator(ABC):
    """
    Computes the metrics of a model by one protocol.

    name (`str`):
        The evaluator's name on the command line.
    adapter_class, excluded_class (`type[ModelAdapter]`, *optional*):
        The models to which the evaluator applies, and those of them to which it does not.
    """

    name: ClassVar[str]
    adapter_class: ClassVar[type[ModelAdapter]] = ModelAdapter
    excluded_class: ClassVar[type[ModelAdapter] | None] = None

    def applies_to(self, model: ModelAdapter | type[ModelAdapter]) -> bool:
        """Returns whether the evaluator applies to a model, or to all models of a class of adapters."""
        kind = model if isinstance(model, type) else type(model)
        is_excluded = self.excluded_class is not None and issubclass(kind, self.excluded_class)
        return issubclass(kind, self.adapter_class) and not is_excluded

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns everything that the metrics depend on besides the model: the data, and the choices that differ in
        the literature. Results with different descriptions are not comparable."""

    def describe_settings(self, model: Any) -> dict[str, Any]:
        """Returns the settings of a model that its metrics depend on and that the protocol does not define, such as
        the size of images. They are stored with the model's metrics."""
        return {}

    @abstractmethod
    def run(self, model: Any) -> EvaluationResult | None:
        """Evaluates a model. All processes must call it; it returns `None` on all but the main process."""


class SampleEvaluator(Evaluator, Generic[SampleType]):
    """
    Base class of evaluators that process a dataset sample by sample. Subclasses annotate their `model` arguments with
    the adapter class that `applies_to` accepts.

    data (`DataSet`):
        The samples. Batches are sharded across processes.
    """

    batch_size: int = 32

    def __init__(self, data: DataSet[SampleType]):
        self.data = data

    @abstractmethod
    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        """Returns empty metrics, by name."""

    def prepare(self, model: Any) -> None:  # optional
        """Computes values that are the same for all samples, such as embeddings of class names. Does nothing by
        default."""

    @abstractmethod
    def update(self, model: Any, samples: list[SampleType], metrics: dict[str, AccumulatingMetric]) -> list[float]:
        """Adds a batch to the metrics. Returns a score for each sample, by which the extremes are chosen."""

    @abstractmethod
    def compute_metrics(self, metrics: dict[str, AccumulatingMetric]) -> dict[str, float | None]:
        """Computes the values for [`EvaluationResult`]."""

    @abstractmethod
    def visualize(self, model: Any, sample: SampleType) -> list[tuple[str, np.ndarray]]:
        """Returns captions and images `(height, width, 3)`, uint8, of the input, the ground truth and the
        prediction."""

    def run(self, model: Any) -> EvaluationResult | None:
        """
        Evaluates a model. Whole batches are assigned to the processes in turn, so the batches and the metrics do not
        depend on the number of processes. Raises `ValueError` if there are no samples.
        """
        state = PartialState()
        metrics = self.new_metrics()
        scores: dict[int, float] = {}  # by index of the sample
        self.prepare(model)
        start = time.perf_counter()
        for first, batch in shard_batches(self.data.samples, self.batch_size, f"{self.name}, {model.name}"):
            scores |= zip(range(first, first + len(batch)), self.update(model, batch, metrics), strict=True)
        gathered = gather_object([({name: metric.state for name, metric in metrics.items()}, scores)])
        if not state.is_main_process:
            return None
        for process_index, (states, process_scores) in enumerate(gathered):
            if process_index != state.process_index:
                for name, metric in metrics.items():
                    metric.merge(states[name])
                scores |= process_scores
        if not scores:
            raise ValueError(f"{self.data.name} has no samples.")
        order = sorted(scores, key=lambda index: (scores[index], index))
        extremes = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
        return EvaluationResult(self.compute_metrics(metrics), len(scores), time.perf_counter() - start, extremes)


def describe_names(names: Sequence[Sequence[str]]) -> str:
    """Describes the synonyms of all classes, for [`Evaluator.describe`]. Other names give another description."""
    num_texts = sum(map(len, names))
    synonyms = f", {num_texts} names with synonyms" if num_texts > len(names) else ""
    return f"{len(names)}{synonyms}, names' hash {hash_json(names)[:8]}"


def describe_templates(templates: Sequence[str]) -> str:
    """Describes templates, for [`Evaluator.describe`]. Other templates give another description."""
    if tuple(templates) == IMAGENET_TEMPLATES:
        return "CLIP's 80 for ImageNet"
    texts = ", ".join(templates) if len(templates) <= 10 else f"hash {hash_json(templates)[:8]}"
    return f"{len(templates)}: {texts}"


def named(sample: SampleType) -> SampleType:
    """Returns the sample with functions that raise `ValueError` with the sample's key if a file cannot be read.
    Pillow's decoders raise many types of errors, and few of them name the file."""

    def read(kind: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise ValueError(f"{sample.key}: the {kind} cannot be read: {error}") from error

    functions: dict[str, Any] = {
        field.name: partial(read, field.name.replace("_", " "), getattr(sample, field.name))
        for field in fields(sample)
        if callable(getattr(sample, field.name))
    }
    return replace(sample, **functions)


def shard_batches(
    samples: Iterable[SampleType], batch_size: int, title: str
) -> Iterator[tuple[int, list[SampleType]]]:
    """Yields the batches of this process, each with the index of its first sample. The main process shows the progress
    of all processes."""
    state = PartialState()
    total = len(samples) if isinstance(samples, Sized) else None
    with tqdm(total=total, desc=title, unit="image", disable=not state.is_main_process) as progress:
        for number, batch in enumerate(batched(samples, batch_size)):
            if number % state.num_processes == state.process_index:
                yield number * batch_size, list(map(named, batch))
            progress.update(len(batch))


def batched(samples: Iterable[SampleType], size: int) -> Iterator[list[SampleType]]:
    """As `itertools.batched` of Python 3.12, but yields lists."""
    iterator = iter(samples)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
