"""What is known of an update while its kernel is traced, and the memory of a subcore that it works in.

Letters: C items of a chunk, U units of a block, L lanes of a vector, m lines of a row, h scalars of a slot.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from pallas_kernels.mosaic_tpu.lines import LANES, RowShape
from pallas_kernels.mosaic_tpu.units import Units, units_of_rows
from pallas_kernels.rounding import Rounding
from pallas_kernels.row_optimizers import STATISTICS_BLOCK
from pallas_kernels.sparsecore.work import bounds_size
from pallas_kernels.traced_rules import TracedRule

# Chunks whose items are in memory: the one being summed, the next, the one on its way; a power of two.
CHUNKS_HELD = 4
# Semaphores: of items, of gradients (two), of scalars on their way in (two) and out; then, for each cut, of lines on
# their way in and out, and of the numbers of units.
WORDS, GRADIENTS, SCALARS, SCALARS_OUT, CUTS, SEMAPHORES_OF_CUT = 0, 1, 3, 5, 6, 3
# Vectors of a row that are read, changed and written in one iteration.
_VECTORS_IN_FLIGHT = 8
# Lines of one store that a block gathers: of pairs, of which often one half is left out, more if that leaves memory.
_LINES_OF_BLOCK, _LINES_OF_BLOCK_OF_PAIRS = 32, 64
# The numbers of the units of a block are a copy of 8 words or more.
_SMALLEST_BLOCK = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Stores that are cut into units alike.

    Attributes:
        units: How.
        block: Units that are gathered at once, U: a power of two.
    """

    units: Units
    block: int


def cuts_of(
    shape: RowShape, dtype: jnp.dtype, *, num_states: int, split: bool, only_statistics: bool
) -> tuple[Cut, ...]:
    """How weights, elementwise state and sums over rows are cut: the last one has the weights, the first the rest.

    Weights in bfloat16 are cut by pairs of lines, their low halves with them, since the lines of a pair share words.

    Args:
        shape: How rows lie on lines.
        dtype: Storage dtype of the weights.
        num_states: Stores of elementwise state, in float32.
        split: Whether there is a store of low halves.
        only_statistics: Whether sums over rows are asked for.
    """
    if dtype == jnp.float32:
        found = [units_of_rows(shape, dtype, 1 + num_states)]
    else:
        found = [units_of_rows(shape, jnp.dtype(jnp.float32), num_states)] if num_states or only_statistics else []
        found.append(units_of_rows(shape, dtype, 1 + split))
    return tuple(Cut(units=units, block=_units_of_block(units)) for units in found)


def _units_of_block(units: Units) -> int:
    lines = _LINES_OF_BLOCK if units.dtype == jnp.float32 else _LINES_OF_BLOCK_OF_PAIRS // units.num_stores
    return max(_SMALLEST_BLOCK, 2 ** ((lines // units.copies).bit_length() - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareCall:
    """What is known of a call while it is traced.

    Attributes:
        shape: How rows lie on lines.
        rule: The rule, traced for vectors of L lanes, scalars being repeated.
        rounding: How weights in bfloat16 are rounded.
        lanes: L.
        chunk: C.
        cuts: See `cuts_of`.
        fields: Names of an item's fields, see `work.Work.words`.
        scalars_of_slot: h.
        workers: Vector subcores of the device.
        subcores: Vector subcores of a core.
        shares: Shares of the work; a subcore takes one or several.
        only_statistics: Whether sums over rows are asked for, and nothing is to be changed.
        interpreted: Whether kernels are: then lines are copied one by one, there being no indirect copies.
    """

    shape: RowShape
    rule: TracedRule
    rounding: Rounding
    lanes: int
    chunk: int
    cuts: tuple[Cut, ...]
    fields: tuple[str, ...]
    scalars_of_slot: int
    workers: int
    subcores: int
    shares: int
    only_statistics: bool
    interpreted: bool

    @property
    def num_scalars(self) -> int:
        """Stores of row-wise state."""
        return len(self.rule.optimizer.row_state)

    @property
    def statistics_of_row(self) -> int:
        """Lanes that the partial sums of one row take."""
        return self.num_blocks * self.rule.num_statistics

    @property
    def num_blocks(self) -> int:
        """Blocks of columns that are summed apart."""
        return max(1, self.shape.width // STATISTICS_BLOCK)

    def scalar(self, buffer: jax.Ref, at: Int32[Array, ""]) -> Array:
        """One number of a buffer that goes on for a vector after it."""
        return buffer[pl.ds(at, self.lanes)][0]

    def each_vector[T](self, body: Callable[[T, int, Array], T], start: T) -> T:
        """Runs a body for each vector of a row, with the line of the row that it is on: ``body(result, i, lane)``."""
        result, count = start, min(self.shape.width, LANES) // self.lanes
        # An interpreter gains nothing from several vectors in flight.
        unroll = 1 if self.interpreted else min(count, _VECTORS_IN_FLIGHT)
        for i in range(self.shape.segments_per_row):

            def step(q: Int32[Array, ""], result: T, i: int = i) -> T:
                return body(result, i, q * self.lanes)

            result = jax.lax.fori_loop(0, count, step, result, unroll=unroll)
        return result

    def scratch(self) -> dict[str, Any]:
        """The memory of a subcore that `update_share` works in."""
        m, chunk, first_block = self.shape.segments_per_row, self.chunk, self.cuts[0].block
        return {
            "bounds": pltpu.VMEM(((1 + len(self.cuts)) * bounds_size(self.shares),), jnp.int32),
            "words": pltpu.VMEM((CHUNKS_HELD * len(self.fields) * chunk + LANES,), jnp.int32),
            "sources": pltpu.VMEM((2 * m, chunk + LANES), jnp.int32),
            "gradients": pltpu.VMEM((2 * m * chunk, LANES), jnp.float32),
            "cuts": [_scratch_of_cut(cut) for cut in self.cuts],
            "places": pltpu.VMEM((2, chunk + LANES), jnp.int32),
            "scalars": [pltpu.VMEM((2 * chunk + LANES,), jnp.float32) for _ in range(self.num_scalars)],
            "hyper": pltpu.VMEM((self.scalars_of_slot * self.lanes,), jnp.float32),
            "sum": pltpu.VMEM((m * LANES,), jnp.float32),
            "summands": [pltpu.VMEM(((m + 1) * LANES,), jnp.float32) for _ in range(self.rule.num_statistics)],
            "statistics": [pltpu.VMEM((2 * first_block, LANES), jnp.float32)] * self.only_statistics,
            "ranks": [pltpu.VMEM((2, first_block + LANES), jnp.int32)] * self.only_statistics,
            "semaphores": pltpu.SemaphoreType.DMA((CUTS + SEMAPHORES_OF_CUT * len(self.cuts),)),
        }


def _scratch_of_cut(cut: Cut) -> dict[str, Any]:
    """The numbers of units and of their lines, and the lines of each store, of two blocks."""
    copies, block = cut.units.copies, cut.block
    return {
        "units": pltpu.VMEM((2 * LANES,), jnp.int32),
        "numbers": pltpu.VMEM((2 * copies, block + LANES), jnp.int32),
        "lines": [pltpu.VMEM((2 * copies * block, LANES), cut.units.word) for _ in range(cut.units.num_stores)],
    }
