"""Stores: the weights of rows, and the optimizer state beside them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stores:
    """What an update changes in place: donate it and go on with the one that is returned, else XLA copies it whole.

    Attributes:
        weights: Line store of weights, seen as ``[-1, width]``: float32, bfloat16 or float16.
        element_state: One store of float32 for each of the optimizer's elementwise states, with as many elements as
            ``weights``. With split weights, after them, one of uint16: the low halves.
        row_state: One store of float32 for each of its row-wise states, see `Slots.first_scalar`. That it has a number
            for every row is the caller's promise.
    """

    weights: Float[Any, "lines line"]
    element_state: tuple[Shaped[Any, "state_lines line"], ...] = ()
    row_state: tuple[Float[Any, "scalar_lines line"], ...] = ()

    def num_rows(self, width: int) -> int:
        """As `named_rows` of the weights."""
        return named_rows(self.weights, width)


def named_rows(weights: Float[Any, "lines line"], width: int) -> int:
    """Rows of a line store that an int32 can name, the largest int32 left out: that is nobody's row.

    Args:
        weights: The line store. A large one, seen in narrow rows, has more.
        width: Width of a row, in elements.
    """
    return min(weights.size // width, jnp.iinfo(jnp.int32).max)
