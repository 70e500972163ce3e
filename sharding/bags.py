"""Between the bags of an owner, as its kernels see them, and its vectors, as they travel.

Bags lie by lookup, then sender, sample and, for an unpooled feature, position: the canonical order of their ids.
Vectors lie by sender, sample and vector, so that what goes to one sender lies together.

Letters: S senders, b samples of each, P vectors a sample, X vectors a sample of all lookups, w stored width.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from sharding.groups import Group
from sharding.owned import of_device


def vectors_of_bags(
    bags: Float[Array, "bags w"], group: Group, senders: int, device: Int32[Array, ""]
) -> Float[Array, "S b P w"]:
    """The vectors of all bags."""
    vectors, width = group.vectors_per_device, bags.shape[1]
    samples = bags.shape[0] // (senders * vectors)
    by_vector = bags
    if group.has_sequences:
        first, count = _sequences(group, device)
        sample = jnp.arange(senders * samples, dtype=jnp.int32)[None]
        position = jnp.arange(vectors, dtype=jnp.int32) - first
        places = (first * (senders * samples) + position)[:, None] + sample * count[:, None]
        by_vector = bags[places.reshape(-1)]
    if senders == 1:
        # XLA takes transposes of the same axes together: whoever goes through the vectors one by one gets the bags.
        return by_vector.reshape(vectors, samples, width).swapaxes(0, 1)[None]
    return by_vector.reshape(vectors, senders, samples, width).transpose(1, 2, 0, 3)


def bags_of_vectors(vectors: Float[Array, "S b P w"], group: Group, device: Int32[Array, ""]) -> Float[Array, "bags w"]:
    """The transpose: the gradients of all bags."""
    senders, samples, count_of_vectors, width = vectors.shape
    by_vector = vectors[0].swapaxes(0, 1) if senders == 1 else vectors.transpose(2, 0, 1, 3)
    by_vector = by_vector.reshape(-1, width)
    if not group.has_sequences or not by_vector.size:
        return by_vector
    first, count = _sequences(group, device)
    bag = jnp.arange(count_of_vectors * senders * samples, dtype=jnp.int32)
    vector = bag // (senders * samples)
    rest = bag - first[vector] * (senders * samples)
    sample, position = rest // count[vector], rest % count[vector]
    return by_vector[(first[vector] + position) * (senders * samples) + sample]


def _sequences(group: Group, device: Int32[Array, ""]) -> tuple[Int32[Array, " P"], Int32[Array, " P"]]:
    """First vector of each vector's lookup, and how many it has; a vector of no lookup stands alone."""
    own_number = np.arange(group.vectors_per_device, dtype=np.int32)
    first = group.of_vectors("first_vector", -1)
    first = np.where(first < 0, own_number, first)
    return of_device(first, device), of_device(group.of_vectors("vectors", 1), device)


def vectors_at_home(bags: Float[Array, "bags w"], group: Group) -> Float[Array, "b X w"]:
    """The vectors of all bags of a device's own samples, lookup by lookup."""
    samples = bags.shape[0] // group.num_vectors
    if group.has_sequences:
        bags = bags[_home_places(group, samples)]
    return bags.reshape(group.num_vectors, samples, group.width).swapaxes(0, 1)


def bags_at_home(vectors: Float[Array, "b X w"], group: Group) -> Float[Array, "bags w"]:
    """The transpose: the gradients of all bags."""
    samples = vectors.shape[0]
    bags = vectors.swapaxes(0, 1).reshape(-1, vectors.shape[2])
    return bags[np.argsort(_home_places(group, samples))] if group.has_sequences else bags


def _home_places(group: Group, samples: int) -> np.ndarray:
    """For each vector of the lookups, then sample, its bag at home."""
    places = []
    for lookup, first in zip(group.lookups, group.vector_starts.tolist(), strict=True):
        sample, position = np.arange(samples)[None], np.arange(lookup.vectors)[:, None]
        places.append((first * samples + sample * lookup.vectors + position).reshape(-1))
    return np.concatenate(places).astype(np.int32)
