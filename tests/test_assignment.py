"""Who holds which table: the first assignment, single tables put where they cost least, and what a search keeps."""

import dataclasses
import itertools
from collections.abc import Set

import numpy as np
import pytest
from planner_cases import choices_of, model_of, skewed_model, with_strange_buffers

from sharding.assignment import Assignment, insert_best
from sharding.candidates import Candidate, Choices
from sharding.constraints import Constraint
from sharding.partition import greedy
from sharding.plan import PlacementKind
from sharding.search import drop_families, improve, reinsert, ruin_and_recreate
from sharding.starts import initial_assignment
from sharding.swaps import swap_slices
from sharding.tables import TableSpec
from sharding.topology import parse_topology

# Without the seconds that exchanges take to start, which a table alone does not decide.
TWO, FOUR = (
    dataclasses.replace(parse_topology(name), inside_latency=0.0, between_latency=0.0)
    for name in ("h200:1x2", "h200:2x2")
)
ROW = 32 * 4
SMALL, LARGE = TableSpec(name="t", num_rows=100, dim=32, optimizer="sgd"), 10_000


def of_kind(choices: Choices, kind: PlacementKind = "table_wise") -> list[Candidate]:
    return [next(c for c in candidates if c.kind == kind) for candidates in choices.of_table]


def first_assignment(
    rows: list[int], factors: list[float], *constraints: Constraint, rows_of_device: float, dims=()
) -> list[int]:
    """The devices of table-wise tables, of two; none where memory has no place."""
    tables = [
        dataclasses.replace(SMALL, num_rows=num_rows, dim=dim)
        for num_rows, dim in itertools.zip_longest(rows, dims, fillvalue=32)
    ]
    choices, step = choices_of(model_of(tables, factors), TWO, constraints)
    choices = choices.without_buffers()
    found = initial_assignment(choices, of_kind(choices), greedy, step, rows_of_device * ROW)
    assert found is None or [held.kind for held in found.candidate if held] == ["table_wise"] * len(rows)
    return [bins[0] for bins in found.bins] if found else []


def pinned(table: int, device: int) -> Constraint:
    return Constraint(tables=(f"t{table}",), devices=(device,))


def together(*tables: int) -> Constraint:
    return Constraint(tables=tuple(f"t{table}" for table in tables), together=True)


def test_tables_kept_together_when_one_is_pinned_then_all_are_there():
    for device in (0, 1):
        constraints = together(0, 2), pinned(2, device)
        bins = first_assignment([100] * 3, [1.0, 1.0, 9.0], *constraints, rows_of_device=1000)
        assert bins == [device, 1 - device, device]


def test_tables_kept_together_when_there_are_two_sets_then_each_has_the_device_where_it_costs_less():
    first, _, second, _ = first_assignment([100] * 4, [9.0] * 4, together(0, 1), together(2, 3), rows_of_device=1000)
    assert first != second


