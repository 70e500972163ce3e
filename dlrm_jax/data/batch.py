"""Batch: what one training step is given."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float

from sharding.jagged import KeyedJagged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of samples, as numpy arrays on the host or jax arrays on devices. B: samples in the batch.

    Attributes:
        dense: Dense features, normalised as the dataset card says, in the card's order.
        ids: Sparse features.
        label: Labels in [0, 1].
        weight: Sample weights; 0 marks padding, whose bags are empty.
    """

    dense: Float[Any, "B num_dense"]
    ids: KeyedJagged
    label: Float[Any, " B"]
    weight: Float[Any, " B"]
