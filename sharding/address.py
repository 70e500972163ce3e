"""Address: the first part of routing, at home. Each id gets its owner and its row there, and ids are sorted by owner.

Letters: W devices, b samples of one device, n records of a device, U lookups of a group.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import Ids, pooled_lookup
from pallas_kernels.bags import offsets_of
from pallas_kernels.scans import counts_below, places_of
from sharding import words
from sharding.capacities import Capacities
from sharding.groups import Group
from sharding.jagged import KeyedJagged
from sharding.layout import LINE_SCALARS, Layout
from sharding.mesh import device_number
from sharding.owned import own
from sharding.records import NO_ROW, Records, bag_offsets_at_home, bags_at_home, bags_at_owner, records_of
from sharding.tables import MAX_IDS, FeatureSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HomeIds:
    """The ids of a group at the device that has their samples; kept where vectors or gradients go by id.

    Attributes:
        bags: Bag of each record: vector of the group, then sample.
        offsets: First record of each bag, and the end of the last.
        weights: Weight of each record, or None if the batch has none.
        lookups: Lookup of each record.
        lookup_starts: First record of each lookup.
    """

    bags: Int32[Any, " n"]
    offsets: Int32[Any, " bags+1"]
    weights: Float[Any, " n"] | None
    lookups: Int32[Any, " n"]
    lookup_starts: Int32[Any, " U"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ByOwner:
    """Records sorted by the device that they go to.

    Attributes:
        records: Which.
        owners: Whose; W for one that does not travel.
        starts: Where each owner's begin, and the end of the last.
        places: The place of each record among them.
    """

    records: Int32[Any, " n"]
    owners: Int32[Any, " n"]
    starts: Int32[Any, " W+1"]
    places: Int32[Any, " n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AddressedGroup:
    """The ids of one group, ready to leave.

    Attributes:
        columns: What an owner is told of each record: its row there, its bag there (-1 where there is no record) and,
            if there are weights, the bits of its weight.
        ids: Who is told; None where every device holds the rows.
        asked: Family "rows_by_id": one record of each distinct row, whose rows are asked for.
        home: The same ids at home; None where nobody needs them there.
        local: Family "local": the ids as this device looks them up.
    """

    columns: tuple[Int32[Any, " n"], ...]
    ids: ByOwner | None = None
    asked: ByOwner | None = None
    home: HomeIds | None = None
    local: Ids | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Addressed:
    """The ids of a batch, ready to leave. A function of ids alone, never of weights.

    Attributes:
        groups: The ids of each group of the layout.
        divisors: What each mean divides by.
        invalid: Number of invalid ids of each device.
        count: Number of ids of each device, those included that its part of the batch has no room for.
        capacities: Room on their way.
    """

    groups: tuple[AddressedGroup, ...]
    divisors: Float[Any, "b means"]
    invalid: Int32[Any, " W"]
    count: Int32[Any, " W"]
    capacities: Capacities = dataclasses.field(metadata={"static": True})


def address_local(
    ids: KeyedJagged, *, layout: Layout, means: Sequence[FeatureSpec], capacities: Capacities
) -> Addressed:
    """Finds out where the ids of a device's samples go.

    Args:
        ids: A device's part of the batch; every feature of the layout must be in it, others are ignored.
        layout: The layout.
        means: The features that are pooled by their mean.
        capacities: Room on their way.
    """
    device = device_number() if layout.num_devices > 1 else jnp.int32(0)
    count = sum_or_most(ids.lengths)
    # Where some had no room, it is not known whose the others are: none is sent, lest all ask one owner for room.
    ids = dataclasses.replace(ids, lengths=jnp.where(count <= ids.capacity, ids.lengths, 0))
    if layout.wide and ids.values.ndim == 1:
        ids = dataclasses.replace(ids, values=words.widened(ids.values))
    records = [records_of(ids, group) for group in layout.groups]
    groups = [
        _staying(of_group, group, ids.batch_size, device, layout.wide)
        if group.family == "local"
        else _leaving(of_group, group, ids.batch_size)
        for of_group, group in zip(records, layout.groups, strict=True)
    ]
    invalid = sum((of_group.invalid for of_group in records), jnp.int32(0))
    return Addressed(
        groups=tuple(groups),
        divisors=_divisors(ids, means),
        invalid=invalid[None],
        count=count[None],
        capacities=capacities,
    )


def sum_or_most(counts: Int32[Any, "..."]) -> Int32[Array, ""]:
    """Sum of counts; `MAX_IDS` where 32 bits do not hold it, which is more than any capacity."""
    total, rough = jnp.sum(counts, dtype=jnp.int32), jnp.sum(jnp.asarray(counts).astype(jnp.float32))
    return jnp.where(jnp.abs(rough - total.astype(jnp.float32)) > 2.0**30, jnp.int32(MAX_IDS), total)


def _divisors(ids: KeyedJagged, means: Sequence[FeatureSpec]) -> Float[Array, "b means"]:
    """What each mean divides by: the ids of the bag, or the sum of their weights; a column of ones if there is none."""
    places = [ids.features.index(feature.name) for feature in means]
    if not places:  # jaxlib 0.11 dies of arrays without elements on several devices.
        return jnp.ones((ids.batch_size, 1), jnp.float32)
    totals = jnp.asarray(ids.lengths).astype(jnp.float32) if ids.weights is None else _sums_of_weights(ids)
    # A bag whose weights add up to nothing pools to zeros.
    of_means = totals[jnp.array(places)]
    return jnp.where(of_means == 0, jnp.inf, of_means).T


def _sums_of_weights(ids: KeyedJagged) -> Float[Array, "F b"]:
    """By a lookup that names a row of ones again and again: in the order of the ids, which a GPU's own sum is not."""
    ones, rows = jnp.ones((1, LINE_SCALARS), jnp.float32), jnp.zeros(ids.capacity, jnp.int32)
    # Lengths that are no lengths have been counted as invalid.
    offsets = offsets_of(jnp.maximum(ids.lengths, 0).reshape(-1))
    sums = pooled_lookup(ones, rows, offsets, jnp.asarray(ids.weights), width=8)
    return sums[:, 0].reshape(ids.lengths.shape)


