"""Does a Parquet table hold what the dataset card says? For the loader, on all it reads, and for prepare.py check."""

import functools
import os
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, Shaped

from dlrm_jax.data.card import CARD_FILE, DatasetCard, DenseColumn, SparseColumn
from sharding.errors import InputError

List = pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray

_WEIGHT_LIMIT = "weights other than 0 are at least 1.4e-45, the smallest float32 number"


def validate_schema(
    schema: pa.Schema, card: DatasetCard, path: str | os.PathLike[str], *, trained: bool = False
) -> None:
    """Checks that every column of the card is there and of a usable type.

    Usable are: integers or floats for the label, the sample weight and dense features; integers for ids, or lists of
    them for a bag; lists of integers or floats for the weights of a bag. Other columns are allowed and ignored.

    Args:
        schema: Schema of a Parquet file.
        card: The dataset's card; to check a selection of features, give a card with those alone.
        path: The file, for the message.
        trained: Whether a model has been trained with the card, so that no message advises to change it.

    Raises:
        InputError: A column is missing, there twice, or of another type; the message names file and column.
    """
    for name in filter(None, (card.label, card.sample_weight, *(column.name for column in card.dense))):
        _require(schema, name, _is_number, "an integer or a float, such as float32", path, trained)
    for column in card.sparse:
        if column.bag:
            _require(schema, column.name, _is_list_of(pa.types.is_integer), "a list of integers (int64)", path, trained)
        else:
            _require(schema, column.name, pa.types.is_integer, "an integer (int64)", path, trained)
        if column.weights:
            _require(schema, column.weights, _is_list_of(_is_number), "a list of floats (float32)", path, trained)


def validate_row_group(
    table: pa.Table, card: DatasetCard, path: str | os.PathLike[str], first_row: int, *, trained: bool = False
) -> None:
    """Checks every value of some consecutive rows of a file, whose schema has been checked.

    Labels lie in [0, 1]; sample weights are finite and at least 0; dense features are finite, also normalised; ids lie
    in [0, num_rows), compared as 64-bit integers; bags are not longer than the maximum pooling factor; weights of
    bags are finite and as many as the ids. A null is allowed in place of an id or of a bag, and nowhere else. Weights
    and dense features are narrowed to float32: there they are finite, and no weight but 0 becomes 0.

    Args:
        table: The rows, with the card's columns.
        card: The dataset's card; to check a selection of features, give a card with those alone.
        path: The file, for the message.
        first_row: Number in the file of the table's first row; rows count from 0.
        trained: As in `validate_schema`.

    Raises:
        InputError: The first wrong value by column, then row; the message names file, row, column, value and limit.
    """
    for name, limit, is_valid in _limits(card):
        for row, chunk in _chunks(table, name, first_row):
            if chunk.null_count:
                where = _locate(path, row + _first(_nulls(chunk)), name)
                raise InputError(f"{where} is null, but {limit}: fill it in, or leave the row out")
            values = chunk.to_numpy(zero_copy_only=False)
            valid = is_valid(values)
            if not valid.all():
                bad = _first(~valid)
                where = _locate(path, row + bad, name)
                raise InputError(f"{where} is {values[bad]}, but {limit}: repair the value, or leave the row out")
    for column in card.sparse:
        for row, chunk in _chunks(table, column.name, first_row):
            if column.bag:
                _validate_bags(chunk, column, path, row, trained)
            else:
                ids = chunk.drop_null() if chunk.null_count else chunk
                bad = _first_outside(ids.to_numpy(), column.num_rows)
                if bad is not None:
                    position = int(np.flatnonzero(~_nulls(chunk))[bad])
                    _raise_outside(ids[bad].as_py(), column, _locate(path, row + position, column.name), trained)
        if column.weights:
            _validate_weights(table, column, path, first_row)


def normalised(values: Shaped[np.ndarray, " n"], column: DenseColumn) -> Float[np.ndarray, " n"]:
    """Returns a dense feature as the model is given it: ``(x - mean) / std``, in float32."""
    return (values.astype(np.float32, copy=False) - np.float32(column.mean)) / np.float32(column.std)


def pooling_factors(chunk: List) -> Int[np.ndarray, " rows"]:
    """Returns the number of ids in each bag; 0 where it is null."""
    return pc.call_function("list_value_length", [chunk]).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _limits(card: DatasetCard) -> Iterator[tuple[str, str, Callable[[np.ndarray], np.ndarray]]]:
    """Columns of numbers: name, limit, and which values keep it. A column of several limits comes again."""
    yield card.label, "labels lie in [0, 1]", lambda x: (x >= 0) & (x <= 1)
    if card.sample_weight is not None:
        limit = "sample weights are finite and at least 0, also as float32"
        yield card.sample_weight, limit, lambda x: _is_finite_float32(x) & (x >= 0)
        yield card.sample_weight, _WEIGHT_LIMIT, _stays_nonzero
    for column in card.dense:
        limit = f"dense features are finite float32 numbers, also as (x - {column.mean}) / {column.std}"
        yield column.name, limit, functools.partial(_is_finite_normalised, column=column)


