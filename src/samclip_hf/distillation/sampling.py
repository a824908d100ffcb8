"""
In which order samples come: the same one for any number of processes and data loader workers.

Samples are numbered. Their numbers are dealt to a fixed number of lanes, a lane reads shards of its own one after the
other, and processes and workers share the lanes out among themselves: one that needs a sample knows its lane and its
place there. So a global batch holds the same samples whoever reads them, and a run goes on after an interruption from
where each lane stood.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ..datasets.streams import DataError, Stream

MAX_EMPTY_PASSES = 10  # of a lane, which finds other shards in each


class Position(NamedTuple):
    """Where a lane stands: at the beginning of a window."""

    epoch: int = 0
    turn: int = 0  # in its shards of the epoch
    row: int = 0
    samples: int = 0  # before it
    shards: int = 0  # begun before this one


class ShardReader:
    r"""
    One lane's samples: pass after pass over the stream, in each of which every shard belongs to one lane, in an order
    that follows from (seed, epoch). Inside a shard samples are shuffled in windows.

    stream ([`Stream`]):
        All of it.
    seed (`int`), lane (`int`), num_lanes (`int`):
        Which of the lanes this is.
    window (`int`):
        Samples that are shuffled with one another, and held undecoded.
    position (`Position`, *optional*):
        Where to begin, from an earlier one.
    """

    def __init__(
        self,
        stream: Stream,
        seed: int,
        lane: int,
        num_lanes: int,
        window: int,
        position: Position | None = None,
    ):
        self.stream, self.seed, self.lane, self.num_lanes, self.window = stream, seed, lane, num_lanes, window
        self.position = position or Position()
        self._next = self.position.samples
        self._samples = self._read()

    def sample(self, number: int) -> tuple[int, dict[str, Any]]:
        """Sample `number` of the lane with its epoch; the numbers asked for must rise."""
        if number < self._next:
            raise ValueError(f"Sample {number} of the lane was asked for, but it stands at {self._next} already.")
        epoch, sample = next(islice(self._samples, number - self._next, None))
        self._next = number + 1
        return epoch, sample

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        epoch, first_turn, row, number, shards = self.position
        empty_passes = 0
        while True:
            before = number
            order = np.random.default_rng((self.seed, epoch)).permutation(self.stream.num_shards)
            own = order.tolist()[self.lane :: self.num_lanes]
            for turn, shard in enumerate(own[first_turn:], first_turn):
                rows = self.stream.read(shard, row)
                shards += 1
                while window := list(islice(rows, self.window)):
                    row = window[0][0]
                    self.position = Position(epoch, turn, row, number, shards - 1)
                    for index in np.random.default_rng((self.seed, epoch, shard, row)).permutation(len(window)):
                        yield epoch, window[index][1]
                    number += len(window)
                    window.clear()  # before the next one fills
                row = 0
            empty_passes = empty_passes + 1 if number == before else 0
            if empty_passes == MAX_EMPTY_PASSES:
                raise DataError(
                    f"The stream of {self.stream.shards.names[0]} holds no samples"
                    + (
                        f" that are held out, with eval_fraction {self.stream.eval_fraction}. Raise that, or do "
                        "without evaluation."
                        if self.stream.held_out
                        else "."
                    )
                )
            epoch, first_turn = epoch + 1, 0


class Mixture:
    r"""
    The numbered samples of several streams, in proportion to their shares.

    streams (`list[Stream]`):
        What is mixed.
    shares (`list[float]`):
        Of each stream, in any unit.
    seed (`int`):
        See [`ShardReader`].
    num_lanes (`int`):
        Of a stream with as many shards. One with fewer shards has the largest divisor of this number that they fill.
    shuffle_buffer (`int`):
        Samples of a stream that are shuffled with one another, in all its lanes together.
    positions (`dict[str, Position]`):
        Where lanes begin, by "stream/lane"; those not named begin at the beginning.
    """

    PERIOD = 1000  # turns after which the order of the streams repeats

    def __init__(
        self,
        streams: list[Stream],
        shares: list[float],
        seed: int,
        num_lanes: int,
        shuffle_buffer: int,
        positions: dict[str, Position],
    ):
        self.streams, self.seed, self.num_lanes = streams, seed, num_lanes
        self.shuffle_buffer, self.start = shuffle_buffer, positions
        self.lanes_of = [lanes_of(stream, num_lanes) for stream in streams]
        # Which stream each turn belongs to, and how many turns it had before: always the one that lacks the most.
        weights = np.asarray(shares) / sum(shares)
        counts = np.zeros(len(streams), dtype=int)
        self._turns: list[tuple[int, int]] = []
        for turn in range(self.PERIOD):
            chosen = int(np.argmax(weights * (turn + 1) - counts))
            self._turns.append((chosen, int(counts[chosen])))
            counts[chosen] += 1
        self._turns_of = counts.tolist()
        if counts.min() == 0:
            raise DataError(
                f"{shares[counts.argmin()]} of the shares {shares} is so small that nothing of that data would be "
                "drawn: raise it, or leave that data out."
            )
        self._lanes: dict[str, ShardReader] = {}

    def sample(self, number: int) -> tuple[int, dict[str, Any]]:
        """Sample `number` with its epoch; the numbers asked for must rise."""
        turn, place = divmod(number, self.num_lanes)
        period, turn = divmod(turn, self.PERIOD)
        index, turns_before = self._turns[turn]
        num_lanes = self.lanes_of[index]
        name = f"{index}/{place % num_lanes}"
        if name not in self._lanes:
            self._lanes[name] = ShardReader(
                self.streams[index],
                self.seed,
                lane=place % num_lanes,
                num_lanes=num_lanes,
                window=max(1, self.shuffle_buffer // num_lanes),
                position=self.start.get(name),
            )
        turns_before += period * self._turns_of[index]
        return self._lanes[name].sample(turns_before * (self.num_lanes // num_lanes) + place // num_lanes)

    @property
    def positions(self) -> dict[str, Position]:
        """Of the lanes read so far."""
        return {name: lane.position for name, lane in self._lanes.items()}


def lanes_of(stream: Stream, num_lanes: int) -> int:
    """How many lanes a stream has: the largest divisor of `num_lanes` that its shards fill."""
    return max(lanes for lanes in range(1, num_lanes + 1) if num_lanes % lanes == 0 and lanes <= stream.num_shards)
