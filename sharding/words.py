"""Whole numbers of 64 bits as two words of 32: JAX without x64 has none.

Letters: n numbers. ``words`` are uint32 of [n, 2], low word first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, UInt32

# Divisors are below this, so that a remainder and the next 16 bits fit into one word.
MAX_DIVISOR = 2**16 - 1


def constant_words(values: Int[np.ndarray, " n"]) -> UInt32[np.ndarray, "n 2"]:
    """Numbers known when the program is made."""
    wide = np.asarray(values, np.int64)
    return np.stack([wide & 0xFFFFFFFF, wide >> 32], axis=-1).astype(np.uint32)


def widened(values: Int32[Array, " n"]) -> UInt32[Array, "n 2"]:
    """Numbers of one word, with their sign, as two."""
    low = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.stack([low, jnp.where(values < 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))], axis=-1)


def less(left: UInt32[Array, "n 2"], right: UInt32[Array, "n 2"]) -> Bool[Array, " n"]:
    """Whether ``left < right``, both unsigned."""
    same_high = left[:, 1] == right[:, 1]
    return (left[:, 1] < right[:, 1]) | (same_high & (left[:, 0] < right[:, 0]))


def divide(
    words: UInt32[Array, "n 2"], divisor: UInt32[Array, " n"]
) -> tuple[UInt32[Array, "n 2"], UInt32[Array, " n"]]:
    """Quotient and remainder; long division by digits of 16 bits.

    Args:
        words: The numbers.
        divisor: At least 1, at most `MAX_DIVISOR`.
    """
    low, high = words[:, 0], words[:, 1]
    remainder = jnp.zeros_like(low)
    digits = []
    for digit in (high >> 16, high & 0xFFFF, low >> 16, low & 0xFFFF):
        rest = (remainder << 16) | digit
        digits.append(rest // divisor)
        remainder = rest % divisor
    return jnp.stack([(digits[2] << 16) | digits[3], (digits[0] << 16) | digits[1]], axis=-1), remainder


def multiply_add(
    number: UInt32[Array, " n"], factor: UInt32[Array, " n"], addend: UInt32[Array, " n"]
) -> UInt32[Array, "n 2"]:
    """``number * factor + addend``.

    Args:
        number: Of 32 bits.
        factor: At most `MAX_DIVISOR`.
        addend: Below ``factor``.
    """
    low = (number & 0xFFFF) * factor + addend
    middle = (number >> 16) * factor + (low >> 16)
    return jnp.stack([(middle << 16) | (low & 0xFFFF), middle >> 16], axis=-1)
