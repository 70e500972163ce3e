"""Partitioners of numbers into bins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.partition import PARTITIONERS, greedy, largest_differencing


def loads_of(weights: list[float], bins: list[tuple[int, ...]], held: np.ndarray) -> np.ndarray:
    loads = held.astype(np.float64).copy()
    for weight, places in zip(weights, bins, strict=True):
        loads[list(places)] += weight
    return loads


def test_largest_differencing_when_given_the_textbooks_numbers_then_it_finds_the_textbooks_partition():
    # Karmarkar and Karp's example as Korf (1998) tells it: 8, 7, 6, 5, 4 into two sets, 16 and 14; greedy: 17 and 13.
    weights = [8.0, 7.0, 6.0, 5.0, 4.0]
    ones, nothing = [1] * 5, np.zeros(2)
    assert sorted(loads_of(weights, largest_differencing(weights, ones, nothing), nothing)) == [14.0, 16.0]
    assert sorted(loads_of(weights, greedy(weights, ones, nothing), nothing)) == [13.0, 17.0]


def test_largest_differencing_when_numbers_divide_evenly_into_four_bins_then_it_finds_that():
    weights = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    nothing = np.zeros(4)
    assert loads_of(weights, largest_differencing(weights, [1] * 8, nothing), nothing).tolist() == [9.0] * 4


# More than the numbers, and less.
@pytest.mark.parametrize("most_held", [100.0, 3.0])
@pytest.mark.parametrize("name", PARTITIONERS)
def test_partitioner_when_a_bin_holds_something_then_the_others_are_filled(name: str, most_held: float):
    for full in range(3):
        held = np.where(np.arange(3) == full, most_held, 0.0)
        bins = PARTITIONERS[name]([10.0, 10.0], [1, 1], held)
        assert sorted(bins) == [(place,) for place in range(3) if place != full]


@pytest.mark.parametrize("name", PARTITIONERS)
@settings(deadline=None)
@given(data=st.data())
def test_partitioner_when_given_any_numbers_then_each_copy_has_a_bin_of_its_own(name: str, data: st.DataObject):
    num_bins = data.draw(st.integers(1, 6))
    items = data.draw(st.lists(st.tuples(st.floats(0, 100), st.integers(1, num_bins)), max_size=20))
    weights, copies = [weight for weight, _ in items], [count for _, count in items]
    held = np.array(data.draw(st.lists(st.floats(0, 100), min_size=num_bins, max_size=num_bins)))
    bins = PARTITIONERS[name](weights, copies, held)
    assert [len(places) for places in bins] == copies
    assert all(len(set(places)) == len(places) and set(places) <= set(range(num_bins)) for places in bins)
    loads = loads_of(weights, bins, held)
    assert loads.sum() == pytest.approx(sum(w * c for w, c in items) + held.sum())
    assert bins == PARTITIONERS[name](weights, copies, held)


@settings(deadline=None)
@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=40), num_bins=st.integers(1, 6))
def test_greedy_when_given_any_numbers_then_it_keeps_grahams_bound(weights: list[int], num_bins: int):
    loads = loads_of(weights, greedy(weights, [1] * len(weights), np.zeros(num_bins)), np.zeros(num_bins))
    # The optimum is at least the mean, the largest, and two of the first M + 1 in order.
    ordered = sorted(weights, reverse=True)
    pair = ordered[num_bins - 1] + ordered[num_bins] if len(weights) > num_bins else 0
    optimum = max(sum(weights) / num_bins, ordered[0], pair)
    assert loads.max() <= max(optimum, sum(weights) / num_bins + (1 - 1 / num_bins) * ordered[0]) + 1e-9
