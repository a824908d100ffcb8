"""
The order of training samples, which does not depend on the number of processes and data loader workers.

Samples are numbered. Consecutive numbers are assigned to a fixed number of readers in turn, and each reader reads its
own shards one after the other. A number therefore determines its reader and its position among the samples of this
reader. Processes and data loader workers divide the numbers among themselves, so a global batch contains the same
samples for any number of processes and workers. Training resumes from the positions of the readers.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ..datasets.streams import DataError, Stream

MAX_EMPTY_EPOCHS = 10  # in a row, before a reader raises an error; it reads other shards in every epoch


class Position(NamedTuple):
    """Position of a reader: the start of a shuffle window."""

    epoch: int = 0
    turn: int = 0  # index of the shard among the reader's shards of the epoch
    row: int = 0
    samples: int = 0  # number of samples before this position
    shards: int = 0  # number of shards that were opened before the current one


class ShardReader:
    r"""
    Reads one of `num_readers` disjoint parts of a stream, epoch after epoch.

    In every epoch, each shard belongs to one reader. `(seed, epoch)` determines the order of the shards. The samples
    of a shard are shuffled in windows.

    Args:
        stream ([`Stream`]):
            The stream, with all of its shards.
        seed (`int`):
            Seed of the order.
        index (`int`):
            Index of this reader, from 0 to `num_readers - 1`.
        num_readers (`int`):
            Number of readers of the stream.
        window (`int`):
            Number of samples that are shuffled together. They are stored in memory undecoded.
        position (`Position`, *optional*):
            Position to resume from.
    """

    def __init__(
        self,
        stream: Stream,
        seed: int,
        index: int,
        num_readers: int,
        window: int,
        position: Position | None = None,
    ):
        self.stream, self.seed, self.index, self.num_readers = stream, seed, index, num_readers
        self.window = window
        self.position = position or Position()
        self._next = self.position.samples
        self._samples = self._read()

    def sample(self, number: int) -> tuple[int, dict[str, Any]]:
        """
        Returns the epoch and the content of sample `number` of this reader.

        Raises:
            ValueError: If `number` is not larger than in the previous call.
        """
        if number < self._next:
            raise ValueError(f"Sample numbers must increase: got {number}, expected {self._next} or more.")
        epoch, sample = next(islice(self._samples, number - self._next, None))
        self._next = number + 1
        return epoch, sample

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        epoch, first_turn, row, number, num_shards = self.position
        empty_epochs = 0
        while True:
            number_at_start = number
            order = np.random.default_rng((self.seed, epoch)).permutation(self.stream.num_shards)
            own_shards = order.tolist()[self.index :: self.num_readers]
            for turn, shard in enumerate(own_shards[first_turn:], first_turn):
                rows = self.stream.read(shard, row)
                num_shards += 1
                while window := list(islice(rows, self.window)):
                    row = window[0][0]
                    self.position = Position(epoch, turn, row, number, num_shards - 1)
                    for index in np.random.default_rng((self.seed, epoch, shard, row)).permutation(len(window)):
                        yield epoch, window[index][1]
                    number += len(window)
                    window.clear()  # frees the samples before the next window is read
                row = 0
            empty_epochs = empty_epochs + 1 if number == number_at_start else 0
            if empty_epochs == MAX_EMPTY_EPOCHS:
                source = self.stream.shards.names[0]
                if self.stream.held_out:
                    raise DataError(
                        f"The stream of {source} has no held-out samples with eval_fraction "
                        f"{self.stream.eval_fraction}. Raise eval_fraction, or train without evaluation."
                    )
                raise DataError(f"The stream of {source} has no samples.")
            epoch, first_turn = epoch + 1, 0


class Mixture:
    r"""
    The numbered samples of several streams, mixed in proportion to their weights.

    Args:
        streams (`Sequence[Stream]`):
            The streams to mix.
        weights (`Sequence[float]`):
            Weight of each stream, in any unit.
        seed (`int`):
            Seed of the order, see [`ShardReader`].
        num_readers (`int`):
            Number of readers of each stream. A stream with fewer shards has fewer readers, see [`count_readers`].
        shuffle_buffer (`int`):
            Number of samples of a stream that are shuffled together, in all of its readers.
        positions (`Mapping[str, Position]`):
            Positions to resume from, by `"stream/reader"`. Other readers start at the beginning.

    Raises:
        DataError: If a weight is so small that its stream would never be drawn.
    """

    PERIOD = 1000  # number of turns after which the order of the streams repeats

    def __init__(
        self,
        streams: Sequence[Stream],
        weights: Sequence[float],
        seed: int,
        num_readers: int,
        shuffle_buffer: int,
        positions: Mapping[str, Position],
    ):
        self.streams, self.seed, self.num_readers = streams, seed, num_readers
        self.shuffle_buffer, self._start = shuffle_buffer, positions
        self._num_readers = [count_readers(stream, num_readers) for stream in streams]
        # The stream of each turn, and the number of earlier turns of that stream in the period. A turn is assigned to
        # the stream whose number of turns is furthest below its weight.
        fractions = np.asarray(weights) / sum(weights)
        counts = np.zeros(len(streams), dtype=int)
        self._turns: list[tuple[int, int]] = []
        for turn in range(self.PERIOD):
            chosen = int(np.argmax(fractions * (turn + 1) - counts))
            self._turns.append((chosen, int(counts[chosen])))
            counts[chosen] += 1
        self._turns_by_stream = counts.tolist()
        if counts.min() == 0:
            raise DataError(
                f"Weight {weights[int(counts.argmin())]} of {list(weights)} is so small that its data would never be "
                "drawn. Raise the weight, or remove this data."
            )
        self._readers: dict[str, ShardReader] = {}

    def sample(self, number: int) -> tuple[int, dict[str, Any]]:
        """Returns the epoch and the content of sample `number`. Numbers must increase from call to call."""
        turn, place = divmod(number, self.num_readers)
        period, turn = divmod(turn, self.PERIOD)
        stream_index, earlier_turns = self._turns[turn]
        num_readers = self._num_readers[stream_index]
        index = place % num_readers
        name = f"{stream_index}/{index}"
        if name not in self._readers:
            self._readers[name] = ShardReader(
                self.streams[stream_index],
                self.seed,
                index=index,
                num_readers=num_readers,
                window=max(1, self.shuffle_buffer // num_readers),
                position=self._start.get(name),
            )
        earlier_turns += period * self._turns_by_stream[stream_index]
        samples_per_turn = self.num_readers // num_readers
        return self._readers[name].sample(earlier_turns * samples_per_turn + place // num_readers)

    @property
    def positions(self) -> dict[str, Position]:
        """Positions of the readers that were used so far."""
        return {name: reader.position for name, reader in self._readers.items()}


def count_readers(stream: Stream, num_readers: int) -> int:
    """Returns the number of readers of a stream: the largest divisor of `num_readers` that is not larger than its
    number of shards, so that every reader has a shard."""
    limit = min(num_readers, stream.num_shards)
    return max(number for number in range(1, limit + 1) if num_readers % number == 0)
