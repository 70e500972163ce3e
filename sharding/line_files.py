"""Lines on disk: the arrays of a `TableState`, one tensorstore array (zarr 3) each.

An array is ``[device, line of the device, element]``. Lines that every device has alike, at the beginning of each
device's part, are written once, to an array of their own. A file holds a chunk of one device's lines, so it has one
writer; inside, each inner chunk has a checksum and can be read alone. One that is missing or damaged is an error, never
zeros. There is no compressor: to one, trained weights are noise.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jaxtyping import Shaped

from pallas_kernels import Stores
from sharding.errors import InputError
from sharding.groups import Shard
from sharding.layout import LINE_BYTES, Layout, StoreLayout
from sharding.state import TableState

# Of the chunks that a process writes at a time, one for each of its devices.
CHUNK_BYTES = 64 * 2**20
# Lines of an inner chunk: 256 KB.
INNER_LINES = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Columns of a table in one array of the state: a shard's rows, or their numbers of row-wise state.

    Attributes:
        shard: The shard.
        first: First row in each owner's part, seen as ``[-1, width]``.
        width: Elements of a row.
        first_column: First column.
        num_columns: Columns.
    """

    shard: Shard
    first: int
    width: int
    first_column: int
    num_columns: int

    @property
    def first_element(self) -> int:
        """Its first element in each owner's part."""
        return self.first * self.width

    @property
    def end_element(self) -> int:
        """One past its last element in each owner's part."""
        return (self.first + self.shard.rows_per_owner) * self.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineArray:
    """One array of a `TableState`, and where it lies on disk.

    Attributes:
        name: Its name among the state's arrays, and that of its folder.
        store: Its store.
        row_state: Whether it has one number a row.
        dtype: Type of its elements.
        lines_per_device: Lines of each device.
    """

    name: str
    store: StoreLayout
    row_state: bool
    dtype: np.dtype
    lines_per_device: int

    @property
    def line_elements(self) -> int:
        """Elements of a line."""
        return LINE_BYTES // self.dtype.itemsize

    def pieces(self, table: str | None = None) -> tuple[Piece, ...]:
        """What lies in it: of one table, or of all."""
        return tuple(
            Piece(shard=shard, first=shard.first_scalar, width=1, first_column=0, num_columns=1)
            if self.row_state
            else Piece(
                shard=shard,
                first=shard.first_row,
                width=shard.width,
                first_column=shard.first_column,
                num_columns=shard.num_columns,
            )
            for shard in self.store.shards
            if table is None or shard.table.name == table
        )

    @property
    def replicated_lines(self) -> int:
        """Lines, from the first, that all devices have alike."""
        starts = [piece.first_element for piece in self.pieces() if not piece.shard.replicated]
        return min(starts) // self.line_elements if starts else self.lines_per_device

    def end(self, device: int) -> int:
        """One past the last line that a device uses."""
        ends = [
            piece.end_element for piece in self.pieces() if piece.shard.owners.start <= device < piece.shard.owners.stop
        ]
        return -(-max(ends, default=0) // self.line_elements)


def line_arrays(layout: Layout) -> TableState:
    """The arrays of a state in a layout, as `LineArray` in place of each."""
    return {store.name: _arrays_of(store) for store in layout.stores}


def _arrays_of(store: StoreLayout) -> Stores:
    def array(name: str, dtype: str, lines_per_device: int, *, row_state: bool = False) -> LineArray:
        return LineArray(
            name=name, store=store, row_state=row_state, dtype=jnp.dtype(dtype), lines_per_device=lines_per_device
        )

    return Stores(
        weights=array(f"weights.{store.name}", store.dtype, store.lines_per_device),
        element_state=tuple(
            array(f"element_state.{store.name}.{number}", state.dtype, store.state_lines(state.dtype))
            for number, state in enumerate(store.element_state)
        ),
        row_state=tuple(
            array(f"row_state.{store.name}.{number}", state.dtype, store.scalar_lines_per_device, row_state=True)
            for number, state in enumerate(store.row_state)
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """A tensorstore array: lines ``first`` to ``stop - 1`` of each device, or of all alike."""

    path: Path
    num_devices: int
    first: int
    stop: int

    @property
    def num_lines(self) -> int:
        return self.stop - self.first


def _parts(folder: Path, array: LineArray) -> tuple[_Part, ...]:
    alike, lines = array.replicated_lines, array.lines_per_device
    parts = (
        _Part(path=folder / f"{array.name}.replicated", num_devices=1, first=0, stop=alike),
        _Part(path=folder / array.name, num_devices=array.store.num_devices, first=alike, stop=lines),
    )
    return tuple(part for part in parts if part.num_lines)


class LineFiles:
    """The files of one `LineArray`."""

    def __init__(self, folder: Path, array: LineArray, context: ts.Context | None = None):
        """Opens them.

        Args:
            folder: Folder of the tables.
            array: The array, as it was saved.
            context: What arrays share in tensorstore: the cache.

        Raises:
            InputError: They are missing or damaged, or have another shape.
        """
        self._parts = [(part, _open(part, array, context)) for part in _parts(folder, array)]

    def chunks(self) -> Iterator[tuple[int, int, bool]]:
        """The chunks of each device: first line, one past the last, and whether all devices have them alike."""
        for part, files in self._parts:
            size = (files.chunk_layout.write_chunk.shape or files.shape)[1] or part.num_lines
            for first in range(part.first, part.stop, size):
                yield first, min(first + size, part.stop), part.num_devices == 1

    def write(self, device: int, first: int, lines: Shaped[np.ndarray, "n line"]) -> Any:
        """Begins to write a chunk of a device; returns what to wait for."""
        for part, files in self._parts:
            if part.first <= first < part.stop:
                row = device if part.num_devices > 1 else 0
                return files[row, first - part.first : first - part.first + len(lines)].write(lines)
        raise ValueError(f"line {first} is in no file")

    def read(self, device: int, first: int, stop: int) -> "Reading":
        """Begins to read lines of a device."""
        reading = []
        for part, files in self._parts:
            begin, end = max(first, part.first), min(stop, part.stop)
            if begin < end:
                row = device if part.num_devices > 1 else 0
                reading.append((files[row, begin - part.first : end - part.first].read(), part.path))
        return Reading(reading)


class Reading:
    """Lines under way from disk."""

    def __init__(self, parts: Sequence[tuple[Any, Path]]):
        """Remembers what to wait for, and the file that each part comes from."""
        self._parts = parts

    def result(self) -> Shaped[np.ndarray, "n line"]:
        """Waits for them.

        Raises:
            InputError: A file is damaged.
        """
        lines = []
        for part, path in self._parts:
            try:
                lines.append(np.asarray(part.result()))
            except ValueError as error:
                raise InputError(f"{path}: is damaged ({_brief(error)}); use another checkpoint") from error
        return lines[0] if len(lines) == 1 else np.concatenate(lines)


def create_files(folder: Path, array: LineArray, writers: int) -> None:
    """Makes the empty files of an array.

    Args:
        folder: Folder of the tables.
        array: The array.
        writers: Devices of a process, each of which writes a chunk at a time.
    """
    most = max(1, CHUNK_BYTES // LINE_BYTES // writers)
    for part in _parts(folder, array):
        inner = min(INNER_LINES, most, part.num_lines)
        outer = min(most // inner, -(-part.num_lines // inner)) * inner
        checked = [{"name": "bytes"}, {"name": "crc32c"}]
        codec = {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [1, inner, array.line_elements],
                "codecs": checked,
                "index_codecs": checked,
                "index_location": "end",
            },
        }
        grid = {"name": "regular", "configuration": {"chunk_shape": [1, outer, array.line_elements]}}
        ts.open(
            {**_spec(part.path), "metadata": {"chunk_grid": grid, "codecs": [codec]}},
            create=True,
            dtype=ts.dtype(array.dtype.name),
            shape=(part.num_devices, part.num_lines, array.line_elements),
        ).result()


def _open(part: _Part, array: LineArray, context: ts.Context | None) -> ts.TensorStore:
    try:
        files = ts.open(_spec(part.path), open=True, context=context).result()
    except ValueError as error:
        raise InputError(f"{part.path}: cannot be opened ({_brief(error)}); use another checkpoint") from error
    shape = (part.num_devices, part.num_lines, array.line_elements)
    if tuple(files.shape) != shape or files.dtype.name != array.dtype.name:
        raise InputError(
            f"{part.path}: has shape {tuple(files.shape)} of {files.dtype.name}, but its manifest says {shape} of "
            f"{array.dtype.name}; use another checkpoint"
        )
    return files


def _spec(path: Path) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        # Else a chunk that is missing would be one of zeros.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        "recheck_cached_data": "open",
    }


def _brief(error: ValueError) -> str:
    return str(error).splitlines()[0][:200]
