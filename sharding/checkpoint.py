"""Tables to and from disk: from any plan on any mesh to any other, in buffers of bounded size.

A folder of tables holds the files of each array of the state (line_files.py) and ``manifest.json``, written last: a
folder without it is not complete. Every process of a job calls these functions, with a folder that all of them see;
each writes and reads what its own devices hold.
"""

import os
from collections import deque
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, Int64, Shaped

from pallas_kernels.zeros import zeros
from sharding import line_files
from sharding.embedding import ShardedTables
from sharding.errors import InputError
from sharding.layout import LINE_BYTES, LOW_HALVES
from sharding.line_files import LineArray, LineFiles, create_files, line_arrays
from sharding.manifest import difference, manifest_of, read_manifest, write_manifest
from sharding.mesh import BY_DEVICE, REPLICATED, sharding_on
from sharding.reshard import SavedArray, copy_lines, fill_lines, read_saved_rows
from sharding.rows import joined_halves, row_numbers
from sharding.state import TableState

CACHE_BYTES = 64 * 2**20
INITIAL_VALUES_BYTES = 64 * 2**20
# Steps under way from devices to disk, of a chunk of each device of a process.
_STEPS_IN_FLIGHT = 2


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
    first_process = jax.process_index() == 0
    exists = folder.exists()
    # No process makes the folder before all have looked.
    _wait_for_others("save_tables: looked")
    if exists:
        raise FileExistsError(f"{folder} exists")
    if "\\" in str(folder):
        raise InputError(f"{folder}: tensorstore takes a backslash for a slash; give a folder without")
    arrays = jax.tree.leaves(line_arrays(tables.layout))
    if first_process:
        folder.mkdir(parents=True)
        for array in arrays:
            create_files(folder, array, writers=_most_devices_of_a_process(tables.mesh))
    _wait_for_others("save_tables: created")
    for array, lines in zip(arrays, jax.tree.leaves(state), strict=True):
        _write_array(folder, array, lines, tables.mesh)
    _wait_for_others("save_tables: written")
    if first_process:
        write_manifest(tables.layout, folder)
    _wait_for_others("save_tables: complete")


def restore_tables(tables: ShardedTables, directory: str | os.PathLike[str]) -> TableState:
    """Reads what `save_tables` wrote, on whatever plan and mesh.

    Args:
        tables: The same tables, on any plan and mesh.
        directory: The folder.

    Returns:
        Their state: every row bit for bit.

    Raises:
        InputError: The folder is not a complete folder of tables, holds other tables, or is damaged.
    """
    folder = Path(directory)
    saved = read_manifest(folder)
    different = difference(saved, tables.layout)
    if different is not None:
        raise InputError(f"{folder}: {different}; use the configuration that the tables were saved with")
    same_layout = manifest_of(saved) == manifest_of(tables.layout)
    context = _cache()
    old, new = line_arrays(saved), line_arrays(tables.layout)
    restored = [
        _read_array(_open(folder, source, context), array, tables.mesh, same_layout=same_layout)
        for source, array in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(new), restored)


def read_table(
    directory: str | os.PathLike[str], name: str, rows: slice | np.ndarray | None = None
) -> Shaped[np.ndarray, "rows dim"]:
    """Reads a table's weights from disk by name and logical row, without the model.

    Args:
        directory: Folder that `save_tables` wrote.
        name: Name of the table.
        rows: Which rows; all unless given.

    Returns:
        The rows, in the table's dtype; float32 where weights are split.

    Raises:
        InputError: The folder is not complete or damaged, has no such table, or the table no such row.
    """
    return _read_logical(Path(directory), name, rows, optimizer_state=False)["weights"]


def read_optimizer_state(
    directory: str | os.PathLike[str], name: str, rows: slice | np.ndarray | None = None
) -> dict[str, Shaped[np.ndarray, "rows ..."]]:
    """Reads a table's optimizer state from disk by name and logical row, without the model.

    Args:
        directory: Folder that `save_tables` wrote.
        name: Name of the table.
        rows: Which rows; all unless given.

    Returns:
        By the rule's name for it, state of one number an element as [rows, dim], of one a row as [rows].

    Raises:
        InputError: The folder is not complete or damaged, has no such table, or the table no such row.
    """
    return _read_logical(Path(directory), name, rows, optimizer_state=True)


def _read_logical(
    folder: Path, name: str, rows: slice | np.ndarray | None, *, optimizer_state: bool
) -> dict[str, Shaped[np.ndarray, "rows ..."]]:
    layout = read_manifest(folder)
    try:
        store, shards = layout.shards(name)
    except KeyError:
        held = sorted(shard.table.name for store in layout.stores for shard in store.shards if not shard.first_column)
        raise InputError(f"{folder}: no table {name!r}; it holds {held}") from None
    num_rows = shards[0].table.num_rows
    wanted = _wanted_rows(slice(None) if rows is None else rows, num_rows, f"{folder}: table {name!r}")
    arrays, context = line_arrays(layout)[store.name], _cache()
    state = [*zip(store.element_state, arrays.element_state, strict=True)]
    state += zip(store.row_state, arrays.row_state, strict=True)
    named = {array.name: lines for array, lines in state if optimizer_state == (array.name != LOW_HALVES)}
    if not optimizer_state:
        named = {"weights": arrays.weights, **named}
    found = {key: read_saved_rows(_open(folder, array, context), name, wanted) for key, array in named.items()}
    if LOW_HALVES in found:
        found["weights"] = joined_halves(found["weights"], found.pop(LOW_HALVES))
    return found


