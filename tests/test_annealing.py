"""Annealing: places that tables trade, what stays as it is, and what memory forbids."""

import numpy as np
import pytest
from planner_cases import BATCH, MACHINE, skewed_model

from sharding.annealing import anneal
from sharding.assignment import Assignment
from sharding.candidates import make_choices
from sharding.constraints import Constraint
from sharding.cost import Step
from sharding.load import FeatureLoad, loads_by_feature
from sharding.partition import greedy
from sharding.starts import initial_assignment
from sharding.topology import Topology


def _started(
    seed: int, *, num_tables: int = 16, machine: Topology = MACHINE, constraints: tuple[Constraint, ...] = ()
) -> Assignment:
    """Tables of any of their kinds, dealt out; ids of some are skewed, so that devices of a node differ."""
    tables, features, loads = skewed_model(num_tables, seed)
    hot = FeatureLoad(feature=loads[0].feature, pooling_factor=50.0, top=((0, 0.3),))
    step = Step(topology=machine, batch_size=BATCH, loads=loads_by_feature(features, [hot, *loads[1:]]))
    memory = float(machine.hbm_bytes)
    choices = make_choices(tables, features, step, constraints, memory)
    rng = np.random.default_rng(seed)
    chosen = [candidates[int(rng.integers(len(candidates)))] for candidates in choices.of_table]
    started = initial_assignment(choices, chosen, greedy, step, memory)
    assert started is not None
    return started


def _again(assignment: Assignment) -> Assignment:
    """The same, added up anew."""
    again = Assignment(assignment.choices, assignment.step, assignment.memory)
    for candidate, bins in zip(assignment.candidate, assignment.bins, strict=True):
        assert candidate is not None
        again.place(candidate, bins)
    return again


@pytest.mark.parametrize("seed", range(4))
def test_annealing_when_kinds_were_drawn_then_the_cost_falls_and_every_slice_has_its_own_bin(seed: int):
    assignment = _started(seed)
    before = assignment.cost
    anneal(assignment, set(range(16)))
    assert assignment.cost < before
    assert assignment.cost == pytest.approx(_again(assignment).cost, rel=1e-9)
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
