"""cross_network: the low-rank cross network of DCN V2, forward and backward.

Letters: B samples, n columns, r rank.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import cpu_layers
from pallas_kernels.cross_layer import CrossGrads, CrossLayer, CrossResidual
from pallas_kernels.implementations import on_hosts_that_multiply
from pallas_kernels.linear import linear, linear_grads
from pallas_kernels.varying import vary_alike

Residuals = list[CrossResidual]


def cross_network(x: Float[Array, "B n"], layers: tuple[CrossLayer, ...]) -> Float[Array, "B n"]:
    """Computes `x_{l+1} = x_0 * ((x_l V_l) U_l + b_l) + x_l`, layer after layer.

    Source: Wang et al. 2021 (DCN V2), equation 2. Products have operands and results in the dtype of x, and sums in
    float32. Elementwise operations, and what goes from layer to layer beside products, are in float32.

    The derivative is written out, since what it needs then is kept in the dtype of x: of each layer x_l, `x_l V_l` and
    `u_l = (x_l V_l) U_l + b_l`. With g_{l+1} the gradient of x_{l+1}, that of u_l is `g_{l+1} * x_0`, rounded; x_0
    gets `g_{l+1} * u_l` from each layer.

    On hosts that multiply bfloat16, in float32 on those with AMX, both ways are `cpu`'s. Else they are XLA's.

    Args:
        x: x_0, in the dtype to compute in.
        layers: Parameters of each layer.

    Returns:
        The last layer's output, in the dtype of x.
    """
    return _cross_network(*vary_alike((x, layers)))


@jax.custom_vjp
def _cross_network(x, layers):
    return _cross_network_forward(x, layers)[0]


def _forward(
    of_layer: Callable, x: Float[Array, "B n"], layers: tuple[CrossLayer, ...]
) -> tuple[Float[Array, "B n"], Residuals]:
    current, rounded, residuals = x, x, []
    for number, layer in enumerate(layers, 1):
        current, rounded, residual = of_layer(x, current, rounded, layer, is_last=number == len(layers))
        residuals.append(residual)
    return rounded, residuals


def _backward(
    of_layer: Callable,
    x: Float[Array, "B n"],
    layers: tuple[CrossLayer, ...],
    residuals: Residuals,
    cotangent: Float[Array, "B n"],
) -> tuple[Float[Array, "B n"], tuple[CrossLayer, ...]]:
    above, grads = CrossGrads(cotangent, None, None), []
    for layer, residual in zip(reversed(layers), reversed(residuals), strict=True):
        above, grad = of_layer(x, residual, layer, above)
        grads.append(grad)
    return _sum(above.first_grad, _input_grad(above)).astype(x.dtype), tuple(reversed(grads))


def _cross_network_forward(x, layers):
    native, reference = functools.partial(_forward, cpu_layers.cross_layer), functools.partial(_forward, _layer)
    y, residuals = on_hosts_that_multiply(native, reference, x, layers)
    return y, (x, layers, residuals)


def _cross_network_backward(kept, cotangent):
    native = functools.partial(_backward, cpu_layers.cross_layer_grads)
    return on_hosts_that_multiply(native, functools.partial(_backward, _layer_grads), *kept, cotangent)


_cross_network.defvjp(_cross_network_forward, _cross_network_backward)


def _layer(
    first: Float[Array, "B n"],
    x: Float[Array, "B n"],
    rounded: Float[Array, "B n"],
    layer: CrossLayer,
    *,
    is_last: bool,
) -> tuple[Float[Array, "B n"], Float[Array, "B n"], CrossResidual]:
    """The layer's output in float32, and rounded."""
    del is_last
    dtype = first.dtype
    hidden = linear(rounded, layer.down, None, False).astype(dtype)
    factor = linear(hidden, layer.up, layer.bias, False).astype(dtype)
    y = first.astype(jnp.float32) * factor.astype(jnp.float32) + x.astype(jnp.float32)
    return y, y.astype(dtype), CrossResidual(rounded, hidden, factor)


def _layer_grads(
    first: Float[Array, "B n"], residual: CrossResidual, layer: CrossLayer, above: CrossGrads
) -> tuple[CrossGrads, CrossLayer]:
    dtype = first.dtype
    cotangent = _input_grad(above)
    factor_grad = (cotangent * first.astype(jnp.float32)).astype(dtype)
    hidden_grad, up_grad, bias_grad = linear_grads(residual.hidden, layer.up, factor_grad, None)
    x_grad, down_grad, _ = linear_grads(residual.rounded, layer.down, hidden_grad, None)
    first_grad = _sum(above.first_grad, cotangent * residual.factor.astype(jnp.float32))
    return CrossGrads(cotangent, x_grad, first_grad), CrossLayer(down_grad, up_grad, bias_grad)


def _input_grad(grads: CrossGrads) -> Float[Array, "B n"]:
    """The gradient of a layer's input, without what it gets as x_0; in float32."""
    return _sum(grads.x_grad, grads.cotangent)


def _sum(a: Float[Array, "B n"] | None, b: Float[Array, "B n"]) -> Float[Array, "B n"]:
    b = b.astype(jnp.float32)
    return b if a is None else a.astype(jnp.float32) + b