def _wanted_rows(rows: slice | np.ndarray, num_rows: int, where: str) -> Int64[np.ndarray, " n"]:
    if isinstance(rows, slice):
        return np.arange(*rows.indices(num_rows), dtype=np.int64)
    wanted = row_numbers(rows, where)
    odd = wanted[(wanted < 0) | (wanted >= num_rows)]
    if odd.size:
        raise InputError(f"{where} has no row {odd[0]}; its rows are 0 to {num_rows - 1}")
    return wanted


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
        rows_per_block = max(1, INITIAL_VALUES_BYTES // (4 * spec.dim))
        dtype = jnp.dtype("float32" if spec.rounding == "split" else spec.dtype)
        for first in range(0, spec.num_rows, rows_per_block):
            with np.errstate(over="ignore"):
                block = values[first : first + rows_per_block].astype(dtype)
            # As float32, since numpy does not know bfloat16.
            finite = np.isfinite(block.astype(np.float32)).all(axis=1)
            if not finite.all():
                row = first + int(np.flatnonzero(~finite)[0])
                raise InputError(f"{where} are not finite in row {row} as {dtype}; give finite numbers")
            state = tables.write_rows(state, spec.name, first, block)
    return state


def _open(folder: Path, array: LineArray, context: ts.Context) -> SavedArray:
    return SavedArray(array=array, files=LineFiles(folder, array, context))


def _cache() -> ts.Context:
    """Inner chunks that two reads share are read once."""
    return ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def _wait_for_others(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _own_devices(mesh: Mesh) -> dict[int, jax.Device]:
    """This process's devices, by their numbers."""
    own = jax.process_index()
    return {number: device for number, device in enumerate(mesh.devices.flat) if device.process_index == own}


def _most_devices_of_a_process(mesh: Mesh) -> int:
    processes = [device.process_index for device in mesh.devices.flat]
    return max(processes.count(process) for process in processes)


def _write_array(folder: Path, array: LineArray, lines: Float[Array, "lines line"], mesh: Mesh) -> None:
    devices = {device: number for number, device in _own_devices(mesh).items()}
    files, ends = LineFiles(folder, array), {number: array.end(number) for number in devices.values()}
    writing: deque[list[Any]] = deque()
    for first, stop, alike in files.chunks():
        if len(writing) == _STEPS_IN_FLIGHT:
            for write in writing.popleft():
                write.result()
        step = []
        # On all devices at once, so that the program is compiled once.
        for shard in _lines_of_devices(lines, np.int32(first), stop - first, mesh).addressable_shards:
            number = devices[shard.device]
            if number == 0 if alike else first < ends[number]:
                step.append(files.write(number, first, np.asarray(shard.data)))
        writing.append(step)
    for step in writing:
        for write in step:
            write.result()


def _read_array(saved: SavedArray, array: LineArray, mesh: Mesh, *, same_layout: bool) -> Float[Array, "lines line"]:
    shape = (array.lines_per_device, array.line_elements)
    sharding = sharding_on(mesh, BY_DEVICE)
    lines = _zeros(shape, array.dtype, mesh)()
    devices = _own_devices(mesh)
    size = min(max(1, line_files.CHUNK_BYTES // LINE_BYTES // _most_devices_of_a_process(mesh)), array.lines_per_device)
    for start in range(0, array.lines_per_device, size):
        # The last step may overlap the one before: the same lines again.
        first = min(start, array.lines_per_device - size)
        buffers = {number: np.zeros((size, array.line_elements), array.dtype) for number in devices}
        if same_layout:
            copy_lines(saved, buffers, first)
        else:
            fill_lines(saved, array, buffers, first)
        of_devices = [jax.device_put(buffers[number], device) for number, device in devices.items()]
        chunk = jax.make_array_from_single_device_arrays((mesh.size * size, shape[1]), sharding, of_devices)
        lines = _with_lines(lines, chunk, np.int32(first), mesh)
    return lines


@cache
def _zeros(shape: tuple[int, int], dtype: np.dtype, mesh: Mesh) -> Callable[[], Float[Array, "lines line"]]:
    """Makes the lines of all devices, of which each has that shape."""
    # Compiled once for all arrays of a shape.
    local = jax.shard_map(partial(zeros, shape, dtype), mesh=mesh, in_specs=(), out_specs=BY_DEVICE, check_vma=False)
    return jax.jit(local, out_shardings=sharding_on(mesh, BY_DEVICE))


@partial(jax.jit, static_argnums=(2, 3))
def _lines_of_devices(
    lines: Float[Array, "lines line"], first: Int32[Array, ""], count: int, mesh: Mesh
) -> Float[Array, "chunks line"]:
    """Lines ``first`` to ``first + count - 1`` of each device."""

    def local(lines: Float[Array, "lines line"], first: Int32[Array, ""]) -> Float[Array, "chunk line"]:
        return jax.lax.dynamic_slice_in_dim(lines, first, count)

    return jax.shard_map(local, mesh=mesh, in_specs=(BY_DEVICE, REPLICATED), out_specs=BY_DEVICE)(lines, first)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _with_lines(
    lines: Float[Array, "lines line"], chunk: Float[Array, "chunks line"], first: Int32[Array, ""], mesh: Mesh
) -> Float[Array, "lines line"]:
    """The lines with those of a chunk from line ``first`` of each device on."""

    def local(
        lines: Float[Array, "lines line"], chunk: Float[Array, "chunk line"], first: Int32[Array, ""]
    ) -> Float[Array, "lines line"]:
        return jax.lax.dynamic_update_slice_in_dim(lines, chunk, first, 0)

    specs = (BY_DEVICE, BY_DEVICE, REPLICATED)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=BY_DEVICE)(lines, chunk, first)
