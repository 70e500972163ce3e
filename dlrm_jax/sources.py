"""Where a config's samples come from: a dataset on disk, or random batches."""

from collections.abc import Iterator
from typing import Protocol

from dlrm_jax.config import Config
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import DatasetCard, read_card
from dlrm_jax.data.random_batches import RandomBatches
from dlrm_jax.recommender import Recommender
from sharding import InputError


class Source(Protocol):
    """Batches of a split: a `Loader` or `RandomBatches`."""

    num_samples: int
    steps_per_epoch: int

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on."""
        ...


def card_of(config: Config) -> DatasetCard:
    """The dataset card of a config: its dataset's, or the one that it states.

    Args:
        config: The experiment.

    Returns:
        The card.

    Raises:
        InputError: Neither is there.
    """
    if config.data.path is not None:
        return read_card(config.data.path)
    if config.stated is None:
        raise InputError(f"config {config.name!r} needs a dataset: prepare one and name its folder with --data.path")
    return config.stated


def open_split(recommender: Recommender, split: str, *, training: bool, path: str | None = None) -> Source:
    """Opens a split of the dataset of a model's config.

    Args:
        recommender: The model, with its config.
        split: Name of the split.
        training: Whether for training: shuffled, in batches of that size.
        path: Folder of the dataset; the config's unless given.

    Returns:
        The batches.

    Raises:
        InputError: The split cannot be used.
    """
    config = recommender.config
    data = config.data
    batch_size = data.batch_size if training else data.eval_batch_size
    path = path or data.path
    if path is None:
        return RandomBatches(
            recommender.card, split, features=recommender.features, batch_size=batch_size, seed=config.seed
        )
    # The step and its benchmarks run where grain is not installed.
    from dlrm_jax.data.loader import Loader

    return Loader(
        path,
        split,
        features=recommender.features,
        batch_size=batch_size,
        seed=config.seed,
        shuffle=training,
        virtual_shards=data.virtual_shards,
        shuffle_window=data.shuffle_window,
        prefetch=data.prefetch,
        threads=data.threads,
    )
