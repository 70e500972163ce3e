"""Ids at the device that holds their rows, put into canonical order.

The canonical order of a row's ids is that of one device: feature, sample of the global batch, position in the bag. What
an owner receives lies sender by sender; its place in canonical order follows from counting, without a sort.

Letters: W devices, b samples of one device, P vectors a sample that an owner pools, G = P * W * b bags of an owner, N
ids of an owner.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import Ids
from pallas_kernels.bags import offsets_of
from pallas_kernels.scans import cummax
from sharding import words
from sharding.groups import Group
from sharding.records import NO_ROW


def own(
    rows: Int32[Array, " N"],
    vectors: Int32[Array, " N"],
    offsets: Int32[Array, " G+1"],
    weights: Float[Array, " N"] | None,
    *,
    group: Group,
    device: Int32[Array, ""],
    wide: bool,
) -> Ids:
    """Completes ids that are in canonical order: with their slots and, where an update draws bits, logical rows.

    Args:
        rows: Row of each in the device's part of the store; NO_ROW for padding and invalid ids.
        vectors: A vector of each id's lookup.
        offsets: Their bags.
        weights: Weight of each, or None.
        group: The group.
        device: This device.
        wide: Whether a row of a table takes two words.
    """
    slots = of_device(group.of_vectors("slot", 0), device).at[vectors].get(mode="clip")
    if not group.table.draws_bits:
        return Ids(rows=rows, slots=slots, offsets=offsets, weights=weights)

    def of_slots(attribute: str) -> Int32[Array, " N"]:
        values = group.of_slots(attribute, np.int32)
        return (
            jnp.full(slots.shape, values[0, 0]) if (values == values[0, 0]).all() else of_device(values, device)[slots]
        )

    stride = of_slots("row_stride")
    local = (rows - of_slots("first_row")).astype(jnp.uint32)
    ordinal = jnp.where(stride > 1, device - of_slots("first_device"), 0).astype(jnp.uint32)
    if wide:
        logical = words.multiply_add(local, stride.astype(jnp.uint32), ordinal)
    else:
        logical = (local * stride.astype(jnp.uint32) + ordinal)[:, None]
    return Ids(rows=rows, slots=slots, logical_rows=logical, offsets=offsets, weights=weights)


def canonical(
    rows: Int32[Array, " N"],
    bags: Int32[Array, " N"],
    weights: Float[Array, " N"] | None,
    senders: Int32[Array, " N"],
    present: Bool[Array, " N"],
    *,
    group: Group,
    samples: int,
    device: Int32[Array, ""],
    wide: bool,
) -> tuple[Ids, Int32[Array, " N"]]:
    """Puts ids that lie sender by sender, each sender's in canonical order, into canonical order.

    Args:
        rows: Row of each.
        bags: Bag of each among its sender's: vector, then sample.
        weights: Weight of each, or None.
        senders: Device that each comes from.
        present: Whether there is an id.
        group: The group.
        samples: Samples of one device.
        device: This device.
        wide: Whether a row of a table takes two words.

    Returns:
        The ids in canonical order, and the place there of each id given (N for none).
    """
    num_ids, num_bags = rows.shape[0], group.vectors_per_device * group.num_devices * samples
    vectors = bags // max(samples, 1)
    firsts = of_device(group.of_vectors("first_vector", 0), device).at[vectors].get(mode="clip")
    counts = of_device(group.of_vectors("vectors", 1), device).at[vectors].get(mode="clip")
    # A feature's bags lie sender by sender.
    all_bags = bags + samples * (firsts * (group.num_devices - 1) + senders * counts)
    all_bags = jnp.where(present, all_bags, num_bags)
    lengths = jnp.zeros(num_bags + 1, jnp.int32).at[all_bags].add(1, mode="drop")[:num_bags]
    offsets = offsets_of(lengths)
    index = jnp.arange(num_ids, dtype=jnp.int32)
    # A bag has one sender, who sent its ids side by side.
    begins = jnp.concatenate([jnp.ones(min(num_ids, 1), bool), all_bags[1:] != all_bags[:-1]])
    rank = index - cummax(jnp.where(begins, index, 0))
    places = jnp.where(present, offsets.at[all_bags].get(mode="clip") + rank, num_ids)
    given = jnp.full(num_ids, num_ids, jnp.int32).at[places].set(index, mode="drop")

    def ordered(values: Array, fill: int) -> Array:
        return values.at[given].get(mode="fill", fill_value=fill)

    ids = own(
        ordered(rows, NO_ROW),
        ordered(vectors, 0),
        offsets,
        None if weights is None else ordered(weights, 0),
        group=group,
        device=device,
        wide=wide,
    )
    return ids, places


def of_device(values: Int32[np.ndarray, "W k"], device: Int32[Array, ""]) -> Int32[Array, " k"]:
    """A device's row of what is known of all."""
    return jnp.asarray(values[0]) if len(values) == 1 else jnp.asarray(values)[device]
