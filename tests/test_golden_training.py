"""Twenty steps of facebookresearch/dlrm reproduced by the program itself: config, tables, routing, update rule."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, EmbeddingConfig, TableConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary
from dlrm_jax.metrics import BinnedMetrics
from dlrm_jax.model import ModelConfig
from dlrm_jax.recommender import Recommender
from dlrm_jax.train_state import init_train_state, make_dense_optimizer
from dlrm_jax.train_step import make_predict_step, make_train_step
from sharding import KeyedJagged


def make_recommender(figures, interaction):
    learning_rate = float(figures["lr"])
    batch_size, num_dense = figures["step0_dense"].shape
    card = DatasetCard(
        name="golden",
        dense=tuple(DenseColumn(name=f"dense_{i}") for i in range(num_dense)),
        sparse=tuple(
            SparseColumn(name=f"table_{t}", num_rows=int(rows), bag=True, max_pooling_factor=100)
            for t, rows in enumerate(figures["table_sizes"])
        ),
        splits={"train": SplitSummary(num_samples=batch_size, positive_rate=0.5)},
    )
    config = Config(
        name="golden",
        data=DataConfig(batch_size=batch_size, virtual_shards=batch_size),
        embedding=EmbeddingConfig(
            default=TableConfig(dim=int(figures["dim"]), optimizer="sgd", learning_rate=learning_rate)
        ),
        model=ModelConfig(bottom_mlp=(16, 8), top_mlp=(16, 1), interaction=interaction),
        dense_optimizer=DenseOptimizerConfig(name="sgd", learning_rate=learning_rate),
        stated=card,
    )
    return Recommender(config, card)


def initial_state(recommender, optimizer, figures):
    state = init_train_state(recommender, optimizer)
    tables = state.tables
    for table in recommender.tables.tables:
        tables = recommender.tables.write_rows(tables, table.name, 0, figures[f"init_{table.name}"])
    params = state.dense_params
    layers = {
        name: {
            "layers": {
                index: {part: figures[f"init_{name}_{part}_{index}"] for part in ("kernel", "bias")}
                for index in range(2)
            }
        }
        for name in ("bottom", "top")
    }
    nnx.replace_by_pure_dict(params, jax.device_put(layers))
    return dataclasses.replace(state, tables=tables, dense_params=params)


def make_batch(recommender, figures, step, capacity):
    label, values = figures[f"step{step}_label"], figures[f"step{step}_values"].astype(np.int32)
    batch = Batch(
        dense=figures[f"step{step}_dense"],
        ids=KeyedJagged(
            values=np.pad(values, (0, capacity - len(values))),
            lengths=figures[f"step{step}_lengths"].astype(np.int32),
            features=recommender.features,
        ),
        label=label,
        weight=np.ones_like(label),
    )
    return recommender.to_devices(batch)


@pytest.mark.parametrize("interaction", ["dot", pytest.param("cat", marks=pytest.mark.slow)])
def test_training_when_compared_with_the_dlrm_reference_then_probabilities_losses_tables_and_mlps_agree(
    shared, interaction
):
    figures = dict(np.load(shared / "golden" / f"dlrm_{interaction}_sgd.npz"))
    recommender = make_recommender(figures, interaction)
    config = recommender.config
    optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
    step, predict = make_train_step(recommender, optimizer), make_predict_step(recommender)
    state = initial_state(recommender, optimizer, figures)
    num_steps = len(figures["losses"])
    capacity = max(len(figures[f"step{s}_values"]) for s in range(num_steps))

    batches = [make_batch(recommender, figures, s, capacity) for s in range(num_steps)]
    first_logits = predict(state.dense_params, state.tables, batches[0])
    losses = []
    for batch in batches:
        state, metrics, report = step(state, BinnedMetrics.zeros(), batch)
        assert int(report.fault) == 0
        losses.append(metrics.compute().log_loss)

    # float32 in both, with sums in another order: about 1e-7 a step, of parameters of order 1, over 20 steps.
    close = {"rtol": 0, "atol": 2e-6}
    np.testing.assert_allclose(jax.nn.sigmoid(first_logits.logits), figures["step0_prob"], **close)
    np.testing.assert_allclose(losses, figures["losses"], **close)
    finals = {
        f"final_{table.name}": recommender.tables.read_rows(state.tables, table.name, np.arange(table.num_rows))
        for table in recommender.tables.tables
    }
    for name, mlp in nnx.to_pure_dict(state.dense_params).items():
        for index, layer in mlp.get("layers", {}).items():
            finals |= {f"final_{name}_{part}_{index}": value for part, value in layer.items()}
    assert set(finals) == {name for name in figures if name.startswith("final_")}
    for name, value in finals.items():
        np.testing.assert_allclose(value, figures[name], err_msg=name, **close)
