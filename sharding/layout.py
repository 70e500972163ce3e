"""Layout: a plan compiled to static numbers: which row of which table lies on which line of which device's store.

Nothing else in the code knows where a row lies. A line is 512 bytes. A store holds the tables of one storage dtype and
one update rule; every device has as many lines of it as the fullest device needs, since all run the same program.
Narrow rows are packed several to a line, wide rows take several lines; a shard starts on a line, on the same one on
every device that holds a part of it.

Letters: W devices, S slots a device, P vectors a sample that a device pools.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, Shaped

from sharding.errors import InputError
from sharding.plan import Placement, ShardingPlan
from sharding.tables import FeatureSpec, TableSpec

LINE_BYTES = 512
# Numbers of one line of optimizer state, which is float32.
LINE_SCALARS = LINE_BYTES // 4
FROZEN = "frozen"
# Rows are named by int32, and the largest one means "no row".
MAX_STORE_ROWS = 2**31 - 1

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
class StoreLayout:
    """One line store.

    Attributes:
        name: Storage dtype and update rule, such as "float32.rowwise_adagrad".
        dtype: Storage dtype.
        num_devices: Devices that have a part of it.
        lines_per_device: Lines of weights of each device.
        scalar_lines_per_device: Lines of each device in each store of row-wise state.
        shards: What lies in it, by rising place.
    """

    name: str
    dtype: str
    num_devices: int
    lines_per_device: int
    scalar_lines_per_device: int
    shards: tuple[Shard, ...]

    @property
    def line_elements(self) -> int:
        """Elements of a line of weights."""
        return LINE_BYTES // jnp.dtype(self.dtype).itemsize

    @property
    def elements_per_device(self) -> int:
        """Elements of each device's part of the weights."""
        return self.lines_per_device * self.line_elements

    @property
    def rule_name(self) -> str:
        """Name of the update rule, or "frozen"."""
        return self.name.split(".")[1]


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
    def has_column_shards(self) -> bool:
        """Whether a row of a table is cut, so that its statistics are sums over devices."""
        return any(lookup.shard.num_columns < lookup.shard.table.dim for lookup in self.lookups)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """All stores and groups of a model on a plan."""

    num_devices: int
    stores: tuple[StoreLayout, ...]
    groups: tuple[Group, ...]

    @cached_property
    def wide(self) -> bool:
        """Whether naming a row of a table takes two words of 32 bits. No plan changes that."""
        return any(shard.table.num_rows > MAX_STORE_ROWS for store in self.stores for shard in store.shards)

    def shards(self, table: str) -> tuple[StoreLayout, tuple[Shard, ...]]:
        """The shards of a table, by column, and their store.

        Raises:
            KeyError: No such table.
        """
        for store in self.stores:
            found = [shard for shard in store.shards if shard.table.name == table]
            if found:
                return store, tuple(sorted(found, key=lambda shard: shard.first_column))
        raise KeyError(table)


def store_name(table: TableSpec) -> str:
    """Name of the store that a table lies in."""
    rule = FROZEN if table.frozen else table.optimizer
    rounding = ".stochastic" if table.rounding == "stochastic" and table.dtype != "float32" else ""
    return f"{table.dtype}.{rule}{rounding}"


def canonical_order(tables: Sequence[TableSpec], features: Sequence[FeatureSpec]) -> tuple[FeatureSpec, ...]:
    """The features in an order that no plan changes: by store, width, pooled before unpooled, and dim."""
    by_name = {table.name: table for table in tables}

    def key(feature: FeatureSpec) -> tuple[str, int, bool, int]:
        table = by_name[feature.table]
        return store_name(table), stored_width(table.dim), feature.pooling == "none", table.dim

    return tuple(sorted(features, key=key))


def make_layout(tables: Sequence[TableSpec], features: Sequence[FeatureSpec], plan: ShardingPlan) -> Layout:
    """Lays tables out in line stores.

    Args:
        tables: Checked tables.
        features: Checked features.
        plan: A checked plan.

    Returns:
        The layout: a function of its arguments alone.

    Raises:
        InputError: A device's part of a store has more rows than 32 bits can name.
    """
    placements = {placement.table: placement for placement in plan.placements}
    by_store: dict[str, list[TableSpec]] = {}
    for table in tables:
        by_store.setdefault(store_name(table), []).append(table)
    stores = tuple(_store_layout(name, by_store[name], placements, plan) for name in sorted(by_store))
    groups = []
    in_order = canonical_order(tables, features)
    for store in stores:
        families = {shard: _family(placements[shard.table.name], plan) for shard in store.shards}
        for family in FAMILIES:
            of_family = [shard for shard in store.shards if families[shard] == family]
            for width in sorted({shard.width for shard in of_family}):
                members = [shard for shard in of_family if shard.width == width]
                groups.append(_group(store, width, family, members, in_order))
    return Layout(num_devices=plan.num_devices, stores=stores, groups=tuple(groups))


