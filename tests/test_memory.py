"""Nothing that runs on tables copies one: checked in the compiled programs, of tables that are never allocated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.quickstart import quickstart
from dlrm_jax.config import DataConfig, EmbeddingConfig, TableConfig, make_specs
from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary
from dlrm_jax.target_step import device_bytes, lower_train_step
from sharding import FeatureSpec, Initializer, KeyedJagged, ShardedTables, TableSpec
from sharding.mesh import make_mesh
from sharding.plan import one_device_plan

BATCH_SIZE, CAPACITY = 64, 1024
# 3 GB of weights beside 64 samples. What a call needs for its ids alone is far below this.
SMALL = 16 * 2**20
TABLES = (
    TableSpec(name="narrow", num_rows=20_000_000, dim=16, optimizer="rowwise_adagrad"),
    TableSpec(name="same_store", num_rows=3_000_000, dim=60, optimizer="rowwise_adagrad"),
    TableSpec(name="moments", num_rows=1_000_000, dim=64, optimizer="lamb", initializer=Initializer(kind="normal")),
    TableSpec(name="wide", num_rows=300_000, dim=384, optimizer="partial_rowwise_adam"),
    TableSpec(name="half", num_rows=4_000_000, dim=32, dtype="bfloat16", rounding="stochastic", optimizer="adam"),
    TableSpec(name="fixed", num_rows=2_000_000, dim=64, frozen=True),
)
TABLES_OF_3_GB = ShardedTables(TABLES, [FeatureSpec(name=table.name, table=table.name) for table in TABLES])


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


STATE = TABLES_OF_3_GB.abstract_state()
IDS = abstract(
    KeyedJagged(
        values=np.zeros(CAPACITY, np.int32),
        lengths=np.zeros((len(TABLES), BATCH_SIZE), np.int32),
        weights=np.zeros(CAPACITY, np.float32),
        features=TABLES_OF_3_GB.feature_order,
    )
)
ROUTED = jax.eval_shape(TABLES_OF_3_GB.route, IDS)
EMBEDDINGS = jax.eval_shape(TABLES_OF_3_GB.lookup, STATE, ROUTED)
BYTES = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(STATE))


def update(state, routed, gradients, step, enabled):
    return TABLES_OF_3_GB.update(state, routed, gradients, step=step, enabled=enabled)


def test_an_update_of_a_donated_state_then_in_place() -> None:
    flag = jax.ShapeDtypeStruct((), jnp.bool_)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(update, donate_argnums=0).lower(STATE, ROUTED, EMBEDDINGS, step, flag).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= BYTES > 3e9
    assert memory.temp_size_in_bytes < SMALL


def test_a_lookup_then_makes_no_copy_of_a_table() -> None:
    memory = jax.jit(TABLES_OF_3_GB.lookup).lower(STATE, ROUTED).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < SMALL


def test_initial_rows_then_made_in_place() -> None:
    memory = jax.jit(TABLES_OF_3_GB.init).lower().compile().memory_analysis()
    assert memory.output_size_in_bytes >= BYTES
    assert memory.temp_size_in_bytes < SMALL


@pytest.mark.parametrize("pipeline", ["route", "stale"])
def test_a_step_that_begins_the_next_one_then_makes_no_copy_of_a_table(pipeline) -> None:
    # Not even where a stale lookup and the update want the same rows.
    card = DatasetCard(
        name="stated",
        dense=(DenseColumn(name="price"),),
        sparse=(SparseColumn(name="item", num_rows=10_000_000),),
        splits={"train": SplitSummary(num_samples=1000, positive_rate=0.5)},
    )
    config = quickstart()
    config = dataclasses.replace(
        config,
        data=DataConfig(batch_size=BATCH_SIZE),
        embedding=EmbeddingConfig(default=TableConfig(dim=64)),
        model=dataclasses.replace(config.model, bottom_mlp=(64,)),
        train=dataclasses.replace(config.train, pipeline=pipeline),
    )
    tables, _ = make_specs(config.embedding, card)
    with jax.numpy_dtype_promotion("standard"):
        compiled = lower_train_step(config, card, one_device_plan(tables), make_mesh()).compile()
    memory = device_bytes(compiled)
    assert memory.reused >= 10_000_000 * 64 * 4
    assert memory.temporary + memory.outputs - memory.reused < SMALL
