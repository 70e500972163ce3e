"""How rows begin: a function of (seed, table, row, column) and of nothing else, whatever the plan.

A device fills its part of a store block by block. Each unit of 128 elements belongs to one shard, since shards begin on
lines: its shard is found by bisection, so the program does not grow with tables or devices.

Letters: W devices, S shards of the fullest device, T shards of the store, L lines of a block, U units of a line.
"""

import bisect
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from pallas_kernels import rounding
from pallas_kernels.zeros import zeros
from sharding.layout import StoreLayout
from sharding.words import multiply_add

UNIT = 128
# Beside the store, a block's temporary arrays take a few times this.
_BLOCK_ELEMENTS = 2**19
# Beyond the last unit that a store can have.
_NOWHERE = np.int32(2**31 - 1)
# Rows beyond this need a second word.
_ONE_WORD = 2**31 - 1


def initial_store(
    store: StoreLayout, seed: UInt32[Array, ""], device: Int32[Array, ""], *, low_halves: bool = False
) -> Shaped[Array, "lines_per_device line"]:
    """One device's lines of a store before any training: uniform, normal or constant rows, zeros elsewhere.

    Args:
        store: Layout of the store.
        seed: Seed of the run.
        device: Number of the device.
        low_halves: Of split weights, the other array: what their bfloat16 lacks.

    Returns:
        The lines. Uniform: ``scale * (2u - 1)`` with u in [0, 1) from 24 random bits; normal:
        ``scale * sqrt(2) * erfinv(2u - 1)``.
    """
    num_lines = min(_BLOCK_ELEMENTS // store.line_elements, store.lines_per_device)

    def fill(block: Int32[Array, ""], lines: Shaped[Array, "lines line"]) -> Shaped[Array, "lines line"]:
        # The last block may overlap the one before: the same values again. A loop counts in 64 bits where JAX has them.
        first = jnp.minimum(jnp.int32(block) * num_lines, store.lines_per_device - num_lines)
        values = initial_lines(store, seed, device, first, num_lines)
        if store.split:
            high, low = rounding.halves(values)
            values = low if low_halves else high
        values = values.astype(lines.dtype)
        return jax.lax.dynamic_update_slice(lines, values, (first, jnp.int32(0)))

    dtype = jnp.uint16 if low_halves else store.dtype
    empty = zeros((store.lines_per_device, store.line_elements), dtype)
    return jax.lax.fori_loop(0, -(-store.lines_per_device // num_lines), fill, empty) if num_lines else empty


def _shards_of_devices(store: StoreLayout) -> tuple[Int32[np.ndarray, "W S"], Int32[np.ndarray, "W S"]]:
    """The first unit of each shard of each device, rising, and the shard's number in the store."""
    of_devices: list[list[tuple[int, int]]] = [[] for _ in range(store.num_devices)]
    for number, shard in enumerate(store.shards):
        for of_device in of_devices[shard.owners]:
            bisect.insort(of_device, (shard.first_row * shard.width // UNIT, number))
    shape = store.num_devices, max(len(of_device) for of_device in of_devices)
    starts, numbers = np.full(shape, _NOWHERE, np.int32), np.zeros(shape, np.int32)
    for device, of_device in enumerate(of_devices):
        for place, (start, number) in enumerate(of_device):
            starts[device, place], numbers[device, place] = start, number
    return starts, numbers


def initial_lines(
    store: StoreLayout,
    seed: UInt32[Array, ""],
    device: Int32[Array, ""],
    first_line: Int32[Array, ""],
    num_lines: int,
) -> Float[Array, "L line"]:
    """Lines ``first_line`` to ``first_line + num_lines - 1`` of those that `initial_store` makes, as float32."""
    starts, numbers = (jnp.asarray(array)[device] for array in _shards_of_devices(store))
    shards, tables = store.shards, [shard.table for shard in store.shards]
    units_per_line = store.line_elements // UNIT
    unit = first_line * units_per_line + jnp.arange(num_lines * units_per_line, dtype=jnp.int32)
    place = jnp.searchsorted(starts, unit, side="right").astype(jnp.int32) - 1
    clipped = jnp.maximum(place, 0)
    number, offset = numbers[clipped], unit - starts[clipped]

    def of_unit(values: list[int] | list[float] | list[bool], dtype: type) -> Array:
        return jnp.asarray(np.array(values, dtype))[number][:, None]

    # A unit holds several narrow rows, or a part of a wide one.
    rows_per_unit = of_unit([max(1, UNIT // shard.width) for shard in shards], np.int32)
    units_per_row = of_unit([max(1, shard.width // UNIT) for shard in shards], np.int32)
    columns_per_row = of_unit([min(UNIT, shard.width) for shard in shards], np.int32)
    shift = of_unit([int(math.log2(min(UNIT, shard.width))) for shard in shards], np.int32)
    element = jnp.arange(UNIT, dtype=jnp.int32)[None, :]
    row = offset[:, None] // units_per_row * rows_per_unit + (element >> shift)
    column = offset[:, None] % units_per_row * UNIT + (element & (columns_per_row - 1))

    # Owner o of M holds the rows o, o + M, o + 2M, ...: one more than others do, if it is among the first of them.
    spread = of_unit([not shard.replicated for shard in shards], np.bool_)
    owner = jnp.where(spread, device - of_unit([shard.first_device for shard in shards], np.int32), 0)
    full = of_unit([shard.table.num_rows // shard.row_stride for shard in shards], np.int32)
    rest = of_unit([shard.table.num_rows % shard.row_stride for shard in shards], np.int32)
    exists = (place[:, None] >= 0) & (row < full + (owner < rest).astype(jnp.int32))
    exists &= column < of_unit([shard.num_columns for shard in shards], np.int32)

    stride = of_unit([shard.row_stride for shard in shards], np.uint32)
    words = _logical_row(
        row.astype(jnp.uint32), stride, owner.astype(jnp.uint32), max(table.num_rows for table in tables)
    )
    names = of_unit([table.stable_id for table in tables], np.uint32)
    keys = rounding.row_key(seed, jnp.uint32(0), names, words)
    table_column = column + of_unit([shard.first_column for shard in shards], np.int32)
    unit_interval = rounding.uniform(rounding.column_bits(keys, table_column.astype(jnp.uint32)))

    symmetric = 2.0 * unit_interval - 1.0
    scale = of_unit([table.initializer.scale_for(table.num_rows) for table in tables], np.float32)
    values = scale * symmetric
    kinds = [table.initializer.kind for table in tables]
    if "normal" in kinds:
        # The open interval: erfinv of exactly -1 is infinite.
        normal = scale * np.float32(np.sqrt(2.0)) * jax.lax.erf_inv(symmetric + np.float32(2.0**-24))
        values = jnp.where(of_unit([kind == "normal" for kind in kinds], np.bool_), normal, values)
    if "constant" in kinds:
        values = jnp.where(of_unit([kind == "constant" for kind in kinds], np.bool_), scale, values)
    return jnp.where(exists, values, 0.0).reshape(num_lines, store.line_elements)


def _logical_row(
    row: UInt32[Array, "n 128"], stride: UInt32[Array, "n 1"], owner: UInt32[Array, "n 1"], most_rows: int
) -> UInt32[Array, "n 128 words"]:
    """``row * stride + owner`` in one word, or in two, low first, where a table needs them."""
    if most_rows <= _ONE_WORD:
        return (row * stride + owner)[..., None]
    return multiply_add(row, stride, owner)