def _validate_bags(
    chunk: List, column: SparseColumn, path: str | os.PathLike[str], first_row: int, trained: bool
) -> None:
    lengths = pooling_factors(chunk)
    if np.max(lengths, initial=0) > column.max_pooling_factor:
        row = _first(lengths > column.max_pooling_factor)
        or_raise = "" if trained else f", or raise max_pooling_factor in {CARD_FILE}"
        raise InputError(
            f"{_locate(path, first_row + row, column.name)} has {lengths[row]} ids, but max_pooling_factor is "
            f"{column.max_pooling_factor}: shorten the bag{or_raise}"
        )
    ids = chunk.flatten()
    if ids.null_count:
        where = _locate(path, first_row + _row_of(lengths, _first(_nulls(ids))), column.name)
        raise InputError(f"{where} holds a null, but a bag is a list of ids: leave the null out of the list")
    bad = _first_outside(ids.to_numpy(), column.num_rows)
    if bad is not None:
        where = _locate(path, first_row + _row_of(lengths, bad), column.name, contains=True)
        _raise_outside(ids[bad].as_py(), column, where, trained)


def _validate_weights(table: pa.Table, column: SparseColumn, path: str | os.PathLike[str], first_row: int) -> None:
    name = str(column.weights)
    num_ids = np.concatenate(
        [np.zeros(0, np.int64), *(pooling_factors(chunk) for _, chunk in _chunks(table, column.name, 0))]
    )
    for start, chunk in _chunks(table, name, 0):
        num_weights = pooling_factors(chunk)
        expected = num_ids[start : start + len(chunk)]
        if not np.array_equal(num_weights, expected):
            row = _first(num_weights != expected)
            raise InputError(
                f"{_locate(path, first_row + start + row, name)} has {num_weights[row]} weights, but "
                f"{column.name!r} has {expected[row]} ids in that row: give each id one weight"
            )
        weights = chunk.flatten()
        values = weights.to_numpy(zero_copy_only=False)
        for limit, valid in (
            ("weights are finite float32 numbers", _is_finite_float32(values)),
            (_WEIGHT_LIMIT, _stays_nonzero(values)),
        ):
            if not valid.all():
                bad = _first(~valid)
                where = _locate(path, first_row + start + _row_of(num_weights, bad), name, contains=True)
                raise InputError(f"{where} {weights[bad].as_py()}, but {limit}: repair the value")


def _chunks(table: pa.Table, name: str, first_row: int) -> Iterator[tuple[int, pa.Array]]:
    for chunk in table.column(name).chunks:
        yield first_row, chunk
        first_row += len(chunk)


def _first_outside(ids: Shaped[np.ndarray, " ids"], num_rows: int) -> int | None:
    """Position of the first id outside [0, num_rows); minimum and maximum first, since all are nearly always inside."""
    if not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < num_rows):
        return None
    return _first((ids < 0) | (ids >= num_rows))


def _raise_outside(value: int, column: SparseColumn, where: str, trained: bool) -> None:
    or_raise = f", or raise num_rows of {column.name!r} in {CARD_FILE}" if value >= 0 and not trained else ""
    raise InputError(
        f"{where} {'' if column.bag else 'is '}{value}, but ids lie in [0, {column.num_rows}): repair the id{or_raise}"
    )


def _is_finite_float32(values: Shaped[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    # The loader narrows to float32, where a large float64 becomes infinite.
    with np.errstate(over="ignore"):
        return np.isfinite(values.astype(np.float32, copy=False))


def _is_finite_normalised(values: Shaped[np.ndarray, " n"], column: DenseColumn) -> Bool[np.ndarray, " n"]:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        # Normalising keeps their order: where the least and the greatest stay finite, all do. A NaN is both.
        if values.size and np.isfinite(normalised(np.array([values.min(), values.max()]), column)).all():
            return np.ones(len(values), bool)
        return np.isfinite(normalised(values, column))


def _stays_nonzero(values: Shaped[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether narrowing keeps a weight from becoming 0: a sample of weight 0 does not count."""
    with np.errstate(over="ignore"):
        return (values == 0) | (values.astype(np.float32, copy=False) != 0)


def _nulls(array: pa.Array) -> Bool[np.ndarray, " n"]:
    return array.is_null().to_numpy(zero_copy_only=False)


def _first(flags: Bool[np.ndarray, " n"]) -> int:
    return int(np.argmax(flags))


def _row_of(lengths: Int[np.ndarray, " rows"], position: int) -> int:
    """The row whose bag holds the value at that position of the flattened bags."""
    return int(np.searchsorted(np.cumsum(lengths), position, side="right"))


def _locate(path: str | os.PathLike[str], row: int, column: str, *, contains: bool = False) -> str:
    return f"{os.fspath(path)}, row {row}: {column!r}{' holds' if contains else ''}"


def _require(
    schema: pa.Schema, name: str, is_usable, expected: str, path: str | os.PathLike[str], trained: bool
) -> None:
    indices = schema.get_all_field_indices(name)
    if not indices:
        fix = "give it; the samples have" if trained else "write it, or take it off the card; the file has"
        raise InputError(f"{os.fspath(path)}: column {name!r} of {CARD_FILE} is missing: {fix} {schema.names}")
    if len(indices) > 1:
        raise InputError(f"{os.fspath(path)}: column {name!r} is there {len(indices)} times: keep one")
    kind = schema.field(indices[0]).type
    if not is_usable(kind):
        or_number = ", or number its values as docs/data.md does" if _is_text(kind) else ""
        raise InputError(f"{os.fspath(path)}: column {name!r} is {kind}, but must be {expected}: cast it{or_number}")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    return any(
        of(kind)
        for of in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_dictionary)
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_list_of(is_element):
    def is_usable(kind: pa.DataType) -> bool:
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return is_list and is_element(kind.value_type)

    return is_usable
