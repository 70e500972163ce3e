"""Records: the ids of one device's samples, once for each shard that they are looked up in, and who owns their rows.

Letters: n records of a group, F features, b samples, U lookups of the group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels.bags import bags_of_ids, offsets_of
from sharding import words
from sharding.groups import Group
from sharding.jagged import KeyedJagged

# Beyond every store: the kernels take it as "no row".
NO_ROW = np.iinfo(np.int32).max


class Records(NamedTuple):
    """The records of a group, by lookup, sample and position in the bag.

    Attributes:
        lookups: Lookup of each.
        present: Whether there is one; others are padding.
        owners: Device that holds the row; the first of the shard's owners for an invalid id.
        rows: Row in the owner's part of the store; NO_ROW for padding and invalid ids.
        samples: Sample of each.
        positions: Position in its bag where the feature is unpooled, else 0.
        weights: Weight of each, or None if the batch has none.
        lengths: Ids in each bag of each lookup.
        lookup_starts: First record of each lookup.
        invalid: How many ids of the group are invalid; an id in several shards counts once.
    """

    lookups: Int32[Array, " n"]
    present: Bool[Array, " n"]
    owners: Int32[Array, " n"]
    rows: Int32[Array, " n"]
    samples: Int32[Array, " n"]
    positions: Int32[Array, " n"]
    weights: Float[Array, " n"] | None
    lengths: Int32[Array, "U b"]
    lookup_starts: Int32[Array, " U"]
    invalid: Int32[Array, ""]


def records_of(ids: KeyedJagged, group: Group) -> Records:
    """Finds the owner and the row of each id of a group's features.

    Args:
        ids: A device's part of the batch, with room for all ids.
        group: The group.
    """
    values, weights, lengths = _select(ids, group)
    num_records = values.shape[0]
    offsets = offsets_of(lengths.reshape(-1))
    bags = bags_of_ids(offsets, num_records)
    present = jnp.arange(num_records) < offsets[-1]
    last_lookup = len(group.lookups) - 1
    lookups = jnp.minimum(bags // max(ids.batch_size, 1), last_lookup)
    # An id in several shards is counted in its first.
    first = group.of_lookups("first_column") == 0
    misplaced, broken = _misplaced_ids(ids, lengths, group, first)

    def of(attribute: str) -> Int32[Array, " n"]:
        return _of_records(group.of_lookups(attribute), lookups)

    if values.ndim == 1:
        inside = (values >= 0) & (values < of("num_rows"))
        valid = present & inside & ~broken
        local, ordinal = jnp.where(valid, values, 0), jnp.zeros_like(values)
        if (group.of_lookups("row_stride") > 1).any():
            stride = of("row_stride")
            local, ordinal = local // stride, local % stride
    else:
        limits = jnp.asarray(words.constant_words(group.of_lookups("num_rows", np.int64)))
        inside = words.less(values, limits.at[lookups].get(mode="clip"))
        valid = present & inside & ~broken
        quotient, remainder = words.divide(
            jnp.where(valid[:, None], values, jnp.uint32(0)), of("row_stride").astype(jnp.uint32)
        )
        local, ordinal = _as_int32(quotient[:, 0]), _as_int32(remainder)
    positions = jnp.arange(num_records, dtype=jnp.int32) - offsets.at[bags].get(mode="clip")
    of_sequence = np.array([lookup.feature.pooling == "none" for lookup in group.lookups])
    counted = _of_records(first, lookups)
    return Records(
        lookups=lookups,
        present=present,
        owners=of("first_device") + ordinal,
        rows=jnp.where(valid, of("first_row") + local, NO_ROW),
        samples=bags - lookups * ids.batch_size,
        positions=jnp.where(_of_records(of_sequence, lookups), positions, 0) if of_sequence.any() else positions * 0,
        weights=weights,
        lengths=lengths,
        lookup_starts=offsets[np.arange(len(group.lookups)) * ids.batch_size],
        invalid=jnp.sum(present & ~inside & counted, dtype=jnp.int32) + misplaced,
    )


def bags_at_owner(records: Records, group: Group, samples: int) -> Int32[Array, " n"]:
    """Bag of each record among those that its owner pools for one sender: by vector, then sample."""
    return _bags(records, group, samples, group.of_lookups("first_vector"))


def bags_at_home(records: Records, group: Group, samples: int) -> Int32[Array, " n"]:
    """Bag of each record among those of all lookups of the group."""
    return _bags(records, group, samples, group.vector_starts)


def _bags(records: Records, group: Group, samples: int, first_vectors: np.ndarray) -> Int32[Array, " n"]:
    first = _of_records(first_vectors, records.lookups) * samples
    return first + records.samples * _of_records(group.of_lookups("vectors"), records.lookups) + records.positions


def bag_offsets_at_home(records: Records, group: Group) -> Int32[Array, " bags+1"]:
    """First record of each bag of all lookups, and the end of the last."""
    lengths = records.lengths
    if group.has_sequences:
        parts = []
        for number, lookup in enumerate(group.lookups):
            of_bags = lengths[number]
            if lookup.feature.pooling == "none":
                of_bags = (jnp.arange(lookup.vectors)[None] < of_bags[:, None]).astype(jnp.int32).reshape(-1)
            parts.append(of_bags)
        lengths = jnp.concatenate(parts)
    # One below 0 has been counted as invalid; kernels wait for ever where offsets fall.
    return offsets_of(jnp.maximum(lengths, 0).reshape(-1))


def _as_int32(word: UInt32[Array, " n"]) -> Int32[Array, " n"]:
    return jax.lax.bitcast_convert_type(word, jnp.int32)


def _of_records(of_lookups: np.ndarray, lookups: Int32[Array, " n"]) -> Array:
    """What is known of each lookup, for each record."""
    if (of_lookups == of_lookups[0]).all():
        return jnp.full(lookups.shape, of_lookups[0])
    return jnp.asarray(of_lookups).at[lookups].get(mode="clip")


def _misplaced_ids(
    ids: KeyedJagged, lengths: Int32[Array, "U b"], group: Group, first: np.ndarray
) -> tuple[Int32[Array, ""], Bool[Array, ""]]:
    """Ids in bags that are too long, and whether that leaves unsaid whose the others are."""
    limits = [lookup.feature.max_ids for lookup in group.lookups]
    longest = np.array([NO_ROW if limit is None else limit for limit in limits], np.int32)
    excess = jnp.abs(lengths - jnp.clip(lengths, 0, longest[:, None]))
    too_many = jnp.sum(excess * first[:, None].astype(np.int32), dtype=jnp.int32)
    return too_many, too_many > 0


def _select(ids: KeyedJagged, group: Group) -> tuple[Array, Float[Array, " n"] | None, Int32[Array, "U b"]]:
    """Values, weights and lengths of the group's lookups, in its order."""
    positions = np.array([ids.features.index(lookup.feature.name) for lookup in group.lookups])
    capacity = group.ids_bound(ids.batch_size, ids.capacity)
    lengths = jnp.asarray(ids.lengths)[positions]
    if np.array_equal(positions, np.arange(len(ids.features))):
        # All features in their own order: nothing moves, and what is beyond the capacity is padding.
        weights = None if ids.weights is None else jnp.asarray(ids.weights)[:capacity]
        return jnp.asarray(ids.values)[:capacity], weights, lengths
    starts = offsets_of(jnp.asarray(ids.lengths).reshape(-1))[:-1].reshape(ids.lengths.shape)[positions].reshape(-1)
    offsets = offsets_of(lengths.reshape(-1))
    bags = bags_of_ids(offsets, capacity)
    places = jnp.arange(capacity) - offsets.at[bags].get(mode="clip") + starts.at[bags].get(mode="clip")
    values = jnp.asarray(ids.values).at[places].get(mode="clip")
    weights = None if ids.weights is None else jnp.asarray(ids.weights).at[places].get(mode="clip")
    return values, weights, lengths
