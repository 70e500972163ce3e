"""product_grads: the derivative of a matrix product, with its operands as each platform's library wants them.

Letters: B samples, n inputs, m outputs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import cpu
from pallas_kernels.implementations import on_hosts


def product_grads(
    x: Float[Array, "B n"], kernel: Float[Array, "n m"], cotangent: Float[Array, "B m"]
) -> tuple[Float[Array, "B n"], Float[Array, "n m"]]:
    """Gradients of x and of the kernel in ``x @ kernel``: ``cotangent kernel^T`` and ``x^T cotangent``.

    Args:
        x: Inputs, in the dtype to compute in.
        kernel: Weights, in any dtype: they are rounded to that of x.
        cotangent: Gradient of the product, in the dtype of x.

    Returns:
        Both in float32, the dtype of their sums.
    """
    arrays = x, kernel.astype(x.dtype), cotangent
    # A layer with one output has no matrix to multiply by.
    if x.dtype == jnp.bfloat16 and kernel.shape[1] > 1 and cpu.multiplies_bfloat16():
        return on_hosts(_of_written_transposes, _of_transposes, *arrays)
    return _of_transposes(*arrays)


def _of_transposes(x, kernel, cotangent):
    # Not `x.T @ cotangent`: where a layer has one output, XLA's program for hosts would go through x column by column.
    return _product(cotangent, kernel.T), _product(cotangent.T, x).T


def _of_written_transposes(x, kernel, cotangent):
    """For YNNPACK, which has products of bfloat16 on hosts, and which XLA gives none that has a transpose in it.

    XLA computes those in float32, a sixth as fast where the processor multiplies bfloat16. What comes out is written
    anew, too: else XLA would have the product made transposed, and fail, since it takes YNNPACK's word from before.
    """
    x_grad = _product(cotangent, cpu.transposed(kernel))
    n, m = kernel.shape
    # The narrower of both is transposed.
    if m < n:
        return x_grad, cpu.transposed(_product(cpu.transposed(cotangent), x))
    return x_grad, _product(cpu.transposed(x), cotangent)


def _product(a: Float[Array, "i j"], b: Float[Array, "j k"]) -> Float[Array, "i k"]:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
