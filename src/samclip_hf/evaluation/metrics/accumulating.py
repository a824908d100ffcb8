"""
The base class of the metrics. `evaluate.Metric` writes every prediction to its cache and reads all of them for
`compute`, which takes hundreds of gigabytes for label maps and masks. These metrics store counts instead.

`evaluate.load` copies a metric's file and the files that it imports from its folder, but not the files that those
import. Metrics therefore import only this file of the package, and this file imports none.
"""

import inspect
from abc import ABC, abstractmethod
from copy import copy
from typing import Any

import evaluate
import numpy as np
from datasets import Features


class AccumulatingMetric(evaluate.Metric, ABC):
    r"""
    An `evaluate.Metric` with the same `add`, `add_batch` and `compute`, which stores a small state and writes no
    files.

    Subclasses compute the state of a batch (`_measure`) and the result of a state (`_result`). The arguments are those
    that `evaluate.load` passes; only the names and `hash` are used. Raises `ValueError` unless `num_process` is 1:
    each process has its own metric, and the main process merges their states.

    state (`dict[str, numpy.ndarray | list]`):
        Integer counts, and lists whose order does not affect the result. The result is exactly the same for any order
        and any sharding of the samples. Empty for a new metric. Can be pickled.
    input_features (`datasets.Features`):
        The types of a prediction and of a reference.
    """

    input_features: Features

    def __init__(
        self,
        config_name: str | None = None,
        experiment_id: str | None = None,
        hash: str | None = None,
        num_process: int = 1,
        process_id: int = 0,
        cache_dir: str | None = None,
        keep_in_memory: bool = False,
    ):
        if num_process != 1:
            raise ValueError("num_process must be 1. Use one metric per process and merge their states.")
        super().__init__(config_name=config_name, experiment_id=experiment_id, hash=hash)
        self.state: dict[str, Any] = {}

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=inspect.getdoc(type(self)), citation="", features=self.input_features)

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # evaluate would create a folder here

    @abstractmethod
    def _measure(self, predictions: Any, references: Any) -> dict[str, Any]:
        """Returns the state for a batch of one or more samples."""

    @abstractmethod
    def _result(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns floats, integers and lists for a state."""

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Adds one sample."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Adds any number of samples. Raises `ValueError`, and adds none of them, if the numbers of predictions and
        references differ or a sample is invalid."""
        if predictions is None or references is None or len(predictions) != len(references):
            raise ValueError(f"{self.name}: the numbers of predictions and references differ.")
        if len(predictions):
            self.merge(self._measure(predictions, references))

    def merge(self, state: dict[str, Any]) -> None:
        """Adds the `state` of another metric, such as that of another process. The other state is not changed. Raises
        `ValueError` if the other metric has different arguments."""
        if self.state and state and _shapes(self.state) != _shapes(state):
            raise ValueError(
                f"{self.name}: the state belongs to a metric of another type or with different arguments."
            )
        for key, value in state.items():
            if key in self.state:
                self.state[key] += value  # counts are summed, lists extended
            else:
                self.state[key] = copy(value)

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, Any]:
        """Returns the result for all samples, including those passed here, and resets the metric. Raises `ValueError`
        if there are no samples."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self.state:
            raise ValueError(f"{self.name}: no samples were added.")
        result = self._result(self.state)
        self.state = {}
        return result


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.shape if isinstance(value, np.ndarray) else list for key, value in state.items()}
