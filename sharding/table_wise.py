"""Table-wise placement on one device: ids to rows of the stores, and pooled rows to embeddings.

Letters: F features, b samples, n ids of a group, G bags of a group (one a sample and pooled feature, max_ids a sample
and unpooled feature), w stored width.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from pallas_kernels.xla import bags_of_ids
from sharding.jagged import KeyedJagged
from sharding.layout import Group, Layout

# Beyond every store: the kernels take it as "no row".
NO_ROW = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedGroup:
    """The ids of one group, as the kernels want them, in canonical order: feature, sample, position in the bag.

    Attributes:
        rows: Row in the group's store of each id; NO_ROW for padding and invalid ids.
        slots: Slot of each id.
        logical_rows: Row in the table, as one word.
        offsets: First id of each bag, and the end of the last.
        weights: Weight of each id, or None if the batch has none.
        divisors: What each bag's sum is divided by, or None if every bag's is 1.
    """

    rows: Int32[Array, " n"]
    slots: Int32[Array, " n"]
    logical_rows: UInt32[Array, "n 1"]
    offsets: Int32[Array, " G+1"]
    weights: Float[Array, " n"] | None
    divisors: Float[Array, " G"] | None


def route_local(ids: KeyedJagged, layout: Layout) -> tuple[tuple[RoutedGroup, ...], Int32[Array, ""]]:
    """Finds the row of every id.

    Args:
        ids: The batch; every feature of the layout must be in it, others are ignored.
        layout: The layout.

    Returns:
        The ids of each group, and how many were invalid (see `Routed.invalid`).
    """
    groups, invalid = [], jnp.int32(0)
    for group in layout.groups:
        routed, group_invalid = _route_group(ids, group)
        groups.append(routed)
        invalid = invalid + group_invalid
    return tuple(groups), invalid


def _route_group(ids: KeyedJagged, group: Group) -> tuple[RoutedGroup, Int32[Array, ""]]:
    values, weights, lengths = _select(ids, group)
    num_ids = values.shape[0]
    misplaced = _misplaced_ids(ids, lengths, group)
    bag_lengths = _bag_lengths(lengths, group)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(bag_lengths, dtype=jnp.int32)])
    bags = bags_of_ids(offsets, num_ids)
    slot_of_bag = jnp.asarray(_of_bags(group.slot_of_feature, group, ids.batch_size), jnp.int32)
    slots = slot_of_bag.at[bags].get(mode="fill", fill_value=0)

    num_rows = jnp.array([shard.table.num_rows for shard in group.shards], jnp.int32)[slots]
    first_rows = jnp.array([shard.first_row for shard in group.shards], jnp.int32)[slots]
    present = jnp.arange(num_ids) < offsets[-1]
    inside = (values >= 0) & (values < num_rows)
    outside = jnp.sum(present & ~inside, dtype=jnp.int32)
    routed = RoutedGroup(
        rows=jnp.where(present & inside & (misplaced == 0), first_rows + values, NO_ROW),
        slots=slots,
        logical_rows=jax.lax.bitcast_convert_type(values, jnp.uint32)[:, None],
        offsets=offsets,
        weights=weights,
        divisors=_divisors(bag_lengths, bags, weights, group, ids.batch_size),
    )
    return routed, outside + misplaced


def _misplaced_ids(ids: KeyedJagged, lengths: Int32[Array, "f b"], group: Group) -> Int32[Array, ""]:
    """Number of ids in bags that are too long, or beyond the capacity: then nobody can say whose the others are."""
    limits = np.array([NO_ROW if feature.max_ids is None else feature.max_ids for feature in group.features], np.int32)
    too_many = jnp.abs(lengths - jnp.clip(lengths, 0, limits[:, None])).sum(dtype=jnp.int32)
    return too_many + jnp.maximum(jnp.sum(ids.lengths, dtype=jnp.int32) - ids.capacity, 0)


def _select(
    ids: KeyedJagged, group: Group
) -> tuple[Int32[Array, " n"], Float[Array, " n"] | None, Int32[Array, "f b"]]:
    """Values, weights and lengths of the group's features, in its order."""
    positions = np.array([ids.features.index(feature.name) for feature in group.features])
    capacity = group.capacity(ids.batch_size, ids.capacity)
    lengths = jnp.asarray(ids.lengths)[positions]
    if np.array_equal(positions, np.arange(len(ids.features))):
        # All features in their own order: nothing moves, and what is beyond the capacity is padding.
        weights = None if ids.weights is None else jnp.asarray(ids.weights)[:capacity]
        return jnp.asarray(ids.values)[:capacity], weights, lengths
    ends = jnp.cumsum(jnp.asarray(ids.lengths).reshape(-1), dtype=jnp.int32).reshape(ids.lengths.shape)
    starts = (ends - ids.lengths)[positions].reshape(-1)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lengths.reshape(-1), dtype=jnp.int32)])
    bags = bags_of_ids(offsets, capacity)
    places = jnp.arange(capacity) - offsets.at[bags].get(mode="clip") + starts.at[bags].get(mode="clip")
    values = jnp.asarray(ids.values).at[places].get(mode="clip")
    weights = None if ids.weights is None else jnp.asarray(ids.weights).at[places].get(mode="clip")
    return values, weights, lengths


