"""Averages of the values that the losses record."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor


class RunningAverages:
    """Averages of named values since the last log, over the micro-batches of all processes. Values stay on their
    device until the averages are computed."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def record(self, values: Mapping[str, Tensor]) -> None:
        """Adds a value to each of the named averages."""
        for name, value in values.items():
            self._sums[name] += value.detach()
            self._counts[name] += 1

    def compute(self) -> dict[str, float]:
        """Returns the averages over all processes and starts again from zero. All processes must call it."""
        processes = gather_object([self.state()])
        names = sorted({name for process in processes for name in process})
        self._sums.clear()
        self._counts.clear()
        averages = {}
        for name in names:
            totals, counts = zip(*(process[name] for process in processes if name in process), strict=True)
            averages[name] = sum(totals) / sum(counts)
        return averages

    @contextlib.contextmanager
    def isolate(self) -> Iterator[None]:
        """Context in which averages start from zero. Values that are recorded in it are discarded at its end."""
        sums, counts = self._sums, self._counts
        self._sums, self._counts = defaultdict(float), defaultdict(int)
        try:
            yield
        finally:
            self._sums, self._counts = sums, counts

    def state(self) -> dict[str, list[Any]]:
        """Returns sum and count of each value of this process, for JSON."""
        return {name: [float(total), self._counts[name]] for name, total in self._sums.items()}

    def load_state(self, state: Mapping[str, list[Any]]) -> None:
        """Continues from a `state`."""
        for name, (total, count) in state.items():
            self._sums[name], self._counts[name] = total, count
