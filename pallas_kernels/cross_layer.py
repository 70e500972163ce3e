"""Arrays of a layer of the low-rank cross network. Letters: B samples, n columns, r rank."""

from typing import NamedTuple

from jaxtyping import Array, Float


class CrossLayer(NamedTuple):
    """Parameters of a layer, or their gradients, in float32.

    Attributes:
        down: V.
        up: U.
        bias: b.
    """

    down: Float[Array, "n r"]
    up: Float[Array, "r n"]
    bias: Float[Array, " n"]


class CrossResidual(NamedTuple):
    """What the backward pass of a layer is given, in the dtype of the network's input.

    Attributes:
        rounded: The layer's input x.
        hidden: `x V`.
        factor: `(x V) U + b`.
    """

    rounded: Float[Array, "B n"]
    hidden: Float[Array, "B r"]
    factor: Float[Array, "B n"]


class CrossGrads(NamedTuple):
    """What the backward pass of a layer hands to the layer before.

    Attributes:
        cotangent: The gradient of the layer's output; float32, but of the last layer in the network's dtype.
        x_grad: What the layer's products add to it, for the gradient of its input, in the network's dtype; None of the
            network's output.
        first_grad: The gradient of x_0 as a factor of this layer and of those after it, in float32; None of the
            network's output.
    """

    cotangent: Float[Array, "B n"]
    x_grad: Float[Array, "B n"] | None
    first_grad: Float[Array, "B n"] | None
