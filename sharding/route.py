"""Route: ids to the devices that hold their rows. A function of ids alone, never of weights.

Letters: W devices, b samples of one device, n records of a device, N ids of an owner, U lookups of a group.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.bags import bags_of_ids
from pallas_kernels.scans import offsets_of, places_of
from sharding import words
from sharding.capacities import Capacities, GroupCapacity
from sharding.errors import InputError
from sharding.groups import Group
from sharding.jagged import KeyedJagged, check_arrays
from sharding.layout import Layout
from sharding.mesh import AXES, device_number
from sharding.owned import OwnedIds, canonical, own
from sharding.records import NO_ROW, Records, bag_offsets_at_home, bags_at_home, bags_at_owner, records_of
from sharding.tables import FeatureSpec
from sharding.trip import Trip, exchange, make_trip, to_owners


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
class RoutedGroup:
    """The ids of one group.

    Attributes:
        owned: The ids whose rows this device updates. It looks the same up, but where `requested` or `local` is given.
        trip: How they travelled; None where they did not.
        home: The same ids at home; None where nobody needs them there.
        requested: Family "rows_by_id": the rows that others ask this device for.
        request: Family "rows_by_id": how those travelled, with the place in its buffers of each record's row.
        local: Family "local" on several devices: the ids of this device's samples.
    """

    owned: OwnedIds
    trip: Trip | None = None
    home: HomeIds | None = None
    requested: Int32[Any, " N"] | None = None
    request: Trip | None = None
    local: OwnedIds | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """Ids on the devices that hold their rows. A function of ids alone, never of weights.

    Attributes:
        groups: The ids of each group of the layout.
        divisors: What each mean divides by, at home.
        invalid: Number of invalid ids, over all devices: those outside their table and those beyond their feature's
            max_ids. The first contribute nothing (a mean still counts them); where a bag is too long, no id of the
            same group and device contributes. A caller that has not validated its ids must look at this.
        needs: The room that ids needed, the most of any device, in the order of `Capacities.as_needs`.
        overflow: Whether that is more than there was. Then some ids are missing here: do nothing with this, grow the
            capacities and route again.
    """

    groups: tuple[RoutedGroup, ...]
    divisors: Float[Any, "b means"]
    invalid: Int32[Any, ""]
    needs: Int32[Any, " needs"]
    overflow: Bool[Any, ""]


def check_batch(ids: KeyedJagged, features: Sequence[FeatureSpec], layout: Layout) -> None:
    """Refuses a batch that cannot be routed.

    Args:
        ids: The batch.
        features: The features that are to be routed.
        layout: The layout.

    Raises:
        InputError: A feature is missing from the batch, its arrays have other shapes or dtypes than their annotations
            say, or do not divide over the devices.
    """
    missing = sorted({feature.name for feature in features} - set(ids.features))
    if missing:
        raise InputError(f"the batch has no ids of feature {missing[0]!r}; it has {ids.features}")
    check_arrays(ids)
    if ids.values.ndim == 2 and not layout.wide:
        raise InputError("ids are two words of 32 bits, but no table has more than 2**31 - 1 rows: give them as int32")
    if ids.batch_size % layout.num_devices or ids.capacity % layout.num_devices:
        raise InputError(
            f"{ids.batch_size} samples with room for {ids.capacity} ids do not divide over {layout.num_devices} "
            "devices: use multiples (see ShardedTables.to_devices)"
        )


def route_local(
    ids: KeyedJagged, *, layout: Layout, means: Sequence[FeatureSpec], capacities: Capacities
) -> tuple[tuple[RoutedGroup, ...], Float[Array, "b means"], Int32[Array, ""], Int32[Array, " needs"]]:
    """Sends the ids of a device's samples to the owners of their rows, and receives those whose rows it holds.

    Args:
        ids: A device's part of the batch; every feature of the layout must be in it, others are ignored.
        layout: The layout.
        means: The features that are pooled by their mean.
        capacities: Room.

    Returns:
        The ids of each group; what each mean divides by; how many ids were invalid, and what room was needed, over all
        devices.
    """
    device = device_number() if layout.num_devices > 1 else jnp.int32(0)
    if layout.wide and ids.values.ndim == 1:
        ids = dataclasses.replace(ids, values=words.widened(ids.values))
    router = _Router(ids.batch_size, device, layout, capacities)
    records = [records_of(ids, group) for group in layout.groups]
    routed: list[RoutedGroup | None] = [None] * len(records)
    needs = [jnp.zeros(3, jnp.int32)] * len(records)
    for number, group in enumerate(layout.groups):
        if group.family == "local":
            routed[number] = router.stay(records[number], group)
    for number, group, need in router.travel(records):
        routed[number], needs[number] = group, need
    invalid = sum((of_group.invalid for of_group in records), jnp.int32(0))
    all_needs = jnp.concatenate([jnp.sum(ids.lengths, dtype=jnp.int32)[None], *needs])
    if layout.num_devices > 1:
        invalid, all_needs = jax.lax.psum(invalid, AXES), jax.lax.pmax(all_needs, AXES)
    return tuple(group for group in routed if group is not None), _divisors(ids, means), invalid, all_needs


def _divisors(ids: KeyedJagged, means: Sequence[FeatureSpec]) -> Float[Array, "b means"]:
    """What each mean divides by: the ids of the bag, or the sum of their weights."""
    places = [ids.features.index(feature.name) for feature in means]
    if not places:
        return jnp.zeros((ids.batch_size, 0), jnp.float32)
    if ids.weights is None:
        totals = jnp.asarray(ids.lengths)[jnp.array(places)].astype(jnp.float32)
    else:
        bags = bags_of_ids(offsets_of(jnp.asarray(ids.lengths).reshape(-1)), ids.capacity)
        sums = jax.ops.segment_sum(jnp.asarray(ids.weights), bags, ids.lengths.size, indices_are_sorted=True)
        totals = sums.reshape(ids.lengths.shape)[jnp.array(places)]
    # A bag whose weights add up to nothing pools to zeros.
    return jnp.where(totals == 0, jnp.inf, totals).T


class _Sorted(NamedTuple):
    """Records sorted by owner: which, whose, where each owner's begin, and the place of each record among them."""

    records: Int32[Array, " n"]
    owners: Int32[Array, " n"]
    starts: Int32[Array, " W+1"]
    places: Int32[Array, " n"]


