"""Lines, as TPU kernels see them: 128 words of 32 bits, whatever the width of the rows that lie on them.

A TPU keeps an array [lines, 128] of 32-bit words as it is written down, so 512 bytes of it are one copy. Any other
width is laid out differently, and reshaping a store to it would copy the store. A store of bfloat16 [lines, 256] is
laid out as words, too: lines 2i and 2i + 1 share the words of one *pair*, the even line in the low halves.

A *segment* is 128 elements: a line of float32, half a line of bfloat16. Rows narrower than a segment share one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.target import current_target

LANES = 128
# Segments of a pair of bfloat16 lines.
SEGMENTS_OF_PAIR = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShape:
    """How rows of a width lie on segments.

    Attributes:
        width: Elements of a row.
        rows_per_segment: Rows that share a segment; 1 for rows of a segment or more.
        segments_per_row: Segments of one row; 1 for rows of a segment or less.
    """

    width: int
    rows_per_segment: int
    segments_per_row: int

    @property
    def padded_width(self) -> int:
        """Elements of the segments that a row touches."""
        return LANES * self.segments_per_row


def row_shape(width: int) -> RowShape:
    """Rows of 8 to 128 elements, or of whole segments."""
    return RowShape(width=width, rows_per_segment=max(1, LANES // width), segments_per_row=max(1, width // LANES))


def segment_and_lane(row: Int32[Array, ""], shape: RowShape) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """First segment of a row that is not negative, and the lane of that segment where the row begins."""
    if shape.rows_per_segment == 1:
        return row * shape.segments_per_row, jnp.zeros_like(row)
    shift = shape.rows_per_segment.bit_length() - 1
    return row >> shift, (row & (shape.rows_per_segment - 1)) * shape.width


def whole_pairs(store: Float[Array, "lines line"]) -> Float[Array, "lines line"]:
    """The store; one of bfloat16 with an odd number of lines is copied, with one more line: keep the number even."""
    return pad_to(store, round_up(store.shape[0], 2)) if store.dtype == jnp.bfloat16 else store


def words_of(store: jax.Ref) -> jax.Ref:
    """A store in HBM as words: [lines, 128] of float32, or [pairs, 256] of uint32 for bfloat16."""
    if store.dtype == jnp.float32:
        return store
    return store.bitcast(jnp.uint32)  # pyright: ignore[reportAttributeAccessIssue]  # Pallas adds it to references.


def segment_of(words: jax.Ref, segment: Int32[Array, ""]) -> jax.Ref:
    """The 128 words that hold a segment, [1, 128]."""
    if words.dtype == jnp.float32:
        return words.at[pl.ds(segment, 1)]
    first = pl.multiple_of((segment & 1) * LANES, LANES)
    return words.at[pl.ds(segment >> 2, 1), pl.ds(first, LANES)]


def wait_for_copies(count: Int32[Array, ""], semaphore: jax.Ref, held: jax.Ref) -> None:
    """Waits for copies of 128 words each, whichever they are, in steps of a power of two: semaphores count bytes.

    Args:
        count: How many.
        semaphore: What knows of them.
        held: Lines of words in VMEM, many: they stand for those that were copied.
    """
    bits = held.shape[0].bit_length() - 1

    def wait(lines: int) -> None:
        some = held.at[pl.ds(0, lines)]
        pltpu.make_async_copy(some, some, semaphore).wait()

    def wait_for_most(_: Int32[Array, ""], none: Int32[Array, ""]) -> Int32[Array, ""]:
        wait(1 << bits)
        return none

    jax.lax.fori_loop(0, count >> bits, wait_for_most, jnp.int32(0))
    for bit in range(bits):
        pl.when(((count >> bit) & 1) != 0)(functools.partial(wait, 1 << bit))


def read_segment(words: Array, segment: Int32[Array, ""]) -> Float[Array, "1 128"]:
    """The elements of a segment as float32, from its words."""
    if words.dtype == jnp.float32:
        return words
    high = (segment & 2) != 0
    bits = jnp.where(high, words & jnp.uint32(0xFFFF0000), words << jnp.uint32(16))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def write_segment(
    words: Array, values: Float[Array, "1 128"], where: Bool[Array, "1 128"], segment: Int32[Array, ""]
) -> Array:
    """Words of a segment with new values in some lanes; values that bfloat16 holds exactly, where words are two."""
    if words.dtype == jnp.float32:
        return jnp.where(where, values, words)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    in_high = (words & jnp.uint32(0xFFFF)) | bits
    in_low = (words & jnp.uint32(0xFFFF0000)) | (bits >> jnp.uint32(16))
    return jnp.where(where, jnp.where((segment & 2) != 0, in_high, in_low), words)


def round_to_bfloat16(x: Float[Array, "R w"]) -> Float[Array, "R w"]:
    """Rounds float32 to the nearest bfloat16, ties to even, and returns it as float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> jnp.uint32(16)) & jnp.uint32(1)
    rounded = (bits + jnp.uint32(0x7FFF) + odd) & jnp.uint32(0xFFFF0000)
    quiet_nan = (bits | jnp.uint32(0x400000)) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(jnp.where(x == x, rounded, quiet_nan), jnp.float32)


def to_lane_zero(line: Float[Array, "R 128"], lane: Int32[Array, ""]) -> Float[Array, "R 128"]:
    """Moves what begins at a lane to lane 0."""
    return pltpu.roll(line, (LANES - lane) & (LANES - 1), 1)


def from_lane_zero(row: Float[Array, "R 128"], lane: Int32[Array, ""]) -> Float[Array, "R 128"]:
    """Moves what begins at lane 0 to a lane."""
    return pltpu.roll(row, lane, 1)


def lanes_between(first: Int32[Array, ""], width: int) -> Bool[Array, "1 128"]:
    """Which lanes of a line are the ``width`` from ``first`` on."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return (lane >= first) & (lane < first + width)


def pad_to(x: Array, size: int, value: int = 0) -> Array:
    """Appends a value along the first axis up to a size."""
    if size == x.shape[0]:
        return x
    return jnp.pad(x, ((0, size - x.shape[0]),) + ((0, 0),) * (x.ndim - 1), constant_values=value)


def round_up(number: int, multiple: int) -> int:
    """The next multiple of a number."""
    return -(-number // multiple) * multiple


def interpreted() -> bool:
    """Whether kernels are interpreted. `pltpu.force_tpu_interpret_mode` overrides how."""
    return current_target().interpreted


def pad_columns(x: Float[Array, "R w"], width: int) -> Float[Array, "R wide"]:
    """Appends zeros to each row."""
    return jnp.pad(x, ((0, 0), (0, width - x.shape[1])))