def _bag_lengths(lengths: Int32[Array, "f b"], group: Group) -> Int32[Array, " G"]:
    """Ids in each bag of the group: a pooled feature has a bag a sample, an unpooled one a bag a position."""
    num_pooled = len(group.pooled)
    parts = [lengths[:num_pooled].reshape(-1)]
    for longest, feature_lengths in zip(group.bags_per_sample[num_pooled:], lengths[num_pooled:], strict=True):
        positions = jnp.arange(longest)
        parts.append((positions[None, :] < feature_lengths[:, None]).astype(jnp.int32).reshape(-1))
    return jnp.concatenate(parts)


def _of_bags(of_features: Sequence[int] | Sequence[bool], group: Group, batch_size: int) -> Shaped[np.ndarray, " G"]:
    """Repeats what is known of each feature for each of its bags."""
    return np.repeat(np.array(of_features), batch_size * np.array(group.bags_per_sample))


def _divisors(
    bag_lengths: Int32[Array, " G"],
    bags: Int32[Array, " n"],
    weights: Float[Array, " n"] | None,
    group: Group,
    batch_size: int,
) -> Float[Array, " G"] | None:
    """What a mean divides by: the ids of the bag, or the sum of their weights; 1 for other poolings."""
    is_mean = [feature.pooling == "mean" for feature in group.features]
    if not any(is_mean):
        return None
    mean_bags = jnp.asarray(_of_bags(is_mean, group, batch_size))
    if weights is None:
        totals = bag_lengths.astype(jnp.float32)
    else:
        totals = jax.ops.segment_sum(weights, bags, bag_lengths.shape[0], indices_are_sorted=True)
    # A bag whose weights add up to nothing pools to zeros.
    return jnp.where(mean_bags, jnp.where(totals == 0, jnp.inf, totals), 1.0)


def even_bags(group: Group) -> int | None:
    """The most ids in one bag, where bags are so even that reading that many from each wastes at most half; or None.

    Decided by the features' limits alone, never by the room for ids, so that growing the room changes no result.
    """
    limits = [feature.max_ids for feature in group.pooled] + [1] * sum(group.bags_per_sample[len(group.pooled) :])
    bounds = [limit for limit in limits if limit is not None]
    if len(bounds) < len(limits) or max(bounds) * len(bounds) > 2 * sum(bounds):
        return None
    return max(bounds)


def divide(pooled: Float[Array, "G w"], divisors: Float[Array, " G"] | None) -> Float[Array, "G w"]:
    """Divides each bag's sum, or its gradient, by the bag's divisor."""
    return pooled if divisors is None else pooled / divisors[:, None]
