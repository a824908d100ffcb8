"""The order of samples: nothing lost, nothing doubled, the same for every number of readers, resumable anywhere."""

from collections import Counter

import pytest

from samclip_hf.datasets.streams import Stream
from samclip_hf.distillation.sampling import Mixture, ShardReader, lanes_of


class Numbers:
    """Shards of given lengths whose samples are their own names."""

    def __init__(self, lengths, name="a"):
        self.names = [f"{name}{shard}" for shard in range(len(lengths))]
        self.is_remote = False
        self.lengths = lengths
        self.reads = []  # rows handed out

    def rows(self, shard, start, wanted):
        for row in range(start, self.lengths[shard]):
            self.reads.append((shard, row))
            if wanted(key := f"{self.names[shard]}/{row}"):
                yield row, {"key": key, "image": None}


def keys(mixture, numbers):
    return [mixture.sample(number)[1]["key"] for number in numbers]


def mix(*sources, shares=None, seed=0, num_lanes=4, shuffle_buffer=12, positions=None, eval_fraction=0.0):
    streams = [Stream(source, eval_fraction) for source in sources]
    return Mixture(streams, shares or [1.0] * len(streams), seed, num_lanes, shuffle_buffer, positions or {})


LENGTHS = [5, 7, 1, 4, 6, 3, 8, 2, 5]


def test_every_pass_holds_every_sample_once_in_an_order_of_its_own():
    lanes = [ShardReader(Stream(Numbers(LENGTHS)), seed=0, lane=lane, num_lanes=4, window=3) for lane in range(4)]
    passes = [Counter(), Counter(), Counter()]
    orders = [[], [], []]
    for lane in lanes:
        for number in range(200):
            epoch, sample = lane.sample(number)
            if epoch < 3:
                passes[epoch][sample["key"]] += 1
                orders[epoch].append(sample["key"])
    assert all(len(seen) == sum(LENGTHS) and set(seen.values()) == {1} for seen in passes)
    assert len({tuple(order) for order in orders}) == 3