class _Router:
    """What routing all groups of a batch has in common."""

    def __init__(self, samples: int, device: Int32[Array, ""], layout: Layout, capacities: Capacities):
        self._samples = samples
        self._device = device
        self._layout = layout
        self._capacities = capacities

    def stay(self, records: Records, group: Group) -> RoutedGroup:
        """Routes a group whose rows every device holds."""
        bags = bags_at_owner(records, group, self._samples)
        mine = own(
            records.rows,
            bags // max(self._samples, 1),
            bag_offsets_at_home(records, group),
            records.weights,
            group=group,
            device=self._device,
            wide=self._layout.wide,
        )
        if self._layout.num_devices == 1:
            return RoutedGroup(owned=mine)
        given = (records.rows, bags, records.present, records.weights)
        rows, bags, present, weights = jax.tree.map(lambda x: jax.lax.all_gather(x, AXES, tiled=True), given)
        senders = jnp.repeat(jnp.arange(self._layout.num_devices, dtype=jnp.int32), records.rows.shape[0])
        return RoutedGroup(owned=self._canonical(rows, bags, weights, senders, present, group)[0], local=mine)

    def travel(self, records: Sequence[Records]) -> list[tuple[int, RoutedGroup, Int32[Array, " 3"]]]:
        """Routes all groups whose ids travel; returns them by number, with the room that they needed."""
        numbers = [i for i, group in enumerate(self._layout.groups) if group.family != "local"]
        asking = [i for i in numbers if self._layout.groups[i].family == "rows_by_id"]
        if not numbers:
            return []
        ids = {i: _by_owner(records[i], self._layout.groups[i]) for i in numbers}
        asked = {i: _distinct(records[i], self._layout.num_devices) for i in asking}
        all_sorted = [*ids.values(), *asked.values()]
        counts = exchange([jnp.stack([jnp.diff(one.starts) for one in all_sorted], axis=1)])[0]
        received = {i: counts[:, place] for place, i in enumerate(numbers)}
        received_asked = {i: counts[:, len(numbers) + place] for place, i in enumerate(asking)}

        trips = {i: self._trip(ids[i], received[i], self._room(i), self._room(i).pair) for i in numbers}
        packed = [
            _packed(records[i], bags_at_owner(records[i], self._layout.groups[i], self._samples)) for i in numbers
        ]
        arrived = dict(zip(numbers, to_owners(list(trips.values()), packed), strict=True))
        requests = {i: self._trip(asked[i], received_asked[i], self._room(i), self._room(i).distinct) for i in asking}
        rows = [records[i].rows[:, None] for i in asking]
        requested = dict(zip(asking, to_owners(list(requests.values()), rows), strict=True))

        results = []
        for i in numbers:
            group = self._layout.groups[i]
            routed = self._received(arrived[i], received[i], trips[i], group)
            need = [jnp.max(jnp.diff(ids[i].starts)), jnp.sum(received[i]), jnp.int32(0)]
            if i in asked:
                present = jnp.arange(requests[i].total) < jnp.sum(received_asked[i])
                routed = dataclasses.replace(
                    routed, requested=jnp.where(present, requested[i][:, 0], NO_ROW), request=requests[i]
                )
                need[2] = jnp.max(jnp.diff(asked[i].starts))
            if i in asked or group.has_column_shards:
                routed = dataclasses.replace(routed, home=self._home(records[i], group))
            results.append((i, routed, jnp.stack(need)))
        return results

    def _room(self, number: int) -> GroupCapacity:
        return self._capacities.groups[number]

    def _trip(self, given: _Sorted, received: Int32[Array, " W"], room: GroupCapacity, capacity: int) -> Trip:
        trip = make_trip(
            given.records,
            given.owners,
            given.starts,
            received,
            capacity=capacity,
            total=room.total,
            rounds=self._capacities.rounds,
        )
        nowhere = trip.sent.size
        return dataclasses.replace(trip, place=trip.place.at[given.places].get(mode="fill", fill_value=nowhere))

    def _received(
        self, arrived: Int32[Array, "N words"], received: Int32[Array, " W"], trip: Trip, group: Group
    ) -> RoutedGroup:
        index = jnp.arange(trip.total, dtype=jnp.int32)
        ends = jnp.cumsum(received, dtype=jnp.int32)
        senders = jnp.minimum(jnp.searchsorted(ends, index, side="right"), received.shape[0] - 1).astype(jnp.int32)
        weights = jax.lax.bitcast_convert_type(arrived[:, 2], jnp.float32) if arrived.shape[1] == 3 else None
        owned, places = self._canonical(arrived[:, 0], arrived[:, 1], weights, senders, index < ends[-1], group)
        kept = places.at[trip.arrived].get(mode="fill", fill_value=trip.total)
        return RoutedGroup(owned=owned, trip=dataclasses.replace(trip, arrived=kept))

    def _canonical(
        self, rows: Array, bags: Array, weights: Array | None, senders: Array, present: Array, group: Group
    ) -> tuple[OwnedIds, Int32[Array, " N"]]:
        return canonical(
            rows,
            bags,
            weights,
            senders,
            present,
            group=group,
            samples=self._samples,
            device=self._device,
            wide=self._layout.wide,
        )

    def _home(self, records: Records, group: Group) -> HomeIds:
        return HomeIds(
            bags=bags_at_home(records, group, self._samples),
            offsets=bag_offsets_at_home(records, group),
            weights=records.weights,
            lookups=records.lookups,
            lookup_starts=records.lookup_starts,
        )


