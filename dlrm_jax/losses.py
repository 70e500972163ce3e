"""The training loss: weighted binary cross-entropy of logits."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def weighted_bce(
    logits: Float[Array, " B"],
    label: Float[Array, " B"],
    weight: Float[Array, " B"],
    *,
    total_weight: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Computes the weighted mean of the binary cross-entropy, stably for large logits.

    `sum_i w_i (-y_i log p_i - (1 - y_i) log(1 - p_i)) / sum_i w_i` with `p = sigmoid(logit)`; 0, with gradient 0,
    if all weights are 0.

    Args:
        logits: Logits of B samples.
        label: Labels in [0, 1].
        weight: Sample weights, at least 0.
        total_weight: What the sum is divided by where the samples are a part of a batch: the sum of the batch's
            weights. Unless given, that of these samples.

    Returns:
        The loss, in nats.
    """
    losses = optax.sigmoid_binary_cross_entropy(logits, label)
    total = jnp.sum(weight) if total_weight is None else total_weight
    return jnp.sum(weight * losses) / jnp.where(total > 0, total, jnp.ones_like(total))
