"""Tables to and from disk: line stores in chunks of at most 64 MB, and a manifest that says what lies where.

A folder of tables holds one tensorstore array (zarr 3) for each store of weights and of state, written chunk by chunk
so that the host never holds a store twice, and ``manifest.json``, written last: the layout, so that a table can be
read without the model. A folder without a manifest is not complete. Each chunk has a checksum, and one that is missing
or damaged is an error, never zeros.
"""

import json
import os
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jaxtyping import Array, Float, Int32, Int64

from sharding.embedding import ShardedTables
from sharding.errors import InputError
from sharding.layout import LINE_BYTES
from sharding.state import TableState

MANIFEST = "manifest.json"
CHUNK_BYTES = 64 * 2**20
# Chunks under way between device and disk.
CHUNKS_IN_FLIGHT = 2
_LINES_PER_CHUNK = CHUNK_BYTES // LINE_BYTES


def save_tables(tables: ShardedTables, state: TableState, directory: str | os.PathLike[str]) -> None:
    """Writes all tables and their optimizer state.

    Args:
        tables: The tables.
        state: Their state.
        directory: A new folder.

    Raises:
        FileExistsError: The folder exists.
    """
    folder = Path(directory)
    folder.mkdir(parents=True)
    for name, lines in _named_stores(state):
        _write_store(folder / name, lines)
    partial_manifest = folder / (MANIFEST + ".partial")
    partial_manifest.write_text(json.dumps(_manifest(tables), indent=1) + "\n")
    partial_manifest.replace(folder / MANIFEST)


def restore_tables(tables: ShardedTables, directory: str | os.PathLike[str]) -> TableState:
    """Reads what `save_tables` wrote.

    Args:
        tables: Tables laid out as they were when saved.
        directory: The folder.

    Returns:
        Their state, bit for bit.

    Raises:
        InputError: The folder is not a complete folder of tables, holds tables of another layout, or is damaged.
    """
    folder = Path(directory)
    saved, expected = read_manifest(folder), _manifest(tables)
    if saved != expected:
        difference = _difference(saved, expected)
        raise InputError(f"{folder}: {difference}; use the configuration that the tables were saved with")
    shapes = tables.abstract_state()
    return jax.tree.unflatten(
        jax.tree.structure(shapes), [_read_store(folder / name, shape) for name, shape in _named_stores(shapes)]
    )


def read_table(
    directory: str | os.PathLike[str], name: str, rows: slice | np.ndarray | None = None
) -> Float[np.ndarray, "rows dim"]:
    """Reads a table's weights from disk by name and logical row, without the model.

    Args:
        directory: Folder that `save_tables` wrote.
        name: Name of the table.
        rows: Which rows; all unless given.

    Returns:
        The rows, in the table's dtype.

    Raises:
        InputError: The folder is not complete or damaged, has no such table, or the table no such row.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    if name not in manifest["tables"]:
        raise InputError(f"{folder}: no table {name!r}; it holds {list(manifest['tables'])}")
    entry = manifest["tables"][name]
    num_rows, width = entry["num_rows"], entry["width"]
    wanted = _wanted_rows(slice(None) if rows is None else rows, num_rows, f"{folder}: table {name!r}")
    line_elements = LINE_BYTES // jnp.dtype(entry["dtype"]).itemsize
    path = folder / _file_name("weights", entry["store"])
    store = _open(path)
    result = np.empty((len(wanted), entry["dim"]), jnp.dtype(entry["dtype"]))
    rows_per_chunk = max(1, CHUNK_BYTES // (width * result.itemsize))
    for chunk in range(0, num_rows, rows_per_chunk):
        places = np.flatnonzero((wanted >= chunk) & (wanted < chunk + rows_per_chunk))
        if not len(places):
            continue
        first = (entry["first_row"] + wanted[places].min()) * width
        last = (entry["first_row"] + wanted[places].max() + 1) * width
        lines = _chunk(store[first // line_elements : -(-last // line_elements)].read(), path)
        view = np.asarray(lines).reshape(-1)[first % line_elements :]
        view = view[: (len(view) // width) * width].reshape(-1, width)
        result[places] = view[wanted[places] - wanted[places].min(), : entry["dim"]]
    return result


def _wanted_rows(rows: slice | np.ndarray, num_rows: int, where: str) -> Int64[np.ndarray, " n"]:
    if isinstance(rows, slice):
        return np.arange(*rows.indices(num_rows), dtype=np.int64)
    wanted = np.asarray(rows, np.int64)
    odd = wanted[(wanted < 0) | (wanted >= num_rows)]
    if odd.size:
        raise InputError(f"{where} has no row {odd[0]}; its rows are 0 to {num_rows - 1}")
    return wanted


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the manifest of a folder of tables.

    Args:
        directory: Folder that `save_tables` wrote.

    Returns:
        ``{"stores": {name: shape and dtype}, "tables": {name: where it lies}}``.

    Raises:
        InputError: There is none, so the folder is not complete, or it is damaged.
    """
    path = Path(directory, MANIFEST)
    try:
        manifest = json.loads(path.read_text())
        if {"stores", "tables"} - set(manifest):
            raise ValueError('no "stores" and "tables" in it')
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a complete folder of tables ({error}); use another checkpoint") from error
    return manifest


