"""The ways in which the planner may place a table, and what it counts for each while it searches."""

import dataclasses
from typing import get_args

import numpy as np
import pytest
from planner_cases import model_of

from sharding.assignment import Assignment
from sharding.candidates import Choices, at_stages, make_choices
from sharding.constraints import Constraint
from sharding.cost import STAGES, CostSettings, DenseLoad, Step, plan_cost
from sharding.load import loads_by_feature
from sharding.plan import PlacementKind
from sharding.tables import TableSpec
from sharding.topology import parse_topology

WIDE = TableSpec(name="t", num_rows=1000, dim=256)


def choices_of(
    machine: str,
    *constraints: Constraint,
    table: TableSpec = WIDE,
    settings: CostSettings | None = None,
    memory: float | None = None,
) -> Choices:
    """Candidates of one table, "t0"."""
    topology = parse_topology(machine)
    tables, features, loads = model_of([table], [3.0])
    step = Step(
        topology=topology,
        batch_size=64,
        loads=loads_by_feature(features, loads),
        settings=settings or CostSettings(),
    )
    return make_choices(tables, features, step, constraints, topology.hbm_bytes if memory is None else memory)


def slices_of(choices: Choices) -> set[int]:
    return {candidate.num_slices for candidate in choices.of_table[0]}


def kinds_of(choices: Choices) -> set[PlacementKind]:
    return {candidate.kind for candidate in choices.of_table[0]}


