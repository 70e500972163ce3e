"""Route: ids to the devices that hold their rows. A function of ids alone, never of weights.

In three parts, so that others may run between and beside them: at home ids are addressed (`sharding.address`), they are
delivered (`sharding.deliver`), and where they arrive they are put in order, which is here.

Letters: W devices, b samples of one device, N ids of an owner.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import Ids
from sharding.address import HomeIds
from sharding.capacities import Capacities
from sharding.deliver import Delivered, DeliveredGroup
from sharding.errors import InputError, check_type
from sharding.groups import Group
from sharding.jagged import KeyedJagged, check_arrays
from sharding.layout import Layout
from sharding.mesh import device_number
from sharding.owned import canonical
from sharding.tables import MAX_IDS, FeatureSpec
from sharding.trip import Trip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedGroup:
    """The ids of one group.

    Attributes:
        owned: The ids whose rows this device updates. It looks the same up, but where `requested` or `local` is given.
        trip: How they travelled; None where nothing else travels beside them.
        home: The same ids at home; None where nobody needs them there.
        requested: Family "rows_by_id": the rows that others ask this device for.
        request: Family "rows_by_id": how those travelled, with the place in its buffers of each record's row.
        local: Family "local" on several devices: the ids of this device's samples.
    """

    owned: Ids
    trip: Trip | None = None
    home: HomeIds | None = None
    requested: Int32[Any, " N"] | None = None
    request: Trip | None = None
    local: Ids | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """Ids on the devices that hold their rows. A function of ids alone, never of weights.

    Attributes:
        groups: The ids of each group of the layout.
        divisors: What each mean divides by, at home.
        invalid: Number of invalid ids, over all devices: those outside their table and those beyond their feature's
            max_ids. The first contribute nothing (a mean still counts them); where a bag is too long, no id of the
            same group and device contributes. A caller that has not validated its ids must look at this, where there is
            no overflow.
        needs: The room that ids needed, the most of any device, in the order of `Capacities.as_needs`.
        overflow: Whether that is more than there was. Then some ids are missing here: do nothing with this, grow the
            capacities and route again.
    """

    groups: tuple[RoutedGroup, ...]
    divisors: Float[Any, "b means"]
    invalid: Int32[Any, ""]
    needs: Int32[Any, " needs"]
    overflow: Bool[Any, ""]


def check_batch(
    ids: KeyedJagged, features: Sequence[FeatureSpec], layout: Layout, capacities: Capacities | None
) -> None:
    """Refuses a batch that cannot be routed.

    Args:
        ids: The batch.
        features: The features that are to be routed.
        layout: The layout.
        capacities: Room on the way; None for enough.

    Raises:
        InputError: A feature is missing from the batch, its arrays have other shapes or dtypes than their annotations
            say, do not divide over the devices, are not in their order, or are too long for 32 bits.
    """
    check_arrays(ids)
    if capacities is not None:
        check_type(capacities, Capacities, "capacities")
    missing = sorted({feature.name for feature in features} - set(ids.features))
    if missing:
        raise InputError(f"the batch has no ids of feature {missing[0]!r}; it has {ids.features}")
    if 0 in (ids.batch_size, ids.capacity) and layout.num_devices > 1 and jax.__version_info__ < (0, 12):
        raise InputError(
            f"{ids.batch_size} samples with room for {ids.capacity} ids: arrays without elements end jax "
            f"{jax.__version__} on several devices; give at least one of each to every device, or install jax 0.12"
        )
    if ids.values.ndim == 2 and not layout.wide:
        raise InputError("ids are two words of 32 bits, but no table has more than 2**31 - 1 rows: give them as int32")
    if ids.parts != layout.num_devices:
        raise InputError(
            f"the batch is laid out for {ids.parts} devices, but there are {layout.num_devices}: give it to "
            "ShardedTables.to_devices first"
        )
    if ids.batch_size % layout.num_devices or ids.capacity % layout.num_devices:
        raise InputError(
            f"{ids.batch_size} samples with room for {ids.capacity} ids do not divide over {layout.num_devices} "
            "devices: use multiples (see ShardedTables.to_devices)"
        )
    samples, room = ids.batch_size // layout.num_devices, ids.capacity // layout.num_devices
    for group in layout.groups:
        bags = samples * max(group.num_vectors, group.vectors_per_device * layout.num_devices)
        for what, count in (("ids", max(room, group.ids_bound(samples, room))), ("bags", bags)):
            if count > MAX_IDS:
                raise InputError(
                    f"{ids.batch_size} samples with room for {ids.capacity} ids are {count} {what} on a device, but 32 "
                    f"bits number {MAX_IDS}: use fewer samples"
                )


def accept_local(delivered: Delivered, *, layout: Layout) -> tuple[RoutedGroup, ...]:
    """Puts the ids that have arrived in canonical order.

    Args:
        delivered: The ids whose rows this device holds.
        layout: The layout.

    Returns:
        The ids of each group.
    """
    samples, wide = delivered.divisors.shape[0], layout.wide
    device = device_number() if layout.num_devices > 1 else jnp.int32(0)
    return tuple(
        _accept(of_group, group, samples, device, wide)
        for of_group, group in zip(delivered.groups, layout.groups, strict=True)
    )


def _accept(delivered: DeliveredGroup, group: Group, samples: int, device: Int32[Array, ""], wide: bool) -> RoutedGroup:
    if group.num_devices == 1:
        assert delivered.local is not None
        return RoutedGroup(owned=delivered.local)
    (rows, bags, *bits), received = delivered.columns, delivered.received
    if received is None:
        senders = jnp.repeat(jnp.arange(group.num_devices, dtype=jnp.int32), len(rows) // group.num_devices)
        present = bags >= 0
    else:
        index, ends = jnp.arange(len(rows), dtype=jnp.int32), jnp.cumsum(received, dtype=jnp.int32)
        before = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
        senders = jnp.minimum(before, group.num_devices - 1)
        present = index < ends[-1]
    weights = jax.lax.bitcast_convert_type(bits[0], jnp.float32) if bits else None
    owned, places = canonical(
        rows, bags, weights, senders, present, group=group, samples=samples, device=device, wide=wide
    )
    trip = delivered.trip
    if trip is not None:
        kept = places.at[trip.arrived].get(mode="fill", fill_value=trip.total)
        trip = dataclasses.replace(trip, arrived=kept)
    return RoutedGroup(
        owned=owned,
        trip=trip,
        home=delivered.home,
        requested=delivered.requested,
        request=delivered.request,
        local=delivered.local,
    )
