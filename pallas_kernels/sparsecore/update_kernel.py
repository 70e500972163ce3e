"""What one vector subcore does of an update: its share of the items, chunk after chunk.

The items of a chunk are read, and the gradients and row-wise state that they name gathered, while the chunk before is
summed. A row is
changed where its last item is, in the lines of a block of units: see `held_lines`.

Letters: C items of a chunk, U units of a block, L lanes of a vector, h scalars of a slot.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_tpu.lines import LANES
from pallas_kernels.sparsecore.held_lines import HeldLines, move
from pallas_kernels.sparsecore.stored_weights import Randomness
from pallas_kernels.sparsecore.subcores import this_subcore
from pallas_kernels.sparsecore.update_call import CHUNKS_HELD, GRADIENTS, SCALARS, SCALARS_OUT, WORDS, ShareCall
from pallas_kernels.sparsecore.update_row import update_row
from pallas_kernels.sparsecore.work import bounds_size, tag_fields


def update_shares(call: ShareCall, operands: dict[str, Any], scratch: dict[str, Any]) -> None:
    """Updates the rows of the shares that fall to this subcore.

    Args:
        call: What is known of the call.
        operands: In HBM: "bounds", "words", "units" and "sources" of the work; "hyper", h vectors for each slot;
            "stores", weights and elementwise state, cut by cut; "scalars", row-wise state, one number after the other;
            and, if sums over rows are asked for, "statistics", a line for each unit of the first cut.
        scratch: See `ShareCall.scratch`.
    """
    worker = this_subcore(call.workers, call.subcores)
    pltpu.sync_copy(operands["bounds"], scratch["bounds"])

    def update_share(k: Int32[Array, ""], none: Int32[Array, ""]) -> Int32[Array, ""]:
        share = worker + k * call.workers
        pl.when(share < call.shares)(lambda: _Share(call, operands, scratch, share).run())
        return none

    jax.lax.fori_loop(
        0, -(-call.shares // call.workers), update_share, jnp.int32(0), unroll=call.shares == call.workers
    )


class _Share:
    """One share of the work, while the kernel is traced."""

    def __init__(self, call: ShareCall, operands: dict[str, Any], scratch: dict[str, Any], share: Int32[Array, ""]):
        self.call, self.operands, self.scratch = call, operands, scratch
        size = bounds_size(call.shares)

        def bounds(part: int) -> tuple[Array, Array]:
            first, end = (call.scalar(scratch["bounds"], part * size + share + i) for i in range(2))
            return first, end

        self.first, self.end = bounds(0)
        self.held = [
            HeldLines(call, k, operands["stores"][k], operands["units"][k], scratch, bounds(1 + k))
            for k in range(len(call.cuts))
        ]

    def run(self) -> None:
        """Updates the rows of all items of the share."""
        call, chunk_shift = self.call, self.call.chunk.bit_length() - 1

        @pl.when(self.end > self.first)
        def _():
            first_chunk, last_chunk = self.first >> chunk_shift, (self.end - 1) >> chunk_shift
            first_blocks = tuple(held.first_block for held in self.held)
            self._read_words(first_chunk).start()
            for held, block in zip(self.held, first_blocks, strict=True):
                held.read_units(block).start()
            self._read_words(first_chunk).wait()
            self._fetch(first_chunk)
            pl.when(first_chunk < last_chunk)(lambda: self._read_words(first_chunk + 1).start())
            for held, block in zip(self.held, first_blocks, strict=True):
                held.fetch(block)
            for held, block in zip(self.held, first_blocks, strict=True):
                held.begin(block)

            has_scalars = "scalar" in call.fields
            writes_scalars = has_scalars and not call.only_statistics

            def update_chunk(c: Int32[Array, ""], carry: tuple) -> tuple:
                if writes_scalars:
                    pl.when(c > first_chunk)(lambda: self._move_scalars(c - 1, lambda copy: copy.wait(), out=True))

                @pl.when(c < last_chunk)
                def _():
                    self._read_words(c + 1).wait()
                    self._fetch(c + 1)
                    pl.when(c + 1 < last_chunk)(lambda: self._read_words(c + 2).start())

                self._move_gradients(c, lambda copy: copy.wait())
                if has_scalars:
                    self._move_scalars(c, lambda copy: copy.wait())
                low, high = self._items_of(c)
                if "weight" in call.fields:
                    # Apart from the sums: a compiler that sees both would round product and sum as one.
                    jax.lax.fori_loop(low, high, lambda j, none: self._weigh(c, j), jnp.int32(0))
                carry = jax.lax.fori_loop(low, high, lambda j, carry: self._add(c, j, *carry), carry)
                if writes_scalars:
                    self._move_scalars(c, lambda copy: copy.start(), out=True)
                return carry

            start = first_blocks, jnp.full_like(first_chunk, -1)
            last_blocks, _ = jax.lax.fori_loop(first_chunk, last_chunk + 1, update_chunk, start)
            for k, block in enumerate(last_blocks):
                self._write_lines(k, block)
            if writes_scalars:
                self._move_scalars(last_chunk, lambda copy: copy.wait(), out=True)

    def _items_of(self, c: Int32[Array, ""]) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
        """The first item of a chunk that is of this share, and the end of those that are."""
        chunk = self.call.chunk
        return jnp.maximum(self.first - c * chunk, 0), jnp.minimum(self.end - c * chunk, chunk)

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

    def _segments(self, parity: Int32[Array, ""]) -> list[Int32[Array, ""]]:
        m = self.call.shape.segments_per_row
        return [parity * m + i for i in range(m)]

    def _fetch(self, c: Int32[Array, ""]) -> None:
        """Starts to gather the gradients and the row-wise state of a chunk whose words are there."""
        call, m = self.call, self.call.shape.segments_per_row
        for j in range(0, call.chunk, call.lanes):
            source = self._word("source", c, jnp.int32(j))
            for i, at in enumerate(self._segments(c & 1)):
                self.scratch["sources"][at, pl.ds(j, call.lanes)] = source * m + i
        self._move_gradients(c, lambda copy: copy.start())
        if "scalar" in call.fields:
            self._fetch_scalars(c)

    def _move_gradients(self, c: Int32[Array, ""], action: Callable[[Any], None]) -> None:
        sources, semaphore = self.operands["sources"], self.scratch["semaphores"].at[GRADIENTS + (c & 1)]
        numbers, held = self.scratch["sources"], self.scratch["gradients"]
        for at in self._segments(c & 1):
            move(self.call, sources, numbers, at, held, self.call.chunk, semaphore, action)

    def _write_lines(self, cut: int, block: Int32[Array, ""]) -> None:
        """Scatters what a block's rows have become, or the sums over them."""
        if not self.call.only_statistics:
            self.held[cut].write(block)
        elif cut == 0:
            (lines,) = self.scratch["statistics"]
            self.held[cut].write_beside(self.operands["statistics"], lines, block)

    def _fetch_scalars(self, c: Int32[Array, ""]) -> None:
        """Starts to gather the row-wise state of the share's rows whose last item is in a chunk."""
        call, (low, high) = self.call, self._items_of(c)
        for j in range(0, call.chunk, call.lanes):
            at = j + jax.lax.iota(jnp.int32, call.lanes)
            place = self._word("scalar", c, jnp.int32(j))
            self.scratch["places"][c & 1, pl.ds(j, call.lanes)] = jnp.where((at >= low) & (at < high), place, -1)
        self._move_scalars(c, lambda copy: copy.start())

    def _move_scalars(self, c: Int32[Array, ""], action: Callable[[Any], None], *, out: bool = False) -> None:
        places, semaphores = self.scratch["places"], self.scratch["semaphores"]
        semaphore = semaphores.at[SCALARS_OUT] if out else semaphores.at[SCALARS + (c & 1)]
        for array, held in zip(self.operands["scalars"], self.scratch["scalars"], strict=True):
            move(self.call, array, places, c & 1, held, self.call.chunk, semaphore, action, out=out)

    def _gradient(self, c: Int32[Array, ""], j: Int32[Array, ""], i: int, lane: Int32[Array, ""]) -> tuple:
        return self._segments(c & 1)[i] * self.call.chunk + j, pl.ds(lane, self.call.lanes)

    def _weigh(self, c: Int32[Array, ""], j: Int32[Array, ""]) -> Int32[Array, ""]:
        weight, gradients = self._number("weight", c, j), self.scratch["gradients"]

        def weigh(none: Int32[Array, ""], i: int, lane: Int32[Array, ""]) -> Int32[Array, ""]:
            at = self._gradient(c, j, i, lane)
            gradients[at] = gradients[at] * weight
            return none

        return self.call.each_vector(weigh, jnp.int32(0))

    def _add(
        self,
        c: Int32[Array, ""],
        j: Int32[Array, ""],
        blocks: tuple[Int32[Array, ""], ...],
        held_slot: Int32[Array, ""],
    ) -> tuple[tuple[Array, ...], Array]:
        """Adds the gradient of an item to its row's, and updates the row if it is the last.

        Args:
            c: The item's chunk.
            j: Its place there.
            blocks: For each cut the block whose lines are at hand.
            held_slot: The slot whose hyperparameters are at hand.

        Returns:
            The blocks and the slot after that.
        """
        is_first, is_last, place, slot = tag_fields(self._word("tag", c, j)[0])
        ranks = [self._word(f"rank {k}", c, j)[0] for k in range(len(self.held))]
        own_blocks = tuple(held.block_of(rank) for held, rank in zip(self.held, ranks, strict=True))
        for k, (block, own_block) in enumerate(zip(blocks, own_blocks, strict=True)):

            @pl.when(own_block != block)
            def _(k=k, block=block, own_block=own_block):
                self._write_lines(k, block)
                self.held[k].begin(own_block)

        total = self.scratch["sum"]

        def add(none: Int32[Array, ""], i: int, lane: Int32[Array, ""]) -> Int32[Array, ""]:
            at = pl.ds(i * LANES + lane, self.call.lanes)
            total[at] = jnp.where(is_first, 0.0, total[at]) + self.scratch["gradients"][self._gradient(c, j, i, lane)]
            return none

        self.call.each_vector(add, jnp.int32(0))

        @pl.when(is_last & (slot != held_slot))
        def _():
            size = self.call.scalars_of_slot * self.call.lanes
            pltpu.sync_copy(
                self.operands["hyper"].at[pl.ds(pl.multiple_of(slot * size, size), size)], self.scratch["hyper"]
            )

        @pl.when(is_last)
        def _():
            statistics = randomness = None
            if "statistic 0" in self.call.fields:
                statistics = [self._number(f"statistic {k}", c, j) for k in range(self.call.rule.num_statistics)]
            if "key" in self.call.fields:
                randomness = Randomness(self._word("key", c, j)[0], self._word("column", c, j)[0])
            item = (c & 1) * self.call.chunk + j
            update_row(self.call, self.scratch, self.held, ranks, place, item, statistics, randomness)

        return own_blocks, jnp.where(is_last, slot, held_slot)
