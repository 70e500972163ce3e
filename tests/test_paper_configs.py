"""The paper's models: their configs have the sizes that are known of them."""

from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx

from configs import CONFIGS
from dlrm_jax.config import make_specs
from dlrm_jax.model import DLRM
from sharding.tables import check_specs

# Parameters, operations a sample, tables, mean dim, mean pooling factor, MLP layers, their width.
MODELS = {
    "paper_a": (793e9, 638e6, 1000, 93, 15, 20, 3375),
    "paper_i": (332e9, 60e6, 400, 92, 70, 43, 682),
    "paper_f": (12e12, 5e6, 50, 256, 20, 7, 490),
}


@pytest.mark.parametrize("name", MODELS)
def test_paper_model_has_the_totals_and_means_of_its_tables(name):
    parameters, _, num_tables, dim, pooling_factor, _, _ = MODELS[name]
    config = CONFIGS[name]()
    assert config.stated is not None
    tables, features = make_specs(config.embedding, config.stated)
    check_specs(tables, features)
    assert len(tables) == len(features) == num_tables
    assert sum(table.num_rows * table.dim for table in tables) == pytest.approx(parameters, rel=0.01)
    assert np.mean([table.dim for table in tables]) == pytest.approx(dim, rel=0.01)
    factors = [column.mean_pooling_factor for column in config.stated.sparse]
    assert np.mean(factors) == pytest.approx(pooling_factor, rel=0.01)
    assert min(factors) >= 1
    assert all(column.max_pooling_factor >= column.mean_pooling_factor for column in config.stated.sparse)
    assert {(table.dtype, table.optimizer) for table in tables} == {("float16", "rowwise_adagrad")}


@pytest.mark.parametrize("name", MODELS)
def test_paper_model_has_its_layers(name):
    *_, layers, width = MODELS[name]
    model = CONFIGS[name]().model
    assert model.bottom_mlp + model.top_mlp[:-1] == (width,) * layers


@pytest.mark.parametrize("name", ["paper_a", "paper_i"])
def test_paper_model_when_tables_are_sorted_then_few_hold_most_rows_and_32_bits_name_each(name):
    config = CONFIGS[name]()
    assert config.stated is not None
    rows = sorted((column.num_rows for column in config.stated.sparse), reverse=True)
    assert rows[0] < 2**31
    assert sum(rows[: len(rows) // 10]) > sum(rows) / 2


def test_paper_a_has_dims_from_4_to_384():
    dims = {table.dim for table in CONFIGS["paper_a"]().embedding.tables.values()}
    assert (min(dims), max(dims)) == (4, 384)


@pytest.mark.parametrize("name", MODELS)
def test_paper_model_when_built_twice_then_it_is_the_same(name):
    assert CONFIGS[name]() == CONFIGS[name]()


@pytest.mark.parametrize("name", MODELS)
def test_paper_model_multiplies_as_often_as_the_paper_says(name):
    config = CONFIGS[name]()
    assert config.stated is not None
    tables, _ = make_specs(config.embedding, config.stated)
    shapes = sorted(Counter(table.dim for table in tables).items())

    def dense_part() -> DLRM:
        return DLRM(
            config.model,
            num_dense=len(config.stated.dense) if config.stated else 0,
            embedding_shapes=[(count, dim) for dim, count in shapes],
            rngs=nnx.Rngs(params=0),
        )

    parameters = nnx.split(nnx.eval_shape(dense_part))[1]
    # Every parameter but the few biases is multiplied and added once a sample.
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert 2 * count == pytest.approx(MODELS[name][1], rel=0.02)
