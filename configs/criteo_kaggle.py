"""Criteo Kaggle display advertising: the model of the DLRM reference.

    .venv/bin/python scripts/prepare.py criteo train.txt --out data/criteo_kaggle
    .venv/bin/python scripts/train.py criteo_kaggle
    .venv/bin/python scripts/eval.py runs/criteo_kaggle --split test

Expect 540 million parameters with every id kept (2.2 GB of tables) and, in one epoch, the reference's accuracy of about
78.9% (its figure, on its own split; not measured here, where the log is not at hand).
"""

from configs.stated import KAGGLE_ROWS, criteo_card
from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, EmbeddingConfig, TableConfig, TrainConfig
from dlrm_jax.model import ModelConfig


def criteo_kaggle() -> Config:
    """Criteo Kaggle: 26 tables of dim 16, SGD (Naumov et al. 2019)."""
    return Config(
        name="criteo_kaggle",
        workdir="runs/criteo_kaggle",
        data=DataConfig(path="data/criteo_kaggle", batch_size=128, eval_batch_size=16384),
        embedding=EmbeddingConfig(default=TableConfig(dim=16, optimizer="sgd", learning_rate=0.1)),
        model=ModelConfig(bottom_mlp=(512, 256, 64, 16), top_mlp=(512, 256, 1)),
        dense_optimizer=DenseOptimizerConfig(name="sgd", learning_rate=0.1),
        train=TrainConfig(epochs=1, eval_every=50_000, log_every=1000, checkpoint_every=50_000),
        stated=criteo_card(
            "criteo_kaggle",
            KAGGLE_ROWS,
            splits={"train": 39_291_958, "validation": 3_274_330, "test": 3_274_329},
        ),
    )
