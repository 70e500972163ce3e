"""Quickstart: a small DLRM on synthetic clicks whose best attainable AUC is known.

    make train

or, step by step,

    .venv/bin/python scripts/prepare.py synthetic --out data/synthetic
    .venv/bin/python scripts/train.py quickstart
    .venv/bin/python scripts/eval.py runs/quickstart --split test

Expect less than 3 minutes of training on 2 cores, and a test AUC within 0.005 of the attainable one.
"""

from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, EmbeddingConfig, TableConfig, TrainConfig
from dlrm_jax.model import ModelConfig
from dlrm_jax.schedules import ScheduleConfig
from sharding import Initializer


def quickstart() -> Config:
    """A small DLRM on synthetic clicks."""
    return Config(
        name="quickstart",
        workdir="runs/quickstart",
        data=DataConfig(path="data/synthetic", batch_size=1024),
        embedding=EmbeddingConfig(
            default=TableConfig(
                dim=16, optimizer="adagrad", learning_rate=0.05, initializer=Initializer(kind="uniform", scale=0.01)
            ),
        ),
        model=ModelConfig(bottom_mlp=(64, 16), top_mlp=(64, 32, 1)),
        dense_optimizer=DenseOptimizerConfig(name="adagrad", learning_rate=0.05),
        # One epoch of 2 million samples is 1,954 steps.
        schedule=ScheduleConfig(decay_start_step=1000, decay_steps=954),
        train=TrainConfig(epochs=1, eval_every=400, log_every=100, checkpoint_every=400),
    )
