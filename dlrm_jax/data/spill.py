"""Counting more keys than memory holds: counts spilled to disk by hash partition, added up a partition at a time."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

from dlrm_jax.data.hashing import hash_to_range, mix64

PARTITIONS = 64
# Bytes that counting takes for each entry at its peak: keys, counts, the order that sorts them, and sorted copies.
BYTES_PER_ENTRY = 64
_RECORD = np.dtype([("key", "<u8"), ("count", "<i8")])


class SpilledCounts:
    """Counts 64-bit keys, holding a bounded number of them at a time.

    Blocks of keys are sorted and counted as they come. When the entries held exceed ``max_entries`` they are merged;
    if that does not halve them, they are appended to files, one for each hash partition, as records of 16 bytes.
    A key may so be written many times, always to the same file: `read_partition` adds its counts up.

    Args:
        directory: Folder of the files, made new; what an earlier, interrupted count left in it is removed.
        max_entries: Entries, a key and its count each, that are held in memory; a block comes on top.
        partitions: Number of files.
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_entries: int, partitions: int = PARTITIONS):
        self._folder = Path(directory)
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            path.unlink()
        self._max_entries = max_entries
        self._partitions = partitions
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_held = 0
        self._num_spills = 0

    @property
    def num_spills(self) -> int:
        """How many times the entries held were written to disk."""
        return self._num_spills

    def add(self, keys: UInt64[np.ndarray, " keys"], counts: Int64[np.ndarray, " keys"]) -> None:
        """Adds distinct keys with their counts, as `count_keys` returns them."""
        self._held.append((keys, counts))
        self._num_held += len(keys)
        if self._num_held <= self._max_entries:
            return
        self._held = [merge_counts(self._held)]
        self._num_held = len(self._held[0][0])
        if 2 * self._num_held > self._max_entries:
            self._spill()

    def close(self) -> None:
        """Writes what is held to disk."""
        self._spill()

    def _spill(self) -> None:
        keys, counts = merge_counts(self._held)
        self._held, self._num_held = [], 0
        if not len(keys):
            return
        partition = hash_to_range(mix64(keys), self._partitions)
        order = np.argsort(partition, kind="stable")
        ends = np.cumsum(np.bincount(partition.astype(np.int64), minlength=self._partitions))
        records = np.empty(len(keys), _RECORD)
        records["key"], records["count"] = keys[order], counts[order]
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                with open(_partition_file(self._folder, number), "ab") as file:
                    # Unlike ndarray.tofile, this says why it fails.
                    file.write(records[start:end].tobytes())
        self._num_spills += 1


def count_keys(
    keys: UInt64[np.ndarray, " keys"],
) -> tuple[UInt64[np.ndarray, " distinct"], Int64[np.ndarray, " distinct"]]:
    """Returns the distinct keys in ascending order, and how often each occurs."""
    distinct, counts = np.unique(keys, return_counts=True)
    return distinct, counts.astype(np.int64, copy=False)


def merge_counts(
    parts: Iterable[tuple[UInt64[np.ndarray, " _"], Int64[np.ndarray, " _"]]],
) -> tuple[UInt64[np.ndarray, " distinct"], Int64[np.ndarray, " distinct"]]:
    """Returns the distinct keys of all parts in ascending order, and the sum of each one's counts.

    A part need not be sorted, and may hold a key several times.
    """
    parts = [part for part in parts if len(part[0])]
    if not parts:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    keys = np.concatenate([part[0] for part in parts])
    # The stable sort is a merge sort, which is fast on parts that are sorted already.
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    counts = np.concatenate([part[1] for part in parts])[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts)


def read_partition(
    directories: Iterable[str | os.PathLike[str]], partition: int, *, max_entries: int
) -> tuple[UInt64[np.ndarray, " distinct"], Int64[np.ndarray, " distinct"]]:
    """Adds up one partition of several counts.

    Memory is the distinct keys of the partition, and ``max_entries`` records on top.

    Args:
        directories: Folders of closed `SpilledCounts` with the same number of partitions.
        partition: Number of the partition.
        max_entries: Records read at a time.

    Returns:
        The partition's distinct keys in ascending order, and their counts. A key is in one partition alone.
    """
    total = merge_counts([])
    for directory in directories:
        path = _partition_file(Path(directory), partition)
        size = path.stat().st_size // _RECORD.itemsize if path.exists() else 0
        for start in range(0, size, max_entries):
            records = np.fromfile(path, _RECORD, count=max_entries, offset=start * _RECORD.itemsize)
            total = merge_counts([total, (records["key"].copy(), records["count"].copy())])
    return total


def _partition_file(folder: Path, partition: int) -> Path:
    return folder / f"partition-{partition:03d}.bin"
