"""Deliver: the second part of routing. Ids that are addressed travel to the owners of their rows.

Letters: W devices, b samples of one device, N ids of an owner.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import Ids
from sharding.address import Addressed, AddressedGroup, ByOwner, HomeIds, sum_or_most
from sharding.capacities import Capacities
from sharding.gather_few import gather_few
from sharding.layout import Layout
from sharding.mesh import AXES, BY_DEVICE, REPLICATED
from sharding.records import NO_ROW
from sharding.trip import Trip, exchange, make_trip, to_owners


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeliveredGroup:
    """The ids of one group at the devices that hold their rows, sender by sender.

    Attributes:
        columns: As of `AddressedGroup`, of each id that came.
        needs: Room that the ids needed: the most from one sender to one owner, all that came here, and the most rows
            that were asked of one owner.
        received: Ids that came from each device; None where every device has sent all of its own.
        trip: How they travelled; None where nothing else will travel beside them.
        requested: Family "rows_by_id": the rows that others ask this device for.
        request: Family "rows_by_id": how those travelled, with the place in its buffers of each record's row.
        home: As of `AddressedGroup`.
        local: As of `AddressedGroup`.
    """

    columns: tuple[Int32[Any, " N"], ...]
    needs: Int32[Any, " 3"]
    received: Int32[Any, " W"] | None = None
    trip: Trip | None = None
    requested: Int32[Any, " N"] | None = None
    request: Trip | None = None
    home: HomeIds | None = None
    local: Ids | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Delivered:
    """The ids of a batch at the devices that hold their rows. A function of ids alone, never of weights.

    Attributes:
        groups: The ids of each group of the layout.
        divisors: As of `Addressed`.
        invalid: Number of invalid ids, over all devices.
        needs: The room that ids needed, the most of any device, in the order of `Capacities.as_needs`.
        capacities: As of `Addressed`.
    """

    groups: tuple[DeliveredGroup, ...]
    divisors: Float[Any, "b means"]
    invalid: Int32[Any, ""]
    needs: Int32[Any, " needs"]
    capacities: Capacities = dataclasses.field(metadata={"static": True})


def delivered_specs(capacities: Capacities) -> Delivered:
    """Which part of it a device has, given the room on the way."""
    by_device, everywhere = cast(Any, BY_DEVICE), cast(Any, REPLICATED)
    return Delivered(groups=by_device, divisors=by_device, invalid=everywhere, needs=everywhere, capacities=capacities)


def deliver_local(addressed: Addressed, *, layout: Layout) -> Delivered:
    """Sends ids to the owners of their rows, and receives those whose rows this device holds.

    Args:
        addressed: The ids of this device's samples.
        layout: The layout.
    """
    groups = {
        number: _spread(addressed.groups[number], layout.num_devices)
        for number, group in enumerate(layout.groups)
        if group.family == "local"
    }
    travelling = {number: group for number, group in enumerate(addressed.groups) if number not in groups}
    groups |= _travel(travelling, addressed.capacities)
    of_layout = tuple(groups[number] for number in range(len(addressed.groups)))
    # Here, not where the ids are accepted: a step may accept them while a long exchange is under way, behind which even
    # a few numbers would wait.
    found = jnp.concatenate([addressed.invalid, addressed.count, *(group.needs for group in of_layout)])
    of_all = gather_few(found) if layout.num_devices > 1 else found[None]
    return Delivered(
        groups=of_layout,
        divisors=addressed.divisors,
        invalid=sum_or_most(of_all[:, 0]),
        needs=jnp.max(of_all[:, 1:], axis=0),
        capacities=addressed.capacities,
    )


def _spread(group: AddressedGroup, num_devices: int) -> DeliveredGroup:
    """Gives all devices the ids of a group whose rows every device holds."""
    columns = group.columns
    if num_devices > 1:
        # Together: one exchange.
        columns = tuple(jax.lax.all_gather(jnp.stack(columns), AXES, axis=1, tiled=True))
    return DeliveredGroup(columns=columns, needs=jnp.zeros(3, jnp.int32), local=group.local)


def _travel(groups: dict[int, AddressedGroup], capacities: Capacities) -> dict[int, DeliveredGroup]:
    """Sends the ids of all groups together, and the requests of those whose rows are asked for."""
    if not groups:
        return {}
    ids = {number: group.ids for number, group in groups.items() if group.ids is not None}
    asked = {number: group.asked for number, group in groups.items() if group.asked is not None}
    counts = exchange([jnp.stack([jnp.diff(one.starts) for one in (*ids.values(), *asked.values())], axis=1)])[0]
    received = {number: counts[:, place] for place, number in enumerate(ids)}
    received_asked = {number: counts[:, len(ids) + place] for place, number in enumerate(asked)}

    rooms, rounds = capacities.groups, capacities.rounds
    trips = {
        number: _trip(given, received[number], rooms[number].pair, rooms[number].total, rounds)
        for number, given in ids.items()
    }
    requests = {
        number: _trip(given, received_asked[number], rooms[number].distinct, rooms[number].total, rounds)
        for number, given in asked.items()
    }
    told = [(number, column) for number in trips for column in groups[number].columns]
    come = to_owners([trips[number] for number, _ in told], [column for _, column in told])
    arrived = {number: tuple(c for c, (to, _) in zip(come, told, strict=True) if to == number) for number in trips}
    rows = to_owners(list(requests.values()), [groups[number].columns[0] for number in requests])
    requested = {
        number: jnp.where(jnp.arange(requests[number].total) < jnp.sum(received_asked[number]), of_number, NO_ROW)
        for number, of_number in zip(requests, rows, strict=True)
    }
    return {
        number: DeliveredGroup(
            columns=columns,
            needs=jnp.stack(
                [
                    jnp.max(jnp.diff(ids[number].starts)),
                    sum_or_most(received[number]),
                    jnp.max(jnp.diff(asked[number].starts)) if number in asked else jnp.int32(0),
                ]
            ),
            received=received[number],
            trip=None if groups[number].home is None else trips[number],
            requested=requested.get(number),
            request=requests.get(number),
            home=groups[number].home,
        )
        for number, columns in arrived.items()
    }


def _trip(given: ByOwner, received: Int32[Array, " W"], capacity: int, total: int, rounds: int) -> Trip:
    """A trip of records, with the place of each."""
    trip = make_trip(given.records, given.owners, given.starts, received, capacity=capacity, total=total, rounds=rounds)
    nowhere = trip.sent.size
    return dataclasses.replace(trip, place=trip.place.at[given.places].get(mode="fill", fill_value=nowhere))
