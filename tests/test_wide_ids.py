"""Tables of more rows than 31 bits name, on eight devices.

A store of 2**33 rows has no place here. So the layout is a window: the last rows of the table are the first of each
device's small store, and all others lie before it, where the kernels find no row.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import sharding.embedding
from pallas_kernels import Stores
from sharding import Embeddings, FeatureSpec, KeyedJagged, ShardedTables, TableSpec, make_mesh
from sharding.jagged import for_devices
from sharding.layout import Layout, make_layout
from sharding.plan import ShardingPlan, row_wise

DEVICES, SMALL_STORE = 8, 4
FIRST = 2**33
# Logical rows are there where an update draws bits; those of small whole numbers are exact all the same.
TABLE = TableSpec(
    name="t",
    num_rows=FIRST + 64,
    dim=8,
    dtype="bfloat16",
    rounding="stochastic",
    optimizer="sgd",
    learning_rate=0.5,
)
FEATURE = FeatureSpec(name="f", table="t", max_ids=3)


def window(layout: Layout) -> Layout:
    (store,), groups = layout.stores, []
    for group in layout.groups:
        shard = dataclasses.replace(group.lookups[0].shard, first_row=-FIRST // DEVICES)
        lookups = tuple(dataclasses.replace(lookup, shard=shard) for lookup in group.lookups)
        groups.append(dataclasses.replace(group, lookups=lookups))
    return dataclasses.replace(
        layout, stores=(dataclasses.replace(store, lines_per_device=SMALL_STORE),), groups=tuple(groups)
    )


@pytest.fixture(params=["rows", "partial_sums"])
def tables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ShardedTables:
    monkeypatch.setattr(sharding.embedding, "make_layout", lambda *given: window(make_layout(*given)))
    plan = ShardingPlan(nodes=2, chips=4, placements=(row_wise(TABLE, returns=request.param),))
    return ShardedTables([TABLE], [FEATURE], plan=plan, mesh=make_mesh(2, 4))


def batch(*bags: list[int]) -> KeyedJagged:
    samples = [*bags, *([[]] * (DEVICES - len(bags)))]
    return for_devices(KeyedJagged.from_bags({"f": samples}, capacity=8), DEVICES, 8)


def test_rows_beyond_2_to_the_33_then_looked_up_and_updated(tables: ShardedTables) -> None:
    ids = batch([FIRST + 5, FIRST + 13, 5], [FIRST + 5], [FIRST + 63])
    state = {"bfloat16.sgd.stochastic": Stores(weights=jnp.zeros((DEVICES * SMALL_STORE, 128), jnp.bfloat16))}
    routed = tables.route(ids)
    assert routed.invalid == 0
    named = {tuple(words) for words in np.asarray(routed.groups[0].owned.logical_rows).tolist()}
    assert {(5, 2), (13, 2), (5, 0), (63, 2)} <= named
    gradients = np.arange(1.0, DEVICES + 1, dtype=np.float32)[:, None, None] * np.ones((1, 1, 8), np.float32)
    state = tables.update(state, routed, Embeddings(blocks=(gradients,), sequences={}, names=(("f",),)), step=1)
    found = np.asarray(tables.lookup(state, tables.route(batch([FIRST + 5], [FIRST + 13], [FIRST + 63], [5])))["f"])
    # Row 5 shares its low word with row 2**33 + 5, and lies before the window.
    np.testing.assert_array_equal(found[:4, 0], [-0.5 * (1 + 2), -0.5 * 1, -0.5 * 3, 0.0])


def test_an_id_beyond_the_table_then_counted_as_invalid(tables: ShardedTables) -> None:
    assert tables.route(batch([FIRST + 64, FIRST + 63], [2**62])).invalid == 2


def test_ids_of_one_word_for_such_a_table_then_taken_with_their_sign(tables: ShardedTables) -> None:
    routed = tables.route(batch([5, -1], [2**31 - 1]))
    assert routed.invalid == 1
    named = {tuple(words) for words in np.asarray(routed.groups[0].owned.logical_rows).tolist()}
    assert {(5, 0), (2**31 - 1, 0)} <= named
