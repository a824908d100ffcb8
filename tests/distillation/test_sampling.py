"""The order of samples: complete epochs, the same order for any number of consumers, resumable anywhere."""

from collections import Counter

import pytest

from samclip_hf.datasets.streams import Stream
from samclip_hf.distillation.sampling import Mixture, ShardReader, count_readers


class Numbers:
    """Shards of given lengths. The key of a sample is its shard and row."""

    def __init__(self, lengths, name="a"):
        self.names = [f"{name}{shard}" for shard in range(len(lengths))]
        self.is_remote = False
        self.lengths = lengths
        self.reads = []  # rows that were read

    def rows(self, shard, start, wanted):
        for row in range(start, self.lengths[shard]):
            self.reads.append((shard, row))
            if wanted(key := f"{self.names[shard]}/{row}"):
                yield row, {"key": key, "image": None}


def keys(mixture, numbers):
    return [mixture.sample(number)[1]["key"] for number in numbers]


def mix(*sources, weights=None, seed=0, num_readers=4, shuffle_buffer=12, positions=None, eval_fraction=0.0):
    streams = [Stream(source, eval_fraction) for source in sources]
    return Mixture(streams, weights or [1.0] * len(streams), seed, num_readers, shuffle_buffer, positions or {})


LENGTHS = [5, 7, 1, 4, 6, 3, 8, 2, 5]


def test_every_epoch_has_every_sample_once_in_another_order():
    stream = Stream(Numbers(LENGTHS))
    readers = [ShardReader(stream, seed=0, index=index, num_readers=4, window=3) for index in range(4)]
    epochs = [Counter(), Counter(), Counter()]
    orders = [[], [], []]
    for reader in readers:
        for number in range(200):
            epoch, sample = reader.sample(number)
            if epoch < 3:
                epochs[epoch][sample["key"]] += 1
                orders[epoch].append(sample["key"])
    assert all(len(seen) == sum(LENGTHS) and set(seen.values()) == {1} for seen in epochs)
    assert len({tuple(order) for order in orders}) == 3


