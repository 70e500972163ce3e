"""sparse_update and row_statistics as Pallas Mosaic GPU kernels (Hopper and later).

A *program* (one warpgroup of 128 lanes) owns some consecutive rows of those that the batch touches: nobody else reads
or writes them. It takes a few at a time. First it loads all that it needs of them (weights, state, the first gradient
of each), so that the loads overlap; then it adds the remaining gradients of each, in order; then come the sums over
columns, of all of them together, in shared memory; then the rule, and the new values are written where the old ones
were. A row of the gradients is read where it lies and its sum never leaves the registers.

Bytes in flight: a program holds up to four rows with their state and gradients. At width 128 in float32 with row-wise
state its 78 registers a lane let six programs share a processor: 24 kB, or 3 MB on 132 of them, of the 4 to 5 MB that
4.8 TB/s at a latency of a microsecond ask for. Reasoning, not a measurement.

Letters: n ids, G bags, S slots, w width of a row, k statistics, C pieces of RUN_BLOCK ids.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels import rounding
from pallas_kernels.ids import Ids
from pallas_kernels.mosaic_gpu.rows import FULL_GRID, LANES, add_halves_of_blocks, opaque_zero, row_layout, run_kernel
from pallas_kernels.mosaic_gpu.runs import (
    Runs,
    SortedGradients,
    add_in_order,
    gradient_of_place,
    place_of_block,
    sort_ids,
    sum_blocks_of_long_runs,
)
from pallas_kernels.row_optimizers import STATISTICS_BLOCK, RowOptimizer, RowValues
from pallas_kernels.slots import Slots
from pallas_kernels.stores import Stores
from pallas_kernels.traced_rules import TracedRule, trace_rule, without_is_finite
from pallas_kernels.xla import RUN_BLOCK

# Registers of a lane that hold rows, and the most rows that a program takes at a time.
_REGISTERS, _MOST_ROWS = 48, 4
# How often a program takes rows, where there is work for a full grid.
_STEPS_OF_PROGRAM = 4


def sparse_update(
    stores: Stores,
    ids: Ids,
    gradients: Float[Array, "G w"],
    *,
    slots: Slots,
    step: Int32[Array, ""],
    seed: UInt32[Array, ""],
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: rounding.Rounding,
    statistics: Float[Array, "n k"] | None,
    enabled: Bool[Array, ""],
) -> Stores:
    """See `pallas_kernels.sparse_update`."""
    kernel = _Kernel.of(optimizer, stores.weights.dtype, width, storage_rounding)
    refs, num_rows = jax.tree.map(jax.new_ref, _by_row(stores, width)), stores.num_rows(width)
    operands = _operands(kernel, refs, ids, gradients, slots, step, num_rows=num_rows)
    runs = operands.runs._replace(count=jnp.where(enabled, operands.runs.count, 0))
    operands, first_ids = operands._replace(runs=runs), runs.first_ids
    if statistics is not None:
        operands = operands._replace(statistics=statistics[first_ids])
    if kernel.is_stochastic:
        tables = slots.table[operands.runs.slots]
        keys = rounding.row_key(seed, step.astype(jnp.uint32), tables, ids.given_logical_rows()[first_ids])
        operands = operands._replace(keys=keys)
    kernel.run(operands, (), name=f"sparse_update_{optimizer.name}")
    new = jax.tree.map(jax.freeze, operands.stores)
    return jax.tree.map(lambda array, old: array.reshape(old.shape), new, stores)


def row_statistics(
    stores: Stores,
    ids: Ids,
    gradients: Float[Array, "G w"],
    *,
    slots: Slots,
    step: Int32[Array, ""],
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: rounding.Rounding,
) -> Float[Array, "n blocks k"]:
    """See `pallas_kernels.row_statistics`."""
    kernel = _Kernel.of(optimizer, stores.weights.dtype, width, storage_rounding)
    num_ids, blocks = ids.rows.shape[0], width // min(STATISTICS_BLOCK, width)
    by_row, num_rows = _by_row(stores, width), stores.num_rows(width)
    operands = _operands(kernel, by_row, ids, gradients, slots, step, num_rows=num_rows)
    shape = (num_ids, kernel.rule.num_statistics, blocks)
    sums = kernel.run(operands, jax.ShapeDtypeStruct(shape, jnp.float32), name=f"row_statistics_{optimizer.name}")
    runs = operands.runs.run_of_id
    return jnp.where((runs < operands.runs.count)[:, None, None], jnp.swapaxes(sums[runs], 1, 2), 0)


def _by_row(stores: Stores, width: int) -> Stores:
    """Weights and elementwise state as [rows, width], row-wise state as [numbers]."""
    return Stores(
        weights=stores.weights.reshape(-1, width),
        element_state=tuple(state.reshape(-1, width) for state in stores.element_state),
        row_state=tuple(state.reshape(-1) for state in stores.row_state),
    )


class _Operands(NamedTuple):
    """Operands of the kernel.

    Attributes:
        stores: Weights and state `_by_row`, or references to them.
        runs: The rows to update.
        ids: Their gradients.
        block_sums: Gradients of long runs, see `runs.place_of_block`.
        scalars: See `TracedRule.scalars_of_slots`.
        places: First row, first number of row-wise state and first column of each slot.
        statistics: The statistics of each run, where the caller has them.
        keys: Keys of the random bits of each run, for stochastic rounding.
    """

    stores: Stores
    runs: Runs
    ids: SortedGradients
    block_sums: Float[Array, "2C w"]
    scalars: Float[Array, "S h"]
    places: Int32[Array, "S 3"]
    statistics: Float[Array, "n k"] | None = None
    keys: UInt32[Array, " n"] | None = None


def _operands(
    kernel: "_Kernel",
    stores: Stores,
    ids: Ids,
    gradients: Float[Array, "G w"],
    slots: Slots,
    step: Int32[Array, ""],
    *,
    num_rows: int,
) -> _Operands:
    runs, sorted_gradients = sort_ids(ids, gradients, opaque_zero(ids.rows), num_rows=num_rows)
    first_column = lax.bitcast_convert_type(slots.first_column, jnp.int32)
    return _Operands(
        stores=stores,
        runs=runs,
        ids=sorted_gradients,
        block_sums=sum_blocks_of_long_runs(runs, sorted_gradients),
        scalars=kernel.rule.scalars_of_slots(slots, step.astype(jnp.float32)),
        places=jnp.stack([slots.first_row, slots.first_scalar, first_column], axis=1),
    )


class _Row(NamedTuple):
    """One row in a program's registers.

    Attributes:
        run: Number of its run.
        is_there: Whether there is such a run; otherwise all else is that of another, and nothing is to be written.
        row: The row.
        slot: Its slot.
        number: Place of its row-wise state.
        start: First place of its ids among the sorted ids.
        end: The place after their last.
        values: Weights and state.
        scalars: The scalars of its slot.
        gradient: Its first gradient, then the sum of them.
    """

    run: Int32[Array, ""]
    is_there: Bool[Array, ""]
    row: Int32[Array, ""]
    slot: Int32[Array, ""]
    number: Int32[Array, ""]
    start: Int32[Array, ""]
    end: Int32[Array, ""]
    values: RowValues
    scalars: list[Float[Array, ""]]
    gradient: Float[Array, " w"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kernel:
    """What is fixed when the kernel is traced."""

    rule: TracedRule
    dtype: jnp.dtype
    width: int
    storage_rounding: rounding.Rounding

    @classmethod
    def of(cls, optimizer: RowOptimizer, dtype: Any, width: int, storage_rounding: rounding.Rounding) -> "_Kernel":
        return cls(
            rule=trace_rule(optimizer, width),
            dtype=jnp.dtype(dtype),
            width=width,
            storage_rounding=storage_rounding,
        )

    @property
    def is_stochastic(self) -> bool:
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

    def run(self, operands: _Operands, out_type: Any, *, name: str) -> Any:
        """Updates the stores of `operands` if they are references, or else returns sums over blocks of columns."""
        num_ids = operands.runs.rows.shape[0]
        in_flight = self.rows_in_flight
        steps = max(1, min(_STEPS_OF_PROGRAM, num_ids // (in_flight * FULL_GRID)))
        runs_of_program = in_flight * steps

        def body(operands: _Operands, *refs: Any) -> None:
            sums, scratch = (None, *refs) if out_type == () else refs
            first = lax.axis_index("program") * runs_of_program
            stop = jnp.minimum(first + runs_of_program, operands.runs.count[0])

            def step(base: Int32[Array, ""]) -> Int32[Array, ""]:
                rows = [self._load(operands, base, base + i, stop) for i in range(in_flight)]
                rows = [self._add_gradients(operands, row) for row in rows]
                if sums is not None:
                    self._sum_columns(scratch, rows)
                    self._write_sums(sums, scratch, rows)
                    return base + in_flight
                statistics = self._statistics(operands, scratch, rows)
                for row, sums_of_row in zip(rows, statistics, strict=True):
                    self._write(operands, row, self.rule.apply(row.values, row.gradient, row.scalars, sums_of_row))
                return base + in_flight

            lax.while_loop(lambda base: base < stop, step, first)

        return run_kernel(
            body,
            operands,
            out_type,
            grid={"program": -(-num_ids // runs_of_program)},
            name=name,
            barriers=True,
            # A sum of two halves of a block reads up to half a block beyond the last column.
            scratch_types=[plgpu.SMEM((self.scratch_size + STATISTICS_BLOCK // 2,), jnp.float32)],
        )

    def _vector(self, ref: Any, row: Int32[Array, ""]) -> Array:
        return plgpu.load(ref.at[row], layout=row_layout(self.width), optimized=False)

    def _load(self, operands: _Operands, base: Array, run: Array, stop: Array) -> _Row:
        """Loads a row and the first of its gradients; of a run that is not there, those of another that is."""
        stores, runs = operands.stores, operands.runs
        is_there = run < stop
        run = jnp.where(is_there, run, base)
        row, slot, start = runs.rows[run], runs.slots[run], runs.starts[run]
        number = row - operands.places[slot, 0] + operands.places[slot, 1]
        weights, element_state = self._vector(stores.weights, row), [self._vector(x, row) for x in stores.element_state]
        values = RowValues(
            weights=rounding.joined(weights, element_state.pop()) if self.is_split else weights.astype(jnp.float32),
            element_state=tuple(element_state),
            row_state=tuple(state[number] for state in stores.row_state),
        )
        return _Row(
            row=row,
            run=run,
            is_there=is_there,
            values=values,
            scalars=[operands.scalars[slot, i] for i in range(operands.scalars.shape[1])],
            number=number,
            slot=slot,
            start=start,
            end=runs.starts[run + 1],
            gradient=gradient_of_place(operands.ids, start, zero=operands.ids.zero[0]),
        )

    def _add_gradients(self, operands: _Operands, row: _Row) -> _Row:
        """Adds the gradients of a row that were not loaded with it."""
        nothing = plgpu.layout_cast(jnp.zeros(self.width, jnp.float32), row_layout(self.width))
        zero = operands.ids.zero[0]

        def add_ids() -> Float[Array, " w"]:
            first = nothing + row.gradient
            return add_in_order(
                first, row.start + 1, row.end, lambda place: gradient_of_place(operands.ids, place, zero=zero)
            )

        def add_blocks() -> Float[Array, " w"]:
            def sum_of_block(block: Int32[Array, ""]) -> Float[Array, " w"]:
                place = place_of_block(row.start + block * RUN_BLOCK, block == 0)
                return self._vector(operands.block_sums, place)

            blocks = (row.end - row.start + RUN_BLOCK - 1) // RUN_BLOCK
            return add_in_order(nothing, jnp.int32(0), blocks, sum_of_block, in_flight=8)

        return row._replace(gradient=lax.cond(row.end - row.start > RUN_BLOCK, add_blocks, add_ids))

    def _sum_columns(self, scratch: Any, rows: Sequence[_Row]) -> None:
        """Leaves in scratch the sums of each block of columns, where its first column was."""
        for i, row in enumerate(rows):
            for j, summand in enumerate(self.rule.summands(row.values, row.gradient, row.scalars)):
                plgpu.store(scratch.at[pl.ds(self._place(i, j), self.width)], summand, optimized=False)
        add_halves_of_blocks(scratch, self.scratch_size, min(STATISTICS_BLOCK, self.width))

    def _place(self, row: int, statistic: int, column: int = 0) -> int:
        return (row * self.rule.num_statistics + statistic) * self.width + column

    def _statistics(self, operands: _Operands, scratch: Any, rows: Sequence[_Row]) -> list[list[Float[Array, ""]]]:
        """The sums over all columns that the rule asks for, of each row."""
        numbers = range(self.rule.num_statistics)
        if operands.statistics is not None:
            return [[operands.statistics[row.run, j] for j in numbers] for row in rows]
        if not numbers:
            return [[] for _ in rows]
        self._sum_columns(scratch, rows)

        def total(i: int, j: int) -> Float[Array, ""]:
            """The blocks, in column order, as in `row_optimizers.sum_blocks`."""
            blocks = [scratch[self._place(i, j, column)] for column in range(0, self.width, STATISTICS_BLOCK)]
            return functools.reduce(operator.add, blocks)

        return [[total(i, j) for j in numbers] for i in range(len(rows))]

    def _write_sums(self, sums: Any, scratch: Any, rows: Sequence[_Row]) -> None:
        for i, row in enumerate(rows):

            @pl.when(row.is_there)
            def _(i: int = i, row: _Row = row) -> None:
                for j in range(self.rule.num_statistics):
                    for block, column in enumerate(range(0, self.width, STATISTICS_BLOCK)):
                        sums[row.run, j, block] = scratch[self._place(i, j, column)]

    def _write(self, operands: _Operands, row: _Row, new: RowValues) -> None:
        stores = operands.stores
        weights, element_state = new.weights, new.element_state
        if self.is_split:
            weights, low = rounding.halves(weights)
            element_state = (*element_state, low)
        elif self.is_stochastic:
            assert operands.keys is not None
            columns = plgpu.broadcasted_iota(jnp.int32, (self.width,), 0, layout=row_layout(self.width))
            columns = lax.bitcast_convert_type(columns + operands.places[row.slot, 2], jnp.uint32)
            bits = rounding.column_bits(operands.keys[row.run], columns)
            weights = without_is_finite(lambda x, b: rounding.stochastic_round(x, b, self.dtype), weights, bits)

        @pl.when(row.is_there)
        def _() -> None:
            # The first store waits until all warps have read what they need of all rows in flight. That of a number of
            # row-wise state would not wait: it comes last.
            plgpu.store(stores.weights.at[row.row], weights.astype(self.dtype), optimized=False)
            for state, values in zip(stores.element_state, element_state, strict=True):
                plgpu.store(state.at[row.row], values, optimized=False)
            for state, value in zip(stores.row_state, new.row_state, strict=True):
                state[row.number] = value
