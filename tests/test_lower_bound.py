"""The lower bound: no plan is below it, it is near the cheapest, and every plan obeys its cuts."""

import dataclasses

import numpy as np
import pytest
from planner_cases import BATCH, choices_of, every_assignment, model_of, skewed_model

from benchmarks.planner import SAMPLES_PER_DEVICE, random_instance
from sharding import lower_bound
from sharding.assignment import Assignment
from sharding.candidates import make_choices
from sharding.constraints import Constraint
from sharding.cost import Step
from sharding.cuts import VECTORS_PLACE, Cuts
from sharding.load import loads_by_feature
from sharding.lower_bound import relax
from sharding.plan import PlacementKind, Returns
from sharding.planner import make_plan
from sharding.programme import Programme, Solved
from sharding.tables import RowOptimizerName, TableSpec
from sharding.topology import parse_topology

# Machine, kinds, and columns, of which slices have at least 16.
CUT_CASES = [
    ("h200:1x3", ("table_wise", "column_wise"), 32),
    ("h200:1x4", ("table_wise", "column_wise"), 64),
    ("h200:3x2", ("table_row_wise", "grid"), 48),
    ("h200:2x2", ("row_wise", "table_row_wise"), 32),
]


def test_lower_bound_when_the_solver_errs_then_what_a_plan_beats_is_no_bound():
    # HiGHS 1.15.1 with its own tolerance "proves" 1.3 % more here than a plan costs.
    machine, tables, features, loads = random_instance(36)
    batch_size = SAMPLES_PER_DEVICE * parse_topology(machine).num_devices
    result = make_plan(tables, features, parse_topology(machine), batch_size=batch_size, loads=loads)
    assert 0 <= result.gap < 0.05


def test_lower_bound_when_a_solution_with_more_rows_costs_less_then_it_is_that_of_others():
    proved = [
        Solved(bound=bound, cost=cost, columns=np.zeros(1))
        for bound, cost in ((10.0, 10.0), (20.0, 21.0), (11.0, 12.0))
    ]
    assert lower_bound._best_bound(proved) == 11.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("searched", ["thoroughly", "quickly", "in a hurry"])
def test_bound_when_every_plan_of_three_tables_is_tried_then_none_is_below_it(seed: int, searched: str, monkeypatch):
    if searched == "quickly":
        # As where there are many candidates.
        monkeypatch.setattr(lower_bound, "_SEARCHES", lower_bound._SEARCHES[2:])
    elif searched == "in a hurry":
        # As where there are many tables.
        monkeypatch.setattr(lower_bound, "_FEW_TABLES", 0)
    tables, features, loads = skewed_model(3, seed)
    machine = parse_topology("h200:1x2")
    choices, step = choices_of((tables, features, loads), machine, memory=float(machine.hbm_bytes))
    relaxed = relax(choices, machine.num_devices, float(machine.hbm_bytes))
    assert relaxed is not None
    assert relax(choices, machine.num_devices, 1000.0) is None
    cheapest = min(assignment.cost for assignment in every_assignment(choices, step))
    assert relaxed.seconds <= cheapest * (1 + 1e-9)
    # Whole tables and whole vectors are all that a programme this small leaves open, but for who sits where.
    assert relaxed.seconds >= 0.8 * cheapest
    planned = make_plan(tables, features, machine, batch_size=BATCH, loads=loads)
    assert planned.cost.total_seconds <= cheapest * 1.05


@pytest.mark.parametrize(
    "constraints",
    [
        [Constraint(tables=("t0", "t1", "t2"), devices=(1,))],
        [Constraint(tables=("t0",), devices=(0, 1)), Constraint(tables=("t1",), nodes=(1,))],
        [Constraint(tables=("t0", "t2"), together=True)],
        [Constraint(tables=("t0", "t2"), together=True), Constraint(tables=("t1", "t2"), devices=(0,))],
    ],
    ids=["pinned", "columns and a node", "together", "both"],
)
@pytest.mark.parametrize("seed", range(2))
def test_bound_when_users_say_where_tables_are_then_near_the_cheapest_of_such_plans(seed: int, constraints):
    model = skewed_model(3, seed)
    machine = parse_topology("h200:2x2")
    choices, step = choices_of(model, machine, constraints, float(machine.hbm_bytes))

    def is_obeyed(held: Assignment) -> bool:
        where = list(zip(held.candidate, held.bins, strict=True))
        pinned = all(c is not None and c.owners in (None, bins) for c, bins in where)
        return pinned and all(len({held.bins[table] for table in tables}) == 1 for tables in choices.together)

    cheapest = min(held.cost for held in every_assignment(choices, step) if is_obeyed(held))
    relaxed = relax(choices, machine.num_devices, float(machine.hbm_bytes))
    assert relaxed is not None
    assert 0.95 * cheapest <= relaxed.seconds <= cheapest * (1 + 1e-9)


