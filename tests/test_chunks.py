"""Batches in chunks: the same numbers travel, the tables keep their bits, and the number of chunks fits the machine."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import placement_cases as cases
import pytest
import tiny

from dlrm_jax.config import MeshConfig
from dlrm_jax.recommender import Recommender
from sharding import Embeddings, FeatureSpec, InputError, ShardedTables, TableSpec
from sharding.chunks import best_chunks
from sharding.cost import Step
from sharding.cost_settings import DenseLoad
from sharding.layout import make_layout
from sharding.load import loads_by_feature
from sharding.mesh import make_mesh
from sharding.plan import ShardingPlan, table_wise
from sharding.topology import preset

NODES, CHIPS = 2, 4
CHUNKS = 2


def tables_on(plan: str, nodes: int, chips: int) -> ShardedTables:
    return ShardedTables(
        cases.TABLES, cases.FEATURES, plan=cases.plan_of(nodes, chips, plan), mesh=make_mesh(nodes, chips), seed=3
    )


def chunks_of(whole: Embeddings, devices: int) -> tuple[Embeddings, ...]:
    """Of each device's samples the first half, then the second."""

    def part(values: jax.Array, chunk: int) -> np.ndarray:
        by_device = np.asarray(values).reshape(devices, CHUNKS, -1, *values.shape[1:])
        return by_device[:, chunk].reshape(-1, *values.shape[1:])

    return tuple(jax.tree.map(lambda values, chunk=chunk: part(values, chunk), whole) for chunk in range(CHUNKS))


@pytest.mark.parametrize(
    ("plan", "nodes", "chips"),
    [("mixed", 2, 4), pytest.param("mixed", 4, 2, marks=pytest.mark.slow)]
    + [pytest.param(plan, 2, 4, marks=pytest.mark.slow) for plan in cases.PLANS if plan != "mixed"],
)
def test_tables_when_vectors_travel_in_chunks_then_the_bits_of_those_that_travel_whole(plan, nodes, chips):
    tables = tables_on(plan, nodes, chips)
    devices = nodes * chips
    routed = tables.route(tables.to_devices(cases.samples_of(0).jagged()))
    whole = tables.lookup(tables.init(), routed)
    pooled = tables.pool(tables.init(), routed)
    expected = chunks_of(whole, devices)
    for chunk in range(CHUNKS):
        found = tables.bring_home(pooled, routed, chunk=chunk, chunks=CHUNKS)
        jax.tree.map(np.testing.assert_array_equal, found, expected[chunk])

    random = np.random.default_rng(1)
    gradients = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape).astype(np.float32)), whole)
    once = tables.update(tables.init(), routed, gradients, step=1)
    sent = [
        tables.send_back(routed, part, chunk=chunk, chunks=CHUNKS)
        for chunk, part in enumerate(chunks_of(gradients, devices))
    ]
    in_parts = tables.update(tables.init(), routed, sent, step=1)
    jax.tree.map(np.testing.assert_array_equal, in_parts, once)


@pytest.mark.parametrize(("chunk", "chunks"), [(0, 3), (2, 2), (0, 0)])
def test_a_chunk_that_does_not_exist_then_an_error_says_so(chunk, chunks):
    tables = tables_on("table_wise", NODES, CHIPS)
    routed = jax.eval_shape(tables.route, tables.to_devices(cases.samples_of(0).jagged()))
    pooled = jax.eval_shape(tables.pool, tables.abstract_state(), routed)
    with pytest.raises(InputError, match=rf"there is no chunk {chunk} of {chunks} of the 2 samples of a device"):
        tables.bring_home(pooled, routed, chunk=chunk, chunks=chunks)


def chosen(*, batch_size: int, flops: float, nodes: int = 2, chips: int = 8) -> int:
    """Chunks for two tables of 128 columns on H200s."""
    tables = [TableSpec(name=name, num_rows=1000, dim=128) for name in ("user", "item")]
    features = [FeatureSpec(name=table.name, table=table.name) for table in tables]
    placements = [table_wise(table, 0) for table in tables]
    step = Step(
        topology=preset("h200", nodes, chips),
        batch_size=batch_size,
        loads=loads_by_feature(features, ()),
        dense=DenseLoad(parameters=1_000_000, flops_per_sample=flops),
    )
    plan = ShardingPlan(nodes=nodes, chips=chips, placements=tuple(placements))
    return best_chunks(make_layout(tables, features, plan), features, step)


def test_best_chunks_then_more_the_longer_exchanges_and_dense_part_are():
    numbers = [chosen(batch_size=size, flops=1e8) for size in (2**10, 2**16, 2**20)]
    assert numbers[0] == 1
    assert numbers == sorted(numbers)
    assert numbers[-1] > numbers[1]


def test_best_chunks_when_nothing_hides_the_exchanges_or_nothing_travels_then_one():
    assert chosen(batch_size=2**20, flops=0.0) == 1
    assert chosen(batch_size=2**20, flops=1e8, nodes=1, chips=1) == 1


def test_best_chunks_when_samples_are_few_or_odd_then_they_are_not_cut_small():
    assert chosen(batch_size=16 * 511, flops=1e12) == 1
    assert chosen(batch_size=16 * 3 * 256, flops=1e12) == 2
    assert chosen(batch_size=16 * 4 * 256, flops=1e12) <= 4


@pytest.mark.parametrize(("given", "expected"), [(None, 1), (4, 4)])
def test_chunks_of_a_host_then_one_unless_the_config_says_more(given, expected):
    config = tiny.with_train(tiny.config(None, Path("unused")), chunks=given)
    recommender = Recommender(dataclasses.replace(config, mesh=MeshConfig(chips=2)), tiny.card())
    assert recommender.chunks == expected


def test_chunks_that_do_not_divide_then_the_error_names_them():
    config = tiny.with_train(tiny.config(None, Path("unused")), chunks=3)
    with pytest.raises(InputError, match=r"train\.chunks is 3, which does not divide the 64 samples of a device"):
        _ = Recommender(config, tiny.card()).chunks
