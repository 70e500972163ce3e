"""Rows from the lines of one layout to those of another, in windows of a bounded number of rows.

Letters: n rows, w stored width, R rows of a table.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int64, Shaped

from sharding.line_files import LineArray, LineFiles, Piece, Reading

# Of all rows of a window, whichever devices they are for.
WINDOW_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PartOfOwner:
    """Rows of one owner of a saved piece, under way: those from ``first`` on."""

    piece: Piece
    first: int
    count: int
    skipped: int
    reading: Reading

    def rows(self) -> Shaped[np.ndarray, "n w"]:
        width = self.piece.width
        flat = self.reading.result().reshape(-1)
        return flat[self.skipped : self.skipped + self.count * width].reshape(-1, width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedArray:
    """An array on disk.

    Attributes:
        array: The array.
        files: Its files.
    """

    array: LineArray
    files: LineFiles

    def begin(self, piece: Piece, owner: int, first: int, stop: int) -> _PartOfOwner:
        """Begins to read those of the table's rows ``first`` to ``stop - 1`` that an owner of a piece has."""
        stride, line = piece.shard.row_stride, self.array.line_elements
        first_place, stop_place = (-(-(row - owner) // stride) for row in (first, stop))
        begin, end = ((piece.first + place) * piece.width for place in (first_place, stop_place))
        reading = self.files.read(piece.shard.first_device + owner, begin // line, -(-end // line))
        return _PartOfOwner(
            piece=piece, first=first_place, count=stop_place - first_place, skipped=begin % line, reading=reading
        )


def copy_lines(saved: SavedArray, buffers: Mapping[int, Shaped[np.ndarray, "lines line"]], first_line: int) -> None:
    """Fills lines of devices with the same lines of the array on disk.

    Args:
        saved: The array, of the same layout.
        buffers: By device, room for equally many of its lines.
        first_line: The first of these lines.
    """
    reading = []
    for device, lines in buffers.items():
        stop = min(first_line + len(lines), saved.array.end(device))
        if first_line < stop:
            reading.append((lines[: stop - first_line], saved.files.read(device, first_line, stop)))
    for lines, read in reading:
        lines[...] = read.result()


def read_saved_rows(saved: SavedArray, table: str, rows: Int64[np.ndarray, " n"]) -> Shaped[np.ndarray, "n ..."]:
    """Reads rows of a table by number.

    Args:
        saved: The array.
        table: Name of the table.
        rows: Rows that it has.

    Returns:
        [n, dim], or [n] of row-wise state.
    """
    pieces = saved.array.pieces(table)
    if saved.array.row_state:
        # Each column slice has its own copy.
        pieces = pieces[:1]
    result = np.empty((len(rows), 1 if saved.array.row_state else pieces[0].shard.table.dim), saved.array.dtype)
    window = max(1, WINDOW_BYTES // (4 * result.shape[1]))
    order = np.argsort(rows, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(rows[order] // window)) + 1):
        if not len(places):
            break
        wanted = rows[places]
        for piece in pieces:
            stride = piece.shard.row_stride
            parts = {
                owner: saved.begin(piece, owner, int(wanted[0]), int(wanted[-1]) + 1)
                for owner in np.unique(wanted % stride).tolist()
            }
            columns = slice(piece.first_column, piece.first_column + piece.num_columns)
            for owner, part in parts.items():
                mine = wanted % stride == owner
                result[places[mine], columns] = part.rows()[wanted[mine] // stride - part.first, : piece.num_columns]
    return result[:, 0] if saved.array.row_state else result


def fill_lines(
    saved: SavedArray,
    array: LineArray,
    buffers: Mapping[int, Shaped[np.ndarray, "lines line"]],
    first_line: int,
) -> None:
    """Fills lines of devices with the rows that lie there.

    Args:
        saved: The array of the old layout.
        array: That of the new one.
        buffers: By device, zeros for equally many of its lines.
        first_line: The first of these lines.
    """
    num_elements = next(iter(buffers.values())).size
    begin = first_line * array.line_elements
    for piece in array.pieces():
        owners = [device - piece.shard.first_device for device in buffers if _holds(piece, device)]
        # Rows of an owner that have elements in the buffer.
        first = max(0, (begin - piece.first_element) // piece.width)
        stop = min(piece.shard.rows_per_owner, -(-(begin + num_elements - piece.first_element) // piece.width))
        window = max(1, WINDOW_BYTES // (4 * piece.width * piece.shard.row_stride))
        for start in range(first, stop if owners else first, window):
            rows = _window(saved, array.dtype, piece, owners, start, min(start + window, stop))
            at = piece.first_element + start * piece.width - begin
            for owner, of_owner in rows.items():
                flat = of_owner.reshape(-1)
                low, high = max(0, at), min(num_elements, at + flat.size)
                buffers[piece.shard.first_device + owner].reshape(-1)[low:high] = flat[low - at : high - at]


def _holds(piece: Piece, device: int) -> bool:
    return piece.shard.owners.start <= device < piece.shard.owners.stop


def _window(
    saved: SavedArray, dtype: np.dtype, piece: Piece, owners: list[int], start: int, stop: int
) -> dict[int, Shaped[np.ndarray, "n w"]]:
    """Rows ``start`` to ``stop - 1`` of owners of a piece."""
    shard = piece.shard
    stride, num_rows = shard.row_stride, shard.table.num_rows
    result = {owner: np.zeros((stop - start, piece.width), dtype) for owner in owners}
    # The first logical row of each owner. Copies of a shard have the same rows.
    firsts = {owner: start * stride + (0 if shard.replicated else owner) for owner in owners}
    for source, to, of in _sources(saved.array, piece):
        old_stride = source.shard.row_stride
        # Every `period` rows of a new owner come from the same old one.
        period = old_stride // math.gcd(stride, old_stride)
        moves = [
            (owner, number, row, row % old_stride)
            for owner, first_row in firsts.items()
            for number, row in enumerate(range(first_row, min(first_row + period * stride, num_rows), stride))
            if number < stop - start
        ]
        last = min(stop * stride, num_rows)
        parts = {old: saved.begin(source, old, start * stride, last) for old in sorted({move[3] for move in moves})}
        rows = {old: part.rows() for old, part in parts.items()}
        for owner, number, row, old in moves:
            # Into every period-th row of the new owner from every step-th of the old one.
            into = result[owner][number::period]
            step = period * stride // old_stride
            taken = rows[old][row // old_stride - parts[old].first :: step]
            count = len(range(row, last, period * stride))
            into[:count, to] = taken[:count, of]
    return result


def _sources(saved: LineArray, piece: Piece) -> list[tuple[Piece, slice, slice]]:
    """Saved pieces that have columns of a piece, with the columns that they share, as columns of each."""
    sources = []
    for source in saved.pieces(piece.shard.table.name):
        first = max(piece.first_column, source.first_column)
        stop = min(piece.first_column + piece.num_columns, source.first_column + source.num_columns)
        if first < stop:
            to, of = (slice(first - held.first_column, stop - held.first_column) for held in (piece, source))
            sources.append((source, to, of))
    # Each column slice has its own copy of row-wise state.
    return sources[:1] if saved.row_state else sources
