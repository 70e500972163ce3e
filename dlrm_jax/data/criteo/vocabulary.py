"""From counted Criteo ids to rows of tables: a vocabulary by frequency, or a hash where that would be too large.

Letters: n ids of a block, V ids of a vocabulary.
"""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64, UInt32, UInt64

from dlrm_jax.data.hashing import hash_to_range, mix64
from dlrm_jax.data.spill import BYTES_PER_ENTRY, PARTITIONS, read_partition
from dlrm_jax.data.stream import open_stream
from sharding.errors import InputError

_RECORD = np.dtype([("value", "<u4"), ("count", "<i8")])
# Making a vocabulary takes value, count, two orders and sorted copies; using one takes value and row.
_BYTES_TO_MAKE = 40
_BYTES_TO_USE = 8
_ROWS_AT_ONCE = 2**20
_HEXADECIMAL = np.array([int.from_bytes(f"{byte:02x}".encode(), "little") for byte in range(256)], np.uint16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountedIds:
    """What counting found of one feature in the training lines.

    Attributes:
        distinct: Different ids.
        frequent: Those that occur often enough for a row of their own.
        occurrences: Lines with an id.
        frequent_occurrences: Lines with a frequent one.
    """

    distinct: int
    frequent: int
    occurrences: int
    frequent_occurrences: int


def to_keys(ids: UInt32[np.ndarray, "26 n"], present: Bool[np.ndarray, "26 n"]) -> UInt64[np.ndarray, " keys"]:
    """Returns the ids that are present as keys to count: the feature in the high 32 bits, the id in the low ones."""
    features = np.arange(len(ids), dtype=np.uint64)[:, None] << np.uint64(32)
    return (features | ids)[present]


def collect_counts(
    directories: Sequence[str | os.PathLike[str]],
    folder: Path,
    *,
    num_features: int,
    frequency_threshold: int,
    memory_limit: int,
) -> list[CountedIds]:
    """Adds up spilled counts of `to_keys`, a partition at a time, into one file of (id, count) for each feature.

    Args:
        directories: Folders of the spilled counts.
        folder: Where the files go; what an interrupted call left there is overwritten.
        num_features: Number of features.
        frequency_threshold: Occurrences from which on an id is frequent.
        memory_limit: Bytes for the tables of counts.

    Returns:
        The sums for each feature.
    """
    folder.mkdir(exist_ok=True)
    sums = np.zeros((num_features, 4), np.int64)
    max_entries = max(1, memory_limit // BYTES_PER_ENTRY)
    features = np.arange(num_features + 1, dtype=np.uint64) << np.uint64(32)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(_counts_file(folder, feature), "wb")) for feature in range(num_features)]
        for partition in range(PARTITIONS):
            keys, counts = read_partition(directories, partition, max_entries=max_entries)
            for feature, (start, end) in enumerate(itertools.pairwise(np.searchsorted(keys, features))):
                records = np.empty(end - start, _RECORD)
                records["value"], records["count"] = keys[start:end], counts[start:end]
                files[feature].write(records.tobytes())
                frequent = records["count"][records["count"] >= frequency_threshold]
                sums[feature] += len(records), len(frequent), records["count"].sum(), frequent.sum()
    return [
        CountedIds(distinct=int(a), frequent=int(b), occurrences=int(c), frequent_occurrences=int(d))
        for a, b, c, d in sums
    ]


def check_memory(counted: Sequence[CountedIds], is_hashed: Sequence[bool], names: Sequence[str], limit: int) -> None:
    """Checks that the vocabularies fit in memory.

    Raises:
        InputError: They don't; the message says how much they take.
    """
    sizes = [0 if hashed else feature.frequent for feature, hashed in zip(counted, is_hashed, strict=True)]
    needed = max(_BYTES_TO_MAKE * max(sizes), _BYTES_TO_USE * sum(sizes))
    if needed > limit:
        largest = sizes.index(max(sizes))
        raise InputError(
            f"the vocabularies of {sum(sizes)} ids ({names[largest]!r} alone {sizes[largest]}) need "
            f"{needed / 2**20:.1f} MiB, but --memory_limit_mb is {limit / 2**20:g}: allow {math.ceil(needed / 2**20)}, "
            "raise --frequency_threshold, or hash large features with --max_rows"
        )


def to_hexadecimal(values: UInt32[np.ndarray, " n"]) -> pa.Array:
    """Returns ids as Criteo writes them: 8 hexadecimal digits."""
    digits = _HEXADECIMAL[np.ascontiguousarray(values).astype(">u4").view(np.uint8)]
    offsets = np.arange(len(values) + 1, dtype=np.int32) * 8
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(digits))