@pytest.mark.parametrize(("few_tables", "asks"), [(300, True), (0, False)])
def test_targets_when_candidates_are_many_then_asked_for_before_whole_tables_unless_in_a_hurry(
    few_tables: int, asks: bool, monkeypatch
):
    asked = []
    monkeypatch.setattr(lower_bound, "_SEARCHES", lower_bound._SEARCHES[2:])
    monkeypatch.setattr(lower_bound, "_FEW_TABLES", few_tables)
    monkeypatch.setattr(Programme, "proves", lambda self, target, near: asked.append(target) or len(asked) == 2)
    machine = parse_topology("h200:1x2")
    choices, _ = choices_of(skewed_model(3, 0), machine)
    assert relax(choices, machine.num_devices, float(machine.hbm_bytes)) is not None
    assert len(asked) == (2 if asks else 0)
    assert asked == sorted(asked, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_target_when_every_plan_is_tried_then_what_none_costs_less_than_is_proved(seed: int):
    machine = parse_topology("h200:1x2")
    choices, step = choices_of(skewed_model(4, seed), machine)
    # With rows on all devices, as much as fractions.
    whole = tuple(tuple(c for c in options if c.kind in ("table_wise", "column_wise")) for options in choices.of_table)
    choices = dataclasses.replace(choices, of_table=whole)
    programme = Programme(choices, machine.num_devices, float(machine.hbm_bytes))
    fractions = programme.solve()
    assert fractions is not None
    cheapest = min(assignment.cost for assignment in every_assignment(choices, step)) / programme.unit
    proved = [share for share in np.arange(0.8, 1.2, 0.02) if programme.proves(share * cheapest, fractions.columns)]
    # More than fractions prove, and nothing that is wrong.
    assert fractions.bound / cheapest < 0.96 < max(proved) < 1.0 + 1e-9


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
@pytest.mark.parametrize(
    ("kind", "returns"),
    [
        ("data_parallel", None),
        ("table_wise", None),
        ("column_wise", None),
        ("row_wise", "partial_sums"),
        ("row_wise", "rows"),
    ],
)
def test_bound_when_the_only_table_has_one_way_then_its_cost_with_what_exchanges_take_to_start(
    kind: PlacementKind, returns: Returns | None, optimizer: RowOptimizerName
):
    machine = dataclasses.replace(parse_topology("h200:1x2"), inside_latency=1e-3)
    tables, features, loads = model_of([TableSpec(name="t", num_rows=1000, dim=32, optimizer=optimizer)], [3.0])
    # The rows of one device are hot.
    loads = [dataclasses.replace(load, top=((0, 0.5),)) for load in loads]
    step = Step(topology=machine, batch_size=BATCH, loads=loads_by_feature(features, loads))
    only = Constraint(tables=("t0",), kinds=(kind,), returns=returns)
    choices = make_choices(tables, features, step, [only], float(machine.hbm_bytes))
    (cost,) = {assignment.cost for assignment in every_assignment(choices, step)}
    relaxed = relax(choices, machine.num_devices, float(machine.hbm_bytes))
    assert relaxed is not None
    # Less what the solver may be off by.
    assert relaxed.seconds == pytest.approx(cost, rel=1e-3)
    assert relaxed.seconds <= cost


@pytest.mark.parametrize("returns", ["partial_sums", "rows"])
def test_bound_when_hot_rows_of_two_tables_are_on_two_devices_then_not_as_if_they_were_on_one(returns: Returns):
    machine = parse_topology("h200:1x2")
    tables, features, loads = model_of([TableSpec(name="t", num_rows=1000, dim=32)] * 2, [30.0, 20.0])
    loads = [dataclasses.replace(load, top=((number, 0.5),)) for number, load in enumerate(loads)]
    step = Step(topology=machine, batch_size=BATCH, loads=loads_by_feature(features, loads))
    spread = Constraint(tables=("t0", "t1"), kinds=("row_wise",), returns=returns)
    choices = make_choices(tables, features, step, [spread], float(machine.hbm_bytes))
    (cost,) = {assignment.cost for assignment in every_assignment(choices, step)}
    relaxed = relax(choices, machine.num_devices, float(machine.hbm_bytes))
    assert relaxed is not None
    assert 0.9 * cost <= relaxed.seconds <= cost


def test_bound_when_memory_is_that_of_all_tables_or_less_then_one_or_none():
    machine = parse_topology("h200:1x2")
    tables, features, loads = model_of([TableSpec(name="t", num_rows=1000, dim=32, optimizer="sgd")] * 4, [1.0] * 4)
    step = Step(topology=machine, batch_size=BATCH, loads=loads_by_feature(features, loads))
    choices = make_choices(tables, features, step, [], float(machine.hbm_bytes)).without_buffers()
    half = 2 * 1000 * 32 * 4
    assert relax(choices, machine.num_devices, half) is not None
    assert relax(choices, machine.num_devices, 0.99 * half) is None


def test_bound_when_buffers_leave_no_room_for_the_cheapest_plan_then_it_is_higher():
    machine = parse_topology("h200:1x2")
    tables, features, loads = skewed_model(3, 1)
    step = Step(topology=machine, batch_size=1 << 16, loads=loads_by_feature(features, loads))
    choices = make_choices(tables, features, step, [], float(machine.hbm_bytes))
    found = np.array([(held.most_bytes, held.cost) for held in every_assignment(choices, step)])
    limit = found[:, 0].min() * 1.01
    roomy, short = (relax(choices, 2, memory) for memory in (float(machine.hbm_bytes), limit))
    assert roomy is not None
    assert short is not None
    assert roomy.seconds * 1.01 < short.seconds <= found[found[:, 0] <= limit, 1].min()


@pytest.mark.parametrize(("machine_name", "kinds", "dim"), CUT_CASES)
def test_cuts_when_every_plan_is_tried_then_each_obeys_them(
    machine_name: str, kinds: tuple[PlacementKind, ...], dim: int
):
    rng = np.random.default_rng(len(machine_name) + dim)
    num_tables = 3 if dim > 32 else 4
    tables = [TableSpec(name="t", num_rows=int(rows), dim=dim) for rows in rng.lognormal(8, 1, num_tables) + 10]
    tables, features, loads = model_of(tables, rng.lognormal(2, 1.5, num_tables).tolist())
    # Hot rows, so that the devices of one slice have different loads.
    loads = [dataclasses.replace(load, top=((number, 0.4),)) for number, load in enumerate(loads)]
    machine = parse_topology(machine_name)
    step = Step(topology=machine, batch_size=BATCH, loads=loads_by_feature(features, loads))
    allowed = [Constraint(tables=tuple(table.name for table in tables), kinds=kinds)]
    choices = make_choices(tables, features, step, allowed, float(machine.hbm_bytes))
    unit = 1e-6
    vector_seconds = np.array(choices.vector_seconds)
    assignments = list(every_assignment(choices, step))
    # Solutions to break: half of one plan and half of another, with maxima and vectors that are too low for either.
    cuts = Cuts(choices, machine.num_devices, unit)
    found = []
    shares = [
        np.array([float(c is held.candidate[c.table]) for options in choices.of_table for c in options])
        for held in assignments
    ]
    for one, two in rng.integers(len(assignments), size=(60, 2)).tolist():
        share = rng.choice([0.0, 0.5])
        x = (1.0 - share) * shares[one] + share * shares[two]
        z = assignments[one].most / unit * rng.uniform(0.2, 1.0)
        vectors = np.ceil(assignments[one].most[:, VECTORS_PLACE] / np.where(vector_seconds > 0, vector_seconds, 1.0))
        found += cuts.broken(x, z, vectors)
    assert {cut.of_vectors > 0 for cut in found} == {False, True}
    for held, x in zip(assignments, shares, strict=True):
        most_vectors = held.most[:, VECTORS_PLACE] / np.where(vector_seconds > 0, vector_seconds, np.inf)
        for cut in found:
            least = float(cut.values @ x[cut.members]) - cut.of_vectors * float(most_vectors[cut.group])
            assert held.most[cut.group, cut.quantity] / unit >= least * (1 - 1e-9) - 1e-9
