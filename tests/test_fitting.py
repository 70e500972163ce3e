"""Bytes of stores and buffers together: how they are counted, that moves keep to a limit, and what is made to fit."""

import dataclasses

import numpy as np
import pytest
from planner_cases import choices_of, every_assignment, skewed_model, with_strange_buffers

from sharding.annealing import anneal
from sharding.assignment import Assignment
from sharding.candidates import make_choices
from sharding.constraints import Constraint
from sharding.cost import Step, cost_of_layout
from sharding.cost_settings import CostSettings
from sharding.fitting import fit
from sharding.layout import make_layout
from sharding.load import loads_by_feature
from sharding.plan import PlacementKind
from sharding.search import lower_levels, reinsert, ruin_and_recreate
from sharding.swaps import swap_slices
from sharding.topology import parse_topology

FOUR = parse_topology("h200:2x2")


@pytest.mark.parametrize("settings", [CostSettings(), CostSettings(forward_codec="float16", backward_codec="int8")])
def test_bytes_when_of_any_places_then_those_of_its_plan(settings: CostSettings):
    # Whole lines, and no replicas, whose updates count for nothing here.
    kinds: tuple[PlacementKind, ...] = ("table_wise", "column_wise", "row_wise", "table_row_wise", "grid")
    tables, features, loads = skewed_model(3, 4)
    tables = [dataclasses.replace(table, num_rows=table.num_rows // 128 * 128 + 128, dim=64) for table in tables]
    step = Step(topology=FOUR, batch_size=1 << 16, loads=loads_by_feature(features, loads), settings=settings)
    names = tuple(table.name for table in tables)
    choices = make_choices(tables, features, step, [Constraint(tables=names, kinds=kinds)], float("inf"))
    dice = np.random.default_rng(0)
    found = list(every_assignment(choices, step))
    for number in dice.choice(len(found), 50, replace=False).tolist():
        layout = make_layout(tables, features, found[number].to_plan(2, 2))
        assert found[number].most_bytes == pytest.approx(cost_of_layout(layout, features, step).storage.total, rel=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_moves_when_memory_is_what_buffers_take_then_none_takes_more(seed: int):
    choices, step = choices_of(skewed_model(16, seed), FOUR)
    dice = np.random.default_rng(seed)
    choices = with_strange_buffers(choices, dice)
    assignment = Assignment(choices, step, float("inf"))
    for candidates in choices.of_table:
        candidate = candidates[int(dice.integers(len(candidates)))]
        bins = dice.permutation(4 // candidate.span)[: candidate.num_slices].tolist()
        assignment.place(candidate, tuple(bins))
    everyone = set(range(16))

    def swaps() -> None:
        for group in range(len(choices.groups)):
            swap_slices(assignment, group, set())

    moves = (
        swaps,
        lambda: anneal(assignment, everyone),
        lambda: reinsert(assignment, sorted(everyone)),
        lambda: lower_levels(assignment, everyone),
        lambda: ruin_and_recreate(assignment, everyone, 1),
    )
    for move in moves:
        assignment.memory = assignment.most_bytes
        move()
        assert assignment.most_bytes <= assignment.memory * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_tables_on_one_device_when_made_to_fit_then_they_do_or_each_keeps_a_place(seed: int):
    constraints = [Constraint(tables=("t0", "t1"), together=True), Constraint(tables=("t2",), devices=(0,))]
    choices, step = choices_of(skewed_model(10, seed), FOUR, constraints)
    assignment = Assignment(choices, step, float("inf"))
    for candidates in choices.of_table:
        assignment.place(next(c for c in candidates if c.kind == "table_wise"), (0,))
    everything = assignment.most_bytes
    for share, fits in ((1.0, True), (0.6, True), (1e-3, False)):
        assignment.memory = share * everything
        assert fit(assignment) == fits == (assignment.most_bytes <= assignment.memory)
        assert None not in assignment.candidate
        assert assignment.bins[:3] == [(0,)] * 3
