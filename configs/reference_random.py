"""The random benchmark of the DLRM repository: no data, uniform ids.

    .venv/bin/python scripts/train.py reference_random --train.max_steps 20

8 tables of 1 million rows and dim 64, 100 ids a bag: 2 GB of tables. There is nothing to learn; it shows the speed.
"""

from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, EmbeddingConfig, TableConfig, TrainConfig
from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary
from dlrm_jax.model import ModelConfig


def reference_random() -> Config:
    """Random batches: 8 tables of a million rows, 100 ids a bag (the DLRM repository's benchmark)."""
    return Config(
        name="reference_random",
        workdir="runs/reference_random",
        data=DataConfig(path=None, batch_size=2048, eval_batch_size=2048),
        embedding=EmbeddingConfig(default=TableConfig(dim=64, optimizer="sgd", learning_rate=0.01)),
        model=ModelConfig(bottom_mlp=(512, 64), top_mlp=(1024, 1024, 1024, 1)),
        dense_optimizer=DenseOptimizerConfig(name="sgd", learning_rate=0.01),
        train=TrainConfig(epochs=1, log_every=10, checkpoint_every=None),
        stated=DatasetCard(
            name="reference_random",
            dense=tuple(DenseColumn(name=f"dense_{i}") for i in range(512)),
            sparse=tuple(
                SparseColumn(
                    name=f"sparse_{i}", num_rows=1_000_000, bag=True, max_pooling_factor=100, mean_pooling_factor=100.0
                )
                for i in range(8)
            ),
            splits={
                "train": SplitSummary(num_samples=2048 * 200, positive_rate=0.5),
                "validation": SplitSummary(num_samples=2048 * 5, positive_rate=0.5),
            },
        ),
    )
