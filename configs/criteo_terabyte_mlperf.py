"""Criteo Terabyte: DLRM as in MLPerf Training v1.

    .venv/bin/python scripts/prepare.py criteo day_*.gz --max_rows 40000000 --out data/criteo_terabyte
    .venv/bin/python scripts/train.py criteo_terabyte_mlperf

26.1 billion parameters: 104 GB of float32 tables, so a device or mesh with more memory than that. MLPerf's target is a
test AUC of 0.8025 within one epoch (its figure; not measured here, where neither log nor machine is at hand). A smaller
trial: --max_rows 500000 at preparation.
"""

from configs.stated import TERABYTE_ROWS, criteo_card
from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, EmbeddingConfig, TableConfig, TrainConfig
from dlrm_jax.model import ModelConfig


def criteo_terabyte_mlperf() -> Config:
    """Criteo Terabyte: 26 tables of dim 128, at most 40 million rows each, SGD (MLPerf Training v1)."""
    return Config(
        name="criteo_terabyte_mlperf",
        workdir="runs/criteo_terabyte_mlperf",
        data=DataConfig(path="data/criteo_terabyte", batch_size=2048, eval_batch_size=65536),
        embedding=EmbeddingConfig(default=TableConfig(dim=128, optimizer="sgd", learning_rate=1.0)),
        model=ModelConfig(bottom_mlp=(512, 256, 128), top_mlp=(1024, 1024, 512, 256, 1)),
        dense_optimizer=DenseOptimizerConfig(name="sgd", learning_rate=1.0),
        train=TrainConfig(epochs=1, eval_every=102_400, log_every=1000, checkpoint_every=50_000, best_by="auc"),
        stated=criteo_card(
            "criteo_terabyte",
            TERABYTE_ROWS,
            splits={"train": 4_195_197_692, "validation": 89_137_319, "test": 89_137_318},
        ),
    )
