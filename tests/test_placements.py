"""Every placement and return on meshes of eight devices does what one device does."""

from functools import cache
from typing import get_args

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import FEATURES, PLANS, TABLES, Samples, plan_of, samples_of

from sharding import (
    Embeddings,
    FeatureSpec,
    Initializer,
    KeyedJagged,
    ShardedTables,
    TableSpec,
    TableState,
    make_mesh,
)
from sharding.codec import Codec
from sharding.plan import Placement, Returns, ShardingPlan, column_wise, row_wise, table_row_wise

MESHES = ((1, 8), (2, 4), (4, 2))
UPDATES = 3
CHUNKS = 2
# Partial sums of a bag are added in another order than the bag's ids: a few roundings of float32.
TOLERANCE = 2e-6


@cache
def tables_on(nodes: int, chips: int, plan: str) -> ShardedTables:
    if nodes * chips == 1:
        return ShardedTables(TABLES, FEATURES, seed=3)
    return ShardedTables(TABLES, FEATURES, seed=3, plan=plan_of(nodes, chips, plan), mesh=make_mesh(nodes, chips))


def gradients_like(embeddings: Embeddings, seed: int) -> Embeddings:
    """Gradients that do not depend on the vectors, so that updates can be compared bit for bit."""
    random = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(embeddings)
    return jax.tree.unflatten(structure, [random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def trained(tables: ShardedTables, samples: Samples, weighted: bool) -> tuple[Embeddings, TableState]:
    """What is looked up before three updates, and the state after them."""
    ids = tables.to_devices(samples.jagged(weighted=weighted))
    state = tables.init()
    routed = tables.route(ids)
    assert routed.invalid == 0
    assert not routed.overflow
    embeddings = tables.lookup(state, routed)
    for step in range(1, UPDATES + 1):
        state = tables.update(state, routed, gradients_like(embeddings, step), step=step, learning_rate_scale=0.5)
    return embeddings, state


def rows_and_state(tables: ShardedTables, state: TableState, table: str) -> dict[str, np.ndarray]:
    spec = next(spec for spec in TABLES if spec.name == table)
    rows = range(spec.num_rows)
    return {"weights": tables.read_rows(state, table, rows)} | tables.read_optimizer_state(state, table, rows)


samples = st.builds(
    samples_of,
    st.integers(0, 2**32 - 1),
    fullness=st.sampled_from([0.0, 0.3, 1.0]),
    distinct=st.sampled_from([0.0, 0.2, 1.0]),
)


# Each of them compiles programs for eight devices for half a minute.
everywhere = pytest.mark.parametrize(
    ("nodes", "chips", "plan"),
    [
        (*mesh, plan) if (mesh, plan) == ((2, 4), "mixed") else pytest.param(*mesh, plan, marks=pytest.mark.slow)
        for mesh in MESHES
        for plan in PLANS
    ],
)


@everywhere
@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
@settings(max_examples=2, deadline=None)
@given(samples=samples)
def test_three_updates_on_eight_devices_then_the_same_bits_as_on_one(
    nodes: int, chips: int, plan: str, weighted: bool, samples: Samples
) -> None:
    one, many = tables_on(1, 1, ""), tables_on(nodes, chips, plan)
    (alone, state_alone), (together, state_together) = (trained(tables, samples, weighted) for tables in (one, many))
    for feature in FEATURES:
        expected, found = np.asarray(alone[feature.name]), np.asarray(together[feature.name])
        if many.plan.placement(feature.table).returns == "partial_sums":
            np.testing.assert_allclose(found, expected, atol=TOLERANCE, err_msg=feature.name)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=feature.name)
    for spec in TABLES:
        expected, found = rows_and_state(one, state_alone, spec.name), rows_and_state(many, state_together, spec.name)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{spec.name}: {name}")


def chunks_of(whole: Embeddings, devices: int) -> tuple[Embeddings, ...]:
    """Of each device's samples the first half, then the second."""

    def part(values: jax.Array, chunk: int) -> np.ndarray:
        by_device = np.asarray(values).reshape(devices, CHUNKS, -1, *values.shape[1:])
        return by_device[:, chunk].reshape(-1, *values.shape[1:])

    return tuple(jax.tree.map(lambda values, chunk=chunk: part(values, chunk), whole) for chunk in range(CHUNKS))


@everywhere
def test_tables_when_vectors_travel_in_chunks_then_the_bits_of_those_that_travel_whole(
    nodes: int, chips: int, plan: str
) -> None:
    tables = tables_on(nodes, chips, plan)
    routed = tables.route(tables.to_devices(samples_of(0).jagged()))
    whole = tables.lookup(tables.init(), routed)
    pooled = tables.pool(tables.init(), routed)
    expected = chunks_of(whole, nodes * chips)
    for chunk in range(CHUNKS):
        found = tables.bring_home(pooled, routed, chunk=chunk, chunks=CHUNKS)
        jax.tree.map(np.testing.assert_array_equal, found, expected[chunk])

    gradients = gradients_like(whole, 1)
    once = tables.update(tables.init(), routed, gradients, step=1)
    sent = [
        tables.send_back(routed, part, chunk=chunk, chunks=CHUNKS)
        for chunk, part in enumerate(chunks_of(gradients, nodes * chips))
    ]
    in_parts = tables.update(tables.init(), routed, sent, step=1)
    jax.tree.map(np.testing.assert_array_equal, in_parts, once)


def test_lamb_on_columns_in_plain_jax_then_the_same_bits_as_on_one_device() -> None:
    # Sums over rows and the rule that takes them are one program for a whole row, and share products for columns.
    table = TableSpec(
        name="shop",
        num_rows=40,
        dim=64,
        optimizer="lamb",
        learning_rate=0.1,
        weight_decay=0.1,
        initializer=Initializer(kind="normal"),
    )
    plan = ShardingPlan(nodes=1, chips=2, placements=(column_wise(table, [1, 0]),))
    random = np.random.default_rng(0)
    ids = KeyedJagged.from_bags({"shops": random.integers(0, 40, (8, 10)).tolist()})
    rows = []
    for place in ({}, {"plan": plan, "mesh": make_mesh(1, 2)}):
        tables = ShardedTables([table], [FeatureSpec(name="shops", table="shop")], kernels="xla", **place)
        state, routed = tables.init(), tables.route(tables.to_devices(ids))
        embeddings = tables.lookup(state, routed)
        for step in range(1, UPDATES + 1):
            state = tables.update(state, routed, gradients_like(embeddings, step), step=step)
        rows.append(tables.read_rows(state, "shop", range(40)))
    np.testing.assert_array_equal(*rows)


USER = TableSpec(name="user", num_rows=50, dim=32)


def test_invalid_ids_of_a_table_in_column_slices_then_each_counted_once() -> None:
    table, feature = TableSpec(name="t", num_rows=10, dim=32), FeatureSpec(name="f", table="t", max_ids=2)
    plan = ShardingPlan(nodes=1, chips=2, placements=(column_wise(table, [1, 0]),))
    tables = ShardedTables([table], [feature], plan=plan, mesh=make_mesh(1, 2))
    for bags, invalid in (([[1, 10], [-1, 2]], 2), ([[1, 2, 3], [4]], 1)):
        assert tables.route(tables.to_devices(KeyedJagged.from_bags({"f": bags}), 3)).invalid == invalid


@pytest.mark.parametrize("returns", get_args(Returns))
def test_ids_outside_a_table_that_is_spread_then_without_effect(returns: Returns) -> None:
    table, feature = TableSpec(name="t", num_rows=10, dim=16), FeatureSpec(name="f", table="t", max_ids=3)
    plan = ShardingPlan(nodes=1, chips=2, placements=(row_wise(table, returns=returns),))
    spread = ShardedTables([table], [feature], plan=plan, mesh=make_mesh(1, 2))
    ids = KeyedJagged.from_bags({"f": [[1, 10, 9], [-1, 2], [2**31 - 1], [9, 11]]})
    found = []
    for tables in (ShardedTables([table], [feature]), spread):
        state = tables.init()
        routed = tables.route(tables.to_devices(ids))
        assert routed.invalid == 4
        embeddings = tables.lookup(state, routed)
        state = tables.update(state, routed, jax.tree.map(np.ones_like, embeddings), step=1)
        found.append((np.asarray(embeddings["f"]), tables.read_rows(state, "t", range(10))))
    for here, there in zip(*found, strict=True):
        np.testing.assert_allclose(there, here, rtol=TOLERANCE)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax 0.11 dies of arrays without elements")
@pytest.mark.parametrize(("capacity", "codec"), [(0, "float32"), (4, "float32"), (4, "int8"), (4, "float16")])
@pytest.mark.parametrize(
    ("nodes", "placement"),
    [
        (1, row_wise(USER, returns="partial_sums")),
        (2, row_wise(USER, returns="partial_sums")),
        (1, table_row_wise(USER, 0, returns="partial_sums")),
        (2, table_row_wise(USER, 1, returns="partial_sums")),
    ],
)
def test_a_batch_of_no_samples_then_no_vectors_and_every_row_stays(
    nodes: int, placement: Placement, capacity: int, codec: Codec
) -> None:
    features = [
        FeatureSpec(name="user_id", table="user"),
        FeatureSpec(name="history", table="user", pooling="none", max_ids=3),
    ]
    plan = ShardingPlan(nodes=nodes, chips=2, placements=(placement,))
    tables = ShardedTables(
        [USER], features, plan=plan, mesh=make_mesh(nodes, 2), forward_codec=codec, backward_codec=codec
    )
    no_samples = np.zeros((2, 0), np.int32)
    ids = KeyedJagged(values=np.zeros(capacity, np.int32), lengths=no_samples, features=("user_id", "history"))
    state = tables.init()
    before = tables.read_rows(state, "user", range(50))
    routed = tables.route(tables.to_devices(ids))
    embeddings = tables.lookup(state, routed)
    assert embeddings["user_id"].shape == (0, 32)
    assert embeddings["history"].shape == (0, 3, 32)
    after = tables.update(state, routed, embeddings, step=1)
    np.testing.assert_array_equal(tables.read_rows(after, "user", range(50)), before)
