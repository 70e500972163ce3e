"""zeros: where the arrays of a store begin."""

import functools

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from pallas_kernels import cpu
from pallas_kernels.implementations import on_hosts


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Shaped[Array, "..."]:
    """`jnp.zeros`, on one device, for arrays whose rows will be read at random, inside `jax.jit`.

    On hosts large ones lie in pages of 2 MB from the start, where the system offers such: moved there later, as stores
    that came from elsewhere are, they take the first half minute of a run.

    Args:
        shape: Shape of the array.
        dtype: Its dtype.

    Returns:
        The zeros.
    """
    make = {"shape": shape, "dtype": jnp.dtype(dtype)}
    return on_hosts(functools.partial(cpu.zeros, **make), functools.partial(jnp.zeros, **make))
