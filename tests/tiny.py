"""A dataset and a model so small that a whole training takes seconds, shared by the tests of training."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
from rich.console import Console

from dlrm_jax.checkpoint import Checkpointer
from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, EmbeddingConfig, TableConfig, TrainConfig
from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary, write_card
from dlrm_jax.loop import Result, train
from dlrm_jax.metrics import Metrics
from dlrm_jax.model import ModelConfig
from dlrm_jax.recommender import Recommender
from dlrm_jax.report import logged_metrics
from dlrm_jax.schedules import ScheduleConfig
from dlrm_jax.sources import card_of
from dlrm_jax.train_state import TrainState, abstract_train_state, make_dense_optimizer
from dlrm_jax.workdir import Workdir

BATCH_SIZE = 64
NUM_SAMPLES = {"train": 1200, "validation": 150, "test": 101}
STEPS_PER_EPOCH = 19
USERS, ITEMS, TAGS = 40, 100, 60
MAX_TAGS = 30


def samples(num_samples: int, seed: int) -> pl.DataFrame:
    """Clicks that depend on all features. In the second half bags are so long that some batches need more room."""
    random = np.random.default_rng(seed)
    dense = random.normal(size=(num_samples, 2)).astype(np.float32)
    user, item = random.integers(USERS, size=num_samples), random.integers(ITEMS, size=num_samples)
    short, long = random.integers(0, 7, size=num_samples), random.integers(20, MAX_TAGS + 1, size=num_samples)
    lengths = np.where(np.arange(num_samples) < num_samples // 2, short, long)
    tags = [random.integers(TAGS, size=length).tolist() for length in lengths]
    logit = dense[:, 0] + (user % 5 - 2) + (item % 3 - 1) + np.array([sum(bag) % 3 - 1 for bag in tags])
    return pl.DataFrame(
        {
            "label": (random.random(num_samples) < 1 / (1 + np.exp(-logit))).astype(np.float32),
            "weight": random.choice([0.0, 0.5, 1.0, 2.0], size=num_samples).astype(np.float32),
            "age": dense[:, 0],
            "price": dense[:, 1],
            "user": pl.Series(user, dtype=pl.Int64),
            "item": pl.Series(item, dtype=pl.Int64),
            "tags": pl.Series(tags, dtype=pl.List(pl.Int64)),
        }
    )


def card(**changes: Any) -> DatasetCard:
    """The card of `samples`."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "dense": (DenseColumn(name="age"), DenseColumn(name="price", mean=0.5, std=2.0)),
        "sparse": (
            SparseColumn(name="user", num_rows=USERS),
            SparseColumn(name="item", num_rows=ITEMS),
            SparseColumn(name="tags", num_rows=TAGS, bag=True, max_pooling_factor=MAX_TAGS, mean_pooling_factor=3.0),
        ),
        "splits": {name: SplitSummary(num_samples=count, positive_rate=0.5) for name, count in NUM_SAMPLES.items()},
    }
    return DatasetCard(**fields | changes)


def write_dataset(
    folder: Path, *, change: Callable[[pl.DataFrame], pl.DataFrame] = lambda table: table, **changes: Any
) -> Path:
    """Writes the splits, in small row groups, and the card.

    Args:
        folder: Where.
        change: What to do to the training split first.
        **changes: Fields of the card that differ.
    """
    for seed, (split, count) in enumerate(NUM_SAMPLES.items()):
        (folder / split).mkdir(parents=True)
        table = samples(count, seed)
        table = change(table) if split == "train" else table
        table.write_parquet(folder / split / "part-00000.parquet", row_group_size=50)
    write_card(card(**changes), folder)
    return folder


def config(data: Path | None, workdir: Path, **train_settings: Any) -> Config:
    """Three tables of three rules, one of them in bfloat16 with stochastic rounding; two epochs.

    Args:
        data: Folder of the dataset.
        workdir: Folder of the run.
        **train_settings: Fields of `TrainConfig` that differ.
    """
    settings: dict[str, Any] = {
        "epochs": 2,
        "eval_every": 8,
        "log_every": 5,
        "checkpoint_every": 8,
    }
    return Config(
        name="tiny",
        workdir=str(workdir),
        data=DataConfig(
            path=None if data is None else str(data),
            batch_size=BATCH_SIZE,
            eval_batch_size=BATCH_SIZE,
            virtual_shards=4,
            shuffle_window=256,
        ),
        embedding=EmbeddingConfig(
            default=TableConfig(dim=8, optimizer="rowwise_adagrad", learning_rate=0.05),
            tables={
                "item": TableConfig(dim=8, optimizer="adam", learning_rate=0.01),
                "tags": TableConfig(
                    dim=8, optimizer="adagrad", learning_rate=0.05, dtype="bfloat16", rounding="stochastic"
                ),
            },
            pooling={"tags": "mean"},
        ),
        model=ModelConfig(bottom_mlp=(8,), top_mlp=(8, 1)),
        dense_optimizer=DenseOptimizerConfig(name="adam", learning_rate=0.01, clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=6),
        train=TrainConfig(**settings | train_settings),
    )


def train_quietly(config: Config) -> Result:
    """Trains without a word."""
    # optax's Adam raises a float to an integer power, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        return train(config, console=Console(quiet=True))


def restore(config: Config, step: int | None = None) -> TrainState:
    """The state of a checkpoint of a run; the latest unless a step is given."""
    return restored(config, step)[1]


def restored(config: Config, step: int | None = None) -> tuple[Recommender, TrainState]:
    """The model of a run, and the state of a checkpoint; of the latest unless a step is given."""
    recommender = Recommender(config, card_of(config))
    optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
    with Checkpointer(Path(config.workdir), recommender.tables, read_only=True) as checkpointer:
        wanted = checkpointer.steps()[-1] if step is None else step
        return recommender, checkpointer.restore(wanted, abstract_train_state(recommender, optimizer))


def leaves(state: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Each leaf of a state, by the name of its path."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        yield jax.tree_util.keystr(path), np.array(leaf)


def assert_identical(left: Any, right: Any) -> None:
    """All leaves are equal bit for bit: also where a number is not one, or is a zero with a sign."""
    for (name, one), (_, other) in zip(leaves(left), leaves(right), strict=True):
        assert one.shape == other.shape, name
        assert one.dtype == other.dtype, name
        assert one.tobytes() == other.tobytes(), f"{name}: {np.count_nonzero(one != other)} of {one.size} differ"


def with_train(config: Config, **changes: Any) -> Config:
    """The config with other settings of `train`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def evaluations(config: Config) -> dict[int, Metrics]:
    """Metrics of each evaluation of a run, by step."""
    return logged_metrics(Workdir(config.workdir), str(config.train.eval_split))
