"""pooled_lookup on a TensorCore: lines are copied to VMEM by their ids, a chunk ahead of the one being summed.

Letters: n ids, G bags, w width of a row, B bags of one grid step, C ids of one chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_tpu.lines import (
    LANES,
    RowShape,
    interpreted,
    pad_to,
    read_segment,
    round_up,
    row_shape,
    segment_and_lane,
    segment_of,
    to_lane_zero,
    wait_for_copies,
    whole_pairs,
    words_of,
)
from pallas_kernels.stores import named_rows

# Lines in flight: half of twice as many.
_SEGMENTS_OF_CHUNK = 256
# Bytes of one grid step's pooled rows.
_OUT_BYTES = 2**18
# Chunks of ids in SMEM: the one being summed, the one being copied, the one to be copied next.
_ID_BUFFERS = 3


def pooled_lookup(
    store: Float[Array, "lines 128"],
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
    bags = min(max(8, _OUT_BYTES // (4 * shape.padded_width) // 8 * 8), round_up(num_bags, 8))
    chunk = 2 ** (max(32, _SEGMENTS_OF_CHUNK // shape.segments_per_row).bit_length() - 1)
    steps = -(-num_bags // bags)
    # Bags of padding are empty. Where not all ids had room, offsets go on beyond those that are there.
    ends = jnp.pad(jnp.clip(offsets, 0, num_ids), (0, steps * bags - num_bags), mode="edge")
    word = jnp.float32 if store.dtype == jnp.float32 else jnp.uint32
    streams = [rows] if weights is None else [rows, weights]
    num_chunks = -(-num_ids // chunk)
    kernel = functools.partial(
        _kernel, shape=shape, bags=bags, chunk=chunk, num_rows=named_rows(store, width), weighted=weights is not None
    )
    scalars = pl.BlockSpec((1, 1, bags), lambda step: (step, 0, 0), memory_space=pltpu.SMEM)
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    pooled = pl.pallas_call(
        kernel,
        grid=(steps,),
        in_specs=[scalars, scalars, anywhere, *(anywhere for _ in streams)],
        out_specs=pl.BlockSpec((bags * shape.segments_per_row, LANES), lambda step: (step, 0)),
        out_shape=jax.ShapeDtypeStruct((steps * bags * shape.segments_per_row, LANES), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((shape.segments_per_row, LANES), jnp.float32),
            pltpu.VMEM((2 * chunk * shape.segments_per_row, LANES), word),
            pltpu.SemaphoreType.DMA((2,)),
            *(pltpu.SMEM((_ID_BUFFERS, 1, chunk), x.dtype) for x in streams),
            pltpu.SemaphoreType.DMA((_ID_BUFFERS,)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpreted(),
        name="pooled_lookup",
    )(
        ends[:-1].reshape(steps, 1, bags),
        ends[1:].reshape(steps, 1, bags),
        whole_pairs(store),
        *(pad_to(x, num_chunks * chunk).reshape(num_chunks, 1, chunk) for x in streams),
    )
    return pooled.reshape(steps * bags, shape.padded_width)[:num_bags, :width]


def _kernel(
    starts: jax.Ref,
    ends: jax.Ref,
    store: jax.Ref,
    *refs: jax.Ref,
    shape: RowShape,
    bags: int,
    chunk: int,
    num_rows: int,
    weighted: bool,
) -> None:
    """Sums the bags of one grid step.

    Args:
        starts: First id of each bag, in SMEM.
        ends: Id beyond the last of each bag, in SMEM.
        store: Line store.
        refs: Rows of the ids, and their weights if any; the pooled rows; two chunks of lines and their semaphores; as
            many chunks of SMEM as `_ID_BUFFERS` for rows and weights; their semaphores.
        shape: How rows lie on lines.
        bags: Bags of a grid step.
        chunk: Ids of a chunk.
        num_rows: Rows of the store.
        weighted: Whether there are weights.
    """
    streams, (out, pending, lines, line_semaphores) = refs[: 1 + weighted], refs[1 + weighted : 5 + weighted]
    buffers, id_semaphores = refs[5 + weighted : -1], refs[-1]
    words = words_of(store)
    shift = chunk.bit_length() - 1
    first_id, last_id = starts[0, 0, 0], ends[0, 0, bags - 1]
    first_chunk = first_id >> shift
    last_chunk = (last_id - 1) >> shift

    def copies_of_ids(c: Int32[Array, ""]) -> list:
        slot = jax.lax.rem(c, _ID_BUFFERS)
        return [
            pltpu.make_async_copy(stream.at[c], buffer.at[slot], id_semaphores.at[slot])
            for stream, buffer in zip(streams, buffers, strict=True)
        ]

    def row_of(p: Int32[Array, ""], c: Int32[Array, ""]) -> tuple:
        """The row that id p names, 0 if there is no such row, and whether there is."""
        row = buffers[0][jax.lax.rem(c, _ID_BUFFERS), 0, p & (chunk - 1)]
        exists = (row >= 0) & (row < num_rows)
        return jnp.where(exists, row, 0), exists

    def ids_of(c: Int32[Array, ""]) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
        """The first id of a chunk that is of this grid step, and the end of those that are."""
        return jnp.maximum(first_id, c << shift), jnp.minimum(last_id, (c + 1) << shift)

    def place(p: Int32[Array, ""]) -> Int32[Array, ""]:
        """Where the lines of id p lie in VMEM."""
        return (p & (2 * chunk - 1)) * shape.segments_per_row

    def fetch_segments(c: Int32[Array, ""]) -> None:
        def start(p: Int32[Array, ""], none: Int32[Array, ""]) -> Int32[Array, ""]:
            segment, _ = segment_and_lane(row_of(p, c)[0], shape)
            for i in range(shape.segments_per_row):
                here = lines.at[pl.ds(place(p) + i, 1)]
                pltpu.make_async_copy(segment_of(words, segment + i), here, line_semaphores.at[c & 1]).start()
            return none

        jax.lax.fori_loop(*ids_of(c), start, jnp.int32(0))

    def wait_for_segments(c: Int32[Array, ""]) -> None:
        low, high = ids_of(c)
        wait_for_copies((high - low) * shape.segments_per_row, line_semaphores.at[c & 1], lines)

    def start_ids(c: Int32[Array, ""]) -> None:
        @pl.when(c <= last_chunk)
        def _():
            for copy in copies_of_ids(c):
                copy.start()

    def fetch(c: Int32[Array, ""]) -> None:
        """Starts the copies of a chunk's lines, and of the ids of the chunk after it."""

        @pl.when(c <= last_chunk)
        def _():
            for copy in copies_of_ids(c):
                copy.wait()
            start_ids(c + 1)
            fetch_segments(c)

    @pl.when(last_id > first_id)
    def _():
        start_ids(first_chunk)
        fetch(first_chunk)

    def add(c: Int32[Array, ""], p: Int32[Array, ""], total: tuple) -> tuple:
        row, exists = row_of(p, c)
        segment, lane = segment_and_lane(row, shape)
        sums = []
        for i in range(shape.segments_per_row):
            vector = read_segment(lines[pl.ds(place(p) + i, 1), :], segment + i)
            if shape.rows_per_segment > 1:
                vector = to_lane_zero(vector, lane)
            if weighted:
                # A product is added one id later: a compiler that sees both would round them as one.
                vector = vector * buffers[1][jax.lax.rem(c, _ID_BUFFERS), 0, p & (chunk - 1)]
                product, vector = jnp.where(exists, vector, 0.0), pending[i : i + 1, :]
                pending[i : i + 1, :] = product
            else:
                vector = jnp.where(exists, vector, 0.0)
            sums.append(total[i] + vector)
        return tuple(sums)

    def sum_bag(g: Int32[Array, ""], summed: Int32[Array, ""]) -> Int32[Array, ""]:
        start, end = starts[0, 0, g], ends[0, 0, g]

        def sum_chunk(c: Int32[Array, ""], carry: tuple) -> tuple:
            summed, total = carry

            @pl.when(c > summed)
            def _():
                fetch(c + 1)
                wait_for_segments(c)

            low, high = jnp.maximum(start, c << shift), jnp.minimum(end, (c + 1) << shift)
            return jnp.maximum(summed, c), jax.lax.fori_loop(low, high, functools.partial(add, c), total)

        if weighted:
            pending[...] = jnp.zeros(pending.shape, jnp.float32)
        chunks = jnp.where(end > start, ((end - 1) >> shift) + 1, start >> shift)
        zeros = (jnp.zeros((1, LANES), jnp.float32),) * shape.segments_per_row
        summed, total = jax.lax.fori_loop(start >> shift, chunks, sum_chunk, (summed, zeros))
        for i, part in enumerate(total):
            last = pending[i : i + 1, :] if weighted else 0.0
            out[pl.ds(g * shape.segments_per_row + i, 1), :] = part + last
        return summed

    jax.lax.fori_loop(0, bags, sum_bag, first_chunk - 1)
