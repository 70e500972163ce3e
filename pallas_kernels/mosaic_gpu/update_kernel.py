"""The kernel of an update: it takes rows with their state and their gradients, and writes new ones in their place.

A *program* (one warpgroup of 128 lanes) owns some consecutive rows of those that the batch touches: nobody else reads
or writes them. It takes a few at a time. First it loads all that it needs of them (the first gradient of each, weights,
state), so that the loads overlap; where some have several ids, it adds the gradients of each before it loads weights
and state, in order, the next ones of all rows together; then come the sums over columns, of all of them together, in
shared memory; then the rule, and the new values are written where the old ones were. A row of the gradients is read
where it lies and its sum never leaves the registers.

Bytes in flight: a program holds up to eight rows with their state and gradients. At width 128 in float32 with row-wise
state its 128 registers a lane let four programs share a processor: 32 kB, or 4.3 MB on 132 of them, of the 4 to 5 MB
that 4.8 TB/s at a latency of a microsecond ask for. Reasoning, not a measurement. A row costs 92 instructions a
warp, of about a hundred that this bandwidth leaves time for.

Letters: n ids, S slots, w width of a row, k statistics, C pieces of RUN_BLOCK ids.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels import rounding
from pallas_kernels.mosaic_gpu.rows import (
    FULL_GRID,
    LANES,
    row_layout,
    run_kernel,
    store,
    sum_blocks_of_columns,
    wait_for_warps,
)
from pallas_kernels.mosaic_gpu.runs import (
    Runs,
    SortedGradients,
    SortedId,
    add_in_order,
    gradient_of_bag,
    place_of_block,
    sorted_id,
    weighted,
)
from pallas_kernels.row_optimizers import STATISTICS_BLOCK, RowOptimizer, RowValues
from pallas_kernels.stores import Stores
from pallas_kernels.traced_rules import TracedRule, trace_rule, without_is_finite
from pallas_kernels.xla import RUN_BLOCK

# Registers of a lane that hold rows, and the most rows that a program takes at a time.
_REGISTERS, _MOST_ROWS = 48, 8
# Ids of each row that are added at a time with those of the other rows.
_TOGETHER = 4
# How often a program takes rows, where there is work for a full grid.
_STEPS_OF_PROGRAM = 8


class Operands(NamedTuple):
    """What the kernel reads; the stores are what it changes.

    Attributes:
        stores: Weights and elementwise state as [rows, w], row-wise state as [numbers]; or references to them.
        runs: The rows to update.
        ids: Their gradients.
        block_sums: Gradients of long runs, see `runs.place_of_block`.
        scalars: See `TracedRule.scalars_of_slots`.
        lengths: Ids of each run.
        first_ids: First id of each run.
        numbers: Place of the row-wise state of each run, if the rule has any.
        first_columns: First column of each slot.
        statistics: The statistics of each run, where the caller has them.
        keys: Keys of the random bits of each run, for stochastic rounding.
    """

    stores: Stores
    runs: Runs
    ids: SortedGradients
    block_sums: Float[Array, "2C w"]
    scalars: Float[Array, "S h"]
    lengths: Int32[Array, " n"]
    first_ids: SortedId
    numbers: Int32[Array, " n"] | None
    first_columns: Int32[Array, " S"]
    statistics: Float[Array, "n k"] | None = None
    keys: UInt32[Array, " n"] | None = None


class _Place(NamedTuple):
    """Where a row and its gradients are.

    Attributes:
        run: Number of its run.
        row: The row.
        slot: Its slot.
        number: Place of its row-wise state, if it has any.
        length: How many ids name it.
        first: The first of them.
    """

    run: Int32[Array, ""]
    row: Int32[Array, ""]
    slot: Int32[Array, ""]
    number: Int32[Array, ""] | None
    length: Int32[Array, ""]
    first: SortedId

    def opaque(self, zero: Int32[Array, ""]) -> "_Place":
        """The same place. What is used behind a branch is no longer seen to be loaded.

        Else the compiler widens it to 64 bits where it is loaded: two more instructions and a register for each.
        """
        number = None if self.number is None else self.number ^ zero
        return self._replace(row=self.row ^ zero, slot=self.slot ^ zero, number=number)


# Values, gradient and the scalars of the slot of a row.
_Inputs = tuple[RowValues, Float[Array, " w"], list[Float[Array, ""]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateKernel:
    """What is fixed when the kernel is traced."""

    rule: TracedRule
    dtype: jnp.dtype
    width: int
    storage_rounding: rounding.Rounding

    @classmethod
    def of(cls, optimizer: RowOptimizer, dtype: Any, width: int, storage_rounding: rounding.Rounding) -> "UpdateKernel":
        """The kernel of a rule, for rows of a width and a storage dtype."""
        return cls(
            rule=trace_rule(optimizer, width),
            dtype=jnp.dtype(dtype),
            width=width,
            storage_rounding=storage_rounding,
        )

    @property
    def is_stochastic(self) -> bool:
        """Whether rounding draws random bits."""
        return rounding.draws_bits(self.storage_rounding, self.dtype)

    @property
    def is_split(self) -> bool:
        """Whether the last elementwise state is the low halves of the weights."""
        return self.storage_rounding == "split"

    @property
    def rows_in_flight(self) -> int:
        """Rows that a program takes at a time: a power of two."""
        arrays = 2 + len(self.rule.optimizer.element_state)
        rows = _REGISTERS // (arrays * max(1, self.width // LANES))
        return min(_MOST_ROWS, 2 ** (max(1, rows).bit_length() - 1))

    @property
    def scratch_size(self) -> int:
        """Numbers whose columns are summed together: the summands of all rows in flight, in whole registers."""
        size = self.rows_in_flight * self.rule.num_statistics * self.width
        return -(-size // LANES) * LANES

    def run(self, operands: Operands, out_type: Any, *, name: str) -> Any:
        """Updates the stores of `operands` if they are references, or else returns sums over blocks of columns."""
        num_ids = operands.runs.rows.shape[0]
        in_flight = self.rows_in_flight
        programs = -(-num_ids // (in_flight * max(1, min(_STEPS_OF_PROGRAM, num_ids // (in_flight * FULL_GRID)))))

        def body(operands: Operands, *refs: Any) -> None:
            *sums, scratch, other_scratch = refs
            count, zero = operands.runs.count[0], operands.ids.zero[0]
            # Of the rows that there are, not of the ids: all programs have work where many ids name few rows.
            steps = (count + programs * in_flight - 1) // (programs * in_flight)
            first = lax.axis_index("program") * steps * in_flight
            stop = jnp.minimum(first + steps * in_flight, count)

            def step(base: Int32[Array, ""]) -> Int32[Array, ""]:
                # Beyond the last row, that one again: what is written twice is the same.
                places = [self._place(operands, jnp.minimum(base + i, stop - 1)) for i in range(in_flight)]
                places = [place.opaque(zero) for place in places]
                gradients, factors = self._gradients(operands, places, zero)
                values = [self._load(operands, place) for place in places]
                # No load moves beyond this; else the compiler makes some wait until others have arrived.
                wait_for_warps()
                sums_of_gradients = [
                    self._nothing() + weighted(gradient, factor, zero)
                    for gradient, factor in zip(gradients, factors, strict=True)
                ]
                inputs = [
                    self._inputs(operands, *of_row) for of_row in zip(places, values, sums_of_gradients, strict=True)
                ]
                if sums:
                    found = self._block_sums(scratch, other_scratch, inputs)
                    wait_for_warps()
                    self._write_sums(sums[0], places, found)
                    return base + in_flight
                statistics = self._statistics(operands, scratch, other_scratch, places, inputs)
                new = [
                    self._rounded(operands, place, self.rule.apply(*of_row, sums_of_row))
                    for place, of_row, sums_of_row in zip(places, inputs, statistics, strict=True)
                ]
                # Until all have read: several warps read a narrow row, and all of them row-wise state and scratch.
                wait_for_warps()
                for place, values in zip(places, new, strict=True):
                    self._write(operands, place, values)
                return base + in_flight

            lax.while_loop(lambda base: base < stop, step, first)

        # Sums of blocks read up to a block beyond the last column.
        scratch = plgpu.SMEM((self.scratch_size + STATISTICS_BLOCK,), jnp.float32)
        return run_kernel(body, operands, out_type, grid={"program": programs}, name=name, scratch_types=[scratch] * 2)

    def _vector(self, ref: Any, row: Int32[Array, ""]) -> Array:
        return plgpu.load(ref.at[row], layout=row_layout(self.width), optimized=False)

    def _nothing(self) -> Float[Array, " w"]:
        return plgpu.layout_cast(jnp.zeros(self.width, jnp.float32), row_layout(self.width))

    def _place(self, operands: Operands, run: Int32[Array, ""]) -> _Place:
        runs, first = operands.runs, operands.first_ids
        return _Place(
            run=run,
            row=runs.rows[run],
            slot=runs.slots[run],
            number=None if operands.numbers is None else operands.numbers[run],
            length=operands.lengths[run],
            first=SortedId(first.bag[run], None if first.weight is None else first.weight[run]),
        )

    def _load(self, operands: Operands, place: _Place) -> RowValues:
        """Loads a row."""
        stores = operands.stores
        weights = self._vector(stores.weights, place.row)
        element_state = [self._vector(state, place.row) for state in stores.element_state]
        return RowValues(
            weights=rounding.joined(weights, element_state.pop()) if self.is_split else weights.astype(jnp.float32),
            element_state=tuple(element_state),
            row_state=tuple(state[place.number] for state in stores.row_state),
        )

    def _gradients(
        self, operands: Operands, places: Sequence[_Place], zero: Int32[Array, ""]
    ) -> tuple[tuple[Float[Array, " w"], ...], tuple[Float[Array, ""] | None, ...]]:
        """The gradient of each row and what to multiply it with: those of its only id, or the sum of all of them and 1.

        Where no row has a second id, nothing waits here for gradients, so that the rows are loaded meanwhile. Else the
        next few ids of all rows are added together, for rows that wait for memory together wait once; those that are
        left belong to few rows.
        """
        most = functools.reduce(jnp.maximum, [place.length for place in places])
        firsts = tuple(gradient_of_bag(operands.ids, place.first.bag) for place in places)
        weights = tuple(place.first.weight for place in places)

        def sums() -> tuple:
            starts = [operands.runs.starts[place.run] for place in places]

            def add_next(carry: tuple) -> tuple:
                number, *totals = carry
                ids = [
                    sorted_id(operands.ids, start + jnp.minimum(number, place.length - 1))
                    for place, start in zip(places, starts, strict=True)
                ]
                found = [weighted(gradient_of_bag(operands.ids, one.bag), one.weight, zero) for one in ids]
                counts = [jnp.broadcast_to(number < place.length, (self.width,)) for place in places]
                kept = [lax.select(*vectors, self._nothing()) for vectors in zip(counts, found, strict=True)]
                return number + 1, *[total + vector for total, vector in zip(totals, kept, strict=True)]

            totals = [self._nothing() + weighted(*of_row, zero) for of_row in zip(firsts, weights, strict=True)]
            together = jnp.minimum(most, _TOGETHER)
            _, *totals = lax.while_loop(lambda carry: carry[0] < together, add_next, (jnp.int32(1), *totals))

            def rest() -> tuple:
                return tuple(self._rest_of_run(operands, *of_row, zero) for of_row in zip(places, totals, strict=True))

            totals = lax.cond(most > _TOGETHER, rest, lambda: tuple(totals))
            return totals, tuple(None if weight is None else jnp.float32(1) for weight in weights)

        return lax.cond(most > 1, sums, lambda: (firsts, weights))

    def _rest_of_run(
        self, operands: Operands, place: _Place, total: Float[Array, " w"], zero: Int32[Array, ""]
    ) -> Float[Array, " w"]:
        """The sum of the gradients of a row, from that of its first `_TOGETHER` ids."""
        start, length = operands.runs.starts[place.run], place.length

        def add_ids() -> Float[Array, " w"]:
            return add_in_order(
                total,
                start + _TOGETHER,
                start + length,
                functools.partial(sorted_id, operands.ids),
                lambda one: weighted(gradient_of_bag(operands.ids, one.bag), one.weight, zero),
            )

        def add_blocks() -> Float[Array, " w"]:
            return add_in_order(
                jnp.zeros_like(total),
                jnp.int32(0),
                (length + RUN_BLOCK - 1) // RUN_BLOCK,
                lambda block: place_of_block(start + block * RUN_BLOCK, block == 0),
                functools.partial(self._vector, operands.block_sums),
            )

        return lax.cond(length > RUN_BLOCK, add_blocks, add_ids)

    def _inputs(self, operands: Operands, place: _Place, values: RowValues, gradient: Float[Array, " w"]) -> _Inputs:
        """What a rule is given of a row, beside statistics."""
        return values, gradient, [operands.scalars[place.slot, i] for i in range(operands.scalars.shape[1])]

    def _block_sums(self, scratch: Any, other_scratch: Any, inputs: Sequence[_Inputs]) -> list[list[list[Array]]]:
        """The sums of each block of columns, of each statistic, of each row."""
        num_statistics, block = self.rule.num_statistics, min(STATISTICS_BLOCK, self.width)
        for i, of_row in enumerate(inputs):
            for j, summand in enumerate(self.rule.summands(*of_row)):
                here = pl.ds((i * num_statistics + j) * self.width, self.width)
                store(scratch.at[here], summand)
        sums = sum_blocks_of_columns(scratch, other_scratch, self.scratch_size, block)
        return [
            [
                [sums[(i * num_statistics + j) * self.width + column] for column in range(0, self.width, block)]
                for j in range(num_statistics)
            ]
            for i in range(len(inputs))
        ]

    def _statistics(
        self,
        operands: Operands,
        scratch: Any,
        other_scratch: Any,
        places: Sequence[_Place],
        inputs: Sequence[_Inputs],
    ) -> list[list[Float[Array, ""]]]:
        """The sums over all columns that the rule asks for, of each row."""
        numbers = range(self.rule.num_statistics)
        if operands.statistics is not None:
            return [[operands.statistics[place.run, j] for j in numbers] for place in places]
        if not numbers:
            return [[] for _ in places]
        # The blocks in column order, as in `row_optimizers.sum_blocks`.
        found = self._block_sums(scratch, other_scratch, inputs)
        return [[functools.reduce(operator.add, blocks) for blocks in sums_of_row] for sums_of_row in found]

    def _write_sums(self, sums: Any, places: Sequence[_Place], found: Sequence[Sequence[Sequence[Array]]]) -> None:
        for place, sums_of_row in zip(places, found, strict=True):
            for j, blocks in enumerate(sums_of_row):
                for k, block in enumerate(blocks):
                    sums[place.run, j, k] = block

    def _rounded(self, operands: Operands, place: _Place, new: RowValues) -> RowValues:
        """New values as they are stored."""
        if self.is_split:
            weights, low = rounding.halves(new.weights)
            return new._replace(weights=weights, element_state=(*new.element_state, low))
        if self.is_stochastic:
            assert operands.keys is not None
            columns = plgpu.broadcasted_iota(jnp.int32, (self.width,), 0, layout=row_layout(self.width))
            columns = lax.bitcast_convert_type(columns + operands.first_columns[place.slot], jnp.uint32)
            bits = rounding.column_bits(operands.keys[place.run], columns)
            weights = without_is_finite(lambda x, b: rounding.stochastic_round(x, b, self.dtype), new.weights, bits)
            return new._replace(weights=weights)
        return new._replace(weights=new.weights.astype(self.dtype))

    def _write(self, operands: Operands, place: _Place, new: RowValues) -> None:
        stores = operands.stores
        store(stores.weights.at[place.row], new.weights)
        for state, values in zip(stores.element_state, new.element_state, strict=True):
            store(state.at[place.row], values)
        for state, value in zip(stores.row_state, new.row_state, strict=True):
            state[place.number] = value
