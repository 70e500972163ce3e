"""A rule applied to a strip of complete rows in VMEM, and the sums over rows that it needs.

Letters: T rows of a strip, w columns, m segments of a row, C ids of a chunk.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import rounding
from pallas_kernels.mosaic_tpu.lines import LANES, round_to_bfloat16
from pallas_kernels.row_optimizers import STATISTICS_BLOCK, RowHyperparameters, RowValues

if TYPE_CHECKING:
    from pallas_kernels.mosaic_tpu.update_kernel import Call


def apply_to_strip(
    call: "Call",
    strip: Int32[Array, ""],
    step: Float[Array, ""],
    scratch: dict,
    statistics_of_ids: jax.Ref,
) -> None:
    """Updates weights and state of the rows of one strip where they lie, or writes down their statistics.

    Args:
        call: What is known of the call.
        strip: Number of the strip within the chunk.
        step: Number of the update.
        scratch: See `update._scratch`.
        statistics_of_ids: Where statistics go, if nothing else is asked for.
    """
    m, first = call.shape.segments_per_row, pl.multiple_of(strip * call.strip, call.strip)
    these = pl.ds(first, call.strip), slice(None)
    places = [(pl.ds(pl.multiple_of(i * call.chunk + first, call.strip), call.strip), slice(None)) for i in range(m)]

    def rows_of(buffer: jax.Ref) -> Float[Array, "T w"]:
        parts = [buffer[place] for place in places]
        return parts[0] if m == 1 else jnp.concatenate(parts, axis=1)

    numbers = scratch["hyper"][these]
    hyper = RowHyperparameters(*(numbers[:, i : i + 1] for i in range(6)), step=step)
    weights, *element_state = (rows_of(buffer) for buffer in scratch["rows"])
    values = RowValues(
        weights=weights,
        element_state=tuple(element_state),
        row_state=tuple(buffer[these][:, :1] for buffer in scratch["scalars"]),
    )
    gradients = rows_of(scratch["sums"])
    if call.only_statistics:
        blocks = [_sums_of_blocks(call, x, scratch) for x in call.optimizer.summands(values, gradients, hyper)]
        statistics_of_ids[these] = _side_by_side(blocks, call)
        return
    if call.statistics:
        statistics = tuple(buffer[these][:, :1] for buffer in scratch["statistics"])
    else:
        summands = call.optimizer.summands(values, gradients, hyper)
        statistics = tuple(_sum_of_rows(_sums_of_blocks(call, x, scratch), call) for x in summands)
    new = call.optimizer.apply(values, gradients, hyper, statistics)

    new_weights = new.weights
    if call.units[0].dtype != jnp.float32:
        new_weights = _rounded(call, new_weights, these, scratch)
    for buffer, x in zip(scratch["rows"], (new_weights, *new.element_state), strict=True):
        for i, place in enumerate(places):
            buffer[place] = x[:, i * LANES : (i + 1) * LANES]
    for buffer, x in zip(scratch["scalars"], new.row_state, strict=True):
        buffer[these] = jnp.broadcast_to(x, (call.strip, LANES))


def _rounded(call: "Call", x: Float[Array, "T w"], these: tuple, scratch: dict) -> Float[Array, "T w"]:
    """Values that bfloat16 holds exactly."""
    if not call.key_words:
        return round_to_bfloat16(x)
    keys, columns = scratch["keys"][0][these], scratch["columns"][0][these]
    lanes = jax.lax.broadcasted_iota(jnp.int32, (call.strip, LANES), 1).astype(jnp.uint32)
    parts = []
    for i in range(call.shape.segments_per_row):
        bits = rounding.column_bits(keys, columns + lanes + jnp.uint32(i * LANES))
        part = x[:, i * LANES : (i + 1) * LANES]
        parts.append(rounding.stochastic_round(part, bits, jnp.dtype(jnp.bfloat16)).astype(jnp.float32))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _num_blocks(call: "Call") -> int:
    return max(1, call.shape.width // STATISTICS_BLOCK)


def _sums_of_blocks(call: "Call", summand: Float[Array, "T w"], scratch: dict) -> list[Float[Array, "T 128"]]:
    """`row_optimizers.sum_columns` by rotations: the sum of the block that begins at a lane stands in that lane."""
    sums = []
    for i in range(call.shape.segments_per_row):
        # Through memory: a compiler that sees product and sum would round them as one.
        at = pl.ds(i * call.strip, call.strip), slice(None)
        scratch["summands"][at] = summand[:, i * LANES : (i + 1) * LANES]
        x = scratch["summands"][at]
        half = min(STATISTICS_BLOCK, call.shape.width) // 2
        while half:
            x = x + pltpu.roll(x, LANES - half, 1)
            half //= 2
        sums.append(x)
    return sums


def _block(sums: list[Float[Array, "T 128"]], block: int) -> Float[Array, "T 128"]:
    """The sum of one block, in lane 0."""
    part, lane = divmod(block * STATISTICS_BLOCK, LANES)
    return pltpu.roll(sums[part], LANES - lane, 1) if lane else sums[part]


def _sum_of_rows(sums: list[Float[Array, "T 128"]], call: "Call") -> Float[Array, "T 1"]:
    """`row_optimizers.sum_blocks`."""
    total = _block(sums, 0)
    for block in range(1, _num_blocks(call)):
        total = total + _block(sums, block)
    return total[:, :1]


def _side_by_side(sums: list[list[Float[Array, "T 128"]]], call: "Call") -> Float[Array, "T 128"]:
    """The blocks of all summands in consecutive lanes."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (call.strip, LANES), 1)
    result = jnp.zeros((call.strip, LANES), jnp.float32)
    blocks = [_block(of_summand, block) for of_summand in sums for block in range(_num_blocks(call))]
    for lane, x in enumerate(blocks):
        result = jnp.where(lanes == lane, pltpu.roll(x, lane, 1) if lane else x, result)
    return result
