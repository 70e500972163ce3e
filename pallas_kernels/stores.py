"""Stores: the weights of rows, and the optimizer state beside them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

# Rows are named by int32, and the largest one means "no row".
MOST_ROWS = 2**31 - 1


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
    return min(weights.size // width, MOST_ROWS)


def rows_view(array: Float[Any, "lines line"], width: int) -> Shaped[Array, "..."]:
    """A line store by rows, for `place_of_rows`.

    As [R, w], or as [lines, rows of a line, w] where XLA, whose indices have 32 bits, could not name the last row.

    Args:
        array: The line store.
        width: Width of a row, in elements.
    """
    if array.size // width <= MOST_ROWS:
        return array.reshape(-1, width)
    return array.reshape(array.shape[0], -1, width)


def place_of_rows(view: Shaped[Array, "..."], rows: Int32[Array, " n"]) -> tuple[Int32[Array, " n"], ...]:
    """Where rows are in a `rows_view`, as an index for its ``at``; beyond its end for those that are not.

    Args:
        view: The view.
        rows: The rows; `MOST_ROWS` is nobody's.
    """
    if view.ndim == 2:
        return (rows,)
    num_lines, rows_of_line, _ = view.shape
    lines = jnp.where(rows < MOST_ROWS, rows // rows_of_line, num_lines)
    return lines, rows % rows_of_line
