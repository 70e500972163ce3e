"""Logical rows of a table, whatever the plan: read to the host, and overwritten.

Every process of a job calls these, and with the same arguments; each gets all the rows that it asks for. Blocks are
bounded and their sizes are powers of two, so that calls share a few compiled programs.

Letters: n rows of a block, w stored width.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int32, Int64, Shaped, UInt16, UInt32

from pallas_kernels import rounding
from pallas_kernels.stores import MOST_ROWS, place_of_rows, rows_view
from sharding.errors import InputError
from sharding.groups import Shard
from sharding.layout import LOW_HALVES, Layout, StoreLayout
from sharding.mesh import AXES, BY_DEVICE, REPLICATED, device_number
from sharding.state import TableState

# Of one block on its way between host and devices.
BLOCK_BYTES = 16 * 2**20


def read_rows(
    layout: Layout, mesh: Mesh, state: TableState, table: str, rows: Sequence[int] | np.ndarray
) -> Shaped[np.ndarray, "n dim"]:
    """Reads rows of a table to the host.

    Args:
        layout: Where rows lie.
        mesh: The devices.
        state: The tables.
        table: Name of the table.
        rows: Rows to read.

    Returns:
        The rows, [len(rows), dim], in the table's dtype; float32 where weights are split.

    Raises:
        InputError: No such table, or a row outside it.
    """
    store, shards = shards_of(layout, table)
    given = _checked_rows(shards[0], rows)
    arrays = state[store.name]
    weights = _joined(mesh, arrays.weights, shards, given)
    if not store.split:
        return weights
    return joined_halves(weights, _joined(mesh, arrays.element_state[-1], shards, given))


def read_optimizer_state(
    layout: Layout, mesh: Mesh, state: TableState, table: str, rows: Sequence[int] | np.ndarray
) -> dict[str, Shaped[np.ndarray, "n ..."]]:
    """Reads the optimizer state of rows of a table to the host.

    Args:
        layout: Where rows lie.
        mesh: The devices.
        state: The tables.
        table: Name of the table.
        rows: Rows to read.

    Returns:
        By the rule's name for it, state of one number an element as [len(rows), dim], of one a row as [len(rows)].

    Raises:
        InputError: No such table, or a row outside it.
    """
    store, shards = shards_of(layout, table)
    given = _checked_rows(shards[0], rows)
    elements = {
        array.name: _joined(mesh, lines, shards, given)
        for array, lines in zip(store.element_state, state[store.name].element_state, strict=True)
        if array.name != LOW_HALVES
    }
    # Each column slice has its own copy of a row's numbers.
    scalars = {
        array.name: _of_shard(mesh, lines, shards[0], given, width=1, first_row=shards[0].first_scalar)[:, 0]
        for array, lines in zip(store.row_state, state[store.name].row_state, strict=True)
    }
    return elements | scalars


def write_rows(
    layout: Layout, mesh: Mesh, state: TableState, table: str, first_row: int, values: np.ndarray
) -> TableState:
    """Overwrites consecutive rows of a table.

    Args:
        layout: Where rows lie.
        mesh: The devices.
        state: The tables; their arrays are donated.
        table: Name of the table.
        first_row: First row to write.
        values: New rows, [count, dim].

    Returns:
        The tables with those rows.

    Raises:
        InputError: No such table, rows outside it, or another dim.
    """
    store, shards = shards_of(layout, table)
    spec = shards[0].table
    values = np.asarray(values)
    if values.ndim != 2 or values.shape[1] != spec.dim:
        raise InputError(f"rows of shape {values.shape} do not fit table {table!r}; its rows have dim {spec.dim}")
    if not isinstance(first_row, Integral):
        raise InputError(f"the first row to write of table {table!r} is {first_row!r}, but must be a whole number")
    if first_row < 0 or first_row + len(values) > spec.num_rows:
        raise InputError(
            f"rows {first_row} to {first_row + len(values) - 1} are not all in table {table!r}, "
            f"whose rows are 0 to {spec.num_rows - 1}"
        )
    lines, elements = state[store.name].weights, state[store.name].element_state
    for shard in shards:
        for block in _blocks(len(values), shard.width):
            count = block.stop - block.start
            padded = np.zeros((_rounded(count), shard.width), np.float32 if store.split else jnp.dtype(store.dtype))
            columns = slice(shard.first_column, shard.first_column + shard.num_columns)
            padded[:count, : shard.num_columns] = values[block, columns]
            first, phase = divmod(first_row + block.start, shard.row_stride)
            place = (shard.first_row + first, phase, count, shard.first_device, shard.num_owners)
            to = np.array(place, np.int32)
            if store.split:
                padded, low = rounding.halves(jnp.asarray(padded))
                elements = (*elements[:-1], _write_block(elements[-1], low, to, shard.row_stride, mesh))
            lines = _write_block(lines, padded, to, shard.row_stride, mesh)
    return state | {store.name: dataclasses.replace(state[store.name], weights=lines, element_state=elements)}


def joined_halves(high: Shaped[np.ndarray, "n w"], low: UInt16[np.ndarray, "n w"]) -> Float32[np.ndarray, "n w"]:
    """The weights whose halves these are; see `pallas_kernels.rounding.joined`."""
    return ((high.view(np.uint16).astype(np.uint32) << 16) | low).view(np.float32)


def shards_of(layout: Layout, table: str) -> tuple[StoreLayout, tuple[Shard, ...]]:
    """The store of a table, and its shards by column.

    Raises:
        InputError: No such table.
    """
    try:
        return layout.shards(table)
    except KeyError:
        names = sorted({shard.table.name for store in layout.stores for shard in store.shards})
        raise InputError(f"no table {table!r}; tables: {names}") from None


def row_numbers(rows: Sequence[int] | np.ndarray, where: str) -> Int64[np.ndarray, " n"]:
    """Row numbers as an array.

    Args:
        rows: The numbers.
        where: Which rows they are, for the message.

    Raises:
        InputError: They are no list of whole numbers.
    """
    given = np.asarray(rows)
    # Nothing has no type of its own.
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
        raise InputError(
            f"rows of {where} are given as {given.dtype} of shape {given.shape}; give a list of row numbers "
            "(np.flatnonzero makes one of a mask, range of a slice)"
        )
    if given.dtype.kind == "u" and given.max(initial=0) > np.iinfo(np.int64).max:
        raise InputError(f"{where} has no row {given.max()}: no table has 2**63 rows; give numbers of rows that it has")
    return given.astype(np.int64)


def _checked_rows(shard: Shard, rows: Sequence[int] | np.ndarray) -> Int64[np.ndarray, " n"]:
    given = row_numbers(rows, f"table {shard.table.name!r}")
    odd = given[(given < 0) | (given >= shard.table.num_rows)]
    if odd.size:
        raise InputError(
            f"row {odd[0]} is outside table {shard.table.name!r}, whose rows are 0 to {shard.table.num_rows - 1}"
        )
    return given


def _joined(
    mesh: Mesh, lines: Float[Array, "lines line"], shards: Sequence[Shard], rows: Int64[np.ndarray, " n"]
) -> Shaped[np.ndarray, "n dim"]:
    """Rows of the columns of all shards, side by side."""
    result = np.empty((len(rows), shards[0].table.dim), lines.dtype)
    for shard in shards:
        read = _of_shard(mesh, lines, shard, rows, width=shard.width, first_row=shard.first_row)
        columns = slice(shard.first_column, shard.first_column + shard.num_columns)
        result[:, columns] = read[:, : shard.num_columns]
    return result


def _of_shard(
    mesh: Mesh,
    lines: Float[Array, "lines line"],
    shard: Shard,
    rows: Int64[np.ndarray, " n"],
    *,
    width: int,
    first_row: int,
) -> Shaped[np.ndarray, "n w"]:
    """Rows of a shard or, of width 1, their numbers in a store of row-wise state."""
    result = np.empty((len(rows), width), lines.dtype)
    for block in _blocks(len(rows), width):
        count = block.stop - block.start
        owners, places = np.full((2, _rounded(count)), -1, np.int32)
        owners[:count] = shard.first_device + rows[block] % shard.row_stride
        places[:count] = first_row + rows[block] // shard.row_stride
        result[block] = np.asarray(_read_block(lines, owners, places, width, mesh))[:count]
    return result


def _blocks(count: int, width: int) -> Iterator[slice]:
    """Cuts ``count`` rows into blocks of a bounded number of bytes, of float32 or less."""
    size = _rounded(max(1, BLOCK_BYTES // (4 * width)))
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def _rounded(count: int) -> int:
    return 1 << (count - 1).bit_length()


# Compiled, so that no reshaped copy of a store is made.
@partial(jax.jit, static_argnums=(3, 4))
def _read_block(
    lines: Float[Array, "lines line"], owners: Int32[Array, " n"], places: Int32[Array, " n"], width: int, mesh: Mesh
) -> Float[Array, "n w"]:
    def local(
        lines: Float[Array, "lines line"], owners: Int32[Array, " n"], places: Int32[Array, " n"]
    ) -> UInt32[Array, "n w"]:
        view = rows_view(lines, width)
        rows = view.at[place_of_rows(view, places)].get(mode="clip", wrap_negative_indices=False)
        mine = owners == device_number()
        # Added as bits, since as numbers -0 + 0 is 0 and a NaN may change.
        return jax.lax.psum(jnp.where(mine[:, None], _bits(rows).astype(jnp.uint32), jnp.uint32(0)), AXES)

    bits = _on_mesh(local, mesh, (BY_DEVICE, REPLICATED, REPLICATED), REPLICATED)(lines, owners, places)
    return jax.lax.bitcast_convert_type(bits.astype(_bits_dtype(lines)), lines.dtype)


@partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _write_block(
    lines: Float[Array, "lines line"], values: Float[Array, "n w"], place: Int32[Array, "5"], stride: int, mesh: Mesh
) -> Float[Array, "lines line"]:
    """Writes a block of consecutive logical rows.

    Args:
        lines: The store.
        values: The rows, and padding after them.
        place: Where the first row lies: the row of its owner's part, and the owner's number in the shard; the number of
            rows; the first device of the shard, and the number of its owners.
        stride: Rows of the table from one row of an owner to its next.
        mesh: The devices.
    """

    def local(
        lines: Float[Array, "lines line"], values: Float[Array, "n w"], place: Int32[Array, "5"]
    ) -> Float[Array, "lines line"]:
        first, phase, count, first_device, num_owners = place
        view = rows_view(lines, values.shape[1])
        owner = device_number() - first_device
        # The owner's first row is row `skipped` of the block; the next are `stride` apart.
        skipped = (owner - phase) % stride
        start = first + (phase + skipped) // stride
        sliced = view.ndim == 2
        room = min(-(-values.shape[0] // stride), lines.size // values.shape[1])
        # The update writes back what it does not change: also where the store ends before the room does.
        begin = jnp.clip(start, 0, view.shape[0] - room) if sliced else start
        row = skipped + (begin + jnp.arange(room, dtype=jnp.int32) - start) * stride
        mine: Bool[Array, " room"] = (row >= 0) & (row < count) & (owner >= 0) & (owner < num_owners)
        after = values.at[row].get(mode="clip", wrap_negative_indices=False)
        if not sliced:
            # A slice begins at one index of 32 bits, too.
            places = jnp.where(mine, begin + jnp.arange(room, dtype=jnp.int32), MOST_ROWS)
            return view.at[place_of_rows(view, places)].set(after, mode="drop").reshape(lines.shape)
        before = jax.lax.dynamic_slice_in_dim(view, begin, room)
        after = jnp.where(mine[:, None], after, before)
        return jax.lax.dynamic_update_slice_in_dim(view, after, begin, 0).reshape(lines.shape)

    return _on_mesh(local, mesh, (BY_DEVICE, REPLICATED, REPLICATED), BY_DEVICE)(lines, values, place)


def _on_mesh(local: Callable[..., Array], mesh: Mesh, in_specs: object, out_specs: object) -> Callable[..., Array]:
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _bits_dtype(lines: Float[Array, "lines line"]) -> jnp.dtype:
    return jnp.dtype(f"uint{8 * lines.dtype.itemsize}")


def _bits(rows: Float[Array, "n w"]) -> Shaped[Array, "n w"]:
    return jax.lax.bitcast_convert_type(rows, _bits_dtype(rows))
