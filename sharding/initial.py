"""How rows begin: a function of (seed, table, row, column) and of nothing else.

Letters: R rows of a region (all shards of one width in a store), w stored width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from pallas_kernels import rounding
from sharding.layout import Shard, StoreLayout


def initial_store(store: StoreLayout, seed: UInt32[Array, ""]) -> Float[Array, "lines line"]:
    """The store's lines before any training: uniform, normal or constant rows, zeros between them.

    Args:
        store: Layout of the store.
        seed: Seed of the run.

    Returns:
        The lines. Uniform: ``scale * (2u - 1)`` with u in [0, 1) from 24 random bits; normal:
        ``scale * sqrt(2) * erfinv(2u - 1)``.
    """
    regions, end = [], 0
    for width in sorted({shard.width for shard in store.shards}):
        shards = [shard for shard in store.shards if shard.width == width]
        first = shards[0].first_row * width
        regions.append(jnp.zeros(first - end, store.dtype))
        last = shards[-1].first_row + shards[-1].table.num_rows
        rows = _region(shards, last - shards[0].first_row, width, seed).astype(store.dtype)
        regions.append(rows.reshape(-1))
        end = last * width
    regions.append(jnp.zeros(store.num_elements - end, store.dtype))
    kept = [region for region in regions if region.size]
    flat = kept[0] if len(kept) == 1 else jnp.concatenate(kept)
    return flat.reshape(store.num_lines, store.line_elements)


def _region(shards: list[Shard], num_rows: int, width: int, seed: UInt32[Array, ""]) -> Float[Array, "R w"]:
    first_rows = np.array([shard.first_row - shards[0].first_row for shard in shards], np.int32)

    def of_row(values: list[float] | list[int], dtype: type) -> Array:
        return jnp.asarray(np.array(values, dtype))[slot][:, None]

    row = jnp.arange(num_rows, dtype=jnp.int32)
    slot = jnp.searchsorted(jnp.asarray(first_rows), row, side="right", method="compare_all") - 1
    local = row - jnp.asarray(first_rows)[slot]
    tables = [shard.table for shard in shards]
    scale = of_row([table.initializer.scale_for(table.num_rows) for table in tables], np.float32)
    kinds = [table.initializer.kind for table in tables]

    keys = rounding.row_key(
        seed,
        jnp.uint32(0),
        of_row([table.stable_id for table in tables], np.uint32)[:, 0],
        local.astype(jnp.uint32)[:, None],
    )
    columns = jnp.arange(width, dtype=jnp.uint32)[None, :]
    unit = 2.0 * rounding.uniform(rounding.column_bits(keys[:, None], columns)) - 1.0
    values = scale * unit
    if "normal" in kinds:
        # The open interval: erfinv of exactly -1 is infinite.
        normal = scale * np.float32(np.sqrt(2.0)) * jax.lax.erf_inv(unit + np.float32(2.0**-24))
        values = jnp.where(of_row([kind == "normal" for kind in kinds], np.bool_), normal, values)
    if "constant" in kinds:
        values = jnp.where(of_row([kind == "constant" for kind in kinds], np.bool_), scale, values)
    num_rows_of = of_row([table.num_rows for table in tables], np.int32)
    dims = of_row([table.dim for table in tables], np.int32)
    return jnp.where((local[:, None] < num_rows_of) & (columns.astype(jnp.int32) < dims), values, 0.0)
