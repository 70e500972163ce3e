"""The planner: what it promises of every plan, and what it says when nothing fits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import BATCH, CHIPS, MACHINE, NODES, every_assignment, model_of, plan_of, skewed_model

from sharding import planner
from sharding.assignment import Assignment
from sharding.candidates import make_choices
from sharding.constraints import Constraint
from sharding.cost import Step
from sharding.errors import InputError
from sharding.load import loads_by_feature
from sharding.plan import ShardingPlan, check_plan
from sharding.plan_report import draw_plan, plan_text
from sharding.planner import make_plan
from sharding.tables import FeatureSpec, TableSpec
from sharding.topology import parse_topology

random_tables = st.lists(
    st.builds(
        TableSpec,
        name=st.just("t"),
        num_rows=st.integers(1, 300_000),
        dim=st.sampled_from([4, 16, 48, 64, 128]),
        dtype=st.sampled_from(["float32", "float16"]),
        optimizer=st.sampled_from(["sgd", "rowwise_adagrad", "adam"]),
    ),
    min_size=1,
    max_size=12,
)
pooling_factors = st.lists(st.floats(0.5, 50), min_size=12, max_size=12)


@settings(max_examples=10, deadline=None)
@given(tables=random_tables, factors=pooling_factors)
def test_plan_when_made_for_any_tables_then_it_is_complete_fits_and_costs_at_least_the_bound(
    tables: list[TableSpec], factors: list[float]
):
    named, features, loads = model_of(tables, factors)
    result = make_plan(named, features, MACHINE, batch_size=BATCH, loads=loads)
    check_plan(result.plan, named, NODES, CHIPS)
    assert result.cost.storage.total <= result.memory_limit
    assert 0 < result.lower_bound <= result.cost.total_seconds * (1 + 1e-9)
    assert ShardingPlan.from_json(result.plan.to_json()) == result.plan


@settings(max_examples=6, deadline=None)
@given(tables=random_tables, factors=pooling_factors, share=st.floats(0.2, 1.0))
def test_plan_when_memory_is_short_then_it_fits_or_an_error_says_how_much_is_missing(
    tables: list[TableSpec], factors: list[float], share: float
):
    named, features, loads = model_of(tables, factors)
    roomy = make_plan(named, features, MACHINE, batch_size=BATCH, loads=loads)
    limit = int(share * roomy.cost.storage.total)
    try:
        result = make_plan(named, features, MACHINE, batch_size=BATCH, loads=loads, memory_limit=limit)
    except InputError as error:
        message, total = str(error), 0
    else:
        message, total = "ways out", result.cost.storage.total
    assert total <= limit
    assert "ways out" in message
    assert "\n" not in message


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("share", [1.0, 1.25])
def test_plan_when_memory_is_what_one_takes_or_more_then_one_is_found(seed: int, share: float):
    tables, features, loads = skewed_model(6, seed)
    machine = parse_topology("a100-80:1x8")
    roomy = make_plan(tables, features, machine, batch_size=65536, loads=loads)
    limit = int(share * roomy.cost.storage.total)
    result = make_plan(tables, features, machine, batch_size=65536, loads=loads, memory_limit=limit)
    assert result.memory_limit == limit
    assert result.cost.storage.total <= limit
    assert 0 < result.lower_bound <= result.cost.total_seconds * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_plan_when_memory_is_short_then_the_cheapest_of_all_that_fit(seed: int):
    machine = parse_topology("h200:1x2")
    tables, features, loads = skewed_model(3, seed)
    # What updates of replicas hold is known late, and so is what rounding to lines adds.
    allowed = [Constraint(tables=("t0", "t1", "t2"), kinds=("table_wise", "column_wise", "row_wise"))]
    step = Step(topology=machine, batch_size=1 << 16, loads=loads_by_feature(features, loads))
    choices = make_choices(tables, features, step, allowed, float(machine.hbm_bytes))
    found = np.array([(held.most_bytes, held.cost) for held in every_assignment(choices, step)])
    for share in (0.0, 0.1, 0.5):
        limit = int(np.quantile(found[:, 0], share) * 1.002)
        cheapest = found[found[:, 0] <= limit, 1].min()
        result = make_plan(
            tables, features, machine, batch_size=1 << 16, loads=loads, constraints=allowed, memory_limit=limit
        )
        assert result.cost.storage.total <= limit
        assert result.lower_bound <= cheapest * (1 + 1e-9)
        assert result.cost.total_seconds <= cheapest * 1.05


def test_plan_when_the_search_outgrows_memory_then_the_one_that_it_began_from(monkeypatch):
    def search(assignment: Assignment, rounds: int, **others: bool) -> None:
        if rounds == planner._SEARCH_ROUNDS:
            for table, candidates in enumerate(assignment.choices.of_table):
                assignment.remove(table)
                assignment.place(candidates[0], (0,))

    tables, features, loads = model_of([TableSpec(name="t", num_rows=100_000, dim=64)] * 8, [1.0] * 8)
    monkeypatch.setattr(planner, "improve", search)
    everything = sum(table.num_rows * table.dim * 4 for table in tables)
    result = make_plan(tables, features, MACHINE, batch_size=BATCH, loads=loads, memory_limit=everything)
    assert result.cost.storage.total <= everything
    assert result.plan.placement("t0") != result.plan.placement("t1")


@pytest.mark.parametrize(("batch_size", "possible"), [(-5, 8), (0, 8), (1023, 1024)])
def test_batch_when_the_devices_do_not_divide_it_then_an_error_says_which_they_do(batch_size: int, possible: int):
    tables, features, _ = skewed_model(2, 0)
    with pytest.raises(InputError, match=f"batch_size is {batch_size}, .* 8 devices .* use {possible}$"):
        make_plan(tables, features, MACHINE, batch_size=batch_size)


def test_plan_when_made_twice_then_it_is_the_same():
    assert plan_of().plan == plan_of().plan


def test_plan_when_of_either_partitioner_then_best_is_no_worse():
    costs = {name: plan_of(12, 1, partitioner=name).cost.total_seconds for name in ("greedy", "ldm", "best")}
    # Both search on from the better start, which need not end better: within the search's own precision.
    assert costs["best"] <= 1.02 * min(costs["greedy"], costs["ldm"])


def test_tables_when_they_do_not_fit_then_the_error_has_figures_and_three_ways_out():
    table = TableSpec(name="huge", num_rows=1_000_000_000, dim=128, optimizer="adam")
    features = [FeatureSpec(name="f", table="huge")]
    with pytest.raises(InputError) as caught:
        make_plan([table], features, MACHINE, batch_size=BATCH, memory_limit=100_000_000_000)
    message = str(caught.value)
    # 10^9 rows of 128 floats with two moments are 1536 GB: 192 GB a device.
    assert "192.00 GB a device" in message
    assert "92.00 GB a device (736.00 GB in all) are missing" in message
    assert "optimizer rowwise_adagrad, one number of state a row (64.50 GB a device, fits)" in message
    # 16 devices would do, 12 would not.
    assert "16 devices instead of 8 (96.00 GB a device, fits)" in message
    assert "(3)" in message
    assert "(4)" not in message
    # Devices of one CPU share its memory.
    with pytest.raises(InputError) as caught:
        make_plan(
            [table], features, dataclasses.replace(MACHINE, platform="cpu"), batch_size=BATCH, memory_limit=10**11
        )
    assert "devices instead of" not in str(caught.value)


def test_partitioner_when_unknown_then_an_error_names_those_there_are():
    with pytest.raises(InputError, match="partitioner 'luck' does not exist; use best, greedy or ldm"):
        plan_of(partitioner="luck")


def test_mesh_when_of_one_device_then_everything_is_on_it():
    tables, features, _ = skewed_model(5, 0)
    plan = make_plan(tables, features, parse_topology("h200:1x1"), batch_size=BATCH).plan
    assert {placement.kind for placement in plan.placements} == {"table_wise"}
    with pytest.raises(InputError, match="do not fit"):
        make_plan(tables, features, parse_topology("h200:1x1"), batch_size=BATCH, memory_limit=1000)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(tables=("t1",), forbidden=("table_wise",)),
        Constraint(tables=("t1",), kinds=("row_wise", "column_wise")),
        Constraint(tables=("t1",), nodes=(0,)),
    ],
)
def test_mesh_when_of_one_device_then_a_constraint_that_wants_another_place_is_refused(constraint: Constraint):
    tables, features, _ = skewed_model(3, 0)
    machine = parse_topology("h200:1x1")
    with pytest.raises(InputError, match="'t1' do not let it be table_wise on device 0, and there is no other place"):
        make_plan(tables, features, machine, batch_size=BATCH, constraints=[constraint])
    harmless = [Constraint(tables=("t0", "t1"), together=True), Constraint(tables=("t2",), devices=(0,))]
    assert make_plan(tables, features, machine, batch_size=BATCH, constraints=harmless).plan.num_devices == 1


def test_large_table_when_one_device_cannot_hold_it_then_it_is_split():
    tables = [TableSpec(name="large", num_rows=1_000_000, dim=128), TableSpec(name="small", num_rows=1000, dim=128)]
    features = [FeatureSpec(name=table.name, table=table.name) for table in tables]
    result = make_plan(tables, features, MACHINE, batch_size=BATCH, memory_limit=200_000_000)
    assert result.plan.placement("large").kind != "table_wise"


def test_report_when_printed_then_it_has_every_table_and_every_device(tmp_path: Path):
    tables, features, loads = skewed_model(8, 0)
    result = make_plan(tables, features, MACHINE, batch_size=BATCH, loads=loads)
    text = plan_text(result, tables, most_tables=None)
    assert all(f" {table.name} " in text for table in tables)
    assert all(f" {device} ({device // CHIPS}, {device % CHIPS}) " in text for device in range(MACHINE.num_devices))
    assert "above the lower bound" in text
    assert "and 5 smaller tables" in plan_text(result, tables, most_tables=3)
    draw_plan(result, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_report_when_a_name_holds_brackets_then_it_is_printed_as_it_is():
    tables = [TableSpec(name="x[/y]", num_rows=1000, dim=8)]
    result = make_plan(tables, [FeatureSpec(name="x", table="x[/y]")], MACHINE, batch_size=BATCH)
    assert "x[/y]" in plan_text(result, tables)


def test_report_when_devices_are_many_then_it_sums_them_up():
    tables, features, loads = skewed_model(8, 0)
    result = make_plan(tables, features, parse_topology("h200:4x8"), batch_size=4096, loads=loads)
    text = plan_text(result, tables)
    assert "median" in text
    assert "32 devices: each column's quantiles" in text
