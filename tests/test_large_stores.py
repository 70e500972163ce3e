"""Stores that have more rows of some width than 32 bits name.

None fits here, so what 32 bits name is said to be less than a small store has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import NUM_ROWS, table_of
from update_cases import a_batch, bits_of, fresh_stores, gradients_of, ids_of, slots_of

import pallas_kernels.stores
import sharding.rows
from pallas_kernels import ROW_OPTIMIZERS, Stores, pooled_lookup, sparse_update
from sharding import FeatureSpec, ShardedTables, TableSpec, make_mesh
from sharding.plan import ShardingPlan, row_wise

WIDTH = 16


@pytest.fixture
def few_named(monkeypatch: pytest.MonkeyPatch):
    """Says how many rows an index names, from when it is called."""

    def name(rows: int) -> None:
        for module in (pallas_kernels.stores, sharding.rows):
            monkeypatch.setattr(module, "MOST_ROWS", rows)
        jax.clear_caches()

    yield name
    jax.clear_caches()


def test_lookup_and_update_by_xla_then_the_bits_of_a_store_whose_rows_all_have_names(few_named) -> None:
    stores = fresh_stores("adagrad", table_of(WIDTH))
    ids = jax.tree.map(jnp.asarray, ids_of(a_batch(num_rows=NUM_ROWS - 1)))

    def both() -> tuple[np.ndarray, Stores]:
        pooled = pooled_lookup(stores.weights, ids.rows, ids.offsets, width=WIDTH, implementation="xla")
        updated = sparse_update(
            stores,
            ids,
            jnp.asarray(gradients_of(WIDTH)),
            slots=slots_of(WIDTH),
            step=jnp.int32(1),
            seed=jnp.uint32(0),
            optimizer=ROW_OPTIMIZERS["adagrad"],
            width=WIDTH,
            implementation="xla",
        )
        return np.asarray(pooled), updated

    expected, expected_stores = both()
    few_named(NUM_ROWS - 1)
    assert pallas_kernels.stores.rows_view(stores.weights, WIDTH).ndim == 3
    found, found_stores = both()
    np.testing.assert_array_equal(found, expected)
    for now, wanted in zip(bits_of(found_stores), bits_of(expected_stores), strict=True):
        np.testing.assert_array_equal(now, wanted)
    assert (bits_of(found_stores)[0] != bits_of(stores)[0]).any()


def test_rows_written_then_read_back_and_no_other_row_changes(few_named) -> None:
    table = TableSpec(name="t", num_rows=60, dim=16, optimizer="adagrad")
    plan = ShardingPlan(nodes=1, chips=2, placements=(row_wise(table, returns="rows"),))
    tables = ShardedTables([table], [FeatureSpec(name="f", table="t")], plan=plan, mesh=make_mesh(1, 2))
    state = tables.init()
    expected = tables.read_rows(state, "t", np.arange(60))
    few_named(31)
    assert state["float32.adagrad"].weights.size // 2 // WIDTH > 31
    expected[7:24] = np.random.default_rng(0).normal(size=(17, 16))
    state = tables.write_rows(state, "t", 7, expected[7:24])
    np.testing.assert_array_equal(tables.read_rows(state, "t", np.arange(60)), expected)
