"""Trades: what the smooth cost is, what tables trade, and what memory and users forbid."""

import pytest
from planner_cases import added_up_again, drawn_start, skewed_model

from sharding.assignment import Assignment
from sharding.constraints import Constraint
from sharding.trades import trade


def _started(seed: int, constraints: tuple[Constraint, ...] = ()) -> Assignment:
    return drawn_start(skewed_model(16, seed), constraints=constraints, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_trades_when_kinds_were_drawn_then_the_cost_falls_and_ways_change_hands(seed: int):
    assignment = _started(seed)
    before, cost = assignment.snapshot(), assignment.cost
    trade(assignment)
    assert assignment.cost < cost
    after = assignment.snapshot()
    ways = [sorted((c.group, c.num_slices, bins) for c, bins in held) for held in (before, after)]
    assert ways[0] == ways[1]
    assert assignment.cost == pytest.approx(added_up_again(assignment).cost, rel=1e-9)


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
