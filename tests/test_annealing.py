"""Annealing: places that tables trade, what stays as it is, and what memory forbids."""

import pytest
from planner_cases import added_up_again, drawn_start, skewed_model

from sharding.annealing import anneal
from sharding.assignment import Assignment
from sharding.constraints import Constraint
from sharding.load import FeatureLoad


def _started(seed: int, constraints: tuple[Constraint, ...] = ()) -> Assignment:
    """Tables of any of their kinds, dealt out; ids of some are skewed, so that devices of a node differ."""
    tables, features, loads = skewed_model(16, seed)
    hot = FeatureLoad(feature=loads[0].feature, pooling_factor=50.0, top=((0, 0.3),))
    return drawn_start((tables, features, [hot, *loads[1:]]), constraints=constraints, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_annealing_when_kinds_were_drawn_then_the_cost_falls_and_every_slice_has_its_own_bin(seed: int):
    assignment = _started(seed)
    before = assignment.cost
    anneal(assignment, set(range(16)))
    assert assignment.cost < before
    assert assignment.cost == pytest.approx(added_up_again(assignment).cost, rel=1e-9)
    for candidate, bins in zip(assignment.candidate, assignment.bins, strict=True):
        assert candidate is not None
        assert candidate in assignment.choices.of_table[candidate.table]
        assert len(set(bins)) == candidate.num_slices


def test_annealing_when_done_twice_then_it_is_the_same():
    one, two = _started(0), _started(0)
    for assignment in (one, two):
        anneal(assignment, set(range(16)))
    assert one.bins == two.bins
    assert one.cost == two.cost


def test_annealing_when_memory_is_what_is_taken_then_no_more_is():
    assignment = _started(1)
    assignment.memory = assignment.most_bytes
    anneal(assignment, set(range(16)))
    assert assignment.most_bytes <= assignment.memory


def test_annealing_when_tables_are_pinned_or_not_to_move_then_they_stay():
    assignment = _started(2, constraints=(Constraint(tables=("t3",), devices=(5,)),))
    before = list(zip(assignment.candidate, assignment.bins, strict=True))
    anneal(assignment, set(range(16)) - {0, 1})
    after = list(zip(assignment.candidate, assignment.bins, strict=True))
    assert [after[table] for table in (0, 1, 3)] == [before[table] for table in (0, 1, 3)]
    assert after != before


def test_annealing_when_the_cost_is_low_enough_then_nothing_moves():
    assignment = _started(3)
    before = list(assignment.bins)
    anneal(assignment, set(range(16)), enough=assignment.cost)
    assert assignment.bins == before
