"""dot_interaction: the dot products of all pairs of a sample's vectors, forward and backward.

Letters: B samples, F vectors of a sample, D their dimension, P pairs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import cpu


def num_pairs(num_vectors: int, *, self_interaction: bool) -> int:
    """Number of values that `dot_interaction` gives for each sample.

    Args:
        num_vectors: F.
        self_interaction: Whether a vector is also paired with itself.

    Returns:
        F (F - 1) / 2, and F more with self-interaction.
    """
    return num_vectors * (num_vectors + (1 if self_interaction else -1)) // 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def dot_interaction(x: Float[Array, "B F D"], self_interaction: bool) -> Float[Array, "B P"]:
    """Computes the dot products of all pairs of vectors of each sample.

    The products are `Z[b] = X[b] X[b]^T`, of which the strict lower triangle (with self-interaction: the lower
    triangle) is taken row by row: (1, 0), (2, 0), (2, 1), (3, 0), ... Source: Naumov et al. 2019, section 2.1, in the
    order of facebookresearch/dlrm.

    The derivative is written out: ``dX = (dZ + dZ^T) X``. On hosts both ways are `cpu`'s, where it can serve; elsewhere
    XLA's matrix products.

    Args:
        x: The vectors, in the dtype to compute in.
        self_interaction: Whether a vector is also paired with itself.

    Returns:
        The dot products in float32.
    """
    return _by_platform(cpu.dot_interaction, _products, self_interaction, x)


def _by_platform(native: Callable, fallback: Callable, self_interaction: bool, *arrays: Array) -> Array:
    fallback = functools.partial(fallback, self_interaction=self_interaction)
    if not cpu.can_interact(arrays[0].dtype):
        return fallback(*arrays)
    native = functools.partial(native, self_interaction=self_interaction)
    return jax.lax.platform_dependent(*arrays, cpu=native, default=fallback)


def _products(x: Float[Array, "B F D"], *, self_interaction: bool) -> Float[Array, "B P"]:
    num_vectors = x.shape[1]
    z = jnp.einsum("bid,bjd->bij", x, x, preferred_element_type=jnp.float32)
    rows, columns = _pairs(num_vectors, self_interaction)
    return jnp.take(z.reshape(-1, num_vectors**2), rows * num_vectors + columns, axis=1, mode="clip")


def _pairs(num_vectors: int, self_interaction: bool) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    rows, columns = np.tril_indices(num_vectors, 0 if self_interaction else -1)
    return rows.astype(np.int32), columns.astype(np.int32)


def _dot_interaction_forward(x, self_interaction):
    return dot_interaction(x, self_interaction), x


def _dot_interaction_backward(self_interaction, x, cotangent):
    return (_by_platform(cpu.dot_interaction_grad, _products_grad, self_interaction, x, cotangent),)


dot_interaction.defvjp(_dot_interaction_forward, _dot_interaction_backward)


def _products_grad(
    x: Float[Array, "B F D"], cotangent: Float[Array, "B P"], *, self_interaction: bool
) -> Float[Array, "B F D"]:
    """One gather puts the cotangents on both triangles of a symmetric matrix, and one product does the rest.

    Automatic differentiation makes a scatter and two products.
    """
    batch_size, num_vectors, _ = x.shape
    if cotangent.shape[1] == 0:
        return jnp.zeros_like(x)
    rows, columns = _pairs(num_vectors, self_interaction)
    pair_of = np.zeros((num_vectors, num_vectors), np.int32)
    pair_of[rows, columns] = pair_of[columns, rows] = np.arange(len(rows), dtype=np.int32)
    # dZ + dZ^T: an element of the diagonal is there twice, or not at all without self-interaction.
    factor = np.where(np.eye(num_vectors, dtype=bool), 2.0 if self_interaction else 0.0, 1.0).astype(x.dtype)
    symmetric = jnp.take(cotangent.astype(x.dtype), pair_of.reshape(-1), axis=1, mode="clip")
    symmetric = symmetric.reshape(batch_size, num_vectors, num_vectors) * factor[None]
    return jnp.einsum("bij,bjd->bid", symmetric, x, preferred_element_type=jnp.float32).astype(x.dtype)
