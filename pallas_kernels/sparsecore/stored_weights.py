"""Weights of a row in the lines that a subcore holds: read as float32, and written as they are stored.

Letters: L lanes of a vector.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels import rounding
from pallas_kernels.mosaic_tpu.lines import LANES, round_to_bfloat16
from pallas_kernels.sparsecore.held_lines import HeldLines
from pallas_kernels.sparsecore.update_call import ShareCall
from pallas_kernels.traced_rules import without_is_finite

_HIGH = 0xFFFF0000


class Randomness(NamedTuple):
    """What the random bits of a row's columns come from.

    Attributes:
        key: `rounding.row_key`, as an int32 of the same bits.
        first_column: Column of the table that the row's first one is.
    """

    key: Int32[Array, ""]
    first_column: Int32[Array, ""]


class StoredWeights(NamedTuple):
    """The weights of one row.

    Attributes:
        call: What is known of the call.
        held: The lines of the weights, and of their low halves if they are split.
        rank: Rank of the row's unit.
        first_segment: First segment of the row within its unit.
        first_lane: Lane of that segment where the row begins.
        randomness: For stochastic rounding.
    """

    call: ShareCall
    held: HeldLines
    rank: Int32[Array, ""]
    first_segment: Int32[Array, ""]
    first_lane: Int32[Array, ""] | int
    randomness: Randomness | None

    def read(self, i: int, lane: Int32[Array, ""]) -> Float[Array, " L"]:
        """A vector of segment i of the row."""
        at, high = self._place(i, lane)
        words = [lines[at] for lines in self.held.lines]
        if words[0].dtype == jnp.float32:
            return words[0]
        bits = _half(words[0], high)
        if self.call.rounding == "split":
            bits = bits | (_half(words[1], high) >> 16)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def write(self, i: int, lane: Int32[Array, ""], x: Float[Array, " L"]) -> None:
        """Changes a vector of segment i of the row."""
        at, high = self._place(i, lane)
        lines = self.held.lines
        if lines[0].dtype == jnp.float32:
            lines[0][at] = x
            return
        if self.call.rounding == "split":
            low = jax.lax.bitcast_convert_type(x, jnp.uint32) << 16
            lines[1][at] = _with_half(lines[1][at], high, low)
        elif self.randomness is None:
            x = round_to_bfloat16(x)
        else:
            x = self._rounded(x, self.randomness, i * LANES + lane)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(_HIGH)
        lines[0][at] = _with_half(lines[0][at], high, bits)

    def _place(self, i: int, lane: Int32[Array, ""]) -> tuple[tuple, Bool[Array, ""] | bool]:
        """Where a vector is among the lines held; and whether in the high halves, if words are two."""
        units, lanes = self.held.cut.units, pl.ds(self.first_lane + lane, self.call.lanes)
        if units.dtype == jnp.float32:
            return (self.held.line_of(self.rank, i), lanes), False
        segment = self.first_segment + i
        copy = units.copy_of(segment, jnp.int32(0))
        return (self.held.line_of(self.rank, copy), lanes), (segment & 2) != 0

    def _rounded(self, x: Float[Array, " L"], randomness: Randomness, column: Int32[Array, ""]) -> Float[Array, " L"]:
        """Values that bfloat16 holds exactly."""
        lanes = self.call.lanes
        key = jax.lax.bitcast_convert_type(jnp.full((lanes,), randomness.key), jnp.uint32)
        columns = randomness.first_column + column + jax.lax.iota(jnp.int32, lanes)
        bits = rounding.column_bits(key, jax.lax.bitcast_convert_type(columns, jnp.uint32))

        def rounded(x: Array, bits: Array) -> Array:
            return rounding.stochastic_round(x, bits, jnp.dtype(jnp.bfloat16)).astype(jnp.float32)

        return without_is_finite(rounded, x, bits)


def _half(words: UInt32[Array, " L"], high: Bool[Array, ""] | bool) -> UInt32[Array, " L"]:
    """One half of each word, as the high half of another."""
    return jnp.where(high, words & jnp.uint32(_HIGH), words << 16)


def _with_half(
    words: UInt32[Array, " L"], high: Bool[Array, ""] | bool, bits: UInt32[Array, " L"]
) -> UInt32[Array, " L"]:
    """Words one half of which is the high half of others, whose low halves are 0."""
    return jnp.where(high, (words & jnp.uint32(0xFFFF)) | bits, (words & jnp.uint32(_HIGH)) | (bits >> 16))
