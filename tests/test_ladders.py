"""Ladders of levels: every plan obeys their rows, and one that costs less than its slices' peaks does not."""

import numpy as np
import pytest
from planner_cases import choices_of, every_assignment, skewed_model

from sharding.assignment import Assignment
from sharding.cuts import Cuts
from sharding.highs import Row
from sharding.ladders import ladders
from sharding.topology import parse_topology

UNIT = 1e-7


def _columns(assignment: Assignment, cuts: Cuts, num_levels: int, rows: list[Row]) -> np.ndarray:
    """x, Z in units, and the levels that have to be reached: those of chosen candidates, and all below."""
    x = np.array([candidate in assignment.candidate for candidate in cuts.candidates], np.float64)
    columns = np.concatenate([x, assignment.most.ravel() / UNIT, np.zeros(num_levels)])
    for _ in range(num_levels + 1):
        for pair, *_ in rows:
            if len(pair) == 2 and pair[1] >= len(columns) - num_levels:
                columns[pair[1]] = max(columns[pair[0]], columns[pair[1]])
    return columns


@pytest.mark.parametrize("seed", range(3))
def test_ladders_when_every_plan_is_tried_then_each_obeys_them(seed: int):
    machine = parse_topology("h200:1x2")
    choices, step = choices_of(skewed_model(3, seed), machine)
    cuts = Cuts(choices, machine.num_devices, UNIT)
    num_x, num_z = len(cuts.candidates), len(choices.groups) * len(cuts.peaks[0])
    num_levels, rows = ladders(cuts, np.zeros((len(choices.groups), len(cuts.peaks[0]))), num_x, num_x + num_z)
    assert num_levels > 0
    broken = 0
    for number, assignment in enumerate(every_assignment(choices, step)):
        if number % 7:
            continue
        columns = _columns(assignment, cuts, num_levels, rows)
        assert all(columns[members] @ values <= upper + 1e-6 for members, values, _, upper in rows)
        columns[num_x : num_x + num_z] *= 0.3
        broken += any(columns[members] @ values > upper + 1e-6 for members, values, _, upper in rows)
    assert broken > 0
