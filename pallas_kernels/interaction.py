"""dot_interaction: the dot products of all pairs of a sample's vectors, forward and backward.

Letters: B samples, d columns of x, k embeddings of a sample, D their dimension, F vectors of a sample (x, if there is
any, and its embeddings), P pairs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import cpu_layers
from pallas_kernels.implementations import on_hosts
from pallas_kernels.varying import vary_alike


def num_pairs(num_vectors: int, *, self_interaction: bool) -> int:
    """Number of pairs that `dot_interaction` gives for each sample.

    Args:
        num_vectors: F.
        self_interaction: Whether a vector is also paired with itself.

    Returns:
        F (F - 1) / 2, and F more with self-interaction.
    """
    return num_vectors * (num_vectors + (1 if self_interaction else -1)) // 2


def dot_interaction(
    x: Float[Array, "B d"], embeddings: Float[Array, "B k D"], self_interaction: bool
) -> Float[Array, "B d+P"]:
    """Computes the dot products of all pairs of vectors of each sample, and puts them beside x.

    With `V[b]` the vectors `(x[b], embeddings[b, 0], ..., embeddings[b, k-1])`, the products are `Z[b] = V[b] V[b]^T`,
    of which the strict lower triangle (with self-interaction: the lower triangle) is taken row by row: (1, 0), (2, 0),
    (2, 1), (3, 0), ... Source: Naumov et al. 2019, section 2.1, in the order of facebookresearch/dlrm.

    The derivative is written out: ``dV = (dZ + dZ^T) V``. On hosts both ways are `cpu`'s, where it can serve; elsewhere
    XLA's matrix products. Sums run in float32.

    Args:
        x: The bottom MLP's output, in the dtype to compute in; d is D, or 0 where there is none.
        embeddings: The embeddings, in the same dtype, or in float32, which is rounded to it first; so is their
            gradient then.
        self_interaction: Whether a vector is also paired with itself.

    Returns:
        x and the dot products, in the dtype of x.

    Raises:
        ValueError: The embeddings are in another dtype.
    """
    if embeddings.dtype not in (x.dtype, jnp.float32):
        raise ValueError(
            f"x is {x.dtype}, but the embeddings are {embeddings.dtype}; give them in the same dtype, or in float32"
        )
    return _dot_interaction(*vary_alike((x, embeddings)), self_interaction, embeddings.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot_interaction(x, embeddings, self_interaction, of_embeddings):
    return _forward(x, embeddings, self_interaction, of_embeddings, rounded=False)[0]


def _by_platform(native: Callable, reference: Callable, x: Array, *others: Array) -> Any:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return reference(x, *others)
    return on_hosts(native, reference, x, *others)


def _vectors(x: Float[Array, "B d"], embeddings: Float[Array, "B k D"]) -> Float[Array, "B F D"]:
    return jnp.concatenate([x[:, None], embeddings], axis=1) if x.shape[1] else embeddings


def _products(
    x: Float[Array, "B d"], embeddings: Float[Array, "B k D"], *, self_interaction: bool
) -> tuple[Float[Array, "B d+P"], Float[Array, "B k D"]]:
    """The result, and the embeddings in the dtype of x."""
    embeddings = embeddings.astype(x.dtype)
    vectors = _vectors(x, embeddings)
    num_vectors = vectors.shape[1]
    z = jnp.einsum("bid,bjd->bij", vectors, vectors, preferred_element_type=jnp.float32)
    rows, columns = _pairs(num_vectors, self_interaction)
    pairs = jnp.take(z.reshape(-1, num_vectors**2), rows * num_vectors + columns, axis=1, mode="clip")
    return jnp.concatenate([x, pairs.astype(x.dtype)], axis=1), embeddings


def _pairs(num_vectors: int, self_interaction: bool) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    rows, columns = np.tril_indices(num_vectors, 0 if self_interaction else -1)
    return rows.astype(np.int32), columns.astype(np.int32)


def _forward(x, embeddings, self_interaction, of_embeddings, *, rounded=True):
    """The result, and what the backward pass wants: the vectors as they were multiplied, if they are `rounded`."""
    del of_embeddings
    native = functools.partial(cpu_layers.dot_interaction, self_interaction=self_interaction, rounded=rounded)
    reference = functools.partial(_products, self_interaction=self_interaction)
    result, multiplied = _by_platform(native, reference, x, embeddings)
    return result, (x, multiplied)


def _backward(self_interaction, of_embeddings, vectors, cotangent):
    how: dict[str, Any] = {"self_interaction": self_interaction, "dtype": of_embeddings}
    native, reference = (functools.partial(way, **how) for way in (cpu_layers.dot_interaction_grad, _products_grad))
    return _by_platform(native, reference, *vectors, cotangent)


_dot_interaction.defvjp(_forward, _backward)


def _products_grad(
    x: Float[Array, "B d"],
    embeddings: Float[Array, "B k D"],
    cotangent: Float[Array, "B d+P"],
    *,
    dtype: jnp.dtype,
    self_interaction: bool,
) -> tuple[Float[Array, "B d"], Float[Array, "B k D"]]:
    """One gather puts the cotangents on both triangles of a symmetric matrix, and one product does the rest.

    Automatic differentiation makes a scatter and two products.
    """
    vectors = _vectors(x, embeddings)
    batch_size, num_vectors, _ = vectors.shape
    of_x, of_pairs = cotangent[:, : x.shape[1]], cotangent[:, x.shape[1] :]
    if of_pairs.shape[1] == 0:
        return of_x, jnp.zeros_like(embeddings, dtype)
    rows, columns = _pairs(num_vectors, self_interaction)
    pair_of = np.zeros((num_vectors, num_vectors), np.int32)
    pair_of[rows, columns] = pair_of[columns, rows] = np.arange(len(rows), dtype=np.int32)
    # dZ + dZ^T: an element of the diagonal is there twice, or not at all without self-interaction.
    factor = np.where(np.eye(num_vectors, dtype=bool), 2.0 if self_interaction else 0.0, 1.0).astype(x.dtype)
    symmetric = jnp.take(of_pairs, pair_of.reshape(-1), axis=1, mode="clip")
    symmetric = symmetric.reshape(batch_size, num_vectors, num_vectors) * factor[None]
    grads = jnp.einsum("bij,bjd->bid", symmetric, vectors, preferred_element_type=jnp.float32)
    of_embeddings = grads[:, 1 if x.shape[1] else 0 :].astype(x.dtype).astype(dtype)
    if not x.shape[1]:
        return of_x, of_embeddings
    return (of_x.astype(jnp.float32) + grads[:, 0]).astype(x.dtype), of_embeddings
