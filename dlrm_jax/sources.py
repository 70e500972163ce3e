"""Where a config's samples come from: a dataset on disk, or random batches."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax

from dlrm_jax.config import BatchSize, Config, DataConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import DatasetCard, read_card
from dlrm_jax.data.card_identity import check_model_inputs
from dlrm_jax.data.random_batches import RandomBatches
from dlrm_jax.recommender import Recommender
from sharding import InputError
from sharding.measure import host_memory_bytes


class Source(Protocol):
    """Batches of a split: a `Loader` or `RandomBatches`."""

    num_samples: int
    steps_per_epoch: int

    @property
    def row_groups_digest(self) -> str | None:
        """Digest of the files' row groups, which the order of samples depends on; None where there are no files."""
        ...

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


def check_parts(data: DataConfig, num_devices: int, num_processes: int, *, batches: Sequence[BatchSize]) -> None:
    """Raises InputError unless batches divide over the devices, and the order of samples over the processes.

    Args:
        data: Batch sizes and virtual shards.
        num_devices: Devices of all processes.
        num_processes: Processes.
        batches: Which batches are wanted.
    """
    # First, since another number of virtual shards may ask for other batch sizes.
    if data.path is not None and data.virtual_shards % num_processes:
        fitting = -(-data.virtual_shards // num_processes) * num_processes
        raise InputError(
            f"data.virtual_shards is {data.virtual_shards}, which {num_processes} processes do not divide: choose "
            f"another number of processes, or for a new run {fitting} virtual shards (another order of samples)"
        )
    for name in batches:
        data.check_devices(name, num_devices)


def check_room(name: BatchSize, batch_size: int, card: DatasetCard, share: float) -> None:
    """Raises InputError unless this host has memory for the numbers of one batch, all of 4 bytes.

    Args:
        name: Which batch, for the message.
        batch_size: Its samples, of all processes.
        card: Their features.
        share: The share of them that this process takes.
    """
    ids = sum(column.mean_pooling_factor if column.bag else 1.0 for column in card.sparse)
    # With the label, the sample's weight, and the length of each bag.
    sample_bytes = 4 * share * (len(card.dense) + 2 + len(card.sparse) + ids)
    memory = host_memory_bytes()
    if batch_size * sample_bytes > memory:
        raise InputError(
            f"data.{name} is {batch_size}, so a batch takes {batch_size * sample_bytes / 1e9:,.2f} GB, but this host "
            f"has {memory / 1e9:,.2f} GB: use fewer than {int(memory / sample_bytes):,} samples"
        )


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
        InputError: The split cannot be used, or its samples mean something else than those of the model's card.
    """
    config = recommender.config
    data = config.data
    path = path or data.path
    first, own, everyone = _part_of(recommender)
    name: BatchSize = "batch_size" if training else "eval_batch_size"
    check_parts(dataclasses.replace(data, path=path), everyone, everyone // own, batches=[name])
    batch_size = getattr(data, name)
    check_room(name, batch_size, recommender.card, own / everyone)
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
    # The step and its benchmarks run where grain is not installed.
    from dlrm_jax.data.loader import Loader

    loader = Loader(
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
    check_model_inputs(loader.card, recommender.card, path)
    return loader


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