def test_a_seed_decides_over_the_order():
    first, again, other = (keys(mix(Numbers(LENGTHS), seed=seed), range(60)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("readers", [2, 3, 4, 8])
def test_readers_together_read_what_one_reads(readers):
    alone = keys(mix(Numbers(LENGTHS), Numbers([3, 9], "b"), shares=[2, 1]), range(300))
    shared = [None] * 300
    for reader in range(readers):
        mixture = mix(Numbers(LENGTHS), Numbers([3, 9], "b"), shares=[2, 1])
        shared[reader::readers] = keys(mixture, range(reader, 300, readers))
    assert shared == alone


@pytest.mark.parametrize("stop", range(0, 240, 17))
def test_a_mixture_goes_on_from_its_positions_without_reading_what_it_has_read(stop):
    sources = Numbers(LENGTHS), Numbers([3, 9], "b")
    whole = keys(mix(*sources), range(300))
    before = mix(*sources)
    keys(before, range(stop))
    resumed = Numbers(LENGTHS), Numbers([3, 9], "b")
    after = mix(*resumed, positions=before.positions)
    assert keys(after, range(stop, stop + 8)) == whole[stop : stop + 8]
    # At most its window again for each lane, and what the eight samples need.
    assert all(
        len(source.reads) <= 2 * (12 // lanes + 1) * lanes for source, lanes in zip(resumed, (4, 2), strict=True)
    )


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (3, 2), (2, 3)])
def test_another_number_of_readers_goes_on_where_the_first_ones_stopped(before, after):
    whole = keys(mix(Numbers(LENGTHS)), range(200))
    positions = {}
    for reader in range(before):
        mixture = mix(Numbers(LENGTHS))
        keys(mixture, range(reader, 90, before))
        positions |= mixture.positions
    resumed = [None] * 110
    for reader in range(after):
        mixture = mix(Numbers(LENGTHS), positions=positions)
        resumed[reader::after] = keys(mixture, range(90 + reader, 200, after))
    assert resumed == whole[90:]


def test_streams_come_in_proportion_to_their_shares():
    mixture = mix(Numbers([50] * 8), Numbers([50] * 8, "b"), shares=[3, 1])
    counts = Counter(key[0] for key in keys(mixture, range(4000)))
    assert counts == {"a": 3000, "b": 1000}
    first = Counter(key[0] for key in keys(mix(Numbers([50] * 8), Numbers([50] * 8, "b"), shares=[3, 1]), range(16)))
    assert first == {"a": 12, "b": 4}  # from the beginning on


def test_numbers_that_fall_are_refused():
    mixture = mix(Numbers(LENGTHS))
    keys(mixture, [0, 9])
    with pytest.raises(ValueError, match="stands at"):
        mixture.sample(1)


def test_what_is_held_out_is_the_rest_and_always_the_same():
    shards = Numbers([400] * 8)
    train, held_out = Stream(shards, 0.1), Stream(shards, 0.1, held_out=True)
    seen = [{sample["key"] for shard in range(8) for _, sample in stream.read(shard)} for stream in (train, held_out)]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 3200
    assert 240 < len(seen[1]) < 400
    more = {sample["key"] for shard in range(8) for _, sample in Stream(shards, 0.2, held_out=True).read(shard)}
    assert seen[1] < more


@pytest.mark.parametrize(("num_shards", "lanes"), [(1, 1), (5, 4), (7, 6), (12, 12), (99, 12)])
def test_lanes_divide_their_number_and_have_shards(num_shards, lanes):
    assert lanes_of(Stream(Numbers([1] * num_shards)), 12) == lanes


def test_a_stream_of_nothing_ends_with_a_sentence():
    with pytest.raises(ValueError, match="The stream of a0 holds no samples"):
        keys(mix(Numbers([0, 0])), [0])
    held_out = Stream(Numbers([3]), eval_fraction=1e-9).complement()
    with pytest.raises(ValueError, match=r"holds no samples that are held out, with eval_fraction 1e-09. Raise that"):
        ShardReader(held_out, seed=0, lane=0, num_lanes=1, window=1).sample(0)


def test_a_share_of_which_nothing_would_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"0\.0004 of the shares .* is so small"):
        mix(Numbers([3]), Numbers([3], "b"), shares=[1.0, 0.0004])
    mix(Numbers([3]), Numbers([3], "b"), shares=[1.0, 0.001])


class Flaky(Numbers):
    """Fails once at every row."""

    def __init__(self, lengths, is_remote):
        super().__init__(lengths)
        self.is_remote = is_remote
        self.failed = set()

    def rows(self, shard, start, wanted):
        for row in range(start, self.lengths[shard]):
            if (shard, row) not in self.failed:
                self.failed.add((shard, row))
                raise ConnectionError("gone")
            yield row, {"key": f"{row}", "image": None}


def test_a_remote_read_that_fails_is_tried_again_where_it_failed(monkeypatch):
    waits = []
    monkeypatch.setattr("samclip_hf.distillation.streams.time.sleep", waits.append)
    assert [row for row, _ in Stream(Flaky([4], is_remote=True)).read(0)] == [0, 1, 2, 3]
    assert waits == [1, 1, 1, 1]
    broken = list(Stream(Flaky([4], is_remote=False)).read(0))  # a file here will not get better
    assert [(row, sample["cause"]) for row, sample in broken] == [(0, "unreadable shard")]


def test_a_remote_shard_that_stays_away_is_given_up(monkeypatch):
    waits = []
    monkeypatch.setattr("samclip_hf.distillation.streams.time.sleep", waits.append)

    class Gone(Numbers):
        def rows(self, shard, start, wanted):
            raise OSError("gone")

    source = Gone([4])
    source.is_remote = True
    assert [sample["cause"] for _, sample in Stream(source).read(0)] == ["unreadable shard"]
    assert waits == [1, 2, 4, 8, 16]


def test_only_rows_that_are_kept_count_in_windows():
    alone = keys(mix(Numbers([40] * 4), eval_fraction=0.3), range(100))
    positions = mix(Numbers([40] * 4), eval_fraction=0.3)
    keys(positions, range(50))
    after = mix(Numbers([40] * 4), eval_fraction=0.3, positions=positions.positions)
    assert keys(after, range(50, 100)) == alone[50:]