def _packed(records: Records, bags: Int32[Array, " n"]) -> Int32[Array, "n words"]:
    """What travels of each record: its row at the owner, its bag there and, if there are weights, its weight."""
    columns = [records.rows, bags]
    if records.weights is not None:
        columns.append(jax.lax.bitcast_convert_type(records.weights, jnp.int32))
    return jnp.stack(columns, axis=1)


def _by_owner(records: Records, group: Group) -> _Sorted:
    """Every record, sorted by owner; those of one owner stay in order."""
    index = jnp.arange(records.rows.shape[0], dtype=jnp.int32)
    owners = jnp.where(records.present, records.owners, group.num_devices)
    order = places = index
    if any(lookup.shard.num_owners > 1 for lookup in group.lookups):
        owners, order = jax.lax.sort((owners, index), num_keys=1, is_stable=True)
        places = jnp.zeros_like(index).at[order].set(index, unique_indices=True)
    return _Sorted(order, owners, _starts(owners, group.num_devices), places)


def _distinct(records: Records, num_devices: int) -> _Sorted:
    """One record of each distinct row, sorted by owner."""
    num_records = records.rows.shape[0]
    index = jnp.arange(num_records, dtype=jnp.int32)
    owners = jnp.where(records.present & (records.rows != NO_ROW), records.owners, num_devices)
    sorted_owners, rows, order = jax.lax.sort((owners, records.rows, index), num_keys=2)
    changed = (sorted_owners[1:] != sorted_owners[:-1]) | (rows[1:] != rows[:-1])
    # Records of nobody are all alike.
    changed = changed & (sorted_owners[1:] < num_devices)
    begins = jnp.concatenate([jnp.ones(min(num_records, 1), bool), changed])
    firsts, upto = places_of(begins)
    first_owners = sorted_owners.at[firsts].get(mode="fill", fill_value=num_devices)
    places = jnp.zeros_like(index).at[order].set(upto - 1, unique_indices=True)
    # Of nobody's records only the first begins a run, or none where they follow those of an owner.
    places = jnp.where(owners < num_devices, places, num_records)
    return _Sorted(
        order.at[firsts].get(mode="fill", fill_value=0), first_owners, _starts(first_owners, num_devices), places
    )


def _starts(owners: Int32[Array, " n"], num_devices: int) -> Int32[Array, " W+1"]:
    """Where each owner's begin among sorted ones, and the end of the last."""
    return jnp.searchsorted(owners, jnp.arange(num_devices + 1, dtype=jnp.int32), side="left").astype(jnp.int32)
