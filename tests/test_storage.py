"""Bytes of a device's buffers, counted by hand: four devices, 64 samples, three ids each, vectors of 32 numbers."""

import dataclasses

import pytest

from sharding.cost import CostSettings, DenseLoad, plan_cost
from sharding.load import FeatureLoad
from sharding.plan import Placement, ShardingPlan, data_parallel, row_wise, table_wise
from sharding.storage import Storage
from sharding.tables import FeatureSpec, TableSpec
from sharding.topology import parse_topology

# A100s: XLA's update holds two vectors an id.
MACHINE = parse_topology("zionex:2x2")
TABLE = TableSpec(name="t", num_rows=1000, dim=32, optimizer="sgd")
NARROW = dataclasses.replace(TABLE, name="narrow", dim=16)


def storage_of(
    *placed: tuple[TableSpec, Placement],
    nodes: int = 2,
    chips: int = 2,
    weighted: bool = False,
    settings: CostSettings | None = None,
    dense: DenseLoad | None = None,
) -> Storage:
    tables = [table for table, _ in placed]
    plan = ShardingPlan(nodes=nodes, chips=chips, placements=tuple(placement for _, placement in placed))
    return plan_cost(
        plan,
        tables,
        [FeatureSpec(name=table.name, table=table.name) for table in tables],
        dataclasses.replace(MACHINE, nodes=nodes, chips=chips),
        batch_size=64,
        loads=[FeatureLoad(feature=table.name, pooling_factor=3.0, weighted=weighted) for table in tables],
        settings=settings,
        dense=dense,
    ).storage


ROWS_BY_ID = row_wise(TABLE, returns="rows")


@pytest.mark.parametrize(
    ("placement", "weighted", "words"),
    [
        # 48 of this device; 192 with where they belong, sent and received; 192 with slot and logical row; 64 bags.
        (table_wise(TABLE, 0), False, 48 + 2 * 192 * 2 + 192 * 3 + 64),
        (table_wise(TABLE, 0), True, 48 * 2 + 2 * 192 * 3 + 192 * 4 + 64),
        # Every device has the ids of all; bags are of its own.
        (data_parallel(TABLE), False, 48 + 48 * 4 * 3),
        # A quarter for each owner.
        (ROWS_BY_ID, False, 48 + 2 * 48 * 2 + 48 * 3),
    ],
    ids=["table_wise", "weighted", "data_parallel", "rows_by_id"],
)
def test_ids_then_room_for_two_batches_and_a_quarter_more(placement: Placement, weighted: bool, words: int):
    assert storage_of((TABLE, placement), weighted=weighted).ids == 2 * 1.25 * 4 * words


def test_ids_of_one_device_then_none_travels():
    alone = storage_of((TABLE, table_wise(TABLE, 0)), nodes=1, chips=1)
    assert alone.ids == 2 * 1.25 * 4 * (192 + 192 * 3)


def test_vectors_then_at_the_owner_in_the_exchange_and_twice_at_home():
    for placement in (table_wise(TABLE, 0), data_parallel(TABLE)):
        assert storage_of((TABLE, placement)).vectors == 4 * 32 * (64 + 64 + 2 * 16)


def test_rows_of_an_update_then_those_of_the_largest_group_and_of_none_that_is_frozen():
    wide, narrow = (TABLE, table_wise(TABLE, 0)), (NARROW, table_wise(NARROW, 0))
    assert storage_of(wide).rows == 1.25 * 4 * 192 * 2 * 32
    assert storage_of(wide, weighted=True).rows == 1.25 * 4 * 192 * 3 * 32
    assert storage_of(narrow).rows == 1.25 * 4 * 192 * 2 * 16
    assert storage_of(wide, narrow).rows == storage_of(narrow, wide).rows == storage_of(wide).rows
    # Groups of replicas come first.
    assert storage_of((TABLE, data_parallel(TABLE)), narrow).rows == storage_of(wide).rows
    frozen = dataclasses.replace(TABLE, frozen=True)
    assert storage_of((frozen, table_wise(frozen, 0))).rows == 0


def test_rows_that_travel_by_id_then_out_and_in_and_their_gradients_and_codes_beside_what_they_mean():
    # No more than an update would take, whose rows they are not.
    assert storage_of((TABLE, ROWS_BY_ID)).rows == 1.25 * 4 * 48 * (2 * 32 + 32)
    # Out in 66 bytes each, back in 34.
    coded = CostSettings(forward_codec="float16", backward_codec="int8")
    of_row, of_gradient = 16.5 + 16.5 + 32, 8.5 + 32
    assert storage_of((TABLE, ROWS_BY_ID), settings=coded).rows == 1.25 * 4 * 48 * (of_row + of_gradient)
    frozen = dataclasses.replace(TABLE, frozen=True)
    assert storage_of((frozen, ROWS_BY_ID)).rows >= 1.25 * 4 * 48 * 2 * 32


def test_storage_then_the_sum_of_its_parts_and_of_all_tables_of_a_device():
    found = storage_of(
        (TABLE, table_wise(TABLE, 1)), (NARROW, table_wise(NARROW, 1)), dense=DenseLoad(parameters=10, memory_bytes=7)
    )
    assert found.dense == 7
    assert found.buffers == found.ids + found.vectors + found.rows
    assert found.total == found.weights + found.element_state + found.row_state + found.buffers + 7
    assert found.weights_alone == (0, 1000 * (32 + 16) * 4, 0, 0)
