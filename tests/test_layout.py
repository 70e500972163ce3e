"""Which tables share a store, and what a store is padded to."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from placement_cases import FEATURES, PLANS, TABLES, plan_of

from pallas_kernels.mosaic_tpu.lines import row_shape
from pallas_kernels.mosaic_tpu.units import units_of_rows
from sharding import FeatureSpec, KeyedJagged, ShardedTables, TableSpec, layout, make_mesh
from sharding.checkpoint import read_table, restore_tables, save_tables
from sharding.layout import LINE_BYTES, Layout, make_layout
from sharding.plan import ShardingPlan, column_wise, data_parallel, one_device_plan, row_wise
from sharding.returns import home_places

# Widths whose least common multiple is 128 * 3 * 5 * 7 * 11 * 13 * 17 * 19 * 23.
ODD_DIMS = (384, 640, 896, 1408, 1664, 2176, 2432, 2944)
NUM_ROWS = 40


def tables_of(dims: Sequence[int], num_rows: int = 1000) -> list[TableSpec]:
    return [TableSpec(name=f"t{dim}", num_rows=num_rows, dim=dim, optimizer="adam") for dim in dims]


def features_of(tables: Sequence[TableSpec]) -> list[FeatureSpec]:
    return [FeatureSpec(name=table.name, table=table.name) for table in tables]


def layout_of(dims: Sequence[int]) -> Layout:
    tables = tables_of(dims)
    return make_layout(tables, features_of(tables), one_device_plan(tables))


def test_dims_with_a_large_common_multiple_then_stores_of_their_own_and_little_padding() -> None:
    stores = layout_of(ODD_DIMS).stores
    assert [store.name for store in stores] == ["float32.adam", "float32.adam.dim_1664", "float32.adam.dim_2176"]
    assert {store.rule_name for store in stores} == {"adam"}
    assert {tuple(array.name for array in store.element_state) for store in stores} == {
        tuple(array.name for array in stores[0].element_state)
    }
    held = sum(1000 * dim * 4 for dim in ODD_DIMS)
    assert sum(store.lines_per_device * LINE_BYTES for store in stores) < 1.2 * held
    for store in stores:
        for shard in store.shards:
            assert store.elements_per_device % shard.width == 0


@pytest.mark.parametrize(
    "dims",
    [
        [2**power for power in range(3, 14)],
        [128 * number for number in range(1, 9)],
        range(16, 1025, 16),
        (5, 10, 20, 50, 100, 200, 300, 400, 500, 768, 1000, 1536),
    ],
)
def test_dims_with_a_small_common_multiple_then_one_store(dims: Sequence[int]) -> None:
    assert [store.name for store in layout_of(dims).stores] == ["float32.adam"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_in_one_store_then_each_begins_what_sparsecores_do_not_divide(dtype: str) -> None:
    # Row-wise state, of which 128 numbers make a line; rows that share a line; and an odd number of lines.
    tables = [TableSpec(name=f"t{dim}", num_rows=68, dim=dim, dtype=dtype) for dim in (16, 32, 64, 384)]
    (store,) = make_layout(tables, features_of(tables), one_device_plan(tables)).stores
    assert [shard.first_scalar % 128 for shard in store.shards] == [0] * len(tables)
    for shard in store.shards:
        rows_of_unit = 1 << units_of_rows(row_shape(shard.width), np.dtype(dtype), 1).shift
        assert shard.first_row % rows_of_unit == 0


def test_tables_alike_in_several_stores_then_learn_and_restore_as_in_one(tmp_path: Path, monkeypatch) -> None:
    specs = tables_of((16, 384, 640), NUM_ROWS)
    features = features_of(specs)
    ids = KeyedJagged.from_bags({spec.name: [[1, 2], [39], [2], []] for spec in specs}, capacity=16)

    def learnt(tables: ShardedTables) -> list[np.ndarray]:
        state = tables.init()
        routed = tables.route(tables.to_devices(ids))
        state = tables.update(state, routed, tables.lookup(state, routed), step=1)
        save_tables(tables, state, tmp_path / f"{len(tables.layout.stores)} {tables.num_devices}")
        return [tables.read_rows(state, spec.name, range(NUM_ROWS)) for spec in specs]

    expected = learnt(ShardedTables(specs, features))
    monkeypatch.setattr(layout, "_MAX_MULTIPLE", 1024)
    placements = data_parallel(specs[0]), row_wise(specs[1], returns="rows"), column_wise(specs[2], (1, 0))
    plan = ShardingPlan(nodes=1, chips=2, placements=placements)
    many = ShardedTables(specs, features, plan=plan, mesh=make_mesh(1, 2))
    assert [store.name for store in many.layout.stores] == ["float32.adam", "float32.adam.dim_640"]
    np.testing.assert_equal(learnt(many), expected)

    one = ShardedTables(specs, features)
    restored = restore_tables(one, tmp_path / "2 2")
    for spec, rows in zip(specs, expected, strict=True):
        np.testing.assert_array_equal(one.read_rows(restored, spec.name, range(NUM_ROWS)), rows)
        np.testing.assert_array_equal(read_table(tmp_path / "2 2", spec.name), rows)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("nodes", "chips"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_vectors_that_come_home_then_each_has_a_place_of_its_own_behind_those_of_owners_before(
    nodes: int, chips: int, plan: str
) -> None:
    for group in make_layout(TABLES, FEATURES, plan_of(nodes, chips, plan)).groups:
        places = home_places(group, chips)
        assert len(set(places.tolist())) == len(places) == group.num_vectors
        owners = np.repeat(
            [lookup.shard.first_device for lookup in group.lookups], [lookup.vectors for lookup in group.lookups]
        )
        if group.family == "table_wise":
            np.testing.assert_array_equal(places // group.vectors_per_device, owners)
        elif group.family == "table_row_wise":
            np.testing.assert_array_equal(places // group.vectors_per_device, owners // chips)
        else:
            # What is added up, or pooled at home, has no owner.
            assert sorted(places.tolist()) == list(range(group.num_vectors))
