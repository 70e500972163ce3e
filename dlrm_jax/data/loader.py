"""Loader: the batches of one split, in the order of order.py, made ahead of time by background threads.

The pipeline, in grain's terms; each ``|`` is a buffer that a thread fills::

    row groups in the order of first need   RowGroups.read: pyarrow, checks, numpy columns     ``threads`` threads
     |
    windows                                 gather_window: one take a column                   one thread
     |
    batches                                 cut_batches                                        one thread
     |
    the consumer

Memory, at most: the row groups that the current window touches (one or two a virtual shard of this process, and those
that lie wholly in the window), ``4 * threads`` row groups read ahead, three windows (one gathered, one waiting, one
cut) and ``prefetch`` batches.
"""

import dataclasses
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain

from dlrm_jax.data.assemble import IdCapacity, WindowSamples, cut_batches, gather_window, padding_row
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import DatasetCard, read_card
from dlrm_jax.data.order import DataOrder, EpochOrder
from dlrm_jax.data.row_groups import RowGroup, RowGroups
from sharding.errors import InputError

_GROUPS_AHEAD_PER_THREAD = 4


class Loader:
    """Batches of one split of a dataset.

    Its whole state is (epoch, step): ``batches(epoch, first_step)`` goes on from anywhere, whatever was read before.

    Attributes:
        card: The dataset's card, with the sparse features that batches hold, in their order.
        num_samples: Samples of the split.
        steps_per_epoch: Batches in an epoch; the last one is padded with samples of weight 0 whose bags are empty.
        row_groups_digest: Digest of the files' row groups, which the order of samples depends on.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        split: str,
        *,
        features: Sequence[str] | None = None,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        virtual_shards: int = 64,
        shuffle_window: int = 262_144,
        shards: range | None = None,
        prefetch: int = 2,
        threads: int = 2,
    ):
        """Reads the card and the footers of the split's files.

        Args:
            directory: Folder of the dataset.
            split: Name of the split.
            features: Sparse features of a batch, in order; all of the card unless given.
            batch_size: Samples in a batch of all processes together.
            seed: Seed of the order; with ``shuffle``.
            shuffle: Whether row groups, and rows within a window, are permuted anew each epoch.
            virtual_shards: Parts that the samples are dealt to. The order depends on it.
            shuffle_window: Samples that are mixed with each other. The order depends on it, and so does memory.
            shards: Virtual shards whose samples this process yields; all of them unless given.
            prefetch: Batches made ahead.
            threads: Threads that read row groups.

        Raises:
            InputError: The dataset cannot be used, or an argument is out of its limits.
        """
        shards = range(virtual_shards) if shards is None else shards
        _check_sizes(batch_size=batch_size, virtual_shards=virtual_shards, shuffle_window=shuffle_window)
        _check_sizes(prefetch=prefetch, threads=threads)
        _check_order(batch_size, virtual_shards, shards, seed)
        self.card = _select(read_card(directory), features)
        self._row_groups = RowGroups(directory, split, self.card)
        self.row_groups_digest = self._row_groups.digest
        self._order = DataOrder(
            rows_per_group=self._row_groups.num_rows,
            batch_size=batch_size,
            virtual_shards=virtual_shards,
            shuffle_window=shuffle_window,
            seed=seed,
            shuffle=shuffle,
        )
        self.num_samples = self._order.num_samples
        self.steps_per_epoch = self._order.steps_per_epoch
        self._shards = shards
        self._prefetch = prefetch
        self._threads = threads
        self._capacity = IdCapacity(self.card.sparse, self._order.rows_per_step * len(shards))

    @property
    def capacity(self) -> int:
        """Ids that a batch has room for. It grows when a batch needs more, and never shrinks."""
        return self._capacity.value

    def batches(self, epoch: int, first_step: int = 0) -> "BatchIterator":
        """Starts reading an epoch.

        Args:
            epoch: Which epoch, from 0.
            first_step: The first step wanted. Data that only earlier windows need is not read.

        Returns:
            The batches of the steps from ``first_step`` on, as numpy arrays.

        Raises:
            InputError: The epoch or the step does not exist; or, from the iterator, a file cannot be used.
        """
        if epoch < 0 or not 0 <= first_step <= self.steps_per_epoch:
            raise InputError(
                f"epoch {epoch}, step {first_step} does not exist: epochs count from 0, and an epoch of "
                f"{self.num_samples} samples has the steps 0 to {self.steps_per_epoch - 1}"
            )
        order = self._order.epoch(epoch, first_step, self._shards)
        reading = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=_GROUPS_AHEAD_PER_THREAD * self._threads
        )
        groups = grain.MapDataset.source(order.groups.tolist()).map(self._row_groups.read).to_iter_dataset(reading)
        windows = _Stage(groups, functools.partial(_windows, order=order, padding=padding_row(self.card)))
        windows = grain.experimental.ThreadPrefetchIterDataset(windows, prefetch_buffer_size=1)
        features = tuple(column.name for column in self.card.sparse)
        batches = _Stage(windows, functools.partial(_batches, features=features, capacity=self._capacity))
        batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=self._prefetch)
        source = iter(batches)
        source.start_prefetch()
        return BatchIterator(source)


class BatchIterator(Iterator[Batch]):
    """The batches of an epoch. Its threads end with the last batch, with ``close``, or when it is dropped."""

    def __init__(self, source: grain.DatasetIterator[Batch]):
        self._source = [source]
        # Also runs when the interpreter exits, while threads can still be stopped and grain's modules are still there.
        self._finalizer = weakref.finalize(self, _close, self._source)

    def __next__(self) -> Batch:
        """Returns the next batch."""
        if not self._source:
            raise StopIteration
        try:
            return next(self._source[0])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the threads. There are no batches afterwards."""
        self._finalizer()


