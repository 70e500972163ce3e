"""What error feedback owes: part of the state and of its checkpoints, also on another mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dlrm_jax.checkpoint import Checkpointer, Progress
from dlrm_jax.config import ExchangeConfig, MeshConfig
from dlrm_jax.recommender import Recommender
from dlrm_jax.train_state import abstract_train_state, init_train_state, make_dense_optimizer
from sharding import InputError


def config_on(tmp_path, chips: int):
    config = tiny.config(None, tmp_path)
    exchange = ExchangeConfig(all_reduce="bfloat16_feedback")
    return dataclasses.replace(config, exchange=exchange, mesh=MeshConfig(chips=chips), stated=tiny.card())


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of two devices that owe something."""
    config = config_on(tmp_path, 2)
    recommender = Recommender(config, tiny.card())
    optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
    state = init_train_state(recommender, optimizer)
    assert state.residual is not None
    owed = jax.random.normal(jax.random.key(0), state.residual.shape)
    state = dataclasses.replace(state, residual=jax.device_put(owed, state.residual.sharding))
    with Checkpointer(tmp_path, recommender.tables) as checkpointer:
        checkpointer.save(state, Progress())
    return state


def restored(tmp_path, chips: int):
    config = config_on(tmp_path, chips)
    recommender = Recommender(config, tiny.card())
    optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
    with Checkpointer(tmp_path, recommender.tables, read_only=True) as checkpointer:
        return checkpointer.restore(0, abstract_train_state(recommender, optimizer))


def test_residual_when_restored_on_the_same_mesh_then_the_same_bits(saved, tmp_path):
    tiny.assert_identical(restored(tmp_path, 2), saved)


@pytest.mark.parametrize("chips", [1, 4])
def test_residual_when_restored_on_another_mesh_then_all_devices_together_owe_the_same(saved, tmp_path, chips):
    found = restored(tmp_path, chips)
    assert found.residual is not None
    assert saved.residual is not None
    assert found.residual.shape == (chips, saved.residual.shape[1])
    np.testing.assert_allclose(jnp.sum(found.residual, axis=0), jnp.sum(saved.residual, axis=0), atol=1e-6)


def test_checkpoint_when_another_model_owes_then_the_error_names_the_residual(saved, tmp_path):
    config = config_on(tmp_path, 2)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, top_mlp=(16, 1)))
    recommender = Recommender(wider, tiny.card())
    optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
    with (
        Checkpointer(tmp_path, recommender.tables, read_only=True) as checkpointer,
        pytest.raises(InputError, match="use the config that it was trained with"),
    ):
        checkpointer.restore(0, abstract_train_state(recommender, optimizer))
