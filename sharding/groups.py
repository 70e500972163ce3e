"""Shard, lookup, group: how the parts of tables and the features that want them are put together for the kernels.

Letters: W devices, S slots a device, P vectors a sample that a device pools.
"""

import dataclasses
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Shaped

from sharding.tables import FeatureSpec, TableSpec

# How vectors of a group come home; see the module of that name.
Family = Literal["local", "row_wise", "table_row_wise", "rows_by_id", "table_wise"]
FAMILIES: tuple[Family, ...] = ("local", "row_wise", "table_row_wise", "rows_by_id", "table_wise")


def stored_width(dim: int) -> int:
    """Columns that a row of ``dim`` columns is padded to: 8, 16, 32, 64, 128 or a multiple of 128."""
    for width in (8, 16, 32, 64):
        if dim <= width:
            return width
    return -(-dim // 128) * 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Columns of a table, and their place in a store.

    Row r is row ``first_row + r // num_owners`` of device ``first_device + r % num_owners``; a replicated shard is
    whole on each of its owners.

    Attributes:
        table: The table.
        first_column: First column of the table that it holds.
        num_columns: Columns that it holds.
        first_device: First device that holds a part.
        num_owners: Number of devices, side by side, that do.
        replicated: Whether each of them holds every row.
        first_row: Its first row in each owner's part of the store, seen as ``[-1, width]``.
        first_scalar: Its first number in each owner's part of a store of row-wise state.
    """

    table: TableSpec
    first_column: int
    num_columns: int
    first_device: int
    num_owners: int
    replicated: bool
    first_row: int = 0
    first_scalar: int = 0

    @property
    def width(self) -> int:
        """Stored width of its rows, in elements."""
        return stored_width(self.num_columns)

    @property
    def row_stride(self) -> int:
        """Rows of the table from one row of an owner to its next."""
        return 1 if self.replicated else self.num_owners

    @property
    def rows_per_owner(self) -> int:
        """Rows that each owner has room for."""
        return -(-self.table.num_rows // self.row_stride)

    @property
    def owners(self) -> slice:
        """Numbers of the devices that hold a part."""
        return slice(self.first_device, self.first_device + self.num_owners)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup:
    """One feature in one shard.

    Attributes:
        feature: The feature.
        shard: The shard.
        slot: Its slot on each of its owners.
        first_vector: Its first vector among those that an owner pools for the group.
        vectors: Vectors a sample: one of a pooled feature, one a position of an unpooled one.
    """

    feature: FeatureSpec
    shard: Shard
    slot: int
    first_vector: int
    vectors: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """All shards of one width, store and family, with the features that look them up: one call of each kernel.

    Attributes:
        store: Name of the store.
        dtype: Storage dtype.
        width: Stored width.
        family: How vectors come home.
        num_devices: Devices of the mesh.
        lookups: Each feature in each shard, by owner, then in canonical order: pooled features by rising dim, then
            unpooled ones.
        slots_per_device: Most slots that a device has.
        vectors_per_device: Most vectors a sample that a device pools.
    """

    store: str
    dtype: str
    width: int
    family: Family
    num_devices: int
    lookups: tuple[Lookup, ...]
    slots_per_device: int
    vectors_per_device: int

    @property
    def table(self) -> TableSpec:
        """Any of its tables: all have the same rule and rounding."""
        return self.lookups[0].shard.table

    @cached_property
    def num_vectors(self) -> int:
        """Vectors a sample of all lookups."""
        return sum(lookup.vectors for lookup in self.lookups)

    @cached_property
    def vector_starts(self) -> Int32[np.ndarray, " lookups"]:
        """First vector of each lookup, counted over all lookups."""
        sizes = [lookup.vectors for lookup in self.lookups]
        return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int32)

    @property
    def has_sequences(self) -> bool:
        """Whether a feature is unpooled."""
        return any(lookup.feature.pooling == "none" for lookup in self.lookups)

    @property
    def adds_statistics(self) -> bool:
        """Whether its update needs sums over whole rows, of which devices have only some columns."""
        rule = self.table.rule
        cut = any(lookup.shard.num_columns < lookup.shard.table.dim for lookup in self.lookups)
        return cut and rule is not None and bool(rule.statistics)

    @cached_property
    def slices_of_lookups(self) -> Int32[np.ndarray, "lookups slices"]:
        """For each lookup those of the same feature, itself among them, by column; -1 where there are no more."""
        of_feature: dict[str, list[int]] = {}
        for number, lookup in enumerate(self.lookups):
            of_feature.setdefault(lookup.feature.name, []).append(number)
        slices = np.full((len(self.lookups), max(map(len, of_feature.values()))), -1, np.int32)
        for numbers in of_feature.values():
            numbers.sort(key=lambda number: self.lookups[number].shard.first_column)
            slices[numbers, : len(numbers)] = numbers
        return slices

    def of_lookups(self, attribute: str, dtype: type = np.int32) -> Shaped[np.ndarray, " lookups"]:
        """An attribute of each lookup or, failing that, of its shard or feature."""
        return np.array([_attribute(lookup, attribute) for lookup in self.lookups], dtype)

    def of_slots(self, attribute: str, dtype: type) -> Shaped[np.ndarray, "W S"]:
        """An attribute of each device's slots: of the shard or, failing that, its table."""
        values = np.zeros((self.num_devices, self.slots_per_device), dtype)
        for lookup in self.lookups:
            values[lookup.shard.owners, lookup.slot] = _attribute(lookup, attribute)
        return values

    def of_vectors(self, attribute: str, fill: int) -> Int32[np.ndarray, "W P"]:
        """An attribute of the lookup of each device's vectors; ``fill`` where there is none."""
        values = np.full((self.num_devices, self.vectors_per_device), fill, np.int32)
        for lookup in self.lookups:
            place = slice(lookup.first_vector, lookup.first_vector + lookup.vectors)
            values[lookup.shard.owners, place] = _attribute(lookup, attribute)
        return values

    def ids_bound(self, batch_size: int, ids_capacity: int) -> int:
        """Ids of a device's samples that can belong to the lookups, given the samples and the room for all ids."""
        limits = [lookup.feature.max_ids for lookup in self.lookups]
        bounds = [limit for limit in limits if limit is not None]
        names = [lookup.feature.name for lookup in self.lookups]
        most = ids_capacity * max(names.count(name) for name in set(names)) if batch_size else 0
        return most if len(bounds) < len(limits) else min(most, batch_size * sum(bounds))


def _attribute(lookup: Lookup, name: str) -> Any:
    for holder in (lookup, lookup.shard, lookup.shard.table, lookup.feature):
        if hasattr(holder, name):
            return getattr(holder, name)
    raise AttributeError(name)
