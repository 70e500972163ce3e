"""A rule applied to one row whose gradient is summed, in the lines that a subcore holds; and the sums that it needs.

Letters: L lanes of a vector, h scalars of a slot.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_tpu.lines import LANES
from pallas_kernels.row_optimizers import STATISTICS_BLOCK, RowValues
from pallas_kernels.sparsecore.held_lines import HeldLines
from pallas_kernels.sparsecore.stored_weights import Randomness, StoredWeights
from pallas_kernels.sparsecore.update_call import ShareCall


def update_row(
    call: ShareCall,
    scratch: dict[str, Any],
    held: Sequence[HeldLines],
    ranks: Sequence[Int32[Array, ""]],
    place: Int32[Array, ""],
    item: Int32[Array, ""],
    statistics: Sequence[Float[Array, " L"]] | None,
    randomness: Randomness | None,
) -> None:
    """Changes weights and state of a row; or, if only they are asked for, writes down its sums.

    Args:
        call: What is known of the call.
        scratch: See `ShareCall.scratch`; "sum" has the row's gradient, "hyper" its slot's scalars.
        held: The lines of each cut.
        ranks: Rank of the row's unit in each cut.
        place: Place of the row in its unit of weights.
        item: Where the row's last item is among those of two chunks.
        statistics: Sums over the whole row, if given.
        randomness: For stochastic rounding.
    """
    shape, lanes, rule = call.shape, call.lanes, call.rule
    place_on_line = place & (shape.rows_per_segment - 1)
    first_lane = place_on_line * shape.width if shape.rows_per_segment > 1 else 0
    first_segment = (place >> (shape.rows_per_segment.bit_length() - 1)) * shape.segments_per_row
    stored = StoredWeights(call, held[-1], ranks[-1], first_segment, first_lane, randomness)
    num_states = len(rule.optimizer.element_state)
    states = held[0].lines[len(held[0].lines) - num_states :] if num_states else []
    hyper = [scratch["hyper"][pl.ds(k * lanes, lanes)] for k in range(call.scalars_of_slot)]
    scalars = tuple(jnp.full((lanes,), call.scalar(buffer, item)) for buffer in scratch["scalars"])

    def state_at(i: int, lane: Int32[Array, ""]) -> tuple:
        return held[0].line_of(ranks[0], i), pl.ds(first_lane + lane, lanes)

    def vector(i: int, lane: Int32[Array, ""]) -> tuple[RowValues, Float[Array, " L"]]:
        state = tuple(lines[state_at(i, lane)] for lines in states)
        read = RowValues(stored.read(i, lane), state, scalars), scratch["sum"][pl.ds(i * LANES + lane, lanes)]
        return _apart(call, read)

    if statistics is None and rule.num_statistics:

        def write_summands(none: Int32[Array, ""], i: int, lane: Int32[Array, ""]) -> Int32[Array, ""]:
            values, gradient = vector(i, lane)
            for buffer, x in zip(scratch["summands"], rule.summands(values, gradient, hyper), strict=True):
                buffer[pl.ds(i * LANES + lane, lanes)] = x
            return none

        call.each_vector(write_summands, jnp.int32(0))
        for buffer in scratch["summands"]:
            _sum_blocks(call, buffer)
        if call.only_statistics:
            _keep_statistics(call, scratch, held[0].unit_of(ranks[0]), place_on_line)
            return
        statistics = [_sum_of_blocks(call, buffer) for buffer in scratch["summands"]]

    def apply(_: tuple, i: int, lane: Int32[Array, ""]) -> tuple:
        values, gradient = vector(i, lane)
        new = _apart(call, rule.apply(values, gradient, hyper, statistics or ()))
        stored.write(i, lane, new.weights)
        for lines, x in zip(states, new.element_state, strict=True):
            lines[state_at(i, lane)] = x
        return tuple(new.row_state)

    new_scalars = call.each_vector(apply, scalars)
    for buffer, x in zip(scratch["scalars"], new_scalars, strict=True):
        _put(call, buffer, (pl.ds(item & -lanes, lanes),), item & (lanes - 1), x)


def _apart[T](call: ShareCall, values: T) -> T:
    """Parts a rule from how its values are stored, for XLA on hosts.

    That rounds a product and the sum it goes into as one or not, program by program, and a store of another dtype makes
    another program.
    """
    return jax.lax.optimization_barrier(values) if call.interpreted else values


def _put(call: ShareCall, buffer: jax.Ref, at: tuple, lane: Int32[Array, ""], x: Float[Array, " L"]) -> None:
    """Writes one lane of a vector."""
    buffer[at] = jnp.where(jax.lax.iota(jnp.int32, call.lanes) == lane, x, buffer[at])


def _sum_blocks(call: ShareCall, buffer: jax.Ref) -> None:
    """`row_optimizers.sum_columns` in memory: the sum of a block is left where the block begins.

    What is added is read from memory, hence never fused with the product that it was.
    """
    lanes, half = call.lanes, min(STATISTICS_BLOCK, call.shape.width) // 2
    while half:

        def halve(b: Int32[Array, ""], none: Int32[Array, ""], half: int = half) -> Int32[Array, ""]:
            at = b * STATISTICS_BLOCK
            buffer[pl.ds(at, lanes)] = buffer[pl.ds(at, lanes)] + buffer[pl.ds(at + half, lanes)]
            return none

        jax.lax.fori_loop(0, call.num_blocks, halve, jnp.int32(0))
        half //= 2


def _sum_of_blocks(call: ShareCall, buffer: jax.Ref) -> Float[Array, " L"]:
    """`row_optimizers.sum_blocks`, L times."""
    total = buffer[pl.ds(0, call.lanes)]
    for b in range(1, call.num_blocks):
        total = total + buffer[pl.ds(b * STATISTICS_BLOCK, call.lanes)]
    return jnp.full((call.lanes,), total[0])


def _keep_statistics(call: ShareCall, scratch: dict[str, Any], unit: Int32[Array, ""], place: Int32[Array, ""]) -> None:
    """Writes the sums of a row's blocks, one summand's after the other's, to the line of its unit."""
    (lines,) = scratch["statistics"]
    first, lanes = place * call.statistics_of_row, call.lanes
    for k, buffer in enumerate(scratch["summands"]):
        for b in range(call.num_blocks):
            lane = first + k * call.num_blocks + b
            x = jnp.full((lanes,), call.scalar(buffer, jnp.int32(b * STATISTICS_BLOCK)))
            _put(call, lines, (unit, pl.ds(lane & -lanes, lanes)), lane & (lanes - 1), x)
