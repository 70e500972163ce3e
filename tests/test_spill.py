"""Counts that are spilled to disk are the counts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.data.hashing import hash_to_range, mix64
from dlrm_jax.data.spill import PARTITIONS, SpilledCounts, count_keys, merge_counts, read_partition


def zipf_keys(num_keys: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return mix64(random.zipf(1.2, num_keys).astype(np.uint64) % np.uint64(50_000))


def add_up(folders, max_entries: int, partitions: int = PARTITIONS) -> Counter:
    total: Counter = Counter()
    for partition in range(partitions):
        keys, counts = read_partition(folders, partition, max_entries=max_entries)
        assert np.all(keys[1:] > keys[:-1])
        assert not set(keys.tolist()) & set(total)
        total.update(dict(zip(keys.tolist(), counts.tolist(), strict=True)))
    return total


@pytest.mark.parametrize("max_entries", [1, 1000, 4000, 10**9])
def test_counts_when_more_keys_than_entries_equal_an_in_memory_counter(tmp_path, max_entries):
    keys = zipf_keys(200_000, seed=0)
    spilled = SpilledCounts(tmp_path, max_entries=max_entries)
    for block in np.array_split(keys, 40):
        spilled.add(*count_keys(block))
    spilled.close()
    assert spilled.num_spills == 1 if max_entries > len(keys) else spilled.num_spills > 3
    assert add_up([tmp_path], max(max_entries, 100)) == Counter(keys.tolist())


def test_counts_of_several_folders_add_up(tmp_path):
    parts = [zipf_keys(20_000, seed) for seed in range(3)]
    for number, keys in enumerate(parts):
        spilled = SpilledCounts(tmp_path / str(number), max_entries=2000)
        spilled.add(*count_keys(keys))
        spilled.close()
    folders = [tmp_path / str(number) for number in range(3)]
    assert add_up(folders, max_entries=500) == Counter(np.concatenate(parts).tolist())


def test_counting_again_after_an_interruption_starts_from_nothing(tmp_path):
    interrupted = SpilledCounts(tmp_path, max_entries=1)
    interrupted.add(*count_keys(zipf_keys(1000, seed=1)))
    again = SpilledCounts(tmp_path, max_entries=1)
    again.add(*count_keys(np.array([7, 7, 9], np.uint64)))
    again.close()
    assert add_up([tmp_path], max_entries=10) == {7: 2, 9: 1}


def test_counts_of_nothing_are_empty(tmp_path):
    SpilledCounts(tmp_path, max_entries=10).close()
    assert not add_up([tmp_path], max_entries=10)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), max_size=30), max_size=5))
def test_merged_counts_equal_a_counter(blocks):
    keys, counts = merge_counts(count_keys(np.array(block, np.uint64)) for block in blocks)
    expected = Counter(key for block in blocks for key in block)
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == expected
    assert keys.tolist() == sorted(expected)


def test_mix64_gives_the_published_splitmix64_sequence():
    # The first outputs of splitmix64 from state 0 (as in the tests of Java's SplittableRandom and of xoshiro).
    state = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(value) for value in mix64(state).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@pytest.mark.parametrize("size", [1, 3, 1000, 2**31, 2**32])
def test_hash_to_range_stays_inside_and_reaches_both_ends(size):
    values = hash_to_range(np.array([0, 2**64 - 1], np.uint64), size)
    assert values.tolist() == [0, size - 1]
