"""Room for ids on their way: what is too small is reported, and no room changes a result."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import FeatureSpec, InputError, KeyedJagged, ShardedTables, TableSpec, make_mesh
from sharding.address import sum_or_most
from sharding.capacities import Capacities, GroupCapacity, with_rounds
from sharding.jagged import for_devices
from sharding.plan import ShardingPlan, row_wise, table_wise

TABLES = (TableSpec(name="a", num_rows=64, dim=16), TableSpec(name="b", num_rows=64, dim=16))
TABLES += (TableSpec(name="c", num_rows=64, dim=16),)
FEATURES = tuple(FeatureSpec(name=table.name, table=table.name, max_ids=4) for table in TABLES)
DEVICES, SAMPLES = 8, 2


@cache
def tables() -> ShardedTables:
    placements = (table_wise(TABLES[0], 5), row_wise(TABLES[1], returns="partial_sums"))
    placements += (row_wise(TABLES[2], returns="rows"),)
    plan = ShardingPlan(nodes=2, chips=4, placements=placements)
    return ShardedTables(TABLES, FEATURES, plan=plan, mesh=make_mesh(2, 4))


def batch(seed: int, *, rows: int = 64, senders: int = DEVICES) -> KeyedJagged:
    """Ids below ``rows``, in the samples of so many devices."""
    random = np.random.default_rng(seed)
    bags = {
        feature.name: [
            random.integers(0, rows, 4 if sample < senders * SAMPLES else 0).tolist()
            for sample in range(DEVICES * SAMPLES)
        ]
        for feature in FEATURES
    }
    return KeyedJagged.from_bags(bags)


def outcome(ids: KeyedJagged, capacities: Capacities | None) -> tuple[list[np.ndarray], np.ndarray, bool]:
    """Bits of what is looked up and of the state after an update, the needs, and whether there was no room."""
    state = tables().init()
    room = capacities.ids if capacities else ids.capacity
    routed = tables().route(tables().to_devices(ids, room), capacities)
    embeddings = tables().lookup(state, routed)
    new = tables().update(state, routed, jax.tree.map(lambda x: x + 1, embeddings), step=1)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((embeddings, new))]
    return leaves, np.asarray(routed.needs), bool(routed.overflow)


def tiny() -> Capacities:
    return Capacities(ids=8, groups=tuple(GroupCapacity(pair=1, total=1, distinct=1) for _ in tables().layout.groups))


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(batch(1), marks=pytest.mark.slow),
        pytest.param(batch(2, rows=1), marks=pytest.mark.slow),
        # Some owners are asked for two rows.
        batch(3, rows=16, senders=1),
    ],
    ids=["spread", "all on one shard", "few rows, from one device"],
)
def test_capacities_grown_to_the_needs_then_the_same_bits_as_with_room_for_all(ids: KeyedJagged) -> None:
    expected, _, overflow = outcome(ids, None)
    assert not overflow
    capacities = tiny()
    _, needs, overflow = outcome(ids, capacities)
    assert overflow
    # What is cut off at home is needed further on, too, but shows only once it has left.
    grown = capacities.grown(needs, DEVICES)
    while overflow:
        leaves, needs, overflow = outcome(ids, grown)
        assert overflow == (grown.grown(needs, DEVICES) != grown)
        grown = grown.grown(needs, DEVICES)
    for found, wanted in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_ids_that_were_cut_off_at_home_when_routed_again_as_they_are_then_still_without_room() -> None:
    ids = batch(1)
    enough = tables().sufficient_capacities(SAMPLES, ids.capacity // DEVICES)
    cut_off = tables().to_devices(ids, enough.ids - 1)
    less = dataclasses.replace(enough, ids=enough.ids - 1)
    routed = tables().route(cut_off, less)
    assert routed.overflow
    again = tables().route(cut_off, less.grown(np.asarray(routed.needs), DEVICES))
    assert again.overflow
    assert again.needs[0] == enough.ids
    assert not tables().route(tables().to_devices(ids, enough.ids), enough).overflow


def test_ids_that_were_cut_off_at_home_then_no_more_room_is_asked_for_than_all_take() -> None:
    ids = batch(1)
    whole = tables().to_devices(ids)
    enough = np.asarray(tables().route(whole).needs)
    capacities = dataclasses.replace(
        tables().sufficient_capacities(SAMPLES, whole.capacity // DEVICES), ids=enough[0] - 1
    )
    routed = tables().route(tables().to_devices(ids, capacities.ids), capacities)
    assert routed.overflow
    assert routed.needs[0] == enough[0]
    assert routed.invalid == 0
    assert (np.asarray(routed.needs) <= enough).all()


@pytest.mark.parametrize("rounds", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_an_exchange_in_rounds_then_the_same_bits(rounds: int) -> None:
    ids = batch(4, rows=20)
    expected, *_ = outcome(ids, None)
    sufficient = tables().sufficient_capacities(SAMPLES, ids.capacity)
    in_rounds = dataclasses.replace(sufficient, rounds=rounds)
    found, _, overflow = outcome(ids, in_rounds)
    assert not overflow
    for leaf, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(leaf, wanted)


def test_growing_then_to_the_next_power_of_two_and_only_what_is_needed() -> None:
    before = Capacities(ids=100, groups=(GroupCapacity(pair=10, total=80, distinct=0),))
    assert before.grown(np.array([100, 10, 80, 0]), 8) == before
    after = before.grown(np.array([101, 9, 81, 0]), 8)
    assert after == Capacities(ids=128, groups=(GroupCapacity(pair=10, total=128, distinct=0),))


def test_growing_beyond_the_budget_of_an_exchange_then_in_rounds() -> None:
    before = Capacities(ids=8, groups=(GroupCapacity(pair=8, total=64, distinct=0),), exchange_bytes=8 * 8 * 12)
    assert before.grown(np.array([8, 8, 64, 0]), 8).rounds == 1
    assert before.grown(np.array([8, 32, 64, 0]), 8).rounds == 4


def test_rows_that_travel_when_there_are_few_then_room_for_as_many_as_an_owner_has() -> None:
    for capacities in (
        tables().sufficient_capacities(1000, 12_000),
        tables().expected_capacities(1000, 12_000, {feature.name: 4.0 for feature in FEATURES}),
    ):
        by_id = next(group for group in capacities.groups if group.row_words)
        assert by_id.pair > by_id.distinct == 64 // DEVICES


def test_rows_that_travel_when_they_are_of_several_tables_then_room_for_those_of_all() -> None:
    placements = tuple(row_wise(table, returns="rows") for table in TABLES)
    plan = ShardingPlan(nodes=2, chips=4, placements=placements)
    of_all = ShardedTables(TABLES, FEATURES, plan=plan, mesh=make_mesh(2, 4))
    assert [group.distinct for group in of_all.sufficient_capacities(1000, 12_000).groups] == [3 * 64 // DEVICES]


def test_rows_that_travel_when_they_exceed_the_budget_then_in_rounds() -> None:
    groups = (GroupCapacity(pair=8, total=64, distinct=8, row_words=128),)
    records, rows = (DEVICES * 8 * words * 4 for words in (3, 128))
    assert with_rounds(8, groups, DEVICES, rows).rounds == 1
    assert with_rounds(8, groups, DEVICES, records).rounds == -(-128 // 3)


def test_expected_capacities_then_within_those_that_suffice() -> None:
    expected = tables().expected_capacities(2, 24, {"a": 1.0, "b": 2.0, "c": 4.0})
    sufficient = tables().sufficient_capacities(2, 24)
    assert (expected.as_needs() <= sufficient.as_needs()).all()
    assert (expected.as_needs()[1:] > 0).sum() == (sufficient.as_needs()[1:] > 0).sum()


def test_expected_capacities_then_a_quarter_and_some_deviations_more_than_the_mean() -> None:
    # All ids of "a" go to one owner, and an eighth of the others' to each: 1,000 of each sender.
    capacities = tables().expected_capacities(1000, 100_000, {"a": 1.0, "b": DEVICES, "c": DEVICES})
    pair, total = (64 * math.ceil((1.25 * mean + 8 * math.sqrt(mean) + 1) / 64) for mean in (1000, 1000 * DEVICES))
    assert [(group.pair, group.total) for group in capacities.groups] == [(pair, total)] * 3


@pytest.mark.parametrize(
    ("counts", "total"),
    [([5, 0, 7], 12), ([2**30, 2**30 - 1], 2**31 - 1), ([2**30, 2**30], 2**31 - 1), ([2**31 - 1] * 8, 2**31 - 1)],
)
def test_ids_that_an_owner_gets_when_32_bits_do_not_hold_their_number_then_it_is_the_most_they_hold(
    counts: list[int], total: int
) -> None:
    assert sum_or_most(np.array(counts, np.int32)) == total


def test_needs_that_32_bits_do_not_hold_then_refused_instead_of_growing_to_no_avail() -> None:
    before = Capacities(ids=100, groups=(GroupCapacity(pair=10, total=80, distinct=0),))
    assert before.grown(np.array([100, 10, 2**31 - 2, 0]), 8).groups[0].total == 2**31 - 2
    with pytest.raises(InputError, match=r"^a device may get 2147483647 ids of a batch or more, but 32 bits number"):
        before.grown(np.array([100, 10, 2**31 - 1, 0]), 8)
    with pytest.raises(InputError, match=r"^a device may get 2147483648 ids .* or, .* expected_capacities$"):
        tables().sufficient_capacities(2**26, 2**28)


@pytest.mark.parametrize("capacity", [0, 3, 7, 100])
def test_a_batch_given_to_devices_then_each_has_its_samples_ids_in_order_as_far_as_there_is_room(
    capacity: int,
) -> None:
    bags = {"x": [[1, 2], [3], [], [4]], "y": [[5], [6, 7, 8], [9], []]}
    weights = {name: [[float(value) for value in bag] for bag in samples] for name, samples in bags.items()}
    given = for_devices(KeyedJagged.from_bags(bags, weights=weights, capacity=12), 2, capacity)
    assert given.capacity == 2 * capacity
    for device, ids in enumerate(([1, 2, 3, 5, 6, 7, 8], [4, 9])):
        part = slice(device * capacity, device * capacity + min(capacity, len(ids)))
        assert given.values[part].tolist() == ids[:capacity]
        assert given.weights is not None
        assert given.weights[part].tolist() == ids[:capacity]
    assert given.lengths.tolist() == [[2, 1, 0, 1], [1, 3, 1, 0]]


@pytest.mark.filterwarnings("error")
def test_a_batch_that_is_on_a_device_then_given_to_devices_as_one_on_the_host() -> None:
    ids = KeyedJagged.from_bags({"x": [[1, 2], [3]], "y": [[5], [6, 7]]}, weights={"x": [[1, 2], [3]]})
    on_device = for_devices(jax.tree.map(jnp.asarray, ids), 2, 4)
    jax.tree.map(np.testing.assert_array_equal, on_device, for_devices(ids, 2, 4))