def test_tables_kept_together_when_the_cheaper_device_has_no_room_then_on_the_other():
    sets = [together(number) for number in range(3)]
    rows, factors = [LARGE, 100, LARGE // 2], [1.0, 50.0, 5.0]
    first, busy, last = first_assignment(rows, factors, *sets, rows_of_device=2 * LARGE)
    assert first == last != busy
    first, busy, last = first_assignment(rows, factors, *sets, rows_of_device=LARGE + 100)
    assert first != last == busy


def test_tables_kept_together_when_no_device_has_room_then_no_assignment():
    assert not first_assignment([100, 100], [1.0, 1.0], together(0, 1), rows_of_device=199)
    assert first_assignment([100, 100], [1.0, 1.0], together(0, 1), rows_of_device=200) in ([0, 0], [1, 1])


def test_tables_when_pinned_then_there_from_the_beginning_or_no_assignment():
    pins = pinned(0, 1), pinned(1, 1)
    assert first_assignment([100] * 3, [1.0] * 3, *pins, rows_of_device=200) == [1, 1, 0]
    assert not first_assignment([100] * 3, [1.0] * 3, *pins, rows_of_device=199)


def test_large_tables_when_the_busiest_device_alone_has_room_for_one_then_it_is_there():
    busy, one, other = first_assignment([100, LARGE, LARGE], [50.0, 1.0, 1.0], rows_of_device=LARGE + 100)
    assert one != other
    assert busy in (one, other)
    assert not first_assignment([100, LARGE, LARGE], [50.0, 1.0, 1.0], rows_of_device=LARGE + 99)


def test_tables_of_two_widths_when_nothing_decides_where_then_their_bytes_are_even():
    one, other = first_assignment([LARGE, LARGE], [1.0, 1.0], dims=[32, 64], rows_of_device=9 * LARGE)
    assert one != other


def test_table_when_pinned_ones_of_its_group_are_on_a_device_then_it_avoids_that_whatever_its_bytes():
    # Another width fills the memory of device 0.
    pins = pinned(0, 1), pinned(1, 0)
    bins = first_assignment([100, LARGE, 100], [9.0] * 3, *pins, dims=[32, 64, 32], rows_of_device=9 * LARGE)
    assert bins == [1, 0, 0]


UNCUT: tuple[PlacementKind, ...] = ("table_wise", "row_wise", "table_row_wise", "data_parallel")


@pytest.mark.parametrize("short", [1.0, 0.7, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_table_when_put_where_it_costs_least_then_nothing_that_fits_is_cheaper(seed: int, short: float):
    tables, features, loads = skewed_model(8, seed)
    # Two stores, as full as each other's rooms allow.
    tables = [dataclasses.replace(table, optimizer=("sgd", "adam")[number % 2]) for number, table in enumerate(tables)]
    names = tuple(table.name for table in tables)
    constraints = [Constraint(tables=names, kinds=UNCUT), Constraint(tables=names[4:], nodes=(1,))]
    choices, step = choices_of((tables, features, loads), FOUR, constraints)
    choices = with_strange_buffers(choices, np.random.default_rng(seed))
    rough = Assignment(choices, step, float("inf"))
    for table in range(8):
        assert insert_best(rough, table)
    assignment = Assignment(choices, step, rough.most_bytes * short if short < 1 else float("inf"))
    for table in range(8):
        ways = [
            (candidate, (place,))
            for candidate in choices.of_table[table]
            for place in candidate.owners or range(4 // candidate.span)
        ]
        costs = []
        for candidate, bins in ways:
            assignment.place(candidate, bins)
            costs.append((assignment.cost if assignment.most_bytes <= assignment.memory else np.inf, candidate.group))
            assignment.remove(table)
        for candidate in choices.of_table[table]:
            if (found := assignment.best_bins(candidate)) is not None:
                before = assignment.cost
                assignment.place(candidate, found[2])
                assert assignment.cost == pytest.approx(before + found[0], rel=1e-9)
                assignment.remove(table)
        for without in ({min(costs)[1]}, {group for _, group in costs}, set()):
            least = min((cost for cost, group in costs if group not in without), default=np.inf)
            assert insert_best(assignment, table, without=without) == np.isfinite(least)
            if np.isfinite(least):
                assert assignment.cost <= least * (1 + 1e-5)
                assert assignment.most_bytes <= assignment.memory
                if without:
                    assignment.remove(table)
        if assignment.candidate[table] is None:
            assert short < 1


@pytest.mark.parametrize("seed", range(3))
def test_search_when_it_ends_then_constraints_and_memory_hold_and_nothing_got_dearer(seed: int):
    constraints = [
        pinned(0, 3),
        Constraint(tables=("t1",), devices=(2, 0)),
        together(2, 3),
        Constraint(tables=("t4", "t5", "t6"), kinds=("column_wise",)),
        Constraint(tables=("t7",), kinds=("grid", "table_row_wise")),
    ]
    tables, features, loads = skewed_model(14, seed)
    tables = [dataclasses.replace(table, dim=64) for table in tables]
    choices, step = choices_of((tables, features, loads), FOUR, constraints)
    chosen = [candidates[seed % len(candidates)] for candidates in choices.of_table]
    chosen[2], chosen[3] = of_kind(dataclasses.replace(choices, of_table=choices.of_table[2:4]))
    start = initial_assignment(choices, chosen, greedy, step, float("inf"))
    assert start is not None
    start.memory = start.most_bytes * 1.01
    for rounds in (0, 2):
        before = start.cost
        improve(start, rounds)
        assert start.cost <= before * (1 + 1e-9)
        assert start.most_bytes <= start.memory
        assert start.bins[:2] == [(3,), (2, 0)]
        assert start.bins[2] == start.bins[3]
        again = Assignment(choices, step, start.memory)
        for candidate, bins in zip(start.candidate, start.bins, strict=True):
            assert candidate is not None
            assert len(set(bins)) == candidate.num_slices
            again.place(candidate, bins)
        assert again.cost == pytest.approx(start.cost, rel=1e-9)
        np.testing.assert_array_equal(again.bytes, start.bytes)


def test_columns_when_one_of_two_devices_is_full_then_no_place():
    tables = [dataclasses.replace(SMALL, num_rows=LARGE), SMALL]
    halves = Constraint(tables=("t1",), kinds=("column_wise",))
    choices, step = choices_of(model_of(tables, [1.0, 1.0]), TWO, [halves])
    choices = choices.without_buffers()
    whole = of_kind(dataclasses.replace(choices, of_table=choices.of_table[:1]))[0]
    for room, placed in ((LARGE + 49, False), (LARGE + 50, True)):
        assignment = Assignment(choices, step, float(room * ROW))
        assignment.place(whole, (1,))
        assert insert_best(assignment, 1) == placed
    assert sorted(assignment.bins[1]) == [0, 1]


def test_latency_when_a_cut_table_joins_a_group_then_that_of_its_second_pass_is_added():
    tables = [dataclasses.replace(SMALL, dim=dim, optimizer="rowwise_adagrad") for dim in (16, 32)]
    choices, step = choices_of(model_of(tables, [1.0, 1.0]), parse_topology("h200:1x2"))
    narrow = of_kind(dataclasses.replace(choices, of_table=choices.of_table[:1]))[0]
    halves = of_kind(dataclasses.replace(choices, of_table=choices.of_table[1:]), "column_wise")[0]
    assert narrow.group == halves.group
    uncut, cut = (step.latency_seconds([("table_wise", is_cut)]) for is_cut in (False, True))
    assert uncut < cut
    assignment = Assignment(choices, step, float("inf"))
    assignment.place(narrow, (0,))
    assert assignment.latency == uncut
    assignment.place(halves, (0, 1))
    assert assignment.latency == cut
    assignment.remove(1)
    assert assignment.latency == uncut


@pytest.mark.parametrize("seed", range(4))
def test_slices_that_change_places_then_apart_within_memory_and_never_dearer_and_pinned_ones_stay(seed: int):
    dice = np.random.default_rng(seed)
    tables = [dataclasses.replace(SMALL, num_rows=int(rows), dim=64) for rows in dice.integers(100, LARGE, 18)]
    names = tuple(f"t{number}" for number in range(18))
    constraints = [
        pinned(0, 3),
        Constraint(tables=names[1:6], kinds=("table_wise",)),
        Constraint(tables=names[6:12], kinds=("column_wise",)),
        Constraint(tables=names[12:14], kinds=("row_wise",), returns="rows"),
        Constraint(tables=names[14:], kinds=("table_row_wise",), returns="rows"),
    ]
    # The busiest table is pinned.
    model = model_of(tables, [99.0, *dice.lognormal(2, 1, 17).tolist()])
    choices, step = choices_of(model, FOUR, constraints)
    choices = with_strange_buffers(choices, dice)
    assignment = Assignment(choices, step, float("inf"))
    for candidates in choices.of_table:
        candidate = candidates[0]
        bins = candidate.owners or dice.permutation(4 // candidate.span)[: candidate.num_slices].tolist()
        assignment.place(candidate, tuple(bins))
    assignment.memory = assignment.most_bytes
    first = assignment.cost
    for group in range(len(choices.groups)):
        before = assignment.cost
        swap_slices(assignment, group, {1})
        assert assignment.cost <= before * (1 + 1e-9)
        assert assignment.most_bytes <= assignment.memory
    assert assignment.cost < first
    assert assignment.bins[0] == (3,)
    for candidate, bins in zip(assignment.candidate, assignment.bins, strict=True):
        assert candidate is not None
        assert len(set(bins)) == candidate.num_slices


def test_family_when_its_tables_have_no_other_or_no_cheaper_one_then_they_stay():
    whole: tuple[PlacementKind, ...] = ("table_wise",)
    for kinds in (whole, None):
        names = ("t0", "t1", "t2")
        choices, step = choices_of(
            model_of([SMALL] * 3, [9.0, 5.0, 4.0]), FOUR, [Constraint(tables=names, kinds=kinds)] if kinds else []
        )
        assignment = Assignment(choices, step, float("inf"))
        for table in range(3):
            if kinds:
                assert insert_best(assignment, table)
            else:
                # Next to nothing: of so few rows every device has a copy.
                assignment.place(of_kind(choices, "data_parallel")[table], (0,))
        before = list(assignment.candidate), list(assignment.bins), assignment.cost
        helped = drop_families(assignment, {0, 1, 2})
        assert None not in assignment.candidate
        assert helped == (assignment.cost < before[2])
        assert helped or (assignment.candidate, assignment.bins) == before[:2]


def full_devices(seed: int) -> tuple[Assignment, Set[int]]:
    """Tables that fill two devices but for a few rows, so that most orders of putting them back leave one over."""
    dice = np.random.default_rng(seed)
    rows = [500, 500, 400, 300, 300, 20, 10]
    tables = [dataclasses.replace(SMALL, num_rows=num_rows) for num_rows in rows]
    names = tuple(f"t{number}" for number in range(len(rows)))
    model = model_of(tables, dice.lognormal(2, 1, len(rows)).tolist())
    choices, step = choices_of(model, TWO, [Constraint(tables=names, kinds=("table_wise",))])
    assignment = Assignment(choices.without_buffers(), step, 1030.0 * ROW)
    for (candidate,), place in zip(choices.of_table, (0, 0, 1, 1, 1, 0, 0), strict=True):
        assignment.place(candidate, (place,))
    return assignment, set(range(len(rows)))


@pytest.mark.parametrize("seed", range(3))
def test_ruins_when_memory_is_nearly_full_then_every_table_has_a_place_and_nothing_got_dearer(seed: int):
    assignment, tables = full_devices(seed)
    improve(assignment, 2, cycles=0)
    before = assignment.cost
    ruin_and_recreate(assignment, tables, 4)
    assert None not in assignment.candidate
    assert assignment.most_bytes <= assignment.memory
    assert assignment.cost <= before * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_ruins_when_what_they_end_with_is_dearer_then_the_cheapest_that_they_found(seed: int):
    names = tuple(f"t{number}" for number in range(12))
    whole = Constraint(tables=names, kinds=("table_wise", "column_wise"))
    choices, step = choices_of(skewed_model(12, seed), FOUR, [whole])
    assignment = Assignment(choices, step, float("inf"))
    for table in range(12):
        insert_best(assignment, table)
    improve(assignment, 4, cycles=0)
    before = assignment.cost
    ruin_and_recreate(assignment, set(range(12)), 4)
    assert assignment.cost <= before * (1 + 1e-9)


def test_ruins_when_the_cost_is_good_enough_then_nothing_moves_else_it_falls():
    names = tuple(f"t{number}" for number in range(12))
    whole = Constraint(tables=names, kinds=("table_wise", "column_wise"))
    found = []
    for enough in (float("inf"), 0.0):
        choices, step = choices_of(skewed_model(12, 1), FOUR, [whole])
        assignment = Assignment(choices, step, float("inf"))
        for table in range(12):
            insert_best(assignment, table)
        before = assignment.cost, list(assignment.bins)
        ruin_and_recreate(assignment, set(range(12)), 1, enough)
        found.append((assignment.cost, assignment.bins) == before)
    assert found == [True, False]
    assert assignment.cost < before[0]


def test_search_when_tables_have_more_than_their_memory_then_each_keeps_a_place():
    assignment, tables = full_devices(0)
    assignment.memory /= 10
    before = list(assignment.bins)
    assert not reinsert(assignment, sorted(tables)[:5])
    assert None not in assignment.candidate
    assert assignment.bins == before


def test_table_when_a_candidate_is_named_then_that_as_long_as_it_fits():
    choices, step = choices_of(model_of([SMALL], [1.0]), TWO)
    choices = choices.without_buffers()
    dearest = max(choices.of_table[0], key=lambda candidate: candidate.seconds + candidate.fixed)
    for memory, taken in ((float("inf"), True), (dearest.owner_bytes - 1.0, False)):
        assignment = Assignment(choices, step, memory)
        insert_best(assignment, 0, first=dearest)
        assert (assignment.candidate[0] is dearest) == taken