def load_initial_values(tables: ShardedTables, state: TableState) -> TableState:
    """Overwrites the rows of tables that begin with a file's values, block by block.

    Args:
        tables: The tables.
        state: Their state; its arrays are donated.

    Returns:
        The state with those rows.

    Raises:
        InputError: A file that cannot be read as .npy, or whose shape or values do not fit its table.
    """
    for spec in tables.tables:
        if spec.initial_values is None:
            continue
        where = f"{spec.initial_values}: initial values of table {spec.name!r}"
        try:
            values = np.load(spec.initial_values, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{where} cannot be read ({error}); give a .npy file") from error
        if not isinstance(values, np.ndarray):
            values.close()
            raise InputError(f"{where} are several arrays; give a .npy file of one")
        if values.shape != (spec.num_rows, spec.dim):
            raise InputError(f"{where} have shape {values.shape}; the table is [{spec.num_rows}, {spec.dim}]")
        if values.dtype.kind not in "fiu":
            raise InputError(f"{where} are {values.dtype}; give numbers, such as float32")
        rows_per_block = max(1, CHUNK_BYTES // (4 * spec.dim))
        for first in range(0, spec.num_rows, rows_per_block):
            with np.errstate(over="ignore"):
                block = values[first : first + rows_per_block].astype(jnp.dtype(spec.dtype))
            # As float32, since numpy does not know bfloat16.
            finite = np.isfinite(block.astype(np.float32)).all(axis=1)
            if not finite.all():
                row = first + int(np.flatnonzero(~finite)[0])
                raise InputError(f"{where} are not finite in row {row} as {spec.dtype}; give finite numbers")
            state = tables.write_rows(state, spec.name, first, block)
    return state


def _named_stores(state: TableState) -> Iterator[tuple[str, Any]]:
    """Names that serve as file names, with the leaves, in the order of the state's own leaves."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        kind, store, *number = path
        yield _file_name(kind.name, store.key, *(str(part.idx) for part in number)), leaf


def _file_name(kind: str, store: str, *number: str) -> str:
    return ".".join((kind, store, *number))


def _manifest(tables: ShardedTables) -> dict[str, Any]:
    return {
        "stores": {
            name: {"shape": list(shape.shape), "dtype": str(shape.dtype)}
            for name, shape in _named_stores(tables.abstract_state(sharded=False))
        },
        "tables": {
            shard.table.name: {
                "store": store.name,
                "dtype": store.dtype,
                "num_rows": shard.table.num_rows,
                "dim": shard.table.dim,
                "width": shard.width,
                "first_row": shard.first_row,
                "first_scalar": shard.first_scalar,
            }
            for store in tables.layout.stores
            for shard in store.shards
        },
    }


def _difference(saved: dict[str, Any], expected: dict[str, Any]) -> str:
    """The first difference between two manifests, in words."""
    for name in sorted(set(saved["tables"]) | set(expected["tables"])):
        was, now = saved["tables"].get(name), expected["tables"].get(name)
        if was is None or now is None:
            here, there = ("model", "checkpoint") if was is None else ("checkpoint", "model")
            return f"table {name!r} is in the {here}, but not in the {there}"
        for field in now:
            if was.get(field) != now[field]:
                return f"table {name!r} has {field} {was.get(field)} in the checkpoint, but {now[field]} in the model"
    return "the stores of the checkpoint have other shapes than the model's"


def _spec(path: Path) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        # Else a chunk that is missing would be one of zeros.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def _open(path: Path) -> ts.TensorStore:
    try:
        return ts.open(_spec(path), open=True, read=True).result()
    except ValueError as error:
        raise InputError(f"{path}: cannot be opened ({_brief(error)}); use another checkpoint") from error


def _chunk(reading: Any, path: Path) -> np.ndarray:
    """Waits for lines under way from disk."""
    try:
        return np.asarray(reading.result())
    except ValueError as error:
        raise InputError(f"{path}: is damaged ({_brief(error)}); use another checkpoint") from error


def _brief(error: ValueError) -> str:
    return str(error).splitlines()[0][:200]


def _write_store(path: Path, lines: Float[Array, "lines line"]) -> None:
    num_lines, elements = lines.shape
    metadata = {
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [min(_LINES_PER_CHUNK, num_lines), elements]},
        },
        # No compressor: to one, trained weights are noise.
        "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
    }
    array = ts.open(
        {**_spec(path), "metadata": metadata},
        create=True,
        dtype=ts.dtype(np.dtype(lines.dtype).name),
        shape=lines.shape,
    ).result()
    writing: deque[Any] = deque()
    for first in range(0, num_lines, _LINES_PER_CHUNK):
        if len(writing) == CHUNKS_IN_FLIGHT:
            writing.popleft().result()
        chunk = np.asarray(lines[first : first + _LINES_PER_CHUNK])
        writing.append(array[first : first + len(chunk)].write(chunk))
    for write in writing:
        write.result()


def _read_store(path: Path, shape: jax.ShapeDtypeStruct) -> Float[Array, "lines line"]:
    array = _open(path)
    if tuple(array.shape) != shape.shape:
        raise InputError(
            f"{path}: has shape {array.shape}, but its manifest says {shape.shape}; use another checkpoint"
        )
    make = partial(jnp.zeros, shape.shape, shape.dtype)
    lines = jax.jit(make, out_shardings=shape.sharding)()
    reading: deque[tuple[int, Any]] = deque()
    starts = deque(range(0, shape.shape[0], _LINES_PER_CHUNK))
    while starts or reading:
        while starts and len(reading) < CHUNKS_IN_FLIGHT:
            first = starts.popleft()
            reading.append((first, array[first : min(first + _LINES_PER_CHUNK, shape.shape[0])].read()))
        first, chunk = reading.popleft()
        lines = _write_lines(lines, _chunk(chunk, path), np.int32(first))
    return lines


@partial(jax.jit, donate_argnums=0)
def _write_lines(
    lines: Float[Array, "lines line"], chunk: Float[Array, "chunk line"], first: Int32[Array, ""]
) -> Float[Array, "lines line"]:
    return jax.lax.dynamic_update_slice(lines, chunk, (first, jnp.int32(0)))
