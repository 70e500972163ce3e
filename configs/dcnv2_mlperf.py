"""Criteo Terabyte, multi-hot: DLRM-DCNv2 as in MLPerf Training.

    .venv/bin/python scripts/prepare.py criteo day_*.gz --max_rows 40000000 --multi_hot --out data/criteo_multi_hot
    .venv/bin/python scripts/train.py dcnv2_mlperf

The tables of criteo_terabyte_mlperf with 214 ids a sample, 3 cross layers of rank 512, element-wise Adagrad (so 208 GB
of tables and state). MLPerf's target is a test AUC of 0.80275 within one epoch (its figure; not measured here, where
neither log nor machine is at hand). MLPs begin as those of the DLRM reference, not as TorchRec's.
"""

from configs.stated import TERABYTE_ROWS, criteo_card
from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, EmbeddingConfig, TableConfig, TrainConfig
from dlrm_jax.data.multi_hot import POOLING_FACTORS
from dlrm_jax.model import ModelConfig


def dcnv2_mlperf() -> Config:
    """Criteo Terabyte, multi-hot: low-rank cross layers, Adagrad, batch 65536 (MLPerf DLRM-DCNv2)."""
    return Config(
        name="dcnv2_mlperf",
        workdir="runs/dcnv2_mlperf",
        data=DataConfig(path="data/criteo_multi_hot", batch_size=65536, eval_batch_size=65536, shuffle_window=2**20),
        embedding=EmbeddingConfig(default=TableConfig(dim=128, optimizer="adagrad", learning_rate=0.005)),
        model=ModelConfig(
            bottom_mlp=(512, 256, 128),
            top_mlp=(1024, 1024, 512, 256, 1),
            interaction="dcnv2",
            cross_layers=3,
            cross_rank=512,
        ),
        # MLPerf adds 1e-10 to the root; optax adds eps under it.
        dense_optimizer=DenseOptimizerConfig(name="adagrad", learning_rate=0.005, eps=1e-20),
        train=TrainConfig(epochs=1, eval_every=3200, log_every=100, checkpoint_every=3200, best_by="auc"),
        stated=criteo_card(
            "criteo_multi_hot",
            TERABYTE_ROWS,
            splits={"train": 4_195_197_692, "validation": 89_137_319, "test": 89_137_318},
            pooling_factors=POOLING_FACTORS,
        ),
    )