def _close(source: list[grain.DatasetIterator[Batch]]) -> None:
    while source:
        source.pop().close()


class _Stage(grain.IterDataset):
    """An IterDataset whose elements a generator function makes out of those of its parent."""

    def __init__(self, parent: grain.IterDataset, transform: Callable[[Iterator[Any]], Iterator[Any]]):
        super().__init__(parent)
        self._transform = transform

    def __iter__(self) -> grain.DatasetIterator:
        return _StageIterator(iter(self._parent), self._transform)


class _StageIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, transform: Callable[[Iterator[Any]], Iterator[Any]]):
        super().__init__(parent)
        self._elements = transform(parent)
        self._position = 0

    def __next__(self) -> Any:
        element = next(self._elements)
        self._position += 1
        return element

    def get_state(self) -> dict[str, Any]:
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("the state is (epoch, step): call Loader.batches with them")


def _windows(groups: Iterator[RowGroup], *, order: EpochOrder, padding: RowGroup) -> Iterator[WindowSamples]:
    names = iter(order.groups.tolist())
    held: dict[int, RowGroup] = {}
    for window in order.windows:
        for group in window.group.tolist():
            while group not in held:
                held[next(names)] = next(groups)
        samples = gather_window(window, held, padding)
        for group in window.released:
            del held[group]
        yield samples


def _batches(windows: Iterator[WindowSamples], *, features: tuple[str, ...], capacity: IdCapacity) -> Iterator[Batch]:
    for samples in windows:
        yield from cut_batches(samples, features, capacity)


def _select(card: DatasetCard, features: Sequence[str] | None) -> DatasetCard:
    if features is None:
        features = [column.name for column in card.sparse]
    repeated = [name for name in features if list(features).count(name) > 1]
    if repeated:
        raise InputError(f"feature {repeated[0]!r} is asked for twice; features of a batch must differ")
    return dataclasses.replace(card, sparse=tuple(card.feature(name) for name in features))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} is {size}, but must be at least 1")


def _check_order(batch_size: int, virtual_shards: int, shards: range, seed: int) -> None:
    if batch_size % virtual_shards:
        nearest = max(1, round(batch_size / virtual_shards)) * virtual_shards
        raise InputError(
            f"batch_size {batch_size} is not a multiple of virtual_shards {virtual_shards}, and a batch takes equally "
            f"many samples of each: use batch_size {nearest}, or virtual_shards that divide {batch_size}"
        )
    if not shards or shards.step != 1 or shards.start < 0 or shards.stop > virtual_shards:
        raise InputError(
            f"shards {shards} must be one or more consecutive ones of the {virtual_shards} virtual shards: "
            f"range(start, stop) with 0 <= start < stop <= {virtual_shards}"
        )
    if seed < 0:
        raise InputError(f"seed is {seed}, but must be at least 0")
