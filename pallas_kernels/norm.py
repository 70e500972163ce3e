"""norm: the Euclidean norm of all numbers of a tree of arrays."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import cpu_layers
from pallas_kernels.implementations import on_hosts


def norm(tree: Any) -> Float[Array, ""]:
    """Computes `sqrt(sum_i x_i^2)` over all numbers of all arrays, in float32: infinite if that sum overflows.

    On hosts this is `cpu`'s, where it was built, which reads the arrays with all threads; XLA's program for a host
    writes the squares to memory first. Not to be differentiated there.

    Args:
        tree: Arrays in float32 or bfloat16.

    Returns:
        The norm; NaN if a number is.

    Raises:
        ValueError: An array has another dtype.
    """
    leaves = jax.tree.leaves(tree)
    others = {str(leaf.dtype) for leaf in leaves} - {"float32", "bfloat16"}
    if others:
        raise ValueError(f"norm was given {', '.join(sorted(others))}; give arrays in float32 or bfloat16")
    if not leaves:
        return jnp.float32(0)
    return on_hosts(cpu_layers.norm, _reference, leaves)


def _reference(leaves: Sequence[Array]) -> Float[Array, ""]:
    squares = (jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves)
    return jnp.sqrt(functools.reduce(jnp.add, squares))
