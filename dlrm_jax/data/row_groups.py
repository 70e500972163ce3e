"""Row groups of one split: where they lie in its Parquet files, and how one becomes numpy columns.

A row group is the unit of reading: small enough to hold many, large enough that pyarrow decodes it at full speed.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from dlrm_jax.data.card import CARD_FILE, DatasetCard, SparseColumn
from dlrm_jax.data.validate import normalised, pooling_factors, validate_row_group, validate_schema
from sharding.errors import InputError
from sharding.jagged import MAX_NARROW_ROWS

_REPAIR = "copy the file again, or prepare the dataset again with scripts/prepare.py"
# Footers are parsed once for all row groups of a file. A large split has gigabytes of them, so only so many are kept.
_FOOTERS_KEPT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bags:
    """One sparse feature of some rows.

    Attributes:
        values: Ids of all bags, one bag after another.
        offsets: Bag ``i`` is ``values[offsets[i]:offsets[i + 1]]``; None where every bag holds exactly one id.
        weights: One weight beside each id; None for an unweighted feature.
    """

    values: Int[np.ndarray, " ids"]
    offsets: Int[np.ndarray, " rows+1"] | None
    weights: Float[np.ndarray, " ids"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowGroup:
    """The columns of one row group, as the model wants them.

    Attributes:
        dense: Normalised dense features, in the card's order.
        label: Labels in [0, 1].
        weight: Sample weights.
        sparse: The sparse features, in the card's order.
    """

    dense: Float[np.ndarray, "rows num_dense"]
    label: Float[np.ndarray, " rows"]
    weight: Float[np.ndarray, " rows"]
    sparse: tuple[Bags, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Location:
    """Where a row group lies: its file, its number and its first row in that file, and how many rows it has."""

    path: str
    index: int
    first_row: int
    num_rows: int


class RowGroups:
    """The row groups of one split, read in any order and by several threads."""

    def __init__(self, directory: str | os.PathLike[str], split: str, card: DatasetCard):
        """Reads the footers of the split's files.

        Args:
            directory: Folder of the dataset.
            split: Name of the split.
            card: The dataset's card, with the sparse features that are wanted.

        Raises:
            InputError: The split is missing or empty, a file cannot be read, a column is missing or of a wrong type, or
                the number of samples is not the card's.
        """
        folder = Path(directory, split)
        if split not in card.splits:
            raise InputError(f"{Path(directory, CARD_FILE)}: no split {split!r}; use one of {sorted(card.splits)}")
        paths = sorted(folder.glob("*.parquet"))
        if not paths:
            raise InputError(f"{folder}: holds no .parquet file, but the card names the split {split!r}; {_REPAIR}")
        self._card = card
        self._columns = _column_names(card)
        self._footer = functools.lru_cache(_FOOTERS_KEPT)(_read_footer)
        self._locations = [location for path in paths for location in self._locate(str(path))]
        num_samples = sum(self.num_rows)
        if not num_samples:
            raise InputError(f"{folder}: its files hold no rows; a split needs at least one sample")
        if num_samples != card.splits[split].num_samples:
            raise InputError(
                f"{folder}: its files hold {num_samples} rows, but the card says {card.splits[split].num_samples}; "
                "files are missing or left over, or the card's num_samples must be corrected"
            )

    @property
    def num_rows(self) -> tuple[int, ...]:
        """Rows of each row group, in the order of files by name and of groups in a file; empty groups are left out."""
        return tuple(location.num_rows for location in self._locations)

    @property
    def digest(self) -> str:
        """A digest of the files' names and of the rows of each of their row groups; empty groups are left out."""
        groups = [(Path(location.path).name, location.num_rows) for location in self._locations]
        return hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:16]

    def read(self, group: int) -> RowGroup:
        """Reads and checks one row group.

        Args:
            group: Its place in ``num_rows``.

        Returns:
            Its columns. A sample of weight 0 has empty bags, like padding: it must not touch a row of a table.

        Raises:
            InputError: The file cannot be read, or its content is not what the card says.
        """
        location = self._locations[group]
        try:
            with pq.ParquetFile(location.path, metadata=self._footer(location.path)) as file:
                # One thread: the loader reads several row groups at a time.
                table = file.read_row_group(location.index, columns=self._columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{location.path}: row group {location.index} cannot be read ({_first_line(error)}); {_REPAIR}"
            ) from error
        if table.num_rows != location.num_rows:
            raise InputError(f"{location.path}: was replaced while it was being read; start again")
        return columns_of(table, self._card, location.path, first_row=location.first_row)

    def _locate(self, path: str) -> Iterator[_Location]:
        footer = self._footer(path)
        validate_schema(footer.schema.to_arrow_schema(), self._card, path)
        first_row = 0
        for index in range(footer.num_row_groups):
            num_rows = footer.row_group(index).num_rows
            if num_rows:
                yield _Location(path=path, index=index, first_row=first_row, num_rows=num_rows)
            first_row += num_rows


