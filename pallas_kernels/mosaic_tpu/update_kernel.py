"""The kernel of sparse_update and row_statistics: one chunk of sorted ids, while the next one's lines are on their way.

Chunk after chunk on one core. Gradients of a row are summed as its ids come by; a row is complete where its last id
is. Then the rule is applied to all complete rows of the chunk at once, as rows of vectors; then rows are put back on
their lines, and lines without further rows are written. A row or a line that goes on in the next chunk is handed over.

Letters: C ids of a chunk, m segments of a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from pallas_kernels.mosaic_tpu.apply_rule import apply_to_strip
from pallas_kernels.mosaic_tpu.lines import (
    LANES,
    RowShape,
    from_lane_zero,
    lanes_between,
    read_segment,
    segment_and_lane,
    to_lane_zero,
    wait_for_copies,
    words_of,
    write_segment,
)
from pallas_kernels.mosaic_tpu.units import BUFFERS, Units
from pallas_kernels.rounding import fold
from pallas_kernels.row_optimizers import RowOptimizer
from pallas_kernels.xla import RUN_BLOCK


class Call(NamedTuple):
    """What is known of a call while it is traced.

    Attributes:
        shape: How rows lie on segments.
        chunk: Ids of a chunk, C.
        strip: Rows to which the rule is applied at once; divides C.
        num_rows: Rows of the store.
        optimizer: The rule.
        units: How weights, elementwise state and row-wise state are cut; the first two alike if both are float32.
        num_states: Stores of elementwise state.
        num_scalars: Stores of row-wise state.
        weighted: Whether ids have weights.
        statistics: Statistics given with the ids: all that the rule needs, or 0.
        key_words: Words of the logical row that random bits come from; 0 to round to the nearest.
        only_statistics: Whether sums over rows are asked for, and nothing is to be written.
    """

    shape: RowShape
    chunk: int
    strip: int
    num_rows: int
    optimizer: RowOptimizer
    units: tuple[Units, ...]
    num_states: int
    num_scalars: int
    weighted: bool
    statistics: int = 0
    key_words: int = 0
    only_statistics: bool = False


def update_chunk(
    call: Call,
    num_valid: jax.Ref,
    step: jax.Ref,
    slot_numbers: dict[str, jax.Ref],
    hyper: jax.Ref,
    here: dict[str, jax.Ref],
    after: dict[str, jax.Ref],
    gradients: jax.Ref,
    stores: tuple[jax.Ref, ...],
    *refs,
) -> None:
    """Updates the rows whose last id is in this grid step's chunk; see `update._run` for the arguments.

    Args:
        call: What is known of the call.
        num_valid: Ids that name a row: the first ones.
        step: Number of the update.
        slot_numbers: For each slot: what to add to a row to get its scalar, its key and its first column.
        hyper: Hyperparameters, a slot a line.
        here: Row, bag, slot and more of the chunk's ids.
        after: Row, bag and slot of the next chunk's ids.
        gradients: Gradient of each bag, m lines each.
        stores: Weights, elementwise state, row-wise state.
        refs: The same as outputs, or the statistics of the chunk's ids; then what `update._scratch` says.
    """
    *outputs, scratch = refs
    shape, chunk, m = call.shape, call.chunk, call.shape.segments_per_row
    words = [words_of(store) for store in (stores if call.only_statistics else outputs)]
    stores_of, first = [], 0
    for units in call.units:
        stores_of.append(words[first : first + units.num_stores])
        first += units.num_stores
    # Where weights and elementwise states are: which units, and which of the stores that are cut so.
    elements = [(u, s) for u, units in enumerate(call.units) if not units.of_scalars for s in range(units.num_stores)]
    scalar_units = len(call.units) - 1

    c = pl.program_id(0)
    num_here = jnp.clip(num_valid[0] - c * chunk, 0, chunk)
    num_after = jnp.clip(num_valid[0] - (c + 1) * chunk, 0, chunk)
    parity = c & 1
    buffer, next_buffer = jax.lax.rem(c, BUFFERS), jax.lax.rem(c + 1, BUFFERS)

    def unit_of(units: Units, row: Int32[Array, ""], slot: Int32[Array, ""]) -> Int32[Array, ""]:
        return (row + slot_numbers["scalar"][slot] if units.of_scalars else row) >> units.shift

    def wait(count: Int32[Array, ""], semaphore: jax.Ref) -> None:
        wait_for_copies(count, semaphore, scratch["gradients"])

    def fetch(ids: dict[str, jax.Ref], count, parity, buffer) -> None:
        """Starts the copies of gradients, and of the units that begin in a chunk."""

        def fetch_id(p: Int32[Array, ""], carry: tuple) -> tuple:
            num_reads, *slots = carry
            row, bag, slot = (ids[name][0, 0, p] for name in ("row", "bag", "slot"))
            for i in range(m):
                here = scratch["gradients"].at[pl.ds((parity * chunk + p) * m + i, 1)]
                pltpu.make_async_copy(gradients.at[pl.ds(bag * m + i, 1)], here, scratch["reads"].at[parity]).start()
            num_reads += m
            for u, units in enumerate(call.units):
                unit = unit_of(units, row, slot)
                begins = unit != scratch["last_unit"][u]
                slots[u] = jnp.where(begins, p, slots[u])
                scratch["slots"][u][parity * chunk + p] = slots[u]

                @pl.when(begins)
                def _(u=u, units=units, unit=unit):
                    scratch["last_unit"][u] = unit
                    place = units.place(buffer, p, chunk)
                    for store, held in zip(stores_of[u], scratch["units"][u], strict=True):
                        for i in range(units.copies):
                            pltpu.make_async_copy(
                                units.in_store(store, unit, i),
                                held.at[pl.ds(place + i, 1)],
                                scratch["reads"].at[parity],
                            ).start()

                num_reads += jnp.where(begins, units.copies * units.num_stores, 0)
            return (num_reads, *slots)

        # A unit that began in an earlier chunk has been handed over, to the slot beyond the chunk's.
        start = (jnp.int32(0), *(jnp.int32(chunk) for _ in call.units))
        scratch["num_reads"][parity] = jax.lax.fori_loop(0, count, fetch_id, start)[0]

    @pl.when(c == 0)
    def _():
        scratch["place"][0] = 0
        for u in range(len(call.units)):
            scratch["last_unit"][u] = -1
        for b in range(BUFFERS):
            scratch["num_writes"][b] = 0
        fetch(here, num_here, parity, buffer)

    # The next chunk's buffer still has what the chunk before the last one wrote.
    wait(scratch["num_writes"][next_buffer], scratch["writes"].at[next_buffer])
    scratch["num_writes"][next_buffer] = 0
    fetch(after, num_after, 1 - parity, next_buffer)
    wait(scratch["num_reads"][parity], scratch["reads"].at[parity])

    def next_of(p: Int32[Array, ""], name: str) -> Int32[Array, ""]:
        return jnp.where(p + 1 < chunk, here[name][0, 0, jnp.minimum(p + 1, chunk - 1)], after[name][0, 0, 0])

    def is_last_of_row(p: Int32[Array, ""]) -> Array:
        return next_of(p, "row") != here["row"][0, 0, p]

    def is_last_of_unit(units: Units, p: Int32[Array, ""]) -> Array:
        row, next_row = here["row"][0, 0, p], next_of(p, "row")
        this, other = unit_of(units, row, here["slot"][0, 0, p]), unit_of(units, next_row, next_of(p, "slot"))
        return (this != other) | (next_row >= call.num_rows)

    def place_of(u: int, p: Int32[Array, ""]) -> Int32[Array, ""]:
        return call.units[u].place(buffer, scratch["slots"][u][parity * chunk + p], chunk)

    def segments_of(u: int, p: Int32[Array, ""]) -> list[tuple]:
        """For each segment of a row: its number, where it lies in VMEM, and where it is kept while it is a row."""
        units, row = call.units[u], here["row"][0, 0, p]
        segment, _ = segment_and_lane(row, shape)
        unit = row >> units.shift
        return [
            (segment + i, pl.ds(place_of(u, p) + units.copy_of(segment + i, unit), 1), pl.ds(i * chunk + p, 1))
            for i in range(m)
        ]

    def scalar_lane(p: Int32[Array, ""]) -> Int32[Array, ""]:
        return (here["row"][0, 0, p] + slot_numbers["scalar"][here["slot"][0, 0, p]]) & (LANES - 1)

    def gradient_of(p: Int32[Array, ""], i: int) -> tuple:
        return pl.ds((parity * chunk + p) * m + i, 1), slice(None)

    if call.weighted:
        # Apart from the sums: a compiler that sees both would round product and sum as one.
        @each_of(num_here)
        def _(p):
            for i in range(m):
                at = gradient_of(p, i)
                scratch["gradients"][at] = scratch["gradients"][at] * here["weight"][0, 0, p]

    def sum_id(p: Int32[Array, ""], place: Int32[Array, ""]) -> Int32[Array, ""]:
        first, cut = place == 0, (place & (RUN_BLOCK - 1)) == 0
        for i in range(m):
            at = slice(i, i + 1), slice(None)
            block, total = scratch["block"][at], scratch["total"][at]
            total = jnp.where(first, 0.0, jnp.where(cut, total + block, total))
            block = jnp.where(cut, 0.0, block) + scratch["gradients"][gradient_of(p, i)]
            scratch["block"][at], scratch["total"][at] = block, total
            scratch["sums"][pl.ds(i * chunk + p, 1), :] = total + block
        last = is_last_of_row(p)
        pl.when(last)(lambda: take_row(p))
        return jnp.where(last, 0, place + 1)

    def take_row(p: Int32[Array, ""]) -> None:
        """Copies a row, its state and its hyperparameters from lines to where the rule is applied."""
        slot, one = here["slot"][0, 0, p], pl.ds(p, 1)
        _, lane = segment_and_lane(here["row"][0, 0, p], shape)
        for (u, s), rows in zip(elements, scratch["rows"], strict=True):
            for segment, at, row_at in segments_of(u, p):
                values = read_segment(scratch["units"][u][s][at, :], segment)
                rows[row_at, :] = values if shape.rows_per_segment == 1 else to_lane_zero(values, lane)
        for s, scalars in enumerate(scratch["scalars"]):
            line = scratch["units"][scalar_units][s][pl.ds(place_of(scalar_units, p), 1), :]
            scalars[one, :] = to_lane_zero(line, scalar_lane(p))
        scratch["hyper"][one, :] = hyper[pl.ds(slot, 1), :]
        for k, statistics in enumerate(scratch["statistics"]):
            statistics[one, :] = jnp.full((1, LANES), here[f"statistic {k}"][0, 0, p])
        for keys, columns in zip(scratch["keys"], scratch["columns"], strict=True):
            keys[one, :] = jnp.full((1, LANES), key_of(p))
            columns[one, :] = jnp.full((1, LANES), slot_numbers["column"][slot])

    def key_of(p: Int32[Array, ""]) -> Array:
        """`rounding.row_key`, the words of the logical row being apart."""
        key = fold(slot_numbers["key"][here["slot"][0, 0, p]], here["word 0"][0, 0, p])
        if call.key_words == 1:
            return key
        high = here["word 1"][0, 0, p]
        return jnp.where(high == 0, key, fold(key, high))

    def put_row(p: Int32[Array, ""]) -> None:
        """Copies a row and its state back to their lines."""
        _, lane = segment_and_lane(here["row"][0, 0, p], shape)
        for (u, s), rows in zip(elements, scratch["rows"], strict=True):
            for segment, at, row_at in segments_of(u, p):
                values = rows[row_at, :]
                if shape.rows_per_segment > 1:
                    values = from_lane_zero(values, lane)
                held = scratch["units"][u][s]
                held[at, :] = write_segment(held[at, :], values, lanes_between(lane, min(shape.width, LANES)), segment)
        for s, scalars in enumerate(scratch["scalars"]):
            held, at = scratch["units"][scalar_units][s], pl.ds(place_of(scalar_units, p), 1)
            held[at, :] = jnp.where(lanes_between(scalar_lane(p), 1), scalars[pl.ds(p, 1), :], held[at, :])

    def write_id(p: Int32[Array, ""], num_writes: Int32[Array, ""]) -> Int32[Array, ""]:
        pl.when(is_last_of_row(p))(lambda: put_row(p))
        for u, units in enumerate(call.units):
            ends = is_last_of_unit(units, p)

            @pl.when(ends)
            def _(u=u, units=units):
                unit = unit_of(units, here["row"][0, 0, p], here["slot"][0, 0, p])
                for store, held in zip(stores_of[u], scratch["units"][u], strict=True):
                    for i in range(units.copies):
                        pltpu.make_async_copy(
                            held.at[pl.ds(place_of(u, p) + i, 1)],
                            units.in_store(store, unit, i),
                            scratch["writes"].at[buffer],
                        ).start()

            num_writes += jnp.where(ends, units.copies * units.num_stores, 0)
        return num_writes

    @pl.when(num_here > 0)
    def _():
        scratch["place"][0] = jax.lax.fori_loop(0, num_here, sum_id, scratch["place"][0])

        @each_of((num_here + call.strip - 1) // call.strip)
        def _(strip):
            apply_to_strip(call, strip, step[0], scratch, outputs[0])

        if not call.only_statistics:
            scratch["num_writes"][buffer] = jax.lax.fori_loop(0, num_here, write_id, jnp.int32(0))

        # Hand over the unit that goes on in the next chunk.
        last = num_here - 1
        for u, units in enumerate(call.units):

            @pl.when(~is_last_of_unit(units, last))
            def _(u=u, units=units):
                place = units.place(next_buffer, chunk, chunk)
                for held in scratch["units"][u]:
                    for i in range(units.copies):
                        held[pl.ds(place + i, 1), :] = held[pl.ds(place_of(u, last) + i, 1), :]

    @pl.when(c == pl.num_programs(0) - 1)
    def _():
        for b in range(BUFFERS):
            wait(scratch["num_writes"][b], scratch["writes"].at[b])


def each(count: Int32[Array, ""], body: Callable[[Int32[Array, ""]], None]) -> None:
    """Calls a body for 0, 1, ..., count - 1."""

    def step(p: Int32[Array, ""], _: Int32[Array, ""]) -> Int32[Array, ""]:
        body(p)
        return jnp.int32(0)

    jax.lax.fori_loop(0, count, step, jnp.int32(0))


def each_of(count: Int32[Array, ""]) -> Callable[[Callable[[Int32[Array, ""]], None]], None]:
    """Decorator: runs the body that follows as `each` does."""
    return lambda body: each(count, body)
