"""Plans: what they refuse, and that they survive a file."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import PLANS, TABLES, plan_of

from sharding import InputError, Placement, ShardingPlan, TableSpec
from sharding.plan import (
    Slice,
    check_plan,
    column_wise,
    data_parallel,
    grid,
    one_device_plan,
    row_wise,
    table_row_wise,
    table_wise,
)

T = TableSpec(name="t", num_rows=100, dim=64)
SMALL = TableSpec(name="t", num_rows=7, dim=64)


def assert_refused(message: str, plan: ShardingPlan, table: TableSpec = T) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        check_plan(plan, [table], plan.nodes, plan.chips)
    assert "\n" not in str(error.value)


def on_2x4(*placements: Placement) -> ShardingPlan:
    return ShardingPlan(nodes=2, chips=4, placements=placements)


@pytest.mark.parametrize("name", PLANS)
def test_every_placement_then_accepted(name: str) -> None:
    for nodes, chips in ((1, 8), (2, 4), (4, 2)):
        check_plan(plan_of(nodes, chips, name), TABLES, nodes, chips)


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(PLANS), mesh=st.sampled_from([(1, 8), (2, 4), (4, 2)]))
def test_a_plan_written_and_read_then_equal(name: str, mesh: tuple[int, int]) -> None:
    plan = plan_of(*mesh, name)
    assert ShardingPlan.from_json(plan.to_json()) == plan


def test_a_plan_saved_to_a_file_then_loaded_as_it_was(tmp_path: Path) -> None:
    plan = one_device_plan(TABLES)
    plan.save(tmp_path / "plan.json")
    assert ShardingPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (table_wise(T, 8), "table 't' is placed on device 8, but a mesh of 2 x 4 has devices 0 to 7"),
        (table_wise(T, -1), "table 't' is placed on device -1, but a mesh of 2 x 4 has devices 0 to 7"),
        (
            table_row_wise(T, 2, returns="rows"),
            "table 't' is placed on node 2, but a mesh of 2 x 4 has nodes 0 to 1",
        ),
        (column_wise(T, [3, 3]), "table 't': two of its slices are on the same device"),
        (grid(T, [1, 1], returns="rows"), "table 't': two of its slices are on the same node"),
        (
            dataclasses.replace(row_wise(T, returns="rows"), returns=None),
            "table 't': a row_wise placement returns None, but must return 'partial_sums' or 'rows'",
        ),
        (
            dataclasses.replace(table_wise(T, 1), returns="rows"),
            "table 't': a table_wise placement returns 'rows', but must return None",
        ),
        (
            dataclasses.replace(row_wise(T, returns="rows"), slices=(Slice(first_column=0, num_columns=64, owner=1),)),
            "table 't': a row_wise placement is on all devices, but names 1",
        ),
        (
            dataclasses.replace(column_wise(T, [1, 2]), kind="table_wise"),
            "table 't': a table_wise placement has one slice, but 2 are given",
        ),
        (
            Placement(table="t", kind="table_wise", slices=()),
            "table 't' has no slice of columns: give one, of columns 0 to 63",
        ),
    ],
)
def test_a_placement_that_cannot_be_then_refused(placement: Placement, message: str) -> None:
    assert_refused(message, on_2x4(placement))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([(0, 32), (16, 32)], "a slice begins at column 16, the one before ends at 32: the plan has an overlap"),
        ([(0, 16), (32, 32)], "a slice begins at column 32, the one before ends at 16: the plan has a gap"),
        ([(0, 16), (16, 16)], "its slices end at column 32, its last column is 63: the plan has a gap; slices must"),
        (
            [(0, 64), (64, 64)],
            "its slices end at column 128, its last column is 63: the plan has columns that do not exist",
        ),
        ([(0, 0)], "its slices end at column 0, its last column is 63: the plan has a gap"),
        ([(0, 0), (0, 64)], "its 64 columns do not divide into 2 equal slices of a multiple of 16: use one of"),
        ([(0, 48), (48, 16)], "its 64 columns do not divide into 2 equal slices of a multiple of 16: use one of"),
    ],
)
def test_a_plan_edited_so_that_columns_do_not_tile_the_table_then_refused(columns: list, message: str) -> None:
    slices = tuple(Slice(first_column=c[0], num_columns=c[1], owner=i) for i, c in enumerate(columns))
    assert_refused(message, on_2x4(Placement(table="t", kind="column_wise", slices=slices)))


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        ((), "the plan has no place for 1 of the model's 1 tables, first 't': make a plan for"),
        ((table_wise(T, 0), table_wise(T, 1)), "the plan places table 't' twice (an overlap)"),
        (
            (table_wise(T, 0), table_wise(TableSpec(name="u", num_rows=1, dim=1), 0)),
            "the plan places table 'u', which the model does not have; it has ['t']",
        ),
    ],
)
def test_a_plan_for_other_tables_then_refused(placements: tuple, message: str) -> None:
    assert_refused(message, on_2x4(*placements))


def test_a_plan_for_another_mesh_then_refused() -> None:
    with pytest.raises(InputError, match=r"a mesh of 2 x 4, but the mesh is 1 x 8: make it 2 x 4 \(--mesh"):
        check_plan(on_2x4(data_parallel(T)), [T], 1, 8)


def test_fewer_rows_than_devices_then_refused() -> None:
    message = "table 't' has 7 rows, row_wise over 8 devices needs at least 8: place it table_wise or data_parallel"
    assert_refused(message, on_2x4(row_wise(SMALL, returns="rows")), SMALL)
    check_plan(on_2x4(table_row_wise(SMALL, 0, returns="rows")), [SMALL], 2, 4)
    tiny = dataclasses.replace(SMALL, num_rows=3)
    for placement in (table_row_wise(tiny, 0, returns="rows"), grid(tiny, [0, 1], returns="rows")):
        message = f"table 't' has 3 rows, {placement.kind} over 4 devices needs at least 4: place it"
        assert_refused(message, on_2x4(placement), tiny)


@pytest.mark.parametrize("count", [3, 8])
def test_columns_that_do_not_divide_then_refused(count: int) -> None:
    message = f"its 64 columns do not divide into {count} equal slices of a multiple of 16: use one of [1, 2, 4] slices"
    with pytest.raises(InputError, match=re.escape(message)):
        column_wise(T, range(count))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("nodes"), "is not a sharding plan (no 'nodes')"),
        (lambda tree: tree.update(format=2), "its format is 2, this version reads 1"),
        (lambda tree: tree.update(chips="4"), "chips is '4', not a whole number"),
        (lambda tree: tree["placements"][0].pop("slices"), "no 'slices'"),
        (lambda tree: tree["placements"][0]["slices"][0].pop("device"), "no 'device'"),
        (lambda tree: tree["placements"][0]["slices"][0].update(columns=[0]), "is not a sharding plan"),
        (lambda tree: tree["placements"][0]["slices"][0].update(columns=[0, 1.5]), "are not two whole numbers"),
        (lambda tree: tree["placements"].append(7), "is not a sharding plan"),
        (lambda tree: tree.update(node=2), "there is no 'node' here, only format, nodes, chips, placements"),
        (
            lambda tree: tree["placements"][0].update(return_="rows"),
            "'t': there is no 'return_' here, only table, kind",
        ),
        (
            lambda tree: tree["placements"][0]["slices"][0].update(node=1),
            "'t': there is no 'node' here, only columns,",
        ),
        (
            lambda tree: tree["placements"][0].update(kind="rowwise"),
            "'t': placement 'rowwise' is not one of table",
        ),
    ],
)
def test_a_damaged_file_then_refused_by_name(change, message: str, tmp_path: Path) -> None:
    tree = json.loads(on_2x4(table_wise(T, 0)).to_json())
    change(tree)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        ShardingPlan.load(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_not_there_then_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        ShardingPlan.load(tmp_path / "none.json")
