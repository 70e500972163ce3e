"""Batches in chunks: their number fits the machine. That the same numbers travel is in test_placements.py."""

import dataclasses
from pathlib import Path

import jax
import placement_cases as cases
import pytest
import tiny

from dlrm_jax.config import MeshConfig
from dlrm_jax.recommender import Recommender
from sharding import FeatureSpec, InputError, ShardedTables, TableSpec
from sharding.chunks import best_chunks
from sharding.cost import Step
from sharding.cost_settings import DenseLoad
from sharding.layout import make_layout
from sharding.load import loads_by_feature
from sharding.mesh import make_mesh
from sharding.plan import ShardingPlan, table_wise
from sharding.topology import preset

NODES, CHIPS = 2, 4


@pytest.mark.parametrize(("chunk", "chunks"), [(0, 3), (2, 2), (0, 0)])
def test_a_chunk_that_does_not_exist_then_an_error_says_so(chunk, chunks):
    plan = cases.plan_of(NODES, CHIPS, "table_wise")
    tables = ShardedTables(cases.TABLES, cases.FEATURES, plan=plan, mesh=make_mesh(NODES, CHIPS))
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
