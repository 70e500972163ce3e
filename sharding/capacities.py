"""Capacities: the room that ids have on their way, static, because XLA's shapes are.

A capacity never changes a result and never drops an id: what does not fit is flagged (`Routed.needs`), the caller makes
the step a no-op, grows the capacities and does the step again (docs/training.md).
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from sharding.errors import InputError
from sharding.groups import Group
from sharding.layout import Layout
from sharding.tables import MAX_IDS

# Room beyond the mean. Bags differ in length, and hot rows meet on one owner.
_SPARE = 1.25
_DEVIATIONS = 8
_MULTIPLE = 64
WORD_BYTES = 4
# Bytes of one exchange's buffer on one device, beyond which it is cut into rounds.
EXCHANGE_BYTES = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupCapacity:
    """Room for the ids of one group of the layout; all 0 where they do not travel.

    Attributes:
        pair: Ids of one sender for one owner.
        total: Ids that an owner receives from all.
        distinct: Distinct rows that one sender asks one owner for (family "rows_by_id" only).
        row_words: Words of a row, where rows travel, not only ids.
    """

    pair: int = 0
    total: int = 0
    distinct: int = 0
    row_words: int = 0

    def as_needs(self) -> tuple[int, int, int]:
        """What a batch may need more of."""
        return self.pair, self.total, self.distinct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacities:
    """Room for the ids of a batch.

    Attributes:
        ids: Ids of one device's samples, all features together.
        groups: One for each group of the layout, in order.
        rounds: Exchanges that each journey is cut into, so that their buffers stay within a budget.
        exchange_bytes: That budget.
    """

    ids: int
    groups: tuple[GroupCapacity, ...]
    rounds: int = 1
    exchange_bytes: int = EXCHANGE_BYTES

    def as_needs(self) -> Int[np.ndarray, " needs"]:
        """The capacities in the order of `Routed.needs`."""
        return np.array([self.ids, *(n for group in self.groups for n in group.as_needs())], np.int32)

    def of_batch(self, ids: int) -> "Capacities":
        """These, with the room that a batch was given at home: the capacities may have grown since.

        Args:
            ids: Ids of one device's samples that the batch has room for.
        """
        return dataclasses.replace(self, ids=ids)

    def grown(self, needs: Int[np.ndarray, " needs"], num_devices: int) -> "Capacities":
        """Raises each capacity that is too small to the next power of two of what is needed.

        Args:
            needs: What a batch needed, as `Routed.needs` reports it.
            num_devices: Devices of the mesh.

        Returns:
            The larger capacities; the same if they suffice.

        Raises:
            InputError: See `with_rounds`.
        """
        old = self.as_needs().tolist()
        new = [
            have if need <= have else max(need, min(1 << (need - 1).bit_length(), MAX_IDS - 1))
            for have, need in zip(old, np.asarray(needs).tolist(), strict=True)
        ]
        ids, *rest = new
        groups = tuple(
            dataclasses.replace(group, pair=pair, total=total, distinct=distinct)
            for group, pair, total, distinct in zip(self.groups, rest[::3], rest[1::3], rest[2::3], strict=True)
        )
        return with_rounds(ids, groups, num_devices, self.exchange_bytes)


def with_rounds(ids: int, groups: tuple[GroupCapacity, ...], num_devices: int, exchange_bytes: int) -> Capacities:
    """Capacities with as many rounds as the budget of the exchange's buffers asks for.

    Raises:
        InputError: A device would need room for so many ids that what it needs cannot be told in 32 bits.
    """
    most = max([ids, *(group.total for group in groups)])
    if most >= MAX_IDS:
        raise InputError(
            f"a device may get {most} ids of a batch or more, but 32 bits number {MAX_IDS}: use fewer samples, or, "
            "where the ids do not all go to one device, expected_capacities"
        )
    # A record is the row, the bag and a weight. What comes home by id is a row, and its gradient goes back.
    words = max(sum(group.pair for group in groups) * 3, sum(group.pair * group.row_words for group in groups))
    rounds = max(1, math.ceil(num_devices * words * WORD_BYTES / exchange_bytes))
    return Capacities(ids=ids, groups=groups, rounds=rounds, exchange_bytes=exchange_bytes)


def sufficient_capacities(layout: Layout, samples: int, ids: int, exchange_bytes: int = EXCHANGE_BYTES) -> Capacities:
    """Room for the worst case: all ids of all devices on one owner.

    Args:
        layout: The layout.
        samples: Samples of one device.
        ids: Room for their ids.
        exchange_bytes: Budget of an exchange's buffers.
    """
    groups = []
    for group in layout.groups:
        most = 0 if group.family == "local" else group.ids_bound(samples, ids)
        groups.append(_group_capacity(group, pair=most, total=layout.num_devices * most))
    return with_rounds(ids, tuple(groups), layout.num_devices, exchange_bytes)


def expected_capacities(
    layout: Layout,
    samples: int,
    ids: int,
    mean_ids: Mapping[str, float],
    exchange_bytes: int = EXCHANGE_BYTES,
) -> Capacities:
    """Room for ordinary batches: the mean and some more, as if ids were uniform over rows.

    Args:
        layout: The layout.
        samples: Samples of one device.
        ids: Room for their ids.
        mean_ids: Mean ids of a bag, by feature.
        exchange_bytes: Budget of an exchange's buffers.

    Raises:
        InputError: A feature is missing from ``mean_ids``.
    """
    missing = sorted({lookup.feature.name for group in layout.groups for lookup in group.lookups} - set(mean_ids))
    if missing:
        raise InputError(f"mean_ids has no feature {missing[0]!r}; it has {sorted(mean_ids)}")
    groups = []
    for group in layout.groups:
        if group.family == "local":
            groups.append(GroupCapacity())
            continue
        most = group.ids_bound(samples, ids)
        busiest = _ids_for_an_owner(group, mean_ids).max() * samples
        pair = min(_roomy(busiest), most)
        total = min(_roomy(busiest * layout.num_devices), layout.num_devices * most)
        groups.append(_group_capacity(group, pair=pair, total=total))
    return with_rounds(ids, tuple(groups), layout.num_devices, exchange_bytes)


def _group_capacity(group: Group, *, pair: int, total: int) -> GroupCapacity:
    if group.family != "rows_by_id":
        return GroupCapacity(pair=pair, total=total)
    # Nobody asks for more rows than there are.
    distinct = min(pair, _rows_of_an_owner(group))
    return GroupCapacity(pair=pair, total=total, distinct=distinct, row_words=group.width)


def _rows_of_an_owner(group: Group) -> int:
    """Rows of a group's shards on the device that has most."""
    rows = np.zeros(group.num_devices, np.int64)
    for shard in {lookup.shard for lookup in group.lookups}:
        rows[shard.owners] += shard.rows_per_owner
    return int(rows.max())


def _ids_for_an_owner(group: Group, mean_ids: Mapping[str, float]) -> Int[np.ndarray, " W"]:
    """Mean ids a sample that go to each device."""
    load = np.zeros(group.num_devices)
    for lookup in group.lookups:
        load[lookup.shard.owners] += mean_ids[lookup.feature.name] / lookup.shard.row_stride
    return load


def _roomy(mean: float) -> int:
    room = _SPARE * mean + _DEVIATIONS * math.sqrt(mean) + 1
    return math.ceil(room / _MULTIPLE) * _MULTIPLE
