"""Slots: what differs from shard to shard within one call of a kernel, as small arrays.

Letters: S slots.
"""

import dataclasses

import jax
from jaxtyping import Array, Float, Int32, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Per-slot arrays: where a shard lies in the stores, which part of which table it is, its hyperparameters.

    A call's *row* is a row of the line store seen as ``[-1, width]``; shard ``s`` holds the rows from
    ``first_row[s]`` on. State of one number a row is kept in a store of its own, from ``first_scalar[s]`` on.

    Attributes:
        first_row: First row of the shard in the store.
        first_scalar: First number of the shard in each store of row-wise state. Rises with ``first_row``.
        table: Stable number of the table, for the counter hash.
        first_column: Column of the table that the shard's first column is.
        dim: Columns of the whole table, the divisor of a mean over a row.
        learning_rate: Learning rate.
        weight_decay: Weight decay; each rule states how it enters.
        eps: Added to the square root in a denominator.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
    """

    first_row: Int32[Array, " S"]
    first_scalar: Int32[Array, " S"]
    table: UInt32[Array, " S"]
    first_column: UInt32[Array, " S"]
    dim: Float[Array, " S"]
    learning_rate: Float[Array, " S"]
    weight_decay: Float[Array, " S"]
    eps: Float[Array, " S"]
    beta1: Float[Array, " S"]
    beta2: Float[Array, " S"]
