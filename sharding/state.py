"""TableState: the arrays that hold all tables of a model."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TableState:
    """All tables of a model: line stores by name, and the optimizer state beside them.

    Attributes:
        weights: Lines of weights.
        element_state: Lines of state of one number an element, in the order of the rule's `element_state`.
        row_state: Lines of state of one number a row, in the order of the rule's `row_state`.
    """

    weights: dict[str, Float[Any, "lines line"]]
    element_state: dict[str, tuple[Float[Any, "state_lines line"], ...]]
    row_state: dict[str, tuple[Float[Any, "scalar_lines line"], ...]]
