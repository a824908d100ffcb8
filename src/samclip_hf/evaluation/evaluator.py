"""
What all protocols share: how a model is taken through a data set, by any number of processes with the same result.
"""

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from ..datasets.samples import DataSet, SampleType
from .adapters import ModelAdapter
from .metrics import AccumulatingMetric


@dataclass
class EvaluationResult:
    """
    metrics (`dict[str, float | None]`):
        In [0, 1] unless their names say a unit; the first is the main one. `None` where the data do not define one.
    num_samples (`int`), seconds (`float`):
        Judged by all processes together, in so much time.
    extremes (`dict[str, int]`):
        The places of the "best", "median" and "worst" samples, where samples are judged one by one.
    """

    metrics: dict[str, float | None]
    num_samples: int
    seconds: float
    extremes: dict[str, int] = field(default_factory=dict)


class Evaluator(ABC):
    """Something that a model is judged by. What a figure depends on but the model, is told by `describe`."""

    name: ClassVar[str]

    @abstractmethod
    def applies_to(self, model: ModelAdapter) -> bool:
        """Whether the model can do at all what is asked."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The protocol, to stand beside the figures: the data, and what the literature does in several ways."""

    @abstractmethod
    def run(self, model: Any) -> EvaluationResult | None:
        """Judges the model. To be called by all processes; `None` on all but the first."""


class SampleEvaluator(Evaluator, Generic[SampleType]):
    """
    A task whose samples are judged one after another, each on its own.

    A subclass names the kind of model that it takes, which `applies_to` has asked for.

    data (`DataSet`):
        In the order in which they come; a process takes every so-manieth batch.
    """

    batch_size: int = 32

    def __init__(self, data: DataSet[SampleType]):
        self.data = data

    @abstractmethod
    def new_metrics(self) -> dict[str, AccumulatingMetric]:
        """Empty ones, by name."""

    @abstractmethod
    def prepare(self, model: Any) -> None:
        """What is done once a model, such as embedding class names."""

    @abstractmethod
    def update(self, model: Any, samples: list[SampleType], metrics: dict[str, AccumulatingMetric]) -> list[float]:
        """Adds the samples to the metrics. Returns for each how well the model did, by which pictures are chosen."""

    @abstractmethod
    def compute_metrics(self, metrics: dict[str, AccumulatingMetric]) -> dict[str, float | None]:
        """What the metrics come to."""

    @abstractmethod
    def visualize(self, model: Any, sample: SampleType) -> list[tuple[str, np.ndarray]]:
        """Titles and pictures `(height, width, 3)` of what goes in, the truth, and what the model makes of it."""

    def run(self, model: Any) -> EvaluationResult | None:
        """
        Every process takes whole batches, in turns; the batches, and so the figures, are the same whatever the number
        of processes. Raises `ValueError` where there are no samples.
        """
        state = PartialState()
        metrics = self.new_metrics()
        scores: dict[int, float] = {}  # by place
        self.prepare(model)
        start = time.perf_counter()
        for first, batch in own_batches(self.data.samples, self.batch_size, f"{self.name}, {model.name}"):
            scores |= zip(range(first, first + len(batch)), self.update(model, batch, metrics), strict=True)
        everyones = gather_object([({name: metric.state for name, metric in metrics.items()}, scores)])
        if not state.is_main_process:
            return None
        for index, (states, others_scores) in enumerate(everyones):
            if index != state.process_index:
                for name, metric in metrics.items():
                    metric.merge(states[name])
                scores |= others_scores
        if not scores:
            raise ValueError(f"{self.data.name} has no samples.")
        order = sorted(scores, key=lambda place: (scores[place], place))
        extremes = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
        return EvaluationResult(self.compute_metrics(metrics), len(scores), time.perf_counter() - start, extremes)


def own_batches(samples: Iterable[SampleType], batch_size: int, title: str) -> Iterator[tuple[int, list[SampleType]]]:
    """This process's batches, every so-manieth, each with the place of its first sample; the first process shows how
    far all of them are."""
    state = PartialState()
    total = len(samples) if isinstance(samples, Sized) else None
    with tqdm(total=total, desc=title, unit="image", disable=not state.is_main_process) as progress:
        for number, batch in enumerate(batched(samples, batch_size)):
            if number % state.num_processes == state.process_index:
                yield number * batch_size, batch
            progress.update(len(batch))


def batched(samples: Iterable[SampleType], size: int) -> Iterator[list[SampleType]]:
    """As `itertools.batched` of Python 3.12, in lists."""
    iterator = iter(samples)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
