"""Training of deep learning recommendation models on JAX: the model, its data, its training."""

from dlrm_jax.config import (
    Config,
    DataConfig,
    DenseOptimizerConfig,
    EmbeddingConfig,
    TableConfig,
    TrainConfig,
)
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary, read_card, write_card
from dlrm_jax.loop import Result, train
from dlrm_jax.metrics import Metrics
from dlrm_jax.model import DLRM, ModelConfig
from dlrm_jax.predict import Predictor
from dlrm_jax.recommender import Recommender
from dlrm_jax.schedules import ScheduleConfig

__all__ = [
    "DLRM",
    "Batch",
    "Config",
    "DataConfig",
    "DatasetCard",
    "DenseColumn",
    "DenseOptimizerConfig",
    "EmbeddingConfig",
    "Metrics",
    "ModelConfig",
    "Predictor",
    "Recommender",
    "Result",
    "ScheduleConfig",
    "SparseColumn",
    "SplitSummary",
    "TableConfig",
    "TrainConfig",
    "read_card",
    "train",
    "write_card",
]
