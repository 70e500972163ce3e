"""pooled_lookup as one Pallas Mosaic GPU kernel (Hopper and later).

A *program* (one warpgroup of 128 lanes) pools a few consecutive bags, whose ids are consecutive too. It walks along
those ids in steps of `ids_in_flight`: it loads that many rows straight into registers, and only then adds the first of
them, so that the loads overlap, however short the bags are; the numbers of the next rows are loaded meanwhile. A bag
is never shared between programs: its ids must be added one after the other.

Bytes in flight: at width 128 in float32, 8 rows of 512 bytes a program and, by its 59 registers a lane, eight programs
a processor: 32 kB, or 4.3 MB on 132 processors, of the 4 to 5 MB that 4.8 TB/s at a latency of a microsecond ask for.
Reasoning, not a measurement. Narrow rows are held several times over (`rows.row_layout`), so that instructions and not
memory limit them: a row of 8 to 64 columns costs as many instructions as one of 128.

Letters: n ids, G bags, w width of a row, R rows of the store seen as [-1, w].
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_gpu.rows import (
    FULL_GRID,
    columns_of_program,
    opaque_zero,
    row_layout,
    run_kernel,
    store,
    unfused,
)
from pallas_kernels.stores import named_rows

# Ids of one program, on average: enough that starting it, which waits for memory twice, costs little beside waiting for
# rows; few enough that long bags even out.
_IDS_OF_PROGRAM = 128


def pooled_lookup(
    store: Float[Array, "lines line"],
    rows: Int32[Array, " n"],
    offsets: Int32[Array, " G+1"],
    weights: Float[Array, " n"] | None,
    *,
    width: int,
    longest_bag: int | None,
) -> Float[Array, "G w"]:
    """See `pallas_kernels.pooled_lookup`. A promise of `longest_bag` changes nothing here."""
    del longest_bag
    num_ids, num_bags = rows.shape[0], offsets.shape[0] - 1
    table = store.reshape(-1, width)
    columns = columns_of_program(width)
    bags_of_program = _bags_of_program(num_ids, num_bags)
    body = functools.partial(
        _pool,
        num_rows=named_rows(store, width),
        bags_of_program=bags_of_program,
        # Weights take registers too.
        ids_in_flight=8 if columns * store.dtype.itemsize >= 512 or weights is not None else 16,
    )
    return run_kernel(
        body,
        (table, rows, offsets, weights, opaque_zero(rows)),
        jax.ShapeDtypeStruct((num_bags, width), jnp.float32),
        grid={"columns": width // columns, "program": -(-num_bags // bags_of_program)},
        name="pooled_lookup",
    )


def _bags_of_program(num_ids: int, num_bags: int) -> int:
    """As many bags as have `_IDS_OF_PROGRAM` ids on average, but not so many that processors have no program."""
    return max(1, min(_IDS_OF_PROGRAM * num_bags // num_ids, num_bags // FULL_GRID))


def _pool(operands: tuple, pooled: Any, *, num_rows: int, bags_of_program: int, ids_in_flight: int) -> None:
    """Body of the kernel; the arguments are references to arrays in global memory."""
    table, rows, offsets, weights, zero = operands
    num_ids, num_bags = rows.shape[0], pooled.shape[0]
    columns = columns_of_program(table.shape[1])
    layout = row_layout(columns)
    here = pl.ds(lax.axis_index("columns") * columns, columns)
    nothing = plgpu.layout_cast(jnp.zeros(columns, jnp.float32), layout)
    zero = zero[0]
    first_bag = lax.axis_index("program") * bags_of_program
    last_bag = jnp.minimum(first_bag + bags_of_program, num_bags)
    start, stop = offsets[first_bag], jnp.minimum(offsets[last_bag], num_ids)

    def numbers(position):
        """Rows and weights of the next ids; those of the last id beyond it."""
        places = [jnp.minimum(position + k, num_ids - 1) for k in range(ids_in_flight)]
        return [rows[place] for place in places], [] if weights is None else [weights[place] for place in places]

    def vectors(safe, factors):
        loaded = [plgpu.load(table.at[row, here], layout=layout, optimized=False) for row in safe]
        loaded = [vector.astype(jnp.float32) for vector in loaded]
        if not factors:
            return loaded
        return [unfused(vector * factor, zero) for vector, factor in zip(loaded, factors, strict=True)]

    def close_bags(bag, end, total, *, reached):
        """Writes the bags that end at or before an id."""

        def is_over(carry):
            bag, end, _ = carry
            return (bag < last_bag) & (reached >= end)

        def close(carry):
            bag, _, total = carry
            store(pooled.at[bag, here], total)
            return bag + 1, offsets[jnp.minimum(bag + 2, num_bags)], nothing

        return lax.while_loop(is_over, close, (bag, end, total))

    def step(carry):
        position, (found, factors), bag, end, total = carry
        # Not by a mask: a predicate for each load is more than there are, and the last loads would wait for the first.
        safe = [jnp.clip(row, 0, num_rows - 1) for row in found]
        loaded = vectors(safe, factors)
        following = numbers(position + ids_in_flight)
        are_rows = [row == safe_row for row, safe_row in zip(found, safe, strict=True)]

        def within_one_bag(bag, end, total):
            for vector in loaded:
                total = total + vector
            return bag, end, total

        def across_bags(bag, end, total):
            for k, (vector, is_row) in enumerate(zip(loaded, are_rows, strict=True)):
                bag, end, total = close_bags(bag, end, total, reached=position + k)
                counts = jnp.broadcast_to(is_row & (position + k < stop), vector.shape)
                total = total + lax.select(counts, vector, nothing)
            return bag, end, total

        stays = position + ids_in_flight <= jnp.minimum(end, stop)
        is_plain = functools.reduce(operator.and_, are_rows, stays)
        bag, end, total = lax.cond(is_plain, within_one_bag, across_bags, bag, end, total)
        return position + ids_in_flight, following, bag, end, total

    carry = start, numbers(start), first_bag, offsets[first_bag + 1], nothing
    _, _, bag, end, total = lax.while_loop(lambda carry: carry[0] < stop, step, carry)
    close_bags(bag, end, total, reached=jnp.iinfo(jnp.int32).max)
