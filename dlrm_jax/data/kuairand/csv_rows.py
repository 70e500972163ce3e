"""CSV files read in blocks of typed columns; lines that do not fit go to the rejects."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from dlrm_jax.data.rejects import Rejects
from sharding.errors import InputError

_LINES_PER_BLOCK = 65_536


def read_csv_blocks(
    path: str | os.PathLike[str],
    columns: Mapping[str, type[pl.DataType]],
    rejects: Rejects,
    *,
    required: Sequence[str],
    faults: Sequence[tuple[pl.Expr, str]] = (),
) -> Iterator[pl.DataFrame]:
    """Reads the columns of a CSV file with a header, 65,536 lines at a time.

    One line is one row: a quoted field may hold commas but no line break. An empty field is null.

    Args:
        path: The file.
        columns: Columns to read, each with its type; others are skipped.
        rejects: Counts good lines and is given malformed ones: a wrong number of fields, a field that its type cannot
            hold, an empty field of a required column, or a fault.
        required: Columns that may not be empty.
        faults: Conditions that make a row malformed, each with the reason to write down.

    Yields:
        The good rows of a block, and with them ``line``: the text of the whole line.

    Raises:
        InputError: The file cannot be read, or lacks a column.
    """
    path = Path(path)
    lines = _lines(path)
    header = _fields(next(lines, "")) or []
    missing = [name for name in columns if name not in header]
    if missing:
        raise InputError(f"{path}: column {missing[0]!r} is missing; the header has {header}")
    places = [header.index(name) for name in columns]
    rows: list[tuple[object, ...]] = []
    for number, text in enumerate(lines, start=2):
        fields = _fields(text)
        if fields is None:
            rejects.add(path, number, "quotes do not match", text)
        elif len(fields) != len(header):
            rejects.add(path, number, f"{len(fields)} fields instead of {len(header)}", text)
        else:
            rows.append((number, text.rstrip("\r\n"), *(fields[place] or None for place in places)))
        if len(rows) == _LINES_PER_BLOCK:
            yield _typed(rows, path, columns, rejects, required, faults)
            rows = []
    yield _typed(rows, path, columns, rejects, required, faults)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
            yield from file
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give the folder of the published files"
        ) from error


def _fields(text: str) -> list[str] | None:
    text = text.rstrip("\r\n")
    if '"' not in text:
        return text.split(",")
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error:
        return None


def _typed(
    rows: list[tuple[object, ...]],
    path: Path,
    columns: Mapping[str, type[pl.DataType]],
    rejects: Rejects,
    required: Sequence[str],
    faults: Sequence[tuple[pl.Expr, str]],
) -> pl.DataFrame:
    schema = {"number": pl.Int64, "line": pl.String} | dict.fromkeys(columns, pl.String)
    texts = pl.DataFrame(rows, schema=schema, orient="row")
    typed = texts.with_columns(pl.col(name).cast(kind, strict=False) for name, kind in columns.items())
    floats = [name for name, kind in columns.items() if kind.is_float()]
    typed = typed.with_columns(pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name) for name in floats)
    reasons = [(typed[name].is_null() & texts[name].is_not_null(), f"{name} is not a number") for name in columns]
    reasons += [(texts[name].is_null(), f"{name} is empty") for name in required]
    reasons += [(typed.select(fault.fill_null(False)).to_series(), reason) for fault, reason in faults]
    malformed = pl.repeat(False, typed.height, eager=True)
    for condition, reason in reasons:
        for number, text in typed.filter(condition & ~malformed).select("number", "line").iter_rows():
            rejects.add(path, number, reason, text)
        malformed |= condition
    good = typed.filter(~malformed)
    rejects.accept(good.height)
    return good.drop("number")
