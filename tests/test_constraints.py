"""What users may ask of the planner, and what it says of what cannot be."""

from typing import get_args

import pytest
from planner_cases import BATCH, MACHINE, plan_of, skewed_model

from sharding.constraints import Allowed, Constraint, allowed_of, together_sets
from sharding.errors import InputError
from sharding.plan import PlacementKind
from sharding.planner import make_plan
from sharding.tables import FeatureSpec, TableSpec


def test_table_when_pinned_then_it_is_where_the_user_wants_it():
    constraints = [
        Constraint(tables=("t0",), devices=(5,)),
        Constraint(tables=("t1",), nodes=(1,), returns="rows"),
        Constraint(tables=("t2",), kinds=("data_parallel",)),
        Constraint(tables=("t3", "t4"), forbidden=("table_wise", "column_wise")),
    ]
    plan = plan_of(constraints=constraints).plan
    first, second = plan.placement("t0"), plan.placement("t1")
    assert (first.kind, first.slices[0].owner) == ("table_wise", 5)
    assert (second.kind, second.slices[0].owner, second.returns) == ("table_row_wise", 1, "rows")
    assert plan.placement("t2").kind == "data_parallel"
    assert {plan.placement(name).kind for name in ("t3", "t4")}.isdisjoint({"table_wise", "column_wise"})


def test_columns_when_pinned_then_each_slice_is_on_its_device():
    table = TableSpec(name="wide", num_rows=1000, dim=64)
    features = [FeatureSpec(name="f", table="wide")]
    pinned = Constraint(tables=("wide",), devices=(7, 2))
    result = make_plan([table], features, MACHINE, batch_size=BATCH, constraints=[pinned])
    placement = result.plan.placement("wide")
    assert placement.kind == "column_wise"
    assert [piece.owner for piece in placement.slices] == [7, 2]


def test_tables_when_kept_together_then_they_share_a_device():
    together = Constraint(tables=("t0", "t3", "t7"), together=True)
    plan = plan_of(constraints=[together, Constraint(tables=("t7", "t9"), together=True)]).plan
    placements = [plan.placement(name) for name in ("t0", "t3", "t7", "t9")]
    assert {placement.kind for placement in placements} == {"table_wise"}
    assert len({placement.slices[0].owner for placement in placements}) == 1


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint(tables=("nobody",), devices=(0,)), "'nobody', which does not exist"),
        (Constraint(tables=("t0",), devices=(8,)), "pinned to device 8, but 2 x 4 has devices 0 to 7"),
        (Constraint(tables=("t0",), nodes=(2,)), "pinned to node 2, but 2 x 4 has nodes 0 to 1"),
        (Constraint(tables=("t0",), devices=(1, 1)), "name each of them once"),
        (Constraint(tables=("t0",), nodes=()), r"pinned to nodes \(\); name each of them once"),
        (Constraint(tables=("t0",), kinds=()), "leave no placement"),
        (Constraint(tables=("t0", "t1"), kinds=("row_wise",), together=True), "leave no placement"),
        (Constraint(tables=("t0",), forbidden=("nowhere",)), "names kind 'nowhere'"),  # pyright: ignore  a bad kind
        (Constraint(tables=("t0",), returns="row"), "names returns 'row'; they are partial_sums, rows"),  # pyright: ignore
        (Constraint(tables=(), kinds=("foo",)), "names no table"),  # pyright: ignore  a bad kind
    ],
)
def test_constraint_when_impossible_then_an_error_says_why(constraint: Constraint, message: str):
    with pytest.raises(InputError, match=message):
        plan_of(constraints=[constraint])


def test_constraints_on_one_table_then_what_each_of_them_allows_is_left():
    constraints = [
        Constraint(tables=("t0",), kinds=("table_wise", "row_wise", "grid")),
        Constraint(tables=("t0", "t1"), kinds=("row_wise", "grid", "column_wise"), forbidden=("grid",)),
        Constraint(tables=("t0",), forbidden=("data_parallel",)),
    ]
    tables, _, _ = skewed_model(2, 0)
    allowed = allowed_of(tables, constraints, MACHINE)
    left = {
        name: [kind for kind in get_args(PlacementKind) if of_table.allows(kind, 1, None)]
        for name, of_table in allowed.items()
    }
    assert left == {"t0": ["row_wise"], "t1": ["column_wise", "row_wise"]}


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (
            (Constraint(tables=("t0",), devices=(0,)), Constraint(tables=("t0",), devices=(1,))),
            r"'t0' is asked to have devices \(0,\) and \(1,\): keep one",
        ),
        (
            (Constraint(tables=("t0",), devices=(3,)), Constraint(tables=("t0",), nodes=(0,))),
            r"'t0' is pinned to devices \(3,\), and spread over nodes \(0,\): keep one",
        ),
        (
            (Constraint(tables=("t0",), returns="rows"), Constraint(tables=("t0",), returns="partial_sums")),
            "'t0' is asked to have returns rows and partial_sums",
        ),
        (
            (
                Constraint(tables=("t0", "t1"), together=True),
                Constraint(tables=("t1", "t2"), together=True),
                Constraint(tables=("t0",), devices=(0,)),
                Constraint(tables=("t2",), devices=(1,)),
            ),
            r"'t0' and 't2' are to be together, but are pinned to devices \(0,\) and \(1,\)",
        ),
    ],
)
def test_constraints_when_they_contradict_each_other_then_an_error_names_both(
    constraints: tuple[Constraint, ...], message: str
):
    with pytest.raises(InputError, match=message):
        plan_of(constraints=constraints)


def test_returns_when_one_is_wanted_then_of_spread_rows_alone():
    wanted = Allowed(returns="rows")
    assert wanted.allows("grid", 2, "rows")
    assert not wanted.allows("grid", 2, "partial_sums")
    assert wanted.allows("table_wise", 1, None)


def test_nodes_when_pinned_then_one_slice_for_each():
    pinned = Allowed(nodes=(1, 0))
    assert pinned.allows("grid", 2, "rows")
    assert not pinned.allows("grid", 4, "rows")
    assert not pinned.allows("table_row_wise", 1, "rows")
    assert not pinned.allows("column_wise", 2, None)


def test_sets_when_another_joins_them_then_all_are_one():
    pairs = [("a", "b"), ("c", "d"), ("e", "f"), ("g",), ("d", "a", "f")]
    constraints = [Constraint(tables=names, together=True) for names in pairs]
    assert set(together_sets([*constraints, Constraint(tables=("b", "g"))])) == {("a", "b", "c", "d", "e", "f"), ("g",)}
