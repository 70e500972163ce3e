"""Layout: a plan compiled to static numbers: which row of which table lies on which line of which device's store.

Nothing else in the code knows where a row lies. A line is 512 bytes. A store holds the tables of one storage dtype and
one update rule, but for those of dims that would pad it too far, which have stores of their own; every device has as
many lines of it as the fullest device needs, since all run the same program.
Narrow rows are packed several to a line, wide rows take several lines; a shard starts on a line, on the same one on
every device that holds a part of it.

Letters: W devices, S slots a device, P vectors a sample that a device pools.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.lookup import LINE_BYTES
from pallas_kernels.row_optimizers import ROW_OPTIMIZERS, STATISTICS_BLOCK
from pallas_kernels.stores import MOST_ROWS
from sharding.errors import InputError
from sharding.groups import FAMILIES, Family, Group, Lookup, Shard, stored_width
from sharding.plan import Placement, ShardingPlan
from sharding.tables import FeatureSpec, TableSpec

# Numbers of one line of optimizer state, which is float32.
LINE_SCALARS = LINE_BYTES // 4
FROZEN = "frozen"
# The name of the low halves of split weights, among the state.
LOW_HALVES = "low_halves"
# A store's elements are a multiple of all its widths: of at most this many, 16 MiB of float32.
_MAX_MULTIPLE = 2**22


class StateArray(NamedTuple):
    """An array of optimizer state: its name and dtype."""

    name: str
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreLayout:
    """One line store.

    Attributes:
        name: Storage dtype, update rule and rounding, such as "float32.rowwise_adagrad" or "bfloat16.adam.stochastic";
            then, where these have several stores, the least dim of each but the first: "float32.adam.dim_1664".
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

    @property
    def split(self) -> bool:
        """Whether it has the high halves of float32 weights, and an array of state their low halves."""
        return any(array.name == LOW_HALVES for array in self.element_state)

    @property
    def element_state(self) -> tuple[StateArray, ...]:
        """Arrays of one number an element."""
        return state_of_store(self.name)[0]

    @property
    def row_state(self) -> tuple[StateArray, ...]:
        """Arrays of one number a row."""
        return state_of_store(self.name)[1]

    def state_lines(self, dtype: str) -> int:
        """Lines of each device in an array of one number an element."""
        return self.elements_per_device * jnp.dtype(dtype).itemsize // LINE_BYTES

    @property
    def largest_array(self) -> int:
        """Bytes of each device in the largest of its arrays: weights, or state of one number an element."""
        dtypes = (self.dtype, *(array.dtype for array in self.element_state))
        return max(self.state_lines(dtype) for dtype in dtypes) * LINE_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """All stores and groups of a model on a plan."""

    num_devices: int
    stores: tuple[StoreLayout, ...]
    groups: tuple[Group, ...]

    @cached_property
    def wide(self) -> bool:
        """Whether naming a row of a table takes two words of 32 bits. No plan changes that."""
        return any(shard.table.num_rows > MOST_ROWS for store in self.stores for shard in store.shards)

    def store_of(self, group: Group) -> StoreLayout:
        """The store that the rows of a group lie in."""
        return next(store for store in self.stores if store.name == group.store)

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
    """Name of the store that a table lies in or, where several are alike, of the first of them."""
    rule = FROZEN if table.frozen else table.optimizer
    exact = table.frozen or table.rounding == "nearest" or table.dtype == "float32"
    return f"{table.dtype}.{rule}" + ("" if exact else f".{table.rounding}")


@cache
def state_of_store(name: str) -> tuple[tuple[StateArray, ...], tuple[StateArray, ...]]:
    """Arrays of one number an element, and of one a row: the rule's and, of split weights, the low halves."""
    rule_name, *rounding = name.split(".")[1:]
    if rule_name == FROZEN:
        return (), ()
    rule = ROW_OPTIMIZERS[rule_name]
    elements = [StateArray(name, "float32") for name in rule.element_state]
    if "split" in rounding:
        elements.append(StateArray(LOW_HALVES, "uint16"))
    return tuple(elements), tuple(StateArray(name, "float32") for name in rule.row_state)