def test_search_when_it_counts_a_plan_then_its_seconds_are_those_of_the_cost():
    machine = parse_topology("h200:2x2")
    tables = [
        TableSpec(name="t", num_rows=4000, dim=64, optimizer="rowwise_adagrad"),
        TableSpec(name="t", num_rows=501, dim=32, optimizer="sgd", dtype="float16"),
        TableSpec(name="t", num_rows=90, dim=48, optimizer="lamb"),
    ]
    tables, features, loads = model_of(tables, [3.0, 20.0, 7.0])
    loads = [dataclasses.replace(load, top=((number, 0.3),)) for number, load in enumerate(loads)]
    step = Step(topology=machine, batch_size=64, loads=loads_by_feature(features, loads))
    choices = make_choices(tables, features, step, (), float(machine.hbm_bytes))
    assignment = Assignment(choices, step, float(machine.hbm_bytes))
    dice = np.random.default_rng(0)
    kinds = set()
    for _ in range(50):
        for table, candidates in enumerate(choices.of_table):
            candidate = candidates[dice.integers(len(candidates))]
            if assignment.candidate[table] is not None:
                assignment.remove(table)
            bins = dice.permutation(machine.num_devices // candidate.span)[: candidate.num_slices]
            assignment.place(candidate, tuple(bins.tolist()))
            kinds.add(candidate.kind)
        cost = plan_cost(assignment.to_plan(2, 2), tables, features, machine, batch_size=64, loads=loads)
        assert assignment.cost + at_stages(step) == pytest.approx(cost.total_seconds, rel=1e-9)
        assert tuple(assignment.bytes.sum(axis=0)) == cost.storage.weights_alone
        assert sum(held.total_bytes for held in assignment.candidate if held) == sum(cost.storage.weights_alone)
    assert kinds == set(get_args(PlacementKind))


def test_search_when_all_exchanges_can_be_hidden_then_none_counts():
    # Without the terms of kernels nothing but exchanges is left.
    exchanges_alone = CostSettings(lookup=0.0, update=0.0)
    for overlap, counted in ((0.0, 1.0), (0.25, 0.75), (1.0, 0.0)):
        plain, hidden = (
            choices_of("h200:2x2", settings=settings).of_table[0]
            for settings in (exchanges_alone, dataclasses.replace(exchanges_alone, overlap=overlap))
        )
        for before, after in zip(plain, hidden, strict=True):
            assert after.seconds == pytest.approx(counted * before.seconds)
            assert after.fixed == pytest.approx(counted * before.fixed)


def test_columns_then_cut_into_equal_parts_at_most_one_a_device_and_up_to_eight_unless_pinned_to_more():
    assert slices_of(choices_of("h200:1x4")) == {1, 2, 4}
    nodes_alone = Constraint(tables=("t0",), kinds=("table_row_wise", "grid"))
    assert slices_of(choices_of("h200:2x4", nodes_alone)) == {1, 2}
    assert slices_of(choices_of("h200:2x8")) == {1, 2, 4, 8}
    assert slices_of(choices_of("h200:2x8", Constraint(tables=("t0",), devices=tuple(range(16))))) == {16}
    # Three times 16 columns, and two more.
    assert slices_of(choices_of("h200:1x4", table=dataclasses.replace(WIDE, dim=50))) == {1}


def test_dense_part_when_exchanges_hide_behind_it_then_itself_counts_whole():
    step = Step(
        topology=parse_topology("h200:2x2"),
        batch_size=64,
        loads={},
        dense=DenseLoad(parameters=1000, flops_per_sample=1e6),
        settings=CostSettings(overlap=1.0),
    )
    assert at_stages(step) == step.fixed_seconds()[STAGES.index("dense")] > 0


def test_columns_on_tpus_then_cut_only_into_whole_lanes_unless_pinned_to_more_devices():
    assert slices_of(choices_of("h200:1x8")) == {1, 2, 4, 8}
    assert slices_of(choices_of("v6e:1x8")) == {1, 2}
    assert slices_of(choices_of("v6e:1x8", Constraint(tables=("t0",), devices=(3, 1, 0, 2)))) == {4}


def test_rows_on_the_chips_of_the_only_node_then_row_wise_unless_asked_for():
    asked = Constraint(tables=("t0",), kinds=("table_row_wise",))
    assert "table_row_wise" not in kinds_of(choices_of("h200:1x8"))
    # Those of single chips are table-wise.
    assert kinds_of(choices_of("h200:8x1")).isdisjoint({"table_row_wise", "grid"})
    for constraint in (asked, Constraint(tables=("t0",), nodes=(0,))):
        assert kinds_of(choices_of("h200:1x8", constraint)) == {"table_row_wise"}


def test_rows_when_there_are_fewer_than_devices_then_not_spread_over_those():
    few, fewer = (dataclasses.replace(WIDE, num_rows=num_rows) for num_rows in (7, 3))
    assert kinds_of(choices_of("h200:2x4", table=few)) == set(get_args(PlacementKind)) - {"row_wise"}
    assert kinds_of(choices_of("h200:2x4", table=fewer)) == {"table_wise", "column_wise", "data_parallel"}
    enough, for_a_node = (dataclasses.replace(WIDE, num_rows=num_rows) for num_rows in (8, 4))
    assert kinds_of(choices_of("h200:2x4", table=enough)) == set(get_args(PlacementKind))
    assert kinds_of(choices_of("h200:2x4", table=for_a_node)) == set(get_args(PlacementKind)) - {"row_wise"}


def test_a_replica_of_a_large_table_then_only_if_asked_for():
    # 10 GB, of 151.
    large, asked = dataclasses.replace(WIDE, num_rows=10**7), Constraint(tables=("t0",), kinds=("data_parallel",))
    assert "data_parallel" not in kinds_of(choices_of("h200:1x8", table=large))
    assert kinds_of(choices_of("h200:1x8", asked, table=large)) == {"data_parallel"}


def test_choices_when_narrowed_then_a_table_keeps_all_where_none_would_be_left():
    choices = choices_of("h200:2x2", table=dataclasses.replace(WIDE, dim=48))
    # Of 48 columns, three slices of 16 at least.
    assert {choices.groups[c.group].width for c in choices.up_to_width(32).of_table[0]} == {16}
    assert choices.up_to_width(8).of_table == choices.of_table
    assert {choices.groups[c.group].family for c in choices.without_family("table_row_wise").of_table[0]} == {
        "local",
        "table_wise",
        "row_wise",
        "rows_by_id",
    }
    one = Constraint(tables=("t0",), kinds=("table_wise",))
    alone = choices_of("h200:2x2", one)
    assert alone.without_family("table_wise").of_table == alone.of_table


def test_choices_when_memory_is_short_then_those_alone_that_fit_into_it():
    everything = choices_of("h200:2x2")
    # A half of the rows, or of the columns, and the state of each row.
    half = max(c.owner_bytes for c in everything.of_table[0] if c.span * c.num_slices == 2)
    fitting = choices_of("h200:2x2", memory=half).of_table[0]
    assert max(c.owner_bytes for c in fitting) == half
    assert len(fitting) < len(everything.of_table[0])
    sizes = [c.owner_bytes for c in fitting]
    assert sizes == [c.owner_bytes for c in everything.of_table[0] if c.owner_bytes <= half]
