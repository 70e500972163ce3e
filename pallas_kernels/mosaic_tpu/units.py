"""Units: the smallest consecutive pieces of a store of which each holds whole rows, so that a unit has one writer.

Rows are visited in ascending order, so the rows of a unit follow one another. A unit is copied to VMEM when its first
row comes, changed there, and copied back after its last.

Letters: C ids of a chunk.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, Shaped

from pallas_kernels.mosaic_tpu.lines import LANES, SEGMENTS_OF_PAIR, RowShape, pad_to, round_up, segment_of

# Chunks whose units are in VMEM: the one being written back, the one being changed, the one being fetched.
BUFFERS = 3
# Numbers of one line of row-wise state.
_SCALARS_SHIFT = LANES.bit_length() - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Units:
    """How a store is cut into units.

    Attributes:
        dtype: float32, or bfloat16 for pairs of lines.
        of_scalars: Whether the store has one number a row.
        shift: Row, or scalar, ``r`` lies in unit ``r >> shift``.
        copies: Copies of 128 words that one unit takes.
        num_stores: Stores that are cut alike.
    """

    dtype: jnp.dtype
    of_scalars: bool
    shift: int
    copies: int
    num_stores: int

    @property
    def word(self) -> jnp.dtype:
        """Dtype of the words in VMEM."""
        return jnp.dtype(jnp.float32 if self.dtype == jnp.float32 else jnp.uint32)

    def segment(self, unit: Int32[Array, ""], copy: int) -> Int32[Array, ""]:
        """One of the segments that a copy of a unit moves."""
        if self.dtype == jnp.float32:
            return unit * self.copies + copy
        return unit * (2 * self.copies) + (copy // 2 * SEGMENTS_OF_PAIR + copy % 2)

    def copy_of(self, segment: Int32[Array, ""], unit: Int32[Array, ""]) -> Int32[Array, ""]:
        """Which copy of the unit moves a segment."""
        if self.dtype == jnp.float32:
            return segment - unit * self.copies
        within = segment - unit * (2 * self.copies)
        return (within >> 2) * 2 + (within & 1)

    def place(self, buffer: Int32[Array, ""], slot: Int32[Array, ""] | int, chunk: int) -> Int32[Array, ""]:
        """Where the first copy of a unit lies in VMEM. Slot C is for the unit that the chunk before left open."""
        return (buffer * (chunk + 1) + slot) * self.copies

    def buffer(self, chunk: int) -> pl.MemoryRef:
        """VMEM for the units of chunks, for one store."""
        return pltpu.VMEM((BUFFERS * (chunk + 1) * self.copies, LANES), self.word)

    def in_store(self, words: jax.Ref, unit: Int32[Array, ""], copy: int) -> jax.Ref:
        """The 128 words that a copy of a unit moves."""
        return segment_of(words, self.segment(unit, copy))


def units_of_rows(shape: RowShape, dtype: jnp.dtype, num_stores: int) -> Units:
    """Lines that hold whole rows: one, or as many as a row has; for bfloat16 a pair, or as many as hold whole rows."""
    rows, segments = shape.rows_per_segment, shape.segments_per_row
    if dtype != jnp.float32:
        segments = math.lcm(segments, SEGMENTS_OF_PAIR)
        rows *= segments // shape.segments_per_row
    return Units(
        dtype=jnp.dtype(dtype),
        of_scalars=False,
        shift=rows.bit_length() - 1,
        copies=segments if dtype == jnp.float32 else segments // 2,
        num_stores=num_stores,
    )


def whole_units(store: Shaped[Array, "lines line"], shape: RowShape) -> Shaped[Array, "lines line"]:
    """The store; one of 16 bits whose last rows leave a unit incomplete is copied, with more lines: keep units whole.

    Args:
        store: Weights, or what belongs to each of them.
        shape: How rows lie on segments.
    """
    if store.dtype.itemsize == 4:
        return store
    segments = math.lcm(shape.segments_per_row, SEGMENTS_OF_PAIR)
    return pad_to(store, round_up(store.shape[0], segments // 2))


def units_of_scalars(num_stores: int) -> Units:
    """Lines of row-wise state."""
    return Units(dtype=jnp.dtype(jnp.float32), of_scalars=True, shift=_SCALARS_SHIFT, copies=1, num_stores=num_stores)
