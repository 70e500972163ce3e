"""pooled_lookup on SparseCores: every vector subcore gathers the lines of its own bags by an indirect copy, and sums.

Of a store of bfloat16 it gathers the 128 words that hold a segment, from the left and the right half of the pairs of
lines apart; see `mosaic_tpu.lines`.

Letters: n ids, G bags, w width of a row, B bags of a block, C ids of a chunk, L lanes of a vector.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_tpu.lines import (
    LANES,
    RowShape,
    pad_to,
    read_segment,
    row_shape,
    whole_pairs,
    words_of,
)
from pallas_kernels.sparsecore.subcores import rows_within, subcore_mesh, this_subcore
from pallas_kernels.stores import named_rows
from pallas_kernels.target import current_target

# An indirect copy takes at most so many indices; twice as many lines fit into a subcore's memory.
_SEGMENTS_OF_CHUNK = 128
# Bags whose sums one subcore holds before it writes them.
_SEGMENTS_OF_BLOCK = 64
# Chunks whose rows are in memory: the one being summed, the one being gathered, the one on its way; a power of two.
_CHUNKS_HELD = 4
# Semaphores: of lines (two), of rows and weights, of the bounds of bags.
_LINES, _IDS, _BOUNDS, _SEMAPHORES = 0, 2, 3, 4
# From jax 0.12 on, copies from VMEM to HBM have a semaphore of their own, and are not to be given another.
_OWN_SEMAPHORES = inspect.signature(pltpu.async_copy).parameters["sem"].default is None


def pooled_lookup(
    store: Float[Array, "lines line"],
    rows: Int32[Array, " n"],
    offsets: Int32[Array, " G+1"],
    weights: Float[Array, " n"] | None,
    *,
    width: int,
    longest_bag: int | None,
) -> Float[Array, "G w"]:
    """See `pallas_kernels.pooled_lookup`."""
    del longest_bag
    num_ids, num_bags = rows.shape[0], offsets.shape[0] - 1
    shape = row_shape(width)
    mesh = subcore_mesh()
    lanes = plsc.get_sparse_core_info().num_lanes
    bags = rows_within(_SEGMENTS_OF_BLOCK, shape)
    blocks = -(-num_bags // bags)
    chunk = rows_within(_SEGMENTS_OF_CHUNK, shape)
    chunks = -(-num_ids // chunk)
    # Bags of padding are empty. Where not all ids had room, offsets go on beyond those that are there. A scalar is read
    # as the first of a vector, so there is one vector more.
    bounds = jnp.pad(jnp.clip(offsets, 0, num_ids), (0, blocks * bags + 2 * LANES - num_bags), mode="edge")
    streams = [rows] if weights is None else [rows, weights]
    num_lines, halves = shape.segments_per_row, 1 if store.dtype == jnp.float32 else 2
    body = functools.partial(
        _body,
        shape=shape,
        lanes=lanes,
        workers=mesh.size,
        subcores=mesh.num_subcores,
        chunk=chunk,
        bags=bags,
        blocks=blocks,
        num_rows=named_rows(store, width),
        weighted=weights is not None,
        one_by_one=current_target().interpreted,
    )
    kernel = pl.kernel(
        body,
        jax.ShapeDtypeStruct((blocks * bags * num_lines, LANES), jnp.float32),
        mesh=mesh,
        scratch_types=[
            pltpu.VMEM((2 * LANES,), jnp.int32),
            *(pltpu.VMEM((_CHUNKS_HELD * 2 * LANES,), x.dtype) for x in streams),
            pltpu.VMEM((2 * num_lines * halves, chunk + LANES), jnp.int32),
            pltpu.VMEM((2 * num_lines * chunk, LANES), jnp.float32 if halves == 1 else jnp.uint32),
            pltpu.VMEM((bags * num_lines, LANES), jnp.float32),
            pltpu.SemaphoreType.DMA((_SEMAPHORES,)),
        ],
        name="pooled_lookup_on_sparsecore",
        interpret=current_target().interpreted,
    )
    chunked = (pad_to(x, chunks * chunk) for x in streams)
    pooled = kernel(bounds, *chunked, whole_pairs(store))  # pyright: ignore[reportCallIssue]  # It takes `body` for given later.
    return pooled.reshape(blocks * bags, shape.padded_width)[:num_bags, :width]


def _body(
    bounds: jax.Ref,
    *refs: jax.Ref,
    shape: RowShape,
    lanes: int,
    workers: int,
    subcores: int,
    chunk: int,
    bags: int,
    blocks: int,
    num_rows: int,
    weighted: bool,
    one_by_one: bool,
) -> None:
    """What one vector subcore does.

    Args:
        bounds: First id of each bag, and the end of the last.
        refs: Rows of the ids, their weights if any, the store and the pooled rows, in HBM; in VMEM the bounds of two
            blocks, some chunks of rows and of weights, two of line numbers and of lines, and the block's sums;
            semaphores.
        shape: How rows lie on lines.
        lanes: Lanes of a vector.
        workers: Vector subcores of the device.
        subcores: Vector subcores of a core.
        chunk: Ids of a chunk.
        bags: Bags of a block.
        blocks: Blocks of bags.
        num_rows: Rows of the store.
        weighted: Whether there are weights.
        one_by_one: Whether lines are copied one by one: interpret mode has no indirect copies.
    """
    num_streams, num_lines = 1 + weighted, shape.segments_per_row
    streams, (store, out, held_bounds) = refs[:num_streams], refs[num_streams : num_streams + 3]
    words, halves = words_of(store), 1 if store.dtype == jnp.float32 else 2
    held, (numbers, lines, sums, semaphores) = refs[num_streams + 3 : 2 * num_streams + 3], refs[2 * num_streams + 3 :]
    worker = this_subcore(workers, subcores)
    chunk_shift, line_shift = chunk.bit_length() - 1, shape.rows_per_segment.bit_length() - 1
    vectors = min(shape.width, LANES) // lanes

    def place_of_bounds(b: Int32[Array, ""]) -> Int32[Array, ""]:
        return pl.multiple_of((b & 1) * LANES, LANES)

    def read_bounds(b: Int32[Array, ""]) -> Any:
        """The copy of the bounds of the bags of the subcore's block number b."""
        first = pl.multiple_of((worker + b * workers) * bags, bags)
        here = held_bounds.at[pl.ds(place_of_bounds(b), LANES)]
        return pltpu.make_async_copy(bounds.at[pl.ds(first, LANES)], here, semaphores.at[_BOUNDS])

    def first_of(c: Int32[Array, ""]) -> Int32[Array, ""]:
        """Where a chunk's rows and weights begin."""
        return pl.multiple_of((c & (_CHUNKS_HELD - 1)) * (2 * LANES), LANES)

    def each_copy_of_ids(c: Int32[Array, ""], action: Callable) -> None:
        """Starts the copies of a chunk's rows and weights, or waits for them."""
        for stream, buffer in zip(streams, held, strict=True):
            there = stream.at[pl.ds(pl.multiple_of(c * chunk, chunk), chunk)]
            action(pltpu.make_async_copy(there, buffer.at[pl.ds(first_of(c), chunk)], semaphores.at[_IDS]))

    def each_copy(c: Int32[Array, ""], action: Callable) -> None:
        """Starts the copies of a chunk's segments, or waits for them."""
        for i in range(num_lines):
            at = (c & 1) * num_lines + i
            for half in range(halves):
                copy_half(c & 1, at, half, action)

    def copy_half(parity: Int32[Array, ""], at: Int32[Array, ""], half: int, action: Callable) -> None:
        columns = () if halves == 1 else (pl.ds(half * LANES, LANES),)
        semaphore = semaphores.at[_LINES + parity]
        if not one_by_one:
            indices = numbers.at[at * halves + half, pl.ds(0, chunk)]
            # Of two halves, each has a part of the segments.
            there = words.at[(indices if halves == 1 else plsc.Indices(indices, ignored_value=-1), *columns)]
            here = lines.at[pl.ds(pl.multiple_of(at * chunk, chunk), chunk)]
            action(pltpu.make_async_copy(there, here, semaphore))
            return

        def copy(j: Int32[Array, ""], none: Int32[Array, ""]) -> Int32[Array, ""]:
            number = numbers[at * halves + half, pl.ds(j, lanes)][0]
            here = lines.at[pl.ds(at * chunk + j, 1)]

            @pl.when(number >= 0)
            def _():
                action(pltpu.make_async_copy(words.at[(pl.ds(number, 1), *columns)], here, semaphore))

            return none

        jax.lax.fori_loop(0, chunk, copy, jnp.int32(0))

    def segment_of_row(row: Int32[Array, " L"], i: int) -> Int32[Array, " L"]:
        """Part i of rows; of row 0 in place of rows that do not exist."""
        row = jnp.where((row >= 0) & (row < num_rows), row, 0)
        return (row >> line_shift) * num_lines + i

    def fetch(c: Int32[Array, ""], last_chunk: Int32[Array, ""]) -> None:
        """Starts to gather the lines of a chunk whose rows are on their way, and to read the rows of the next one."""
        each_copy_of_ids(c, lambda copy: copy.wait())
        pl.when(c < last_chunk)(lambda: each_copy_of_ids(c + 1, lambda copy: copy.start()))
        for j in range(0, chunk, lanes):
            row = held[0][pl.ds(first_of(c) + j, lanes)]
            for i in range(num_lines):
                segment, at = segment_of_row(row, i), ((c & 1) * num_lines + i) * halves
                if halves == 1:
                    numbers[at, pl.ds(j, lanes)] = segment
                else:
                    for half in range(2):
                        numbers[at + half, pl.ds(j, lanes)] = jnp.where(segment & 1 == half, segment >> 2, -1)
        each_copy(c, lambda copy: copy.start())

    def place_of(i: int, c: Int32[Array, ""], p: Int32[Array, ""]) -> tuple:
        """Where part i of the row of id p lies, vector by vector; its segment; and whether there is such a row."""
        j = p & (chunk - 1)
        row = held[0][pl.ds(first_of(c) + j, lanes)][0]
        lane = (row & (shape.rows_per_segment - 1)) * shape.width if shape.rows_per_segment > 1 else 0
        line = ((c & 1) * num_lines + i) * chunk + j
        exists = (row >= 0) & (row < num_rows)
        places = [(line, pl.ds(lane + q * lanes, lanes)) for q in range(vectors)]
        return places, (row >> line_shift) * num_lines + i, exists

    def weigh(i: int, c: Int32[Array, ""], p: Int32[Array, ""], _: Int32[Array, ""]) -> Int32[Array, ""]:
        weight = held[1][pl.ds(first_of(c) + (p & (chunk - 1)), lanes)][0]
        places, segment, _ = place_of(i, c, p)
        for place in places:
            product = read_segment(lines[place], segment) * weight
            lines[place] = product if halves == 1 else jax.lax.bitcast_convert_type(product, jnp.uint32)
        return jnp.int32(0)

    def add(i: int, c: Int32[Array, ""], p: Int32[Array, ""], total: tuple) -> tuple:
        places, segment, exists = place_of(i, c, p)
        # Where there are weights, words have become products.
        if halves == 2 and weighted:
            values = (jax.lax.bitcast_convert_type(lines[place], jnp.float32) for place in places)
        else:
            values = (read_segment(lines[place], segment) for place in places)
        vectors_of_row = (jnp.where(exists, x, 0.0) for x in values)
        return tuple(part + vector for part, vector in zip(total, vectors_of_row, strict=True))

    def sum_block(b: Int32[Array, ""], _: Int32[Array, ""]) -> Int32[Array, ""]:
        block = worker + b * workers

        @pl.when(block < blocks)
        def _():
            read_bounds(b).wait()
            pl.when(block + workers < blocks)(lambda: read_bounds(b + 1).start())

            def bound(bag: Int32[Array, ""]) -> Int32[Array, ""]:
                return held_bounds[pl.ds(place_of_bounds(b) + bag, lanes)][0]

            first_id, last_id = bound(jnp.int32(0)), bound(jnp.int32(bags))
            first_chunk, last_chunk = first_id >> chunk_shift, (last_id - 1) >> chunk_shift

            @pl.when(last_id > first_id)
            def _():
                each_copy_of_ids(first_chunk, lambda copy: copy.start())
                fetch(first_chunk, last_chunk)

            def sum_bag(g: Int32[Array, ""], summed: Int32[Array, ""]) -> Int32[Array, ""]:
                start, end = bound(g), bound(g + 1)
                for i in range(num_lines):
                    for q in range(0, LANES, lanes):
                        sums[g * num_lines + i, pl.ds(q, lanes)] = jnp.zeros(lanes, jnp.float32)

                def sum_chunk(c: Int32[Array, ""], summed: Int32[Array, ""]) -> Int32[Array, ""]:
                    @pl.when(c > summed)
                    def _():
                        pl.when(c < last_chunk)(lambda: fetch(c + 1, last_chunk))
                        each_copy(c, lambda copy: copy.wait())

                    low, high = jnp.maximum(start, c << chunk_shift), jnp.minimum(end, (c + 1) << chunk_shift)
                    for i in range(num_lines):
                        at = [(g * num_lines + i, pl.ds(q * lanes, lanes)) for q in range(vectors)]
                        if weighted:
                            # Apart from the sums: a compiler that sees both would round product and sum as one.
                            jax.lax.fori_loop(low, high, functools.partial(weigh, i, c), jnp.int32(0))
                        total = tuple(sums[place] for place in at)
                        total = jax.lax.fori_loop(low, high, functools.partial(add, i, c), total)
                        for place, part in zip(at, total, strict=True):
                            sums[place] = part
                    return jnp.maximum(summed, c)

                chunks = jnp.where(end > start, ((end - 1) >> chunk_shift) + 1, start >> chunk_shift)
                return jax.lax.fori_loop(start >> chunk_shift, chunks, sum_chunk, summed)

            jax.lax.fori_loop(0, bags, sum_bag, first_chunk - 1)
            size = bags * num_lines
            pooled = out.at[pl.ds(pl.multiple_of(block * size, size), size)]
            if one_by_one or not _OWN_SEMAPHORES:
                pltpu.sync_copy(sums, pooled)
            else:
                copy = pltpu.async_copy(sums, pooled)
                copy.wait()

        return jnp.int32(0)

    pl.when(worker < blocks)(lambda: read_bounds(jnp.int32(0)).start())
    jax.lax.fori_loop(0, -(-blocks // workers), sum_block, jnp.int32(0))