def _staying(records: Records, group: Group, samples: int, device: Int32[Array, ""], wide: bool) -> AddressedGroup:
    """A group whose rows every device holds."""
    bags = bags_at_owner(records, group, samples)
    local = own(
        records.rows,
        bags // max(samples, 1),
        bag_offsets_at_home(records, group),
        records.weights,
        group=group,
        device=device,
        wide=wide,
    )
    return AddressedGroup(columns=_columns(records, bags), local=local)


def _leaving(records: Records, group: Group, samples: int) -> AddressedGroup:
    """A group whose ids travel."""
    asked = _distinct(records, group) if group.family == "rows_by_id" else None
    home = None
    if asked is not None or group.adds_statistics:
        home = HomeIds(
            bags=bags_at_home(records, group, samples),
            offsets=bag_offsets_at_home(records, group),
            weights=records.weights,
            lookups=records.lookups,
            lookup_starts=records.lookup_starts,
        )
    columns = _columns(records, bags_at_owner(records, group, samples))
    return AddressedGroup(columns=columns, ids=_by_owner(records, group), asked=asked, home=home)


def _columns(records: Records, bags: Int32[Array, " n"]) -> tuple[Int32[Array, " n"], ...]:
    # Not one array of two or three numbers a record: its exchange takes TPU compilers minutes, that of columns seconds.
    columns = (records.rows, jnp.where(records.present, bags, -1))
    if records.weights is None:
        return columns
    return (*columns, jax.lax.bitcast_convert_type(records.weights, jnp.int32))


def _by_owner(records: Records, group: Group) -> ByOwner:
    """Every record, sorted by owner; those of one owner stay in order."""
    index = jnp.arange(records.rows.shape[0], dtype=jnp.int32)
    owners = jnp.where(records.present, records.owners, group.num_devices)
    order = places = index
    if any(lookup.shard.num_owners > 1 for lookup in group.lookups):
        owners, order = jax.lax.sort((owners, index), num_keys=1, is_stable=True)
        places = jnp.zeros_like(index).at[order].set(index, unique_indices=True)
    return ByOwner(records=order, owners=owners, starts=_starts(owners, group.num_devices), places=places)


def _distinct(records: Records, group: Group) -> ByOwner:
    """One record of each distinct row, sorted by owner."""
    num_records, num_devices = records.rows.shape[0], group.num_devices
    index = jnp.arange(num_records, dtype=jnp.int32)
    owners = jnp.where(records.present & (records.rows != NO_ROW), records.owners, num_devices)
    end = max(lookup.shard.first_row + lookup.shard.rows_per_owner for lookup in group.lookups)
    if end * num_devices <= NO_ROW:
        # One number for owner and row: on GPUs XLA leaves a key beside one value to CUB, and sorts more by itself.
        keys = jnp.where(owners < num_devices, owners * end + records.rows, NO_ROW)
        keys, order = jax.lax.sort((keys, index), num_keys=1, is_stable=True)
        sorted_owners, changed = jnp.minimum(keys // end, num_devices), keys[1:] != keys[:-1]
    else:
        # By one key at a time, which compilers of accelerators do better than by two.
        rows, sorted_owners, order = jax.lax.sort((records.rows, owners, index), num_keys=1, is_stable=True)
        sorted_owners, rows, order = jax.lax.sort((sorted_owners, rows, order), num_keys=1, is_stable=True)
        changed = (sorted_owners[1:] != sorted_owners[:-1]) | (rows[1:] != rows[:-1])
    # Records of nobody are all alike.
    changed = changed & (sorted_owners[1:] < num_devices)
    begins = jnp.concatenate([jnp.ones(min(num_records, 1), bool), changed])
    firsts, upto = places_of(begins)
    first_owners = sorted_owners.at[firsts].get(mode="fill", fill_value=num_devices)
    places = jnp.zeros_like(index).at[order].set(upto - 1, unique_indices=True)
    return ByOwner(
        records=order.at[firsts].get(mode="fill", fill_value=0),
        owners=first_owners,
        starts=_starts(first_owners, num_devices),
        # Of nobody's records only the first begins a run, or none where they follow those of an owner.
        places=jnp.where(owners < num_devices, places, num_records),
    )


def _starts(owners: Int32[Array, " n"], num_devices: int) -> Int32[Array, " W+1"]:
    """Where each owner's begin among sorted ones, and the end of the last."""
    return counts_below(owners, jnp.arange(num_devices + 1, dtype=jnp.int32))
