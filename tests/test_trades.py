"""Trades: what the smooth cost is, what tables trade, and what memory and users forbid."""

import numpy as np
import pytest
from planner_cases import BATCH, MACHINE, skewed_model

from sharding.assignment import Assignment
from sharding.candidates import make_choices
from sharding.constraints import Constraint
from sharding.cost import Step
from sharding.load import loads_by_feature
from sharding.partition import greedy
from sharding.starts import initial_assignment
from sharding.trades import trade


def _started(seed: int, constraints: tuple[Constraint, ...] = ()) -> Assignment:
    """Tables of any of their kinds, dealt out."""
    tables, features, loads = skewed_model(16, seed)
    step = Step(topology=MACHINE, batch_size=BATCH, loads=loads_by_feature(features, loads))
    memory = float(MACHINE.hbm_bytes)
    choices = make_choices(tables, features, step, constraints, memory)
    rng = np.random.default_rng(seed)
    chosen = [candidates[int(rng.integers(len(candidates)))] for candidates in choices.of_table]
    started = initial_assignment(choices, chosen, greedy, step, memory)
    assert started is not None
    return started


@pytest.mark.parametrize("seed", range(4))
def test_trades_when_kinds_were_drawn_then_the_cost_falls_and_ways_change_hands(seed: int):
    assignment = _started(seed)
    before, cost = assignment.snapshot(), assignment.cost
    trade(assignment)
    assert assignment.cost < cost
    after = assignment.snapshot()
    ways = [sorted((c.group, c.num_slices, bins) for c, bins in held) for held in (before, after)]
    assert ways[0] == ways[1]
    again = Assignment(assignment.choices, assignment.step, assignment.memory)
    for candidate, bins in after:
        again.place(candidate, bins)
    assert assignment.cost == pytest.approx(again.cost, rel=1e-9)


def test_trades_when_memory_is_what_is_taken_then_no_more_is():
    assignment = _started(1)
    assignment.memory = assignment.most_bytes
    trade(assignment)
    assert assignment.most_bytes <= assignment.memory


def test_trades_when_a_table_is_pinned_then_it_stays():
    assignment = _started(2, (Constraint(tables=("t3",), devices=(5,)),))
    before = assignment.snapshot()
    trade(assignment)
    assert assignment.snapshot()[3] == before[3]
    assert assignment.snapshot() != before


def test_trades_when_the_cost_is_low_enough_then_nothing_moves():
    assignment = _started(3)
    before = assignment.snapshot()
    trade(assignment, enough=assignment.cost)
    assert assignment.snapshot() == before
