"""The counter hash, and rounding to storage precision.

Random bits are a function of (seed, step, table, logical row, column) and of nothing else, so they do not depend on
where a row is stored, on which device, or on the implementation that asks.

Letters: R rows, w columns.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, UInt16, UInt32

# How float32 becomes a 16-bit weight: the nearest; one of the two neighbours, by chance; or its high half, a bfloat16,
# with the low half kept beside it.
Rounding = Literal["nearest", "stochastic", "split"]


def draws_bits(storage_rounding: Rounding, dtype: DTypeLike) -> bool:
    """Whether an update of weights of that storage dtype takes random bits."""
    return storage_rounding == "stochastic" and jnp.dtype(dtype) != jnp.float32


# The golden ratio in 32 bits, and the two multipliers of `lowbias32` (C. Wellons, "Hash Function Prospector", 2018:
# exact bias 0.17 of the best 32-bit mixers with two multiplications).
_GOLDEN = 0x9E3779B9
_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Permutes the 32-bit integers so that every output bit depends on every input bit (lowbias32)."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(_FIRST)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(_SECOND)
    return x ^ (x >> 16)


def fold(key: UInt32[Array, "..."], word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Derives a key from a key and one more word: ``mix(key ^ (word * golden))``."""
    return mix(key ^ (word * jnp.uint32(_GOLDEN)))


def row_key(
    seed: UInt32[Array, ""],
    step: UInt32[Array, ""],
    table: UInt32[Array, "..."],
    logical_row: UInt32[Array, "... words"],
) -> UInt32[Array, "..."]:
    """Key of one row of one table at one step.

    Args:
        seed: Seed of the run.
        step: Number of the update, counted from 1; initialisation uses 0.
        table: Stable number of the table.
        logical_row: Row in the table, as one 32-bit word or as two, low word first. A high word of 0 gives the same
            key as no high word.

    Returns:
        One key for each row, from which `column_bits` derives the bits of its columns.
    """
    key = fold(fold(fold(mix(seed), step), table), logical_row[..., 0])
    if logical_row.shape[-1] == 1:
        return key
    high = logical_row[..., 1]
    return jnp.where(high == 0, key, fold(key, high))


def column_bits(keys: UInt32[Array, "R 1"], columns: UInt32[Array, "#R w"]) -> UInt32[Array, "R w"]:
    """32 random bits for each column of each row."""
    return fold(keys, columns)


def uniform(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Maps random bits to [0, 1) in steps of 2**-24, which float32 holds exactly."""
    # By way of int32, since not every compiler of kernels converts uint32.
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-24)


def joined(high: BFloat16[Array, "..."], low: UInt16[Array, "..."]) -> Float32[Array, "..."]:
    """The float32 whose bits are ``high * 2**16 + low``: a weight that is stored in two halves."""
    words = jax.lax.bitcast_convert_type(high, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(words | low.astype(jnp.uint32), jnp.float32)


def halves(x: Float32[Array, "..."]) -> tuple[BFloat16[Array, "..."], UInt16[Array, "..."]]:
    """The two halves of a float32: a bfloat16, which is x rounded towards 0, and what it lacks. See `joined`."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    high = jax.lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), jnp.bfloat16)
    return high, (words & jnp.uint32(0xFFFF)).astype(jnp.uint16)


def stochastic_round(x: Float[Array, "R w"], bits: UInt32[Array, "R w"], dtype: jnp.dtype) -> Float[Array, "R w"]:
    """Rounds float32 to bfloat16 or float16 so that the expected result is ``x``.

    With q the spacing of ``dtype`` at ``x`` and f the fraction ``|x| / q - floor(|x| / q)``: the magnitude becomes
    ``(floor(|x| / q) + 1) * q`` with probability f, else ``floor(|x| / q) * q``. What ``dtype`` holds exactly stays.

    Args:
        x: Values.
        bits: Random bits, one word for each value.
        dtype: bfloat16 or float16.

    Returns:
        One of the two neighbours of x in ``dtype``. Infinities and NaNs stay; a float16 whose magnitude exceeds
        65504 saturates there.
    """
    if dtype == jnp.bfloat16:
        # bfloat16 is the high half of float32: 16 random bits added to the low half carry with probability f.
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
        rounded = (words + (bits & jnp.uint32(0xFFFF))) & jnp.uint32(0xFFFF0000)
        result = jax.lax.bitcast_convert_type(rounded, jnp.float32)
        return jnp.where(jnp.isfinite(x), result, x).astype(dtype)
    if dtype == jnp.float16:
        magnitude = jnp.abs(x)
        # 13 bits fewer of fraction than float32: as many random bits carry with probability f.
        words = jax.lax.bitcast_convert_type(magnitude, jnp.uint32)
        words = (words + (bits & jnp.uint32(0x1FFF))) & jnp.uint32(0xFFFFE000)
        normal = jax.lax.bitcast_convert_type(words, jnp.float32)
        # Below 2**-14 numbers are subnormal and the spacing stays at 2**-24.
        scaled = jnp.minimum(magnitude, jnp.float32(2.0**-14)) * jnp.float32(2.0**24)
        below = scaled.astype(jnp.int32).astype(jnp.float32)
        carry = (uniform(bits) < scaled - below).astype(jnp.float32)
        subnormal = (below + carry) * jnp.float32(2.0**-24)
        rounded = jnp.where(magnitude < 2.0**-14, subnormal, jnp.minimum(normal, 65504.0))
        sign = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x80000000)
        rounded = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(rounded, jnp.uint32) | sign, jnp.float32)
        return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)
    raise ValueError(f"stochastic rounding to {dtype} is not defined; use bfloat16 or float16")