def _family(placement: Placement, plan: ShardingPlan) -> Family:
    if placement.kind == "data_parallel" or plan.num_devices == 1:
        return "local"
    if placement.kind in ("table_wise", "column_wise"):
        return "table_wise"
    if placement.returns == "rows":
        return "rows_by_id"
    return "row_wise" if placement.kind == "row_wise" else "table_row_wise"


def _shards(table: TableSpec, placement: Placement, plan: ShardingPlan) -> Iterator[Shard]:
    for piece in placement.slices:
        owner = piece.owner or 0
        match placement.kind:
            case "table_wise" | "column_wise":
                first_device, num_owners = owner, 1
            case "table_row_wise" | "grid":
                first_device, num_owners = owner * plan.chips, plan.chips
            case "row_wise" | "data_parallel":
                first_device, num_owners = 0, plan.num_devices
        yield Shard(
            table=table,
            first_column=piece.first_column,
            num_columns=piece.num_columns,
            first_device=first_device,
            num_owners=num_owners,
            replicated=placement.kind == "data_parallel",
        )


class _Cursors:
    """Where each device's next shard, slot or vector goes; one that several devices share begins at the same place."""

    def __init__(self, num_devices: int):
        self._ends = np.zeros(num_devices, np.int64)

    def take(self, shard: Shard, size: int, alignment: int = 1) -> int:
        """Takes the next ``size`` places on all owners of a shard; returns the first."""
        first = -(-int(self._ends[shard.owners].max()) // alignment) * alignment
        self._ends[shard.owners] = first + size
        return first

    @property
    def most(self) -> int:
        """Places taken on the fullest device."""
        return int(self._ends.max())


def _store_layout(
    name: str, tables: Sequence[TableSpec], placements: dict[str, Placement], plan: ShardingPlan
) -> StoreLayout:
    dtype = tables[0].dtype
    line = LINE_BYTES // jnp.dtype(dtype).itemsize
    unplaced = [shard for table in tables for shard in _shards(table, placements[table.name], plan)]
    # Those of all devices first, then those of a node: so that beginning at the same place costs no gap. Replicas before
    # all others: lines that all devices have alike are saved once.
    unplaced.sort(key=lambda shard: (-shard.num_owners, not shard.replicated, shard.width))
    elements, scalars = _Cursors(plan.num_devices), _Cursors(plan.num_devices)
    shards = []
    for shard in unplaced:
        first = elements.take(shard, shard.rows_per_owner * shard.width, math.lcm(line, shard.width))
        first_row = first // shard.width
        if first_row + shard.rows_per_owner > MAX_STORE_ROWS:
            raise InputError(
                f"table {shard.table.name!r} ends at row {first_row + shard.rows_per_owner} of width {shard.width} in "
                f"the store {name!r} of one device, and 32 bits name {MAX_STORE_ROWS}: spread its rows over more "
                "devices, or use larger dims or fewer rows"
            )
        first_scalar = scalars.take(shard, -(-shard.rows_per_owner // LINE_SCALARS) * LINE_SCALARS)
        shards.append(dataclasses.replace(shard, first_row=first_row, first_scalar=first_scalar))
    # Rows of every width must be able to see the whole store as [-1, width].
    whole = math.lcm(line, *(shard.width for shard in shards))
    return StoreLayout(
        name=name,
        dtype=dtype,
        num_devices=plan.num_devices,
        lines_per_device=-(-elements.most // whole) * whole // line,
        scalar_lines_per_device=scalars.most // LINE_SCALARS,
        shards=tuple(shards),
    )


def _group(
    store: StoreLayout, width: int, family: Family, shards: Sequence[Shard], features: Sequence[FeatureSpec]
) -> Group:
    slots, vectors = _Cursors(store.num_devices), _Cursors(store.num_devices)
    slot_of = {shard: slots.take(shard, 1) for shard in shards}
    of_table: dict[str, list[Shard]] = {}
    for shard in shards:
        of_table.setdefault(shard.table.name, []).append(shard)
    pairs = [(feature, shard) for feature in features for shard in of_table.get(feature.table, ())]
    pairs.sort(key=lambda pair: (-pair[1].num_owners, pair[1].first_device))
    lookups = []
    for feature, shard in pairs:
        count = (feature.max_ids or 0) if feature.pooling == "none" else 1
        lookups.append(
            Lookup(
                feature=feature,
                shard=shard,
                slot=slot_of[shard],
                first_vector=vectors.take(shard, count),
                vectors=count,
            )
        )
    return Group(
        store=store.name,
        dtype=store.dtype,
        width=width,
        family=family,
        num_devices=store.num_devices,
        lookups=tuple(lookups),
        slots_per_device=slots.most,
        vectors_per_device=vectors.most,
    )