def test_the_order_depends_on_the_seed():
    first, again, other = (keys(mix(Numbers(LENGTHS), seed=seed), range(60)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("num_consumers", [2, 3, 4, 8])
def test_consumers_together_get_the_samples_of_one(num_consumers):
    alone = keys(mix(Numbers(LENGTHS), Numbers([3, 9], "b"), weights=[2, 1]), range(300))
    shared = [None] * 300
    for consumer in range(num_consumers):
        mixture = mix(Numbers(LENGTHS), Numbers([3, 9], "b"), weights=[2, 1])
        shared[consumer::num_consumers] = keys(mixture, range(consumer, 300, num_consumers))
    assert shared == alone


@pytest.mark.parametrize("stop", range(0, 240, 17))
def test_a_mixture_resumes_from_its_positions_without_reading_earlier_rows(stop):
    sources = Numbers(LENGTHS), Numbers([3, 9], "b")
    whole = keys(mix(*sources), range(300))
    before = mix(*sources)
    keys(before, range(stop))
    resumed = Numbers(LENGTHS), Numbers([3, 9], "b")
    after = mix(*resumed, positions=before.positions)
    assert keys(after, range(stop, stop + 8)) == whole[stop : stop + 8]
    # Each reader reads at most its current window again, and the rows of the eight samples.
    for source, num_readers in zip(resumed, (4, 2), strict=True):
        assert len(source.reads) <= 2 * (12 // num_readers + 1) * num_readers


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (3, 2), (2, 3)])
def test_another_number_of_consumers_resumes_at_the_same_sample(before, after):
    whole = keys(mix(Numbers(LENGTHS)), range(200))
    positions = {}
    for consumer in range(before):
        mixture = mix(Numbers(LENGTHS))
        keys(mixture, range(consumer, 90, before))
        positions |= mixture.positions
    resumed = [None] * 110
    for consumer in range(after):
        mixture = mix(Numbers(LENGTHS), positions=positions)
        resumed[consumer::after] = keys(mixture, range(90 + consumer, 200, after))
    assert resumed == whole[90:]


def test_streams_are_mixed_in_proportion_to_their_weights():
    mixture = mix(Numbers([50] * 8), Numbers([50] * 8, "b"), weights=[3, 1])
    counts = Counter(key[0] for key in keys(mixture, range(4000)))
    assert counts == {"a": 3000, "b": 1000}
    first = Counter(key[0] for key in keys(mix(Numbers([50] * 8), Numbers([50] * 8, "b"), weights=[3, 1]), range(16)))
    assert first == {"a": 12, "b": 4}  # also at the start


def test_numbers_must_increase():
    mixture = mix(Numbers(LENGTHS))
    keys(mixture, [0, 9])
    with pytest.raises(ValueError, match="must increase: got 0, expected 3 or more"):
        mixture.sample(1)


def test_held_out_samples_are_the_complement_and_depend_on_the_key_only():
    shards = Numbers([400] * 8)
    train, held_out = Stream(shards, 0.1), Stream(shards, 0.1, held_out=True)
    seen = [{sample["key"] for shard in range(8) for _, sample in stream.read(shard)} for stream in (train, held_out)]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 3200
    assert 240 < len(seen[1]) < 400
    more = {sample["key"] for shard in range(8) for _, sample in Stream(shards, 0.2, held_out=True).read(shard)}
    assert seen[1] < more


@pytest.mark.parametrize(("num_shards", "num_readers"), [(1, 1), (5, 4), (7, 6), (12, 12), (99, 12)])
def test_every_reader_of_a_stream_has_a_shard(num_shards, num_readers):
    assert count_readers(Stream(Numbers([1] * num_shards)), 12) == num_readers


def test_a_stream_without_samples_raises():
    with pytest.raises(ValueError, match="The stream of a0 has no samples"):
        keys(mix(Numbers([0, 0])), [0])
    held_out = Stream(Numbers([3]), eval_fraction=1e-9).complement()
    with pytest.raises(ValueError, match=r"has no held-out samples with eval_fraction 1e-09\. Raise"):
        ShardReader(held_out, seed=0, index=0, num_readers=1, window=1).sample(0)


def test_a_weight_must_be_large_enough_to_draw_samples():
    with pytest.raises(ValueError, match=r"Weight 0\.0004 of .* is so small"):
        mix(Numbers([3]), Numbers([3], "b"), weights=[1.0, 0.0004])
    mix(Numbers([3]), Numbers([3], "b"), weights=[1.0, 0.001])


class Flaky(Numbers):
    """Raises once at every row."""

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


def test_a_failed_remote_read_is_retried_at_the_same_row(monkeypatch):
    waits = []
    monkeypatch.setattr("samclip_hf.datasets.streams.time.sleep", waits.append)
    assert [row for row, _ in Stream(Flaky([4], is_remote=True)).read(0)] == [0, 1, 2, 3]
    assert waits == [1, 1, 1, 1]
    broken = list(Stream(Flaky([4], is_remote=False)).read(0))  # local reads are not retried
    assert [(row, sample["cause"]) for row, sample in broken] == [(0, "unreadable shard")]


def test_a_remote_shard_is_skipped_after_the_last_retry(monkeypatch):
    waits = []
    monkeypatch.setattr("samclip_hf.datasets.streams.time.sleep", waits.append)

    class Gone(Numbers):
        def rows(self, shard, start, wanted):
            raise OSError("gone")

    source = Gone([4])
    source.is_remote = True
    assert [sample["cause"] for _, sample in Stream(source).read(0)] == ["unreadable shard"]
    assert waits == [1, 2, 4, 8, 16]


def test_a_mixture_without_held_out_samples_resumes_from_its_positions():
    alone = keys(mix(Numbers([40] * 4), eval_fraction=0.3), range(100))
    before = mix(Numbers([40] * 4), eval_fraction=0.3)
    keys(before, range(50))
    after = mix(Numbers([40] * 4), eval_fraction=0.3, positions=before.positions)
    assert keys(after, range(50, 100)) == alone[50:]
