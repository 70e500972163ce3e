"""The 64-bit hash of the converters: the same on every machine, in every process, in every version of Python."""

import numpy as np
from jaxtyping import UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(bits: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Maps 64 bits to 64 bits, one to one, so that every input bit changes about half of the output bits.

    The output function of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    bits = bits + _GOLDEN
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def hash_to_range(bits: UInt64[np.ndarray, "*shape"], size: int) -> UInt64[np.ndarray, "*shape"]:
    """Maps 64 random bits to [0, size), for size up to 2^32: uniform to within 2^-32."""
    return ((bits >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32)
