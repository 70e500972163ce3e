"""KuaiRand-Pure: real impressions of short videos, predicting clicks.

.venv/bin/python scripts/prepare.py kuairand FOLDER_OF_CSV_FILES --out data/kuairand
.venv/bin/python scripts/train.py kuairand --data.path data/kuairand --workdir runs/kuairand
.venv/bin/python scripts/eval.py runs/kuairand --split test
"""

from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, EmbeddingConfig, TableConfig, TrainConfig
from dlrm_jax.model import ModelConfig
from sharding import Initializer


def kuairand() -> Config:
    """KuaiRand-Pure: clicks on short videos, with each user's history."""
    return Config(
        name="kuairand",
        workdir="runs/kuairand",
        data=DataConfig(path="data/kuairand", batch_size=512),
        embedding=EmbeddingConfig(
            default=TableConfig(
                dim=16, optimizer="adagrad", learning_rate=0.01, initializer=Initializer(kind="uniform", scale=0.01)
            ),
            default_pooling="mean",
            shared={
                "video_id": ("video_id", "recent_clicked_videos", "recent_skipped_videos"),
                "author_id": ("author_id", "recent_clicked_authors"),
                "tag": ("tag", "recent_clicked_tags"),
            },
        ),
        model=ModelConfig(bottom_mlp=(64, 16), top_mlp=(256, 128, 1)),
        dense_optimizer=DenseOptimizerConfig(name="adagrad", learning_rate=0.01),
        train=TrainConfig(epochs=1, eval_every=50, log_every=50),
    )
