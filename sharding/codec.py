"""Codecs: how vectors and their gradients are written while they travel between devices.

A vector x of w numbers travels as w codes and, for some codecs, one scale s. It arrives as s times what the codes mean.
With m the largest absolute value of x::

    codec     code of a number x_i      scale                                bytes    error of x_i, at most
    float32   itself                    none                                 4 w      0
    float16   x_i / s in float16        m / 65504, up to a power of two      2 w + 2  2^-11 |x_i| + 2^-40 m
    bfloat16  x_i in bfloat16           none                                 2 w      2^-8 |x_i|
    float8    x_i / s in float8 e4m3    m / 448, up to a power of two        w + 2    2^-4 |x_i| + 2^-18 m
    int8      x_i / s, -127 to 127      m / 127, up to the next bfloat16     w + 2    (1 + 2^-7) m / 254

and 2^-126 more, for numbers that float32 itself holds only as subnormals. Codes are rounded to nearest, ties to even.
Scales are at least 2^-126.

Why scales: float16 ends at 65504 and begins at 6e-8, and gradients of a mean over a large batch are smaller than that.
Saturation would cure the first only. A scale for each vector cures both, in both directions, for two bytes: those of a
bfloat16, which has the range of float32, so that bfloat16 codes need none. A scale that is a power of two adds no error
of its own. So what the format can hold arrives exactly, such as rows of float16 tables (but for numbers below 2^-40 of
their row's largest). Codes of int8 are evenly spaced: there a finer scale saves up to a bit.

Zeros arrive as zeros. A number that is not finite arrives as NaN, and the rest of its vector as if it were 0. A finite
number arrives finite: what would be rounded to infinity becomes float32's largest number.

Codes are unsigned integers, uint16 or uint8, with the scale behind them. XLA could move a conversion of floating point
to the other side of an exchange, which would then carry float32 after all; a change of meaning it cannot move.

Neo sends float16 forward and bfloat16 backward (Mudigere et al., ISCA 2022).

Letters: w numbers of a vector, k codes with the scale.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from sharding.errors import InputError

Codec = Literal["float32", "float16", "bfloat16", "float8", "int8"]

_SCALE_BYTES = 2
# Bits of a float32's mantissa that bfloat16 has not.
_LOW_BITS = 16
_MANTISSA_BITS = 23
_SMALLEST_NORMAL = np.float32(2.0**-126)
_LARGEST = float(np.finfo(np.float32).max)
# int8 has one value more below 0 than above.
_NAN_OF_INT8 = -128


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Format:
    """Format of a code.

    Attributes:
        dtype: What a number is rounded to.
        word: The unsigned integer that it travels as.
        largest: Largest value of a code; None where there is no scale.
        dropped_bits: Bits of the scale's mantissa, as a float32, that are 0.
    """

    dtype: DTypeLike
    word: DTypeLike
    largest: float | None = None
    dropped_bits: int = _MANTISSA_BITS

    @property
    def scale_words(self) -> int:
        """Words of a scale."""
        return 0 if self.largest is None else _SCALE_BYTES // jnp.dtype(self.word).itemsize


_FORMATS = {
    "float16": _Format(dtype=jnp.float16, word=jnp.uint16, largest=65504.0),
    "bfloat16": _Format(dtype=jnp.bfloat16, word=jnp.uint16),
    "float8": _Format(dtype=jnp.float8_e4m3fn, word=jnp.uint8, largest=448.0),
    "int8": _Format(dtype=jnp.int8, word=jnp.uint8, largest=127.0, dropped_bits=_LOW_BITS),
}


def check_codec(codec: str, what: str) -> None:
    """Refuses a codec that does not exist.

    Args:
        codec: Its name.
        what: What it was given as.

    Raises:
        InputError: There is none of that name.
    """
    if codec not in get_args(Codec):
        raise InputError(f"{what} {codec!r} does not exist; use one of {', '.join(get_args(Codec))}")


def code_bytes(codec: Codec, width: int) -> int:
    """Bytes of a vector of ``width`` numbers on its way, with its scale."""
    if codec == "float32":
        return 4 * width
    format = _FORMATS[codec]
    return (width + format.scale_words) * jnp.dtype(format.word).itemsize


def encode(vectors: Float[Array, "*vectors w"], codec: Codec) -> Shaped[Array, "*vectors k"]:
    """Writes vectors as codes.

    Args:
        vectors: Vectors, float32.
        codec: The codec.

    Returns:
        Codes, and the scale behind them; the vectors themselves for float32.
    """
    if codec == "float32":
        return vectors
    format = _FORMATS[codec]
    finite = jnp.isfinite(vectors)
    if format.largest is None:
        return _as_words(jnp.where(finite, vectors, jnp.nan).astype(format.dtype), format)
    largest = jnp.max(jnp.where(finite, jnp.abs(vectors), 0.0), axis=-1, keepdims=True)
    scale_bits = _rounded_up(largest / format.largest, format.dropped_bits)
    scaled = vectors / jax.lax.bitcast_convert_type(scale_bits, jnp.float32)
    if format.dtype == jnp.int8:
        codes = jnp.where(finite, jnp.round(scaled), _NAN_OF_INT8).astype(format.dtype)
    else:
        codes = jnp.where(finite, scaled, jnp.nan).astype(format.dtype)
    scale = _as_words((scale_bits >> _LOW_BITS).astype(jnp.uint16), format)
    scale = scale.reshape(*vectors.shape[:-1], format.scale_words)
    return jnp.concatenate([_as_words(codes, format), scale], axis=-1)


def decode(codes: Shaped[Array, "*vectors k"], codec: Codec) -> Float[Array, "*vectors w"]:
    """Reads vectors from codes.

    Args:
        codes: What `encode` has returned, of this device or another. Codes that are all 0 are a vector of zeros.
        codec: The codec.

    Returns:
        Vectors, float32.
    """
    if codec == "float32":
        return codes
    format = _FORMATS[codec]
    width = codes.shape[-1] - format.scale_words
    rounded = jax.lax.bitcast_convert_type(codes[..., :width], format.dtype)
    numbers = rounded.astype(jnp.float32)
    if format.dtype == jnp.int8:
        numbers = jnp.where(rounded == _NAN_OF_INT8, jnp.nan, numbers)
    if format.largest is not None:
        scale = codes[..., width:]
        if format.word == jnp.uint8:
            scale = jax.lax.bitcast_convert_type(scale, jnp.uint16)[..., None]
        numbers = numbers * jax.lax.bitcast_convert_type(scale.astype(jnp.uint32) << _LOW_BITS, jnp.float32)
    return jnp.clip(numbers, -_LARGEST, _LARGEST)


def _as_words(values: Shaped[Array, " *shape"], format: _Format) -> Shaped[Array, " *words"]:
    """The bits of values; of those that are wider than a word, along one more axis."""
    return jax.lax.bitcast_convert_type(values, format.word)


def _rounded_up(scale: Float[Array, " *shape"], dropped_bits: int) -> Shaped[Array, " *shape"]:
    """The bits of the least float32 that is not less, normal, and has zeros in the last bits of its mantissa."""
    bits = jax.lax.bitcast_convert_type(jnp.maximum(scale, _SMALLEST_NORMAL), jnp.uint32)
    return ((bits + jnp.uint32((1 << dropped_bits) - 1)) >> dropped_bits) << dropped_bits
