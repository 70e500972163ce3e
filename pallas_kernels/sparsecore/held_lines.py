"""Indirect copies, and the lines that a subcore holds of stores that are cut alike: those of two blocks of units.

The lines of a block of units are gathered while the block before is changed in the subcore's memory, and scattered when
it is done with. No line is read after it was written, so nothing waits for writes.

Letters: U units of a block.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc
from jaxtyping import Array, Bool, Int32

from pallas_kernels.mosaic_tpu.lines import LANES, words_of
from pallas_kernels.sparsecore.update_call import CUTS, SEMAPHORES_OF_CUT, Cut, ShareCall
from pallas_kernels.sparsecore.work import HALVES_BITS


def move(
    call: ShareCall,
    array: jax.Ref,
    numbers: jax.Ref,
    at: Int32[Array, ""],
    held: jax.Ref,
    count: int,
    semaphore: jax.Ref,
    action: Callable[[Any], None],
    *,
    half: int | None = None,
    out: bool = False,
) -> None:
    """Starts or awaits copies of lines, or of numbers, of an array.

    Args:
        call: What is known of the call.
        array: In HBM.
        numbers: Which ones, at entry ``at``; not -1.
        at: The entry, and ``at * count`` where the first one is held.
        held: In the subcore's memory.
        count: How many.
        semaphore: What knows of them.
        action: What to do with a copy.
        half: Which half of the lines of the array, if lines are of two.
        out: Whether to copy what is held to the array.
    """
    columns = () if half is None else (pl.ds(half * LANES, LANES),)

    def copy(there: Any, here: Any) -> None:
        action(pltpu.make_async_copy(*((here, there) if out else (there, here)), semaphore))

    first = at * count
    if not call.interpreted:
        indices = plsc.Indices(numbers.at[at, pl.ds(0, count)], ignored_value=-1)
        there = array.at[(indices, *columns) if columns else indices]
        copy(there, held.at[pl.ds(pl.multiple_of(first, count), count)])
        return

    def copy_one(j: Int32[Array, ""], none: Int32[Array, ""]) -> Int32[Array, ""]:
        number = numbers[at, pl.ds(j, call.lanes)][0]
        pl.when(number >= 0)(lambda: copy(array.at[(pl.ds(number, 1), *columns)], held.at[pl.ds(first + j, 1)]))
        return none

    jax.lax.fori_loop(0, count, copy_one, jnp.int32(0))


class HeldLines:
    """The lines of a cut that one share needs, block after block."""

    def __init__(
        self,
        call: ShareCall,
        number: int,
        stores: Sequence[jax.Ref],
        units: jax.Ref,
        scratch: dict[str, Any],
        ranks: tuple[Array, Array],
    ) -> None:
        """Holds nothing yet.

        Args:
            call: What is known of the call.
            number: Number of the cut.
            stores: The stores that are cut so.
            units: The units that are touched, in ascending order.
            scratch: See `ShareCall.scratch`.
            ranks: Rank of the share's first unit among those; and of the first after its last.
        """
        self._call, self._cut, self._units = call, call.cuts[number], units
        self._words = [words_of(store) for store in stores]
        self._scratch, self._ranks = scratch["cuts"][number], scratch["ranks"] if number == 0 else []
        first = CUTS + SEMAPHORES_OF_CUT * number
        self._in, self._out, self._of_units = (scratch["semaphores"].at[first + i] for i in range(SEMAPHORES_OF_CUT))
        self._first, self._end = ranks

    @property
    def cut(self) -> Cut:
        """How the stores are cut."""
        return self._cut

    @property
    def lines(self) -> list[jax.Ref]:
        """The lines of each store."""
        return self._scratch["lines"]

    @property
    def first_block(self) -> Int32[Array, ""]:
        """The block of the share's first unit."""
        return self.block_of(self._first)

    def block_of(self, rank: Int32[Array, ""]) -> Int32[Array, ""]:
        """The block of a unit."""
        return rank >> (self._cut.block.bit_length() - 1)

    def unit_of(self, rank: Int32[Array, ""]) -> Int32[Array, ""]:
        """Where a unit is among those of two blocks."""
        return (self.block_of(rank) & 1) * self._cut.block + (rank & (self._cut.block - 1))

    def line_of(self, rank: Int32[Array, ""], copy: Int32[Array, ""] | int) -> Int32[Array, ""]:
        """Where a line of a unit lies among `lines`."""
        entry = (self.block_of(rank) & 1) * self._cut.units.copies + copy
        return entry * self._cut.block + (rank & (self._cut.block - 1))

    def read_units(self, block: Int32[Array, ""]) -> Any:
        """The copy of the numbers of a block's units."""
        size = self._cut.block
        return pltpu.make_async_copy(
            self._units.at[pl.ds(pl.multiple_of(block * size, size), size)],
            self._scratch["units"].at[pl.ds(self._place_of_units(block), size)],
            self._of_units,
        )

    def fetch(self, block: Int32[Array, ""]) -> None:
        """Starts to gather the lines of a block's units, which are on their way, as far as they are of this share."""
        units, size, lanes, held = self._cut.units, self._cut.block, self._call.lanes, self._scratch
        self.read_units(block).wait()
        pl.when(self._has(block + 1))(lambda: self.read_units(block + 1).start())
        for j in range(0, size, lanes):
            unit = touched = held["units"][pl.ds(self._place_of_units(block) + j, lanes)]
            if units.dtype != jnp.float32:
                unit = touched >> HALVES_BITS
            rank = block * size + j + jax.lax.iota(jnp.int32, lanes)
            mine = (rank >= self._first) & (rank < self._end)
            for copy, at in enumerate(self._entries(block)):
                number, wanted = units.segment(unit, copy), mine
                if units.dtype != jnp.float32:
                    number, wanted = number >> 2, mine & ((touched & (1 << copy % 2)) != 0)
                held["numbers"][at, pl.ds(j, lanes)] = jnp.where(wanted, number, -1)
            for ranks in self._ranks:
                ranks[block & 1, pl.ds(j, lanes)] = jnp.where(mine, rank, -1)
        self._move(block, lambda copy: copy.start())

    def begin(self, block: Int32[Array, ""]) -> None:
        """Waits for the lines of a block, and starts to gather the next one's."""
        self._move(block, lambda copy: copy.wait())
        pl.when(self._has(block + 1))(lambda: self.fetch(block + 1))

    def write(self, block: Int32[Array, ""]) -> None:
        """Scatters what a block's rows have become."""
        self._move(block, lambda copy: copy.start(), out=True)
        self._move(block, lambda copy: copy.wait(), out=True)

    def write_beside(self, there: jax.Ref, held: jax.Ref, block: Int32[Array, ""]) -> None:
        """Scatters lines that are no store's, one for each unit, by the ranks of the units."""
        for action in (lambda copy: copy.start(), lambda copy: copy.wait()):
            for ranks in self._ranks:
                move(self._call, there, ranks, block & 1, held, self._cut.block, self._out, action, out=True)

    def _has(self, block: Int32[Array, ""]) -> Bool[Array, ""]:
        """Whether the share goes on in a block beyond its first."""
        return block * self._cut.block < self._end

    def _place_of_units(self, block: Int32[Array, ""]) -> Int32[Array, ""]:
        return pl.multiple_of((block & 1) * LANES, LANES)

    def _entries(self, block: Int32[Array, ""]) -> list[Int32[Array, ""]]:
        copies = self._cut.units.copies
        return [(block & 1) * copies + copy for copy in range(copies)]

    def _move(self, block: Int32[Array, ""], action: Callable[[Any], None], *, out: bool = False) -> None:
        semaphore, of_pairs = self._out if out else self._in, self._cut.units.dtype != jnp.float32
        for words, lines in zip(self._words, self.lines, strict=True):
            for copy, at in enumerate(self._entries(block)):
                half = copy % 2 if of_pairs else None
                numbers, size = self._scratch["numbers"], self._cut.block
                move(self._call, words, numbers, at, lines, size, semaphore, action, half=half, out=out)