def columns_of(
    table: pa.Table, card: DatasetCard, where: str, *, first_row: int = 0, trained: bool = False
) -> RowGroup:
    """Checks rows against the card and turns them into numpy columns.

    Args:
        table: Rows with at least the columns of the card.
        card: The dataset's card, with the sparse features that are wanted.
        where: What to call the rows' origin in an error.
        first_row: Number of the first row there.
        trained: As in `validate_schema`.

    Returns:
        The columns. A sample of weight 0 has empty bags, like padding: it must not touch a row of a table.

    Raises:
        InputError: The rows are not what the card says.
    """
    validate_row_group(table, card, where, first_row, trained=trained)
    weight = np.ones(table.num_rows, np.float32)
    if card.sample_weight is not None:
        weight = _numbers(table, card.sample_weight)
    counts = None if weight.all() else pa.array(weight > 0)
    dense = np.empty((table.num_rows, len(card.dense)), np.float32)
    for position, column in enumerate(card.dense):
        dense[:, position] = normalised(_array(table, column.name).to_numpy(), column)
    return RowGroup(
        dense=dense,
        label=_numbers(table, card.label),
        weight=weight,
        sparse=tuple(_bags(table, column, counts) for column in card.sparse),
    )


def _column_names(card: DatasetCard) -> list[str]:
    names = [card.label, *(column.name for column in card.dense), *(column.name for column in card.sparse)]
    names += [column.weights for column in card.sparse if column.weights is not None]
    names += [] if card.sample_weight is None else [card.sample_weight]
    return list(dict.fromkeys(names))  # features may share a column of weights


def _read_footer(path: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({_first_line(error)}); {_REPAIR}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _numbers(table: pa.Table, name: str) -> Float[np.ndarray, " rows"]:
    return _array(table, name).to_numpy().astype(np.float32, copy=False)


def _bags(table: pa.Table, column: SparseColumn, counts: pa.Array | None) -> Bags:
    ids = _where(counts, _array(table, column.name))
    if not column.bag:
        offsets = _offsets(np.asarray(ids.is_valid())) if ids.null_count else None
        return Bags(values=_ids(ids.drop_null(), column), offsets=offsets, weights=None)
    weights = None
    if column.weights is not None:
        weights = _where(counts, _array(table, column.weights)).flatten().to_numpy().astype(np.float32, copy=False)
    return Bags(values=_ids(ids.flatten(), column), offsets=_offsets(pooling_factors(ids)), weights=weights)


def _where(counts: pa.Array | None, column: pa.Array) -> pa.Array:
    """Replaces the bags of samples that do not count by null."""
    return column if counts is None else pc.call_function("if_else", [counts, column, pa.scalar(None, column.type)])


def _offsets(lengths: np.ndarray) -> Int[np.ndarray, " rows+1"]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _ids(ids: pa.Array, column: SparseColumn) -> Int[np.ndarray, " ids"]:
    narrow = column.num_rows <= MAX_NARROW_ROWS
    return ids.to_numpy().astype(np.int32 if narrow else np.int64, copy=False)