def write_vocabulary(folder: Path, feature: int, out: Path, *, frequency_threshold: int) -> Int64[np.ndarray, " V"]:
    """Writes a feature's vocabulary: the frequent ids by descending count, then ascending value, as rows 1, 2, ...

    Args:
        folder: Folder of `collect_counts`.
        feature: Number of the feature.
        out: The Parquet file, with columns id (the row), value (8 hexadecimal digits) and count.
        frequency_threshold: Occurrences from which on an id is frequent.

    Returns:
        The counts in order of the rows.
    """
    parts = [part[part["count"] >= frequency_threshold] for part in _read_counts(folder, feature)]
    frequent = np.concatenate([np.zeros(0, _RECORD), *parts])
    order = np.lexsort((frequent["value"], -frequent["count"]))
    frequent = frequent[order]
    schema = pa.schema([("id", pa.int64()), ("value", pa.string()), ("count", pa.int64())])
    partial = out.with_suffix(".partial")
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for start in range(0, max(1, len(frequent)), _ROWS_AT_ONCE):
            part = frequent[start : start + _ROWS_AT_ONCE]
            ids = np.arange(start + 1, start + 1 + len(part), dtype=np.int64)
            counts = np.ascontiguousarray(part["count"])
            writer.write_table(pa.table([ids, to_hexadecimal(part["value"]), counts], schema=schema))
    partial.replace(out)
    return np.ascontiguousarray(frequent["count"])


def hash_rows(values: UInt32[np.ndarray, " n"], *, feature: int, num_rows: int) -> Int64[np.ndarray, " n"]:
    """Hashes the ids of a feature to the rows 1, ..., num_rows - 1; row 0 is left to missing ids."""
    stream = mix64(np.array([feature], np.uint64))
    return 1 + hash_to_range(mix64(values ^ stream), num_rows - 1).astype(np.int64)


def count_hashed_rows(folder: Path, feature: int, *, num_rows: int, num_missing: int) -> Int64[np.ndarray, " rows"]:
    """Returns how often each row of a hashed feature occurs in the training lines."""
    counts = np.zeros(num_rows, np.int64)
    counts[0] = num_missing
    for part in _read_counts(folder, feature):
        rows = hash_rows(np.ascontiguousarray(part["value"]), feature=feature, num_rows=num_rows)
        np.add.at(counts, rows, part["count"])
    return counts


class RowLookup:
    """Maps the ids of one feature to rows of its table."""

    def __init__(self, *, feature: int, num_rows: int, vocabulary: UInt32[np.ndarray, " V"] | None):
        """Prepares the look-up.

        Args:
            feature: Number of the feature.
            num_rows: Rows of its table.
            vocabulary: The ids of rows 1, 2, ..., in order; None for a hashed feature.
        """
        self._feature = feature
        self._num_rows = num_rows
        self._values = self._rows = None
        if vocabulary is not None:
            order = np.argsort(vocabulary)
            self._values = vocabulary[order]
            self._rows = (order + 1).astype(np.uint32)

    def __call__(self, ids: UInt32[np.ndarray, " n"], present: Bool[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Returns the rows of ids; 0 for those that are missing or not in the vocabulary."""
        if self._values is None or self._rows is None:
            return np.where(present, hash_rows(ids, feature=self._feature, num_rows=self._num_rows), 0)
        if not len(self._values):
            return np.zeros(len(ids), np.int64)
        position = np.searchsorted(self._values, ids)
        position[position == len(self._values)] = 0
        known = present & (self._values[position] == ids)
        return np.where(known, self._rows[position], 0).astype(np.int64)


def read_vocabulary(path: str | os.PathLike[str]) -> UInt32[np.ndarray, " V"]:
    """Reads the ids of rows 1, 2, ... from a vocabulary file."""
    with open_stream(path) as file:
        parts = [np.zeros(0, np.uint32)]
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=["value"]):
            column = batch.column(0)
            digits = column.buffers()[2].to_pybytes()[8 * column.offset : 8 * (column.offset + len(column))]
            parts.append(np.frombuffer(bytes.fromhex(digits.decode()), ">u4").astype(np.uint32))
    return np.concatenate(parts)


def _read_counts(folder: Path, feature: int):
    path = _counts_file(folder, feature)
    for start in range(0, path.stat().st_size // _RECORD.itemsize, _ROWS_AT_ONCE):
        yield np.fromfile(path, _RECORD, count=_ROWS_AT_ONCE, offset=start * _RECORD.itemsize)


def _counts_file(folder: Path, feature: int) -> Path:
    return folder / f"feature-{feature:02d}.bin"
