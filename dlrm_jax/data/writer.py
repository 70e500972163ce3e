"""Writing a dataset: Parquet shards of one split, and the figures of the card that are counted while writing."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_jax.data.card import DatasetCard, DenseColumn, Frequencies, SparseColumn, SplitSummary
from sharding.errors import InputError

ROWS_PER_GROUP = 16_384
ROWS_PER_FILE = 1_048_576
TRAIN = "train"
# The loader deals row groups to 64 virtual shards and shuffles by group, so a training split wants as many.
_MIN_GROUPS = 64
_MIN_ROWS_PER_GROUP = 256
_TOP_IDS = 64


def dataset_schema(card: DatasetCard) -> pa.Schema:
    """Returns the Parquet schema that a card's columns imply.

    Label, sample weight and dense features are float32; a sparse feature is int64, or a list of int64 if it is a bag,
    and the weights of a bag are a list of float32.
    """
    fields = [(card.label, pa.float32())]
    if card.sample_weight:
        fields.append((card.sample_weight, pa.float32()))
    fields += [(column.name, pa.float32()) for column in card.dense]
    for column in card.sparse:
        fields.append((column.name, pa.list_(pa.int64()) if column.bag else pa.int64()))
        if column.weights:
            fields.append((column.weights, pa.list_(pa.float32())))
    return pa.schema(fields)


def rows_per_group(num_samples: int) -> int:
    """Returns the rows in a row group that suit a split: 16,384, or fewer so that there are at least 64 groups."""
    return min(ROWS_PER_GROUP, max(_MIN_ROWS_PER_GROUP, num_samples // _MIN_GROUPS))


class SplitWriter:
    """Writes one split as Parquet shards ``DIR/SPLIT/part-00000.parquet``, ...: a context manager.

    Rows are buffered to whole row groups, so at most one group and the table just written are held. A file has its
    final name only once it is complete; until then it ends in ``.partial``, and leaving the context by an exception
    removes it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        split: str,
        schema: pa.Schema,
        *,
        rows_per_group: int = ROWS_PER_GROUP,
        rows_per_file: int = ROWS_PER_FILE,
        first_file: int = 0,
    ):
        """Makes the split's folder.

        Args:
            directory: Folder of the dataset.
            split: Name of the split.
            schema: Columns, in order; tables are cast to it.
            rows_per_group: Rows in each row group but the last: the unit that the loader reads.
            rows_per_file: Rows in each file, rounded down to whole row groups (at least one).
            first_file: Number of the first file, where earlier ones are complete already.
        """
        if rows_per_group < 1 or rows_per_file < 1:
            raise InputError(f"rows_per_group {rows_per_group} and rows_per_file {rows_per_file} must be at least 1")
        self._folder = Path(directory, split)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._schema = schema
        self._rows_per_group = rows_per_group
        self._rows_per_file = max(1, rows_per_file // rows_per_group) * rows_per_group
        self._first_file = self._next_file = first_file
        self._buffer: list[pa.Table] = []
        self._buffered = 0
        self._writer: pq.ParquetWriter | None = None
        self._rows_in_file = 0
        self._num_samples = 0

    @property
    def num_samples(self) -> int:
        """Rows given so far."""
        return self._num_samples

    @property
    def num_files(self) -> int:
        """Files completed so far by this writer."""
        return self._next_file - self._first_file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._discard()

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Appends rows; columns that the schema does not name are left out.

        Raises:
            InputError: A column is missing or cannot be cast to the schema.
        """
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        missing = [name for name in self._schema.names if name not in table.column_names]
        if missing:
            raise InputError(f"{self._folder}: column {missing[0]!r} is missing; the rows have {table.column_names}")
        try:
            table = table.select(self._schema.names).cast(self._schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"{self._folder}: a column does not fit the schema: {error}") from error
        self._buffer.append(table)
        self._buffered += table.num_rows
        self._num_samples += table.num_rows
        if self._buffered >= self._rows_per_group:
            held = pa.concat_tables(self._buffer)
            whole = held.num_rows // self._rows_per_group * self._rows_per_group
            for start in range(0, whole, self._rows_per_group):
                self._write_group(held.slice(start, self._rows_per_group))
            self._buffer = [held.slice(whole)]
            self._buffered = held.num_rows - whole

    def close(self) -> None:
        """Writes the last, possibly smaller row group and completes the file. A split of no rows has no file."""
        if self._buffered:
            self._write_group(pa.concat_tables(self._buffer))
        self._buffer, self._buffered = [], 0
        self._complete_file()

    def _path(self, suffix: str = "") -> Path:
        return self._folder / f"part-{self._next_file:05d}.parquet{suffix}"

    def _write_group(self, group: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path(".partial"), self._schema, compression="zstd")
        self._writer.write_table(group, row_group_size=self._rows_per_group)
        self._rows_in_file += group.num_rows
        if self._rows_in_file >= self._rows_per_file:
            self._complete_file()

    def _discard(self) -> None:
        """Removes the file in progress, if there is one; it may be one that cannot be written to its end."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None
            self._path(".partial").unlink(missing_ok=True)

    def _complete_file(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._path(".partial").replace(self._path())
        self._writer = None
        self._rows_in_file = 0
        self._next_file += 1


class ColumnStatistics:
    """Counts, block by block, what a dataset card says of its columns.

    Sizes, positive rates and maximum pooling factors are taken over the splits that they belong to; mean pooling
    factors, frequencies and the mean and standard deviation of dense features over the training split alone.

    Memory is one counter of 8 bytes for each row of the features whose frequencies are counted: those with the fewest
    rows first, up to ``max_counters`` in all. The others have ``frequencies=None``.
    """

    def __init__(self, draft: DatasetCard, *, standardise: bool = True, max_counters: int = 2**25):
        """Starts from a card without figures.

        Args:
            draft: Names, kinds and ``num_rows`` of the columns; ``splits`` may be empty. Frequencies that it already
                has are kept.
            standardise: Whether the card's ``mean`` and ``std`` of dense features come from the training split;
                otherwise the draft's stay.
            max_counters: Bound on the counters of ids, over all features.
        """
        self._draft = draft
        self._standardise = standardise
        self._counts: dict[str, np.ndarray] = {}
        for column in sorted(draft.sparse, key=lambda column: column.num_rows):
            if column.frequencies is None and column.num_rows <= max_counters:
                self._counts[column.name] = np.zeros(column.num_rows, np.int64)
                max_counters -= column.num_rows
        self._num_samples: dict[str, int] = {}
        self._label_sum: dict[str, float] = {}
        self._num_ids = {column.name: 0 for column in draft.sparse}
        self._max_pooling_factor = {column.name: 1 for column in draft.sparse}
        self._dense_mean = np.zeros(len(draft.dense))
        self._dense_squares = np.zeros(len(draft.dense))

    def add(self, split: str, rows: pa.Table | pa.RecordBatch) -> None:
        """Counts rows of a split.

        Raises:
            InputError: An id lies outside its feature's ``num_rows``.
        """
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        before = self._num_samples.get(split, 0)
        label_sum = float(table.column(self._draft.label).to_numpy().sum(dtype=np.float64))
        self._num_samples[split] = before + table.num_rows
        self._label_sum[split] = self._label_sum.get(split, 0.0) + label_sum
        for column in self._draft.sparse:
            for chunk in table.column(column.name).chunks:
                self._add_ids(split, column, chunk)
        if split == TRAIN and self._draft.dense and table.num_rows:
            block = np.stack([table.column(c.name).to_numpy().astype(np.float64) for c in self._draft.dense], axis=1)
            self._add_dense(before, block)

    def add_files(self, directory: str | os.PathLike[str], splits: Sequence[str]) -> None:
        """Counts every row of the files that the splits already have, one row group at a time."""
        columns = dataset_schema(self._draft).names
        for split in splits:
            for path in sorted(Path(directory, split).glob("part-*.parquet")):
                with pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups):
                        self.add(split, file.read_row_group(group, columns=columns))

    def card(self) -> DatasetCard:
        """Returns the draft with the figures filled in."""
        num_train = self._num_samples.get(TRAIN, 0)
        dense = self._draft.dense
        if self._standardise and num_train:
            std = np.sqrt(self._dense_squares / num_train)
            dense = tuple(
                # The std of a constant column is 0 or rounding error; dividing by 1 leaves the column at 0.
                DenseColumn(name=column.name, mean=float(mean), std=float(scale) if scale > 1e-6 * abs(mean) else 1.0)
                for column, mean, scale in zip(dense, self._dense_mean, std, strict=True)
            )
        splits = {
            split: SplitSummary(num_samples=count, positive_rate=self._label_sum[split] / max(count, 1))
            for split, count in self._num_samples.items()
        }
        sparse = tuple(self._completed(column, num_train) for column in self._draft.sparse)
        return dataclasses.replace(self._draft, dense=dense, sparse=sparse, splits=splits)

    def _completed(self, column: SparseColumn, num_train: int) -> SparseColumn:
        counts = self._counts.get(column.name)
        return dataclasses.replace(
            column,
            max_pooling_factor=self._max_pooling_factor[column.name],
            mean_pooling_factor=self._num_ids[column.name] / num_train if num_train else column.mean_pooling_factor,
            frequencies=column.frequencies if counts is None else summarise_frequencies(counts),
        )

    def _add_ids(self, split: str, column: SparseColumn, values: pa.Array) -> None:
        if isinstance(values, pa.ListArray):
            longest = int(np.max(values.value_lengths().fill_null(0).to_numpy(), initial=0))
            self._max_pooling_factor[column.name] = max(self._max_pooling_factor[column.name], longest)
            values = values.flatten()
        ids = values.drop_null().to_numpy(zero_copy_only=False)
        if not len(ids):
            return
        if ids.min() < 0 or ids.max() >= column.num_rows:
            outside = ids[(ids < 0) | (ids >= column.num_rows)][0]
            raise InputError(
                f"{split}: feature {column.name!r} has id {outside}, but ids lie in [0, {column.num_rows})"
            )
        if split == TRAIN:
            self._num_ids[column.name] += len(ids)
            counts = self._counts.get(column.name)
            if counts is not None:
                # Not bincount: its result is as long as the table, for every block.
                distinct, occurrences = np.unique(ids, return_counts=True)
                counts[distinct] += occurrences

    def _add_dense(self, before: int, block: np.ndarray) -> None:
        """Merges a block's mean and sum of squared deviations (Chan, Golub and LeVeque 1983)."""
        after = before + len(block)
        difference = block.mean(axis=0) - self._dense_mean
        self._dense_mean += difference * len(block) / after
        self._dense_squares += ((block - block.mean(axis=0)) ** 2).sum(axis=0)
        self._dense_squares += difference**2 * before * len(block) / after


def summarise_frequencies(counts: np.ndarray) -> Frequencies:
    """Summarises the occurrences of ids, given the count of every id in order."""
    distinct = int(np.count_nonzero(counts))
    # Ties by id, so that the result does not depend on the sorting algorithm.
    order = np.argsort(-counts, kind="stable")[:distinct]
    cumulative = np.cumsum(counts[order])
    total = int(cumulative[-1]) if distinct else 0
    ranks = sorted({min(10**power, distinct) for power in range(len(str(distinct)) + 1)}) if distinct else []
    return Frequencies(
        total=total,
        distinct=distinct,
        top=tuple((int(i), int(counts[i])) for i in order[:_TOP_IDS]),
        coverage=tuple((rank, round(float(cumulative[rank - 1] / total), 6)) for rank in ranks),
    )
