"""What one vector subcore does of an update: its share of the items, chunk after chunk.

The items of a chunk are read, and the gradients that they name gathered, while the chunk before is summed. The lines of
a block of units are gathered while the block before is changed in the subcore's memory, and scattered when it is done
with. A row is changed where its last item is. No line is read after it was written, so nothing waits for writes.

Letters: C items of a chunk, U units of a block, L lanes of a vector, h scalars of a slot.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_tpu.lines import LANES
from pallas_kernels.row_optimizers import STATISTICS_BLOCK, RowValues
from pallas_kernels.sparsecore.subcores import this_subcore
from pallas_kernels.sparsecore.update_call import CHUNKS_HELD, GRADIENTS, LINES_IN, LINES_OUT, SCALARS, WORDS, ShareCall
from pallas_kernels.sparsecore.work import bounds_size, tag_fields

# Vectors of a row that are read, changed and written in one iteration.
_VECTORS_IN_FLIGHT = 8


def update_shares(call: ShareCall, operands: dict[str, Any], scratch: dict[str, Any]) -> None:
    """Updates the rows of the shares that fall to this subcore.

    Args:
        call: What is known of the call.
        operands: In HBM: "bounds", "words", "units" and "sources" of the work; "hyper", h vectors for each slot;
            "elements", weights and elementwise state; "scalars", row-wise state, one number after the other; and, if
            sums over rows are asked for, "statistics", a line for each unit.
        scratch: See `ShareCall.scratch`.
    """
    worker = this_subcore(call.workers, call.subcores)
    pltpu.sync_copy(operands["bounds"], scratch["bounds"])
    for first_share in range(0, call.shares, call.workers):
        share = first_share + worker

        @pl.when(share < call.shares)
        def _(share=share):
            _Share(call, operands, scratch, share).run()


class _Share:
    """One share of the work, while the kernel is traced."""

    def __init__(self, call: ShareCall, operands: dict[str, Any], scratch: dict[str, Any], share: Int32[Array, ""]):
        self.call, self.operands, self.scratch = call, operands, scratch
        half = bounds_size(call.shares)
        self.first, self.end, self.first_rank, self.end_rank = (
            self._scalar(scratch["bounds"], at) for at in (share, share + 1, half + share, half + share + 1)
        )

    def run(self) -> None:
        """Updates the rows of all items of the share."""
        call, chunk_shift = self.call, self.call.chunk.bit_length() - 1

        @pl.when(self.end > self.first)
        def _():
            first_chunk, last_chunk = self.first >> chunk_shift, (self.end - 1) >> chunk_shift
            first_block = self.first_rank >> self._block_shift
            self._read_words(first_chunk).start()
            self._read_words(first_chunk).wait()
            self._fetch_gradients(first_chunk)
            pl.when(first_chunk < last_chunk)(lambda: self._read_words(first_chunk + 1).start())
            self._fetch_lines(first_block)
            self._begin_block(first_block)

            def update_chunk(c: Int32[Array, ""], carry: tuple) -> tuple:
                @pl.when(c < last_chunk)
                def _():
                    self._read_words(c + 1).wait()
                    self._fetch_gradients(c + 1)
                    pl.when(c + 1 < last_chunk)(lambda: self._read_words(c + 2).start())

                self._move_gradients(c, lambda copy: copy.wait())
                low = jnp.maximum(self.first - c * call.chunk, 0)
                high = jnp.minimum(self.end - c * call.chunk, call.chunk)
                if "scalar" in call.fields:
                    self._fetch_scalars(c, low, high)
                if "weight" in call.fields:
                    # Apart from the sums: a compiler that sees both would round product and sum as one.
                    jax.lax.fori_loop(low, high, lambda j, none: self._weigh(c, j), jnp.int32(0))
                carry = jax.lax.fori_loop(low, high, lambda j, carry: self._add(c, j, *carry), carry)
                if "scalar" in call.fields and not call.only_statistics:
                    self._write_scalars(c)
                return carry

            last_block, _ = jax.lax.fori_loop(
                first_chunk, last_chunk + 1, update_chunk, (first_block, jnp.full_like(first_block, -1))
            )
            self._write_lines(last_block)

    @property
    def _block_shift(self) -> int:
        return self.call.block.bit_length() - 1

    def _scalar(self, buffer: jax.Ref, at: Int32[Array, ""]) -> Array:
        return buffer[pl.ds(at, self.call.lanes)][0]

    def _word(self, name: str, c: Int32[Array, ""], j: Int32[Array, ""]) -> Int32[Array, " L"]:
        """A field of consecutive items, from item j of chunk c on."""
        fields, chunk = self.call.fields, self.call.chunk
        start = ((c & (CHUNKS_HELD - 1)) * len(fields) + fields.index(name)) * chunk
        return self.scratch["words"][pl.ds(start + j, self.call.lanes)]

    def _number(self, name: str, c: Int32[Array, ""], j: Int32[Array, ""]) -> Float[Array, " L"]:
        """A field of an item that is a float32, L times."""
        word = jax.lax.bitcast_convert_type(self._word(name, c, j), jnp.float32)
        return jnp.full((self.call.lanes,), word[0])

    def _read_words(self, c: Int32[Array, ""]) -> Any:
        size = len(self.call.fields) * self.call.chunk
        source = self.operands["words"].at[pl.ds(pl.multiple_of(c * size, size), size)]
        start = pl.multiple_of((c & (CHUNKS_HELD - 1)) * size, size)
        return pltpu.make_async_copy(
            source, self.scratch["words"].at[pl.ds(start, size)], self.scratch["semaphores"].at[WORDS]
        )

    def _move(
        self,
        array: jax.Ref,
        numbers: jax.Ref,
        at: Int32[Array, ""],
        held: jax.Ref,
        count: int,
        semaphore: Int32[Array, ""] | int,
        action: Callable[[Any], None],
        *,
        out: bool = False,
    ) -> None:
        """Starts or awaits copies of lines, or numbers, of an array: entry ``at`` of ``numbers`` says which; not -1."""
        semaphore = self.scratch["semaphores"].at[semaphore]

        def copy(there: Any, here: Any) -> None:
            action(pltpu.make_async_copy(*((here, there) if out else (there, here)), semaphore))

        first = at * count
        if not self.call.one_by_one:
            there = array.at[plsc.Indices(numbers.at[at, pl.ds(0, count)], ignored_value=-1)]
            copy(there, held.at[pl.ds(pl.multiple_of(first, count), count)])
            return

        def copy_one(j: Int32[Array, ""], none: Int32[Array, ""]) -> Int32[Array, ""]:
            number = numbers[at, pl.ds(j, self.call.lanes)][0]
            pl.when(number >= 0)(lambda: copy(array.at[pl.ds(number, 1)], held.at[pl.ds(first + j, 1)]))
            return none

        jax.lax.fori_loop(0, count, copy_one, jnp.int32(0))

    def _segments(self, parity: Int32[Array, ""]) -> list[Int32[Array, ""]]:
        m = self.call.shape.segments_per_row
        return [parity * m + i for i in range(m)]

    def _fetch_gradients(self, c: Int32[Array, ""]) -> None:
        """Starts to gather the gradients of a chunk whose words are there."""
        call, m = self.call, self.call.shape.segments_per_row
        for j in range(0, call.chunk, call.lanes):
            source = self._word("source", c, jnp.int32(j))
            for i, at in enumerate(self._segments(c & 1)):
                self.scratch["sources"][at, pl.ds(j, call.lanes)] = source * m + i
        self._move_gradients(c, lambda copy: copy.start())

    def _move_gradients(self, c: Int32[Array, ""], action: Callable[[Any], None]) -> None:
        for at in self._segments(c & 1):
            self._move(
                self.operands["sources"],
                self.scratch["sources"],
                at,
                self.scratch["gradients"],
                self.call.chunk,
                GRADIENTS + (c & 1),
                action,
            )

    def _fetch_lines(self, block: Int32[Array, ""]) -> None:
        """Starts to gather the lines of a block's units, as far as they are of this share."""
        call, m, size = self.call, self.call.shape.segments_per_row, self.call.block
        start = pl.multiple_of(block * size, size)
        pltpu.sync_copy(self.operands["units"].at[pl.ds(start, size)], self.scratch["units"].at[pl.ds(0, size)])
        for j in range(0, size, call.lanes):
            unit = self.scratch["units"][pl.ds(j, call.lanes)]
            rank = block * size + j + jax.lax.iota(jnp.int32, call.lanes)
            mine = (rank >= self.first_rank) & (rank < self.end_rank)
            for i, at in enumerate(self._segments(block & 1)):
                self.scratch["lines"][at, pl.ds(j, call.lanes)] = jnp.where(mine, unit * m + i, -1)
            for ranks in self.scratch["ranks"]:
                ranks[block & 1, pl.ds(j, call.lanes)] = jnp.where(mine, rank, -1)
        self._move_lines(block, LINES_IN, lambda copy: copy.start())

    def _move_lines(
        self, block: Int32[Array, ""], semaphore: int, action: Callable[[Any], None], *, out: bool = False
    ) -> None:
        for array, held in zip(self.operands["elements"], self.scratch["elements"], strict=True):
            for at in self._segments(block & 1):
                self._move(array, self.scratch["lines"], at, held, self.call.block, semaphore, action, out=out)

    def _begin_block(self, block: Int32[Array, ""]) -> None:
        """Waits for the lines of a block, and starts to gather the next one's."""
        self._move_lines(block, LINES_IN, lambda copy: copy.wait())

        @pl.when((block + 1) << self._block_shift < self.end_rank)
        def _():
            self._fetch_lines(block + 1)

    def _write_lines(self, block: Int32[Array, ""]) -> None:
        """Scatters what a block's rows have become."""
        for action in (lambda copy: copy.start(), lambda copy: copy.wait()):
            if not self.call.only_statistics:
                self._move_lines(block, LINES_OUT, action, out=True)
            for held, ranks in zip(self.scratch["statistics"], self.scratch["ranks"], strict=True):
                there, at = self.operands["statistics"], block & 1
                self._move(there, ranks, at, held, self.call.block, LINES_OUT, action, out=True)

    def _fetch_scalars(self, c: Int32[Array, ""], low: Int32[Array, ""], high: Int32[Array, ""]) -> None:
        """Gathers the row-wise state of the rows whose last item is in this part of a chunk."""
        call = self.call
        for j in range(0, call.chunk, call.lanes):
            at = j + jax.lax.iota(jnp.int32, call.lanes)
            place = self._word("scalar", c, jnp.int32(j))
            self.scratch["places"][c & 1, pl.ds(j, call.lanes)] = jnp.where((at >= low) & (at < high), place, -1)
        self._move_scalars(c, lambda copy: copy.start())
        self._move_scalars(c, lambda copy: copy.wait())

    def _write_scalars(self, c: Int32[Array, ""]) -> None:
        self._move_scalars(c, lambda copy: copy.start(), out=True)
        self._move_scalars(c, lambda copy: copy.wait(), out=True)

    def _move_scalars(self, c: Int32[Array, ""], action: Callable[[Any], None], *, out: bool = False) -> None:
        for array, held in zip(self.operands["scalars"], self.scratch["scalars"], strict=True):
            self._move(array, self.scratch["places"], c & 1, held, self.call.chunk, SCALARS, action, out=out)

    def _vectors[T](self, body: Callable[[T, int, Array], T], start: T) -> T:
        """Runs a body for each vector of a row, with the lines that it is on: ``body(result, i, lane)``."""
        lanes, result = self.call.lanes, start
        count = min(self.call.shape.width, LANES) // lanes
        # An interpreter gains nothing from several vectors in flight.
        unroll = 1 if self.call.one_by_one else min(count, _VECTORS_IN_FLIGHT)
        for i in range(self.call.shape.segments_per_row):

            def step(q: Int32[Array, ""], result: T, i: int = i) -> T:
                return body(result, i, q * lanes)

            result = jax.lax.fori_loop(0, count, step, result, unroll=unroll)
        return result

    def _gradient(self, c: Int32[Array, ""], j: Int32[Array, ""], i: int, lane: Int32[Array, ""]) -> tuple:
        return self._segments(c & 1)[i] * self.call.chunk + j, pl.ds(lane, self.call.lanes)

    def _weigh(self, c: Int32[Array, ""], j: Int32[Array, ""]) -> Int32[Array, ""]:
        weight, gradients = self._number("weight", c, j), self.scratch["gradients"]

        def weigh(none: Int32[Array, ""], i: int, lane: Int32[Array, ""]) -> Int32[Array, ""]:
            at = self._gradient(c, j, i, lane)
            gradients[at] = gradients[at] * weight
            return none

        return self._vectors(weigh, jnp.int32(0))

    def _add(
        self,
        c: Int32[Array, ""],
        j: Int32[Array, ""],
        block: Int32[Array, ""],
        held_slot: Int32[Array, ""],
    ) -> tuple[Array, Array]:
        """Adds the gradient of an item to its row's, and updates the row if it is the last.

        Args:
            c: The item's chunk.
            j: Its place there.
            block: The block whose lines are at hand.
            held_slot: The slot whose hyperparameters are at hand.

        Returns:
            The block and the slot after that.
        """
        is_first, is_last, place, slot = tag_fields(self._word("tag", c, j)[0])
        rank = self._word("rank", c, j)[0]
        own_block = rank >> self._block_shift

        @pl.when(own_block != block)
        def _():
            self._write_lines(block)
            self._begin_block(own_block)

        total = self.scratch["sum"]

        def add(none: Int32[Array, ""], i: int, lane: Int32[Array, ""]) -> Int32[Array, ""]:
            at = pl.ds(i * LANES + lane, self.call.lanes)
            total[at] = jnp.where(is_first, 0.0, total[at]) + self.scratch["gradients"][self._gradient(c, j, i, lane)]
            return none

        self._vectors(add, jnp.int32(0))

        @pl.when(is_last & (slot != held_slot))
        def _():
            size = self.call.scalars_of_slot * self.call.lanes
            pltpu.sync_copy(
                self.operands["hyper"].at[pl.ds(pl.multiple_of(slot * size, size), size)], self.scratch["hyper"]
            )

        pl.when(is_last)(lambda: self._update_row(c, j, rank, place))
        return own_block, jnp.where(is_last, slot, held_slot)

    def _update_row(
        self, c: Int32[Array, ""], j: Int32[Array, ""], rank: Int32[Array, ""], place: Int32[Array, ""]
    ) -> None:
        """Applies the rule to a row, its gradient being summed; or sums what the rule needs the sums of."""
        call, lanes, rule = self.call, self.call.lanes, self.call.rule
        block, unit = rank >> self._block_shift, rank & (call.block - 1)
        first_lane = place * call.shape.width if call.shape.rows_per_segment > 1 else 0
        hyper = [self.scratch["hyper"][pl.ds(k * lanes, lanes)] for k in range(call.scalars_of_slot)]
        scalars = tuple(
            jnp.full((lanes,), self._scalar(held, (c & 1) * call.chunk + j)) for held in self.scratch["scalars"]
        )

        def vector(i: int, lane: Int32[Array, ""]) -> tuple[tuple, RowValues, Float[Array, " L"]]:
            at = self._segments(block & 1)[i] * call.block + unit, pl.ds(first_lane + lane, lanes)
            weights, *state = (held[at] for held in self.scratch["elements"])
            return at, RowValues(weights, tuple(state), scalars), self.scratch["sum"][pl.ds(i * LANES + lane, lanes)]

        statistics: Sequence[Array] = ()
        if rule.num_statistics and "statistic 0" in call.fields:
            statistics = [self._number(f"statistic {k}", c, j) for k in range(rule.num_statistics)]
        elif rule.num_statistics:

            def write_summands(none: Int32[Array, ""], i: int, lane: Int32[Array, ""]) -> Int32[Array, ""]:
                _, values, gradient = vector(i, lane)
                for buffer, x in zip(self.scratch["summands"], rule.summands(values, gradient, hyper), strict=True):
                    buffer[pl.ds(i * LANES + lane, lanes)] = x
                return none

            self._vectors(write_summands, jnp.int32(0))
            for buffer in self.scratch["summands"]:
                self._sum_blocks(buffer)
            if call.only_statistics:
                self._keep_statistics((block & 1) * call.block + unit, place)
                return
            statistics = [self._sum_of_blocks(buffer) for buffer in self.scratch["summands"]]

        def apply(_: tuple, i: int, lane: Int32[Array, ""]) -> tuple:
            at, values, gradient = vector(i, lane)
            new = rule.apply(values, gradient, hyper, statistics)
            for held, x in zip(self.scratch["elements"], (new.weights, *new.element_state), strict=True):
                held[at] = x
            return tuple(new.row_state)

        new_scalars = self._vectors(apply, scalars)
        for held, x in zip(self.scratch["scalars"], new_scalars, strict=True):
            start = (c & 1) * call.chunk + (j & -lanes)
            self._put(held, (pl.ds(start, lanes),), j & (lanes - 1), x)

    def _put(self, buffer: jax.Ref, at: tuple, lane: Int32[Array, ""], x: Float[Array, " L"]) -> None:
        """Writes one lane of a vector."""
        buffer[at] = jnp.where(jax.lax.iota(jnp.int32, self.call.lanes) == lane, x, buffer[at])

    def _sum_blocks(self, buffer: jax.Ref) -> None:
        """`row_optimizers.sum_columns` in memory: the sum of a block is left where the block begins.

        What is added is read from memory, hence never fused with the product that it was.
        """
        lanes, half = self.call.lanes, min(STATISTICS_BLOCK, self.call.shape.width) // 2
        while half:

            def halve(b: Int32[Array, ""], none: Int32[Array, ""], half: int = half) -> Int32[Array, ""]:
                at = b * STATISTICS_BLOCK
                buffer[pl.ds(at, lanes)] = buffer[pl.ds(at, lanes)] + buffer[pl.ds(at + half, lanes)]
                return none

            jax.lax.fori_loop(0, self.call.num_blocks, halve, jnp.int32(0))
            half //= 2

    def _sum_of_blocks(self, buffer: jax.Ref) -> Float[Array, " L"]:
        """`row_optimizers.sum_blocks`, L times."""
        total = buffer[pl.ds(0, self.call.lanes)]
        for b in range(1, self.call.num_blocks):
            total = total + buffer[pl.ds(b * STATISTICS_BLOCK, self.call.lanes)]
        return jnp.full((self.call.lanes,), total[0])

    def _keep_statistics(self, unit: Int32[Array, ""], place: Int32[Array, ""]) -> None:
        """Writes the sums of a row's blocks, one summand's after the other's, to the line of its unit."""
        (lines,) = self.scratch["statistics"]
        first, lanes = place * self.call.statistics_of_row, self.call.lanes
        for k, buffer in enumerate(self.scratch["summands"]):
            for b in range(self.call.num_blocks):
                lane = first + k * self.call.num_blocks + b
                x = jnp.full((lanes,), self._scalar(buffer, jnp.int32(b * STATISTICS_BLOCK)))
                self._put(lines, (unit, pl.ds(lane & -lanes, lanes)), lane & (lanes - 1), x)