def canonical_order(tables: Sequence[TableSpec], features: Sequence[FeatureSpec]) -> tuple[FeatureSpec, ...]:
    """The features in an order that no plan changes: by store, width, pooled before unpooled, and dim."""
    by_name = {table.name: table for table in tables}

    def key(feature: FeatureSpec) -> tuple[str, int, bool, int]:
        table = by_name[feature.table]
        return store_name(table), stored_width(table.dim), feature.pooling == "none", table.dim

    return tuple(sorted(features, key=key))


@cache
def _multiple_of_widths(dim: int) -> int:
    """What elements of a store must be a multiple of, for every width that a plan can cut the columns to."""
    cuts = (dim // count for count in range(2, dim // STATISTICS_BLOCK + 1) if dim % (count * STATISTICS_BLOCK) == 0)
    return math.lcm(2 * LINE_SCALARS, *map(stored_width, (dim, *cuts)))


def _by_store(tables: Sequence[TableSpec]) -> dict[str, list[TableSpec]]:
    """The tables of each store. No plan changes that: checkpoints are restored store by store."""
    multiples: dict[str, dict[str, int]] = {}
    names = {}
    for kind, dim in sorted({(store_name(table), table.dim) for table in tables}):
        of_kind, own = multiples.setdefault(kind, {}), _multiple_of_widths(dim)
        fitting = (name for name, multiple in of_kind.items() if math.lcm(multiple, own) <= _MAX_MULTIPLE)
        name = next(fitting, f"{kind}.dim_{dim}" if of_kind else kind)
        of_kind[name] = math.lcm(of_kind.get(name, 1), own)
        names[kind, dim] = name
    by_store: dict[str, list[TableSpec]] = {}
    for table in tables:
        by_store.setdefault(names[store_name(table), table.dim], []).append(table)
    return by_store


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
    layout = lay_out(tables, features, plan)
    for store in layout.stores:
        _check_rows(store)
    return layout


def lay_out(tables: Sequence[TableSpec], features: Sequence[FeatureSpec], plan: ShardingPlan) -> Layout:
    """The same for those who only count: a device may have more rows than can be named."""
    placements = {placement.table: placement for placement in plan.placements}
    by_store = _by_store(tables)
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
        # Python's integers: no number of rows is too large for them.
        self._ends = np.zeros(num_devices, object)

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
    # TPUs see 16-bit lines in pairs. Each table begins a pair: SparseCores share its rows out where a pair and a line
    # of row-wise state begin at once, which is nowhere if many rows of a table that begins amid a pair are updated.
    pair = line * (2 if jnp.dtype(dtype).itemsize == 2 else 1)
    unplaced = [shard for table in tables for shard in _shards(table, placements[table.name], plan)]
    # Those of all devices first, then those of a node: so that beginning at the same place costs no gap. Replicas
    # before all others: lines that all devices have alike are saved once.
    unplaced.sort(key=lambda shard: (-shard.num_owners, not shard.replicated, shard.width))
    elements, scalars = _Cursors(plan.num_devices), _Cursors(plan.num_devices)
    shards = []
    for shard in unplaced:
        first = elements.take(shard, shard.rows_per_owner * shard.width, math.lcm(pair, shard.width))
        first_row = first // shard.width
        first_scalar = scalars.take(shard, -(-shard.rows_per_owner // LINE_SCALARS) * LINE_SCALARS)
        shards.append(dataclasses.replace(shard, first_row=first_row, first_scalar=first_scalar))
    # Rows of every width must be able to see the whole store as [-1, width].
    whole = math.lcm(pair, *(shard.width for shard in shards))
    return StoreLayout(
        name=name,
        dtype=dtype,
        num_devices=plan.num_devices,
        lines_per_device=-(-elements.most // whole) * whole // line,
        scalar_lines_per_device=scalars.most // LINE_SCALARS,
        shards=tuple(shards),
    )


def _check_rows(store: StoreLayout) -> None:
    for shard in store.shards:
        where = f"in the store {store.name!r} of one device, and 32 bits name {MOST_ROWS}: spread its rows over more "
        end = shard.first_row + shard.rows_per_owner
        if end > MOST_ROWS:
            raise InputError(
                f"table {shard.table.name!r} ends at row {end} of width {shard.width} {where}devices, or use larger "
                "dims or fewer rows"
            )
        end = shard.first_scalar + shard.rows_per_owner
        if store.row_state and end > MOST_ROWS:
            raise InputError(
                f"the row-wise state of table {shard.table.name!r} ends at number {end} {where}devices, or use an "
                "optimizer without row-wise state"
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
