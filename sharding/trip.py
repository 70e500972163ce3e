"""Trip: how the ids of one group travel to the owners of their rows, and anything else beside them, there and back.

Letters: W devices, K places of a buffer for each of them, n records of a sender, N of an owner, k numbers beside each.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from sharding.mesh import AXES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trip:
    """Where each record goes.

    Attributes:
        sent: Record in each place of the buffer for each owner; beyond them where there is none.
        place: Place of each record, counted over all buffers; beyond them for one that does not travel.
        arrived: Where the owner keeps what is in each place of the buffer from each sender; N where there is nothing.
        total: N.
        rounds: Exchanges that a trip takes.
    """

    sent: Int32[Any, "W K"]
    place: Int32[Any, " n"]
    arrived: Int32[Any, "W K"]
    total: int = dataclasses.field(metadata={"static": True})
    rounds: int = dataclasses.field(metadata={"static": True})


def exchange(
    parts: Sequence[Shaped[Array, "W ..."]], axes: str | tuple[str, ...] = AXES
) -> list[Shaped[Array, "W ..."]]:
    """Sends row d of each part to device d; row s of a result comes from device s. One exchange for each dtype.

    Args:
        parts: What this device sends.
        axes: Devices that take part, numbered along these axes of the mesh.
    """
    results: list[Any] = [None] * len(parts)
    for dtype in dict.fromkeys(part.dtype for part in parts):
        places = [i for i, part in enumerate(parts) if part.dtype == dtype]
        flat = [parts[i].reshape(parts[i].shape[0], -1) for i in places]
        joined = flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)
        come = jax.lax.all_to_all(joined, axes, split_axis=0, concat_axis=0, tiled=True)
        first = 0
        for i, part in zip(places, flat, strict=True):
            results[i] = come[:, first : first + part.shape[1]].reshape(parts[i].shape)
            first += part.shape[1]
    return results


def make_trip(
    records: Int32[Array, " m"],
    owners: Int32[Array, " m"],
    starts: Int32[Array, " W+1"],
    received: Int32[Array, " W"],
    *,
    capacity: int,
    total: int,
    rounds: int,
) -> Trip:
    """Plans a trip of records, given owner by owner.

    Args:
        records: The records that travel, sorted by owner.
        owners: Owner of each; W for one that does not travel.
        starts: Where each owner's begin, and the end of the last.
        received: Records that come from each device.
        capacity: Records of one sender that an owner has room for.
        total: Records that an owner has room for.
        rounds: Exchanges that the trip takes.

    Returns:
        The trip, its places in the order of ``records``. An owner keeps what it receives sender by sender.
    """
    num_devices = received.shape[0]
    room = -(-capacity // rounds) * rounds
    column = jnp.arange(room, dtype=jnp.int32)[None]
    position = starts[:-1, None] + column
    nobody = jnp.iinfo(jnp.int32).max
    rank = jnp.arange(records.shape[0], dtype=jnp.int32) - starts[owners]
    kept = (jnp.cumsum(received, dtype=jnp.int32) - received)[:, None] + column
    return Trip(
        sent=jnp.where(position < starts[1:, None], records.at[position].get(mode="fill", fill_value=nobody), nobody),
        place=jnp.where((owners < num_devices) & (rank < room), owners * room + rank, num_devices * room),
        arrived=jnp.where((column < received[:, None]) & (kept < total), kept, total),
        total=total,
        rounds=rounds,
    )


def to_owners(trips: Sequence[Trip], records: Sequence[Shaped[Array, "n ..."]]) -> list[Shaped[Array, "N ..."]]:
    """Takes what belongs to the records of several groups to their owners, together.

    Args:
        trips: A trip for each group.
        records: For each group, a number or numbers beside each record.

    Returns:
        For each group, what is beside each record of the owner; zeros where it has none.
    """

    def one_round(kept: list[Array], first: Any) -> list[Array]:
        buffers = [_get(values, _round(trip, trip.sent, first)) for trip, values in zip(trips, records, strict=True)]
        return [
            values.at[_round(trip, trip.arrived, first)].set(come, mode="drop")
            for trip, values, come in zip(trips, kept, exchange(buffers), strict=True)
        ]

    empty = [
        jnp.zeros((trip.total, *values.shape[1:]), values.dtype) for trip, values in zip(trips, records, strict=True)
    ]
    return _in_rounds(trips, one_round, empty)


def to_senders(trips: Sequence[Trip], values: Sequence[Shaped[Array, "N k"]]) -> list[Shaped[Array, "places k"]]:
    """Takes what belongs to the owners' records back to where those came from.

    Args:
        trips: A trip for each group.
        values: For each group, numbers beside each record of the owner.

    Returns:
        For each group, what came back to each place of the buffers, in the order of `Trip.place`.
    """

    def one_round(kept: list[Array], first: Any) -> list[Array]:
        buffers = [_get(given, _round(trip, trip.arrived, first)) for trip, given in zip(trips, values, strict=True)]
        return [
            jax.lax.dynamic_update_slice_in_dim(back, come, jnp.int32(first) * come.shape[1], axis=1)
            for back, come in zip(kept, exchange(buffers), strict=True)
        ]

    empty = [
        jnp.zeros((*trip.arrived.shape, *given.shape[1:]), given.dtype)
        for trip, given in zip(trips, values, strict=True)
    ]
    return [back.reshape(-1, *back.shape[2:]) for back in _in_rounds(trips, one_round, empty)]


def _in_rounds(trips: Sequence[Trip], one_round: Any, kept: list[Array]) -> list[Array]:
    rounds = max((trip.rounds for trip in trips), default=0)
    if rounds <= 1:
        return one_round(kept, 0) if trips else kept
    return jax.lax.fori_loop(0, rounds, lambda number, kept: one_round(kept, number), kept)


def _round(trip: Trip, places: Int32[Array, "W K"], number: Any) -> Int32[Array, "W k"]:
    """The places that one round covers."""
    if trip.rounds == 1:
        return places
    width = places.shape[1] // trip.rounds
    return jax.lax.dynamic_slice_in_dim(places, number * width, width, axis=1)


def _get(values: Shaped[Array, "n ..."], places: Int32[Array, "W K"]) -> Shaped[Array, "W K ..."]:
    return values.at[places].get(mode="fill", fill_value=0)
