"""Dense layers: linear maps, multi-layer perceptrons and the low-rank cross network.

Letters: B samples, n inputs, m outputs, k features.

Every layer has float32 parameters and computes in `compute_dtype`. In bfloat16 the operands of a matrix product are
rounded, its sums and its result are float32, and so are the gradients of the parameters; the backward products round
their operands in the same way. Products use JAX's default precision, on hosts with AMX that of
`pallas_kernels.cpu_layers.linear`.
"""

import math
from collections.abc import Sequence
from typing import Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.cross import cross_network
from pallas_kernels.cross_layer import CrossLayer
from pallas_kernels.linear import linear


class Linear(nnx.Module):
    """The linear map `x @ kernel + bias`.

    The kernel is drawn from normal(0, sqrt(2 / (m + n))), which is both DLRM's initialisation and the Xavier normal
    one of TorchRec's cross network.

    Attributes:
        kernel: Weights, `[n, m]`.
        bias: `[m]`, or None.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        bias: Literal["normal", "zeros", "none"] = "normal",
        compute_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters.

        Args:
            num_inputs: n.
            num_outputs: m.
            bias: `normal` draws it from normal(0, sqrt(1 / m)) as DLRM does; `none` leaves it out.
            compute_dtype: What the inputs and the kernel are rounded to.
            rngs: Its stream `params` gives the random bits.
        """
        stddev = math.sqrt(2 / (num_inputs + num_outputs))
        self.kernel = nnx.Param(stddev * jax.random.normal(rngs.params(), (num_inputs, num_outputs), jnp.float32))
        if bias == "none":
            self.bias = None
        elif bias == "zeros":
            self.bias = nnx.Param(jnp.zeros(num_outputs, jnp.float32))
        else:
            draw = jax.random.normal(rngs.params(), (num_outputs,), jnp.float32)
            self.bias = nnx.Param(math.sqrt(1 / num_outputs) * draw)
        self.compute_dtype = compute_dtype

    def __call__(self, x: Float[Array, "B n"], *, relu: bool = False) -> Float[Array, "B m"]:
        """Returns `x @ kernel + bias` in float32, or with a ReLU after it, in the compute dtype."""
        bias = None if self.bias is None else self.bias[...]
        return linear(x.astype(self.compute_dtype), self.kernel[...], bias, relu)


class MLP(nnx.Module):
    """Multi-layer perceptron: linear maps, with a ReLU after each but, if asked, the last.

    Attributes:
        layers: The linear maps. None at all is the identity.
    """

    def __init__(
        self, num_inputs: int, widths: Sequence[int], *, last_relu: bool, compute_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """Draws the parameters.

        Args:
            num_inputs: Width of the input.
            widths: Width after each layer.
            last_relu: Whether a ReLU follows the last layer too.
            compute_dtype: What the operands of the products, and the activations kept, are rounded to.
            rngs: Its stream `params` gives the random bits.
        """
        inputs = (num_inputs, *widths[:-1])
        self.layers = (
            nnx.List(Linear(n, m, compute_dtype=compute_dtype, rngs=rngs) for n, m in zip(inputs, widths, strict=True))
            if widths
            else nnx.List()
        )
        self.last_relu = last_relu

    def __call__(self, x: Float[Array, "B n"]) -> Float[Array, "B m"]:
        """Returns the last layer's output: float32 without a ReLU after it, else in the compute dtype."""
        for index, layer in enumerate(self.layers):
            x = layer(x, relu=self.last_relu or index + 1 < len(self.layers))
        return x


class LowRankCross(nnx.Module):
    """Low-rank cross network: `x_{l+1} = x_0 * ((x_l V_l) U_l + b_l) + x_l`; see `pallas_kernels.cross`.

    Source: Wang et al. 2021 (DCN V2), equation 2, with the initialisation of TorchRec's LowRankCrossNet: Xavier
    normal kernels, zero biases.

    Attributes:
        down: The maps V_l, `[n, rank]`, without bias.
        up: The maps U_l, `[rank, n]`, with the biases b_l.
    """

    def __init__(self, num_inputs: int, *, num_layers: int, rank: int, compute_dtype: jnp.dtype, rngs: nnx.Rngs):
        """Draws the parameters.

        Args:
            num_inputs: n, also the width of the output.
            num_layers: Number of cross layers.
            rank: Width between V and U.
            compute_dtype: What the network's input, and what the backward pass is given, are rounded to.
            rngs: Its stream `params` gives the random bits.
        """
        settings = {"compute_dtype": compute_dtype, "rngs": rngs}
        self.down = nnx.List(Linear(num_inputs, rank, bias="none", **settings) for _ in range(num_layers))
        self.up = nnx.List(Linear(rank, num_inputs, bias="zeros", **settings) for _ in range(num_layers))
        self.compute_dtype = compute_dtype

    def __call__(self, x: Float[Array, "B n"]) -> Float[Array, "B n"]:
        """Returns the last layer's output in the compute dtype."""
        layers = tuple(
            CrossLayer(down.kernel[...], up.kernel[...], cast(nnx.Param, up.bias)[...])
            for down, up in zip(self.down, self.up, strict=True)
        )
        return cross_network(x.astype(self.compute_dtype), layers)


class Projection(nnx.Module):
    """One linear map without bias for each of k features of one dimension, to a common dimension.

    Attributes:
        kernel: Weights, `[k, D, m]`, drawn from normal(0, sqrt(2 / (m + D))).
    """

    def __init__(self, num_features: int, dim: int, num_outputs: int, *, compute_dtype: jnp.dtype, rngs: nnx.Rngs):
        """Draws the parameters.

        Args:
            num_features: k.
            dim: D, the dimension of the embeddings.
            num_outputs: m, the dimension they are brought to.
            compute_dtype: What the inputs and the kernel are rounded to.
            rngs: Its stream `params` gives the random bits.
        """
        draw = jax.random.normal(rngs.params(), (num_features, dim, num_outputs), jnp.float32)
        self.kernel = nnx.Param(math.sqrt(2 / (dim + num_outputs)) * draw)
        self.compute_dtype = compute_dtype

    def __call__(self, embeddings: Float[Array, "B k D"]) -> Float[Array, "B k m"]:
        """Returns the projected embeddings in float32."""
        by_feature = jnp.swapaxes(embeddings.astype(self.compute_dtype), 0, 1)
        project = jax.vmap(lambda x, kernel: linear(x, kernel, None, False))
        return jnp.swapaxes(project(by_feature, self.kernel[...]), 0, 1)
