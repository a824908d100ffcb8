"""
What the metrics share. `evaluate.Metric` writes every prediction to a file of its cache and reads all of them back to
compute: for label maps and masks that is hundreds of gigabytes where a table of counts would do. These keep the
counts.

`evaluate.load` copies a metric's file elsewhere, together with what the file itself imports from beside it. So a
metric imports this file and nothing else of the package, and this file imports nothing of it.
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
    An `evaluate.Metric` with the same `add`, `add_batch` and `compute`, that keeps a small state and writes no files.

    Subclasses say what a batch adds (`_measure`) and what follows from the sum (`_result`). The arguments are those
    that `evaluate.load` passes; only names and `hash` have a meaning here. Raises `ValueError` where `num_process` is
    not 1: processes each have a metric of their own, and one of them merges the others' states.

    state (`dict[str, numpy.ndarray | list]`):
        What was added so far, empty at first. Arrays are integer counts, lists have entries whose order must not
        matter to the result: it is the same to the bit, however samples were divided and whichever came first. Can be
        pickled.
    input_features (`datasets.Features`):
        What one prediction and one reference are.
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
            raise ValueError("Give every process a metric of its own and merge their states, instead of num_process.")
        super().__init__(config_name=config_name, experiment_id=experiment_id, hash=hash)
        self.state: dict[str, Any] = {}

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=inspect.getdoc(type(self)), citation="", features=self.input_features)

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # evaluate makes a folder here

    @abstractmethod
    def _measure(self, predictions: Any, references: Any) -> dict[str, Any]:
        """The state of a metric that has seen this batch, of one sample or more, and nothing else."""

    @abstractmethod
    def _result(self, state: dict[str, Any]) -> dict[str, Any]:
        """Plain floats, integers and lists."""

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """One sample."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Any number of samples. Raises `ValueError` where there are not as many references as predictions, and adds
        nothing where any sample is refused."""
        if predictions is None or references is None or len(predictions) != len(references):
            raise ValueError(f"{self.name}: there must be as many references as predictions.")
        if len(predictions):
            self.merge(self._measure(predictions, references))

    def merge(self, state: dict[str, Any]) -> None:
        """Adds another metric's `state`, that of another process for instance, and leaves it as it was. Raises
        `ValueError` where that metric counted other things."""
        if self.state and state and shapes(self.state) != shapes(state):
            raise ValueError(f"{self.name}: this state is of another metric, or of one with other arguments.")
        for key, value in state.items():
            if key in self.state:
                self.state[key] += value  # counts are summed, lists extended
            else:
                self.state[key] = copy(value)

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, Any]:
        """The result of all that was added, these samples included, after which the metric starts afresh. Raises
        `ValueError` where nothing was added."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self.state:
            raise ValueError(f"{self.name}: nothing was added, so there is nothing to compute.")
        result = self._result(self.state)
        self.state = {}
        return result


def shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.shape if isinstance(value, np.ndarray) else list for key, value in state.items()}
