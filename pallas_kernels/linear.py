"""linear: a dense layer with the bias and the ReLU that go with its matrix product, forward and backward.

Letters: B samples, n inputs, m outputs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import cpu_layers
from pallas_kernels.implementations import on_hosts_that_multiply
from pallas_kernels.varying import vary_alike


def linear(
    x: Float[Array, "B n"], kernel: Float[Array, "n m"], bias: Float[Array, " m"] | None, relu: bool
) -> Float[Array, "B m"]:
    """Computes `x @ kernel + bias`, and `max(x @ kernel + bias, 0)` with a ReLU, whose gradient at 0 is 0.

    The product has operands in the dtype of x, and sums in float32. With a ReLU the result is rounded to the dtype of
    x before it is rectified, so that what is kept for the backward pass is rounded, too.

    The derivative is written out. Its products round their operands to the dtype of x, too: automatic differentiation
    would multiply float32 cotangents by bfloat16 operands, at the speed of float32. And that of the ReLU is written in
    terms of the output, which the next layer keeps anyway: `jax.nn.relu` keeps its input, too, of every layer a second
    array for the whole batch.

    On hosts that multiply bfloat16, in float32 on those with AMX, both ways are `cpu`'s, which adds, rectifies and
    rounds what it has multiplied while that is in the cache. Else they are XLA's matrix products.

    Args:
        x: Inputs, in the dtype to compute in.
        kernel: Weights in float32, which are rounded to the dtype of x.
        bias: In float32; None for none.
        relu: Whether a ReLU follows.

    Returns:
        The outputs: with a ReLU in the dtype of x, else in float32.
    """
    return _linear(*vary_alike((x, kernel, bias)), relu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x, kernel, bias, relu):
    native, reference = functools.partial(cpu_layers.linear, relu=relu), functools.partial(_reference, relu=relu)
    return on_hosts_that_multiply(native, reference, x, kernel, bias)


def _reference(x, kernel, bias, *, relu):
    y = _product(x, kernel.astype(x.dtype))
    if bias is not None:
        y = y + bias[None, :]
    return jnp.maximum(y.astype(x.dtype), 0) if relu else y


def _linear_forward(x, kernel, bias, relu):
    y = _linear(x, kernel, bias, relu)
    if not relu:
        return y, (x, kernel, bias, None)
    # Else XLA may keep the sums for the backward pass beside what is rectified.
    y = jax.lax.optimization_barrier(y)
    return y, (x, kernel, bias, y)


def _linear_backward(relu, residuals, cotangent):
    del relu
    x, kernel, bias, y = residuals
    x_grad, kernel_grad, bias_grad = linear_grads(x, kernel, cotangent, y)
    return x_grad, kernel_grad, None if bias is None else bias_grad


_linear.defvjp(_linear_forward, _linear_backward)


def linear_grads(
    x: Float[Array, "B n"], kernel: Float[Array, "n m"], cotangent: Float[Array, "B m"], y: Float[Array, "B m"] | None
) -> tuple[Float[Array, "B n"], Float[Array, "n m"], Float[Array, " m"]]:
    """The gradients of x, of the kernel and of the bias of `linear` from that of its outputs.

    Args:
        x: Inputs.
        kernel: Weights.
        cotangent: Gradient of the outputs, in their dtype.
        y: The outputs of a layer with a ReLU; None of one without.

    Returns:
        The gradients; that of x in its dtype, the others in float32.
    """
    return on_hosts_that_multiply(cpu_layers.linear_grads, _reference_grads, x, kernel, cotangent, y)


def _reference_grads(x, kernel, cotangent, y):
    if y is not None:
        cotangent = jnp.where(y > 0, cotangent, 0)
    rounded = cotangent.astype(x.dtype)
    x_grad = _product(rounded, kernel.astype(x.dtype).T).astype(x.dtype)
    # Not `x.T @ cotangent`: where a layer has one output, XLA's program for hosts would go through x column by column.
    kernel_grad = _product(rounded.T, x).T
    return x_grad, kernel_grad, jnp.sum(cotangent.astype(jnp.float32), axis=0)


def _product(a: Float[Array, "i j"], b: Float[Array, "j k"]) -> Float[Array, "i k"]:
    """XLA's matrix product of operands of one dtype, with sums in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
