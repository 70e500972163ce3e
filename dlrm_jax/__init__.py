"""Training of deep learning recommendation models on JAX: the model, its data, its training.

Names are imported when first used, so that a program that needs only the step, or only the data, does not import the
libraries of the other.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlrm_jax.config import (
        Config,
        DataConfig,
        DenseOptimizerConfig,
        EmbeddingConfig,
        ExchangeConfig,
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
    "ExchangeConfig",
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

_MODULES = {
    "config": (
        "Config",
        "DataConfig",
        "DenseOptimizerConfig",
        "EmbeddingConfig",
        "ExchangeConfig",
        "TableConfig",
        "TrainConfig",
    ),
    "data.batch": ("Batch",),
    "data.card": ("DatasetCard", "DenseColumn", "SparseColumn", "SplitSummary", "read_card", "write_card"),
    "loop": ("Result", "train"),
    "metrics": ("Metrics",),
    "model": ("DLRM", "ModelConfig"),
    "predict": ("Predictor",),
    "recommender": ("Recommender",),
    "schedules": ("ScheduleConfig",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"dlrm_jax.{module}"), name)
    raise AttributeError(f"module 'dlrm_jax' has no attribute {name!r}")
