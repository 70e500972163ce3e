"""Where a config's samples come from: a dataset on disk, or random batches."""

import itertools
from collections.abc import Iterator
from typing import Protocol

import jax

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

    @property
    def capacity(self) -> int:
        """Ids that a batch of this process has room for. Before the first batch it is the same on all processes."""
        ...

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
    """Opens a split of the dataset of a model's config: this process's part of each batch.

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
    first, own, everyone = _part_of(recommender)
    if batch_size % everyone:
        raise InputError(
            f"data.{'batch_size' if training else 'eval_batch_size'} is {batch_size}, which {everyone} devices do not "
            f"divide: use {-(-batch_size // everyone) * everyone}"
        )
    if path is None:
        samples = range(batch_size * first // everyone, batch_size * (first + own) // everyone)
        return RandomBatches(
            recommender.card,
            split,
            features=recommender.features,
            batch_size=batch_size,
            seed=config.seed,
            samples=samples,
        )
    if data.virtual_shards % (everyone // own):
        raise InputError(
            f"data.virtual_shards is {data.virtual_shards}, which {everyone // own} processes do not divide: choose "
            "another number of processes (another number of virtual shards would change the order of samples)"
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
        shards=range(data.virtual_shards * first // everyone, data.virtual_shards * (first + own) // everyone),
        prefetch=data.prefetch,
        threads=data.threads,
    )


def _part_of(recommender: Recommender) -> tuple[int, int, int]:
    """This process's devices in the mesh: the number of the first, how many, and how many all processes have.

    Raises:
        InputError: Processes have different numbers of devices in the mesh.
    """
    owners = [device.process_index for device in recommender.tables.mesh.devices.flat]
    counts = {process: owners.count(process) for process in range(jax.process_count())}
    if len(set(counts.values())) > 1 or [owner for owner, _ in itertools.groupby(owners)] != list(
        dict.fromkeys(owners)
    ):
        raise InputError(
            f"processes have {sorted(counts.values())} devices of the mesh: choose --mesh.nodes and --mesh.chips so "
            f"that each of {len(counts)} processes has equally many"
        )
    own = jax.process_index()
    return owners.index(own), counts[own], len(owners)
