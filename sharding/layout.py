"""Layout: a plan compiled to static numbers: which row of which table lies on which line of which store.

Nothing else in the code knows where a row lies. A line is 512 bytes. A store holds the tables of one storage dtype and
one update rule; in it, shards of one stored width lie side by side, so that one call serves them all. Narrow rows are
packed several to a line, wide rows take several lines; a shard starts on a line.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from pallas_kernels import Slots
from sharding.errors import InputError
from sharding.plan import ShardingPlan
from sharding.tables import FeatureSpec, TableSpec

LINE_BYTES = 512
# Numbers of one line of optimizer state, which is float32.
LINE_SCALARS = LINE_BYTES // 4
FROZEN = "frozen"
# Rows are named by int32, and the largest one means "no row".
MAX_STORE_ROWS = 2**31 - 1


def stored_width(dim: int) -> int:
    """Columns that a row of ``dim`` columns is padded to: 8, 16, 32, 64, 128 or a multiple of 128."""
    for width in (8, 16, 32, 64):
        if dim <= width:
            return width
    return -(-dim // 128) * 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One table's place in a store.

    Attributes:
        table: The table.
        width: Stored width of its rows, in elements.
        first_row: Its first row in the store seen as ``[-1, width]``.
        first_scalar: Its first number in each store of row-wise state.
    """

    table: TableSpec
    width: int
    first_row: int
    first_scalar: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreLayout:
    """One line store.

    Attributes:
        name: Storage dtype and update rule, such as "float32.rowwise_adagrad".
        dtype: Storage dtype.
        num_lines: Lines of the weights' store.
        num_scalar_lines: Lines of each store of row-wise state.
        shards: What lies in it, by rising width.
    """

    name: str
    dtype: str
    num_lines: int
    num_scalar_lines: int
    shards: tuple[Shard, ...]

    @property
    def line_elements(self) -> int:
        """Elements of a line of weights."""
        return LINE_BYTES // jnp.dtype(self.dtype).itemsize

    @property
    def num_elements(self) -> int:
        """Elements of the weights' store."""
        return self.num_lines * self.line_elements

    @property
    def rule_name(self) -> str:
        """Name of the update rule, or "frozen"."""
        return self.name.split(".")[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """All shards of one width in one store, with the features that look them up: one call of each kernel.

    Attributes:
        store: Name of the store.
        width: Stored width.
        shards: The slots, in order.
        pooled: Features with one bag a sample, by rising dim, so that equal dims lie side by side.
        sequences: Unpooled features.
        slot_of_feature: Slot of each feature, pooled ones first.
    """

    store: str
    width: int
    shards: tuple[Shard, ...]
    pooled: tuple[FeatureSpec, ...]
    sequences: tuple[FeatureSpec, ...]
    slot_of_feature: tuple[int, ...]

    @property
    def features(self) -> tuple[FeatureSpec, ...]:
        """All features of the group, in the order of their bags."""
        return self.pooled + self.sequences

    @property
    def dims(self) -> tuple[int, ...]:
        """Dim of each feature."""
        return tuple(self.shards[slot].table.dim for slot in self.slot_of_feature)

    @property
    def bags_per_sample(self) -> tuple[int, ...]:
        """Bags of each feature in a sample: one of a pooled feature, one a position of an unpooled one."""
        return (1,) * len(self.pooled) + tuple(feature.max_ids or 0 for feature in self.sequences)

    def capacity(self, batch_size: int, ids_capacity: int) -> int:
        """Ids that can belong to this group, given the batch and the room for all ids."""
        limits = [feature.max_ids for feature in self.features]
        bounds = [limit for limit in limits if limit is not None]
        if len(bounds) < len(limits):
            return ids_capacity if batch_size else 0
        return min(ids_capacity, batch_size * sum(bounds))

    def slots(self) -> Slots:
        """The per-slot arrays of the group."""
        tables = [shard.table for shard in self.shards]

        def floats(field: str) -> jnp.ndarray:
            return jnp.array([getattr(table, field) for table in tables], jnp.float32)

        return Slots(
            first_row=jnp.array([shard.first_row for shard in self.shards], jnp.int32),
            first_scalar=jnp.array([shard.first_scalar for shard in self.shards], jnp.int32),
            table=jnp.array(np.array([table.stable_id for table in tables], np.uint32)),
            first_column=jnp.zeros(len(tables), jnp.uint32),
            dim=floats("dim"),
            learning_rate=floats("learning_rate"),
            weight_decay=floats("weight_decay"),
            eps=floats("eps"),
            beta1=floats("beta1"),
            beta2=floats("beta2"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """All stores and groups of a model on a plan."""

    stores: tuple[StoreLayout, ...]
    groups: tuple[Group, ...]

    def shard(self, table: str) -> tuple[StoreLayout, Shard]:
        """The shard that holds a table, and its store.

        Raises:
            KeyError: No such table.
        """
        for store in self.stores:
            for shard in store.shards:
                if shard.table.name == table:
                    return store, shard
        raise KeyError(table)


def make_layout(tables: Sequence[TableSpec], features: Sequence[FeatureSpec], plan: ShardingPlan) -> Layout:
    """Lays tables out in line stores.

    Args:
        tables: Checked tables.
        features: Checked features.
        plan: A checked plan for one device.

    Returns:
        The layout: a function of its arguments alone.

    Raises:
        InputError: A store has more rows than 32 bits can name.
    """
    placed = {placement.table for placement in plan.placements}
    by_store: dict[str, list[TableSpec]] = {}
    for table in tables:
        if table.name in placed:
            rule = FROZEN if table.frozen else table.optimizer
            rounding = ".stochastic" if table.rounding == "stochastic" and table.dtype != "float32" else ""
            by_store.setdefault(f"{table.dtype}.{rule}{rounding}", []).append(table)
    stores = tuple(_store_layout(name, members) for name, members in sorted(by_store.items()))
    groups = tuple(
        _group(store, width, features) for store in stores for width in sorted({shard.width for shard in store.shards})
    )
    return Layout(stores=stores, groups=groups)


def _store_layout(name: str, tables: Sequence[TableSpec]) -> StoreLayout:
    dtype = tables[0].dtype
    line = LINE_BYTES // jnp.dtype(dtype).itemsize
    # Rows of every width must be able to see the whole store as [-1, width].
    whole = math.lcm(line, *(stored_width(table.dim) for table in tables))
    element, scalar = 0, 0
    shards = []
    for table in sorted(tables, key=lambda table: stored_width(table.dim)):
        width = stored_width(table.dim)
        alignment = math.lcm(line, width)
        element = -(-element // alignment) * alignment
        shards.append(Shard(table=table, width=width, first_row=element // width, first_scalar=scalar))
        element += table.num_rows * width
        if element // width > MAX_STORE_ROWS:
            raise InputError(
                f"table {table.name!r} ends at row {element // width} of width {width} in the store {name!r} of one "
                f"device, and 32 bits name {MAX_STORE_ROWS}: use larger dims or fewer rows"
            )
        scalar += -(-table.num_rows // LINE_SCALARS) * LINE_SCALARS
    element = -(-element // whole) * whole
    return StoreLayout(
        name=name,
        dtype=dtype,
        num_lines=element // line,
        num_scalar_lines=scalar // LINE_SCALARS,
        shards=tuple(shards),
    )


def _group(store: StoreLayout, width: int, features: Sequence[FeatureSpec]) -> Group:
    shards = tuple(shard for shard in store.shards if shard.width == width)
    slot_of_table = {shard.table.name: slot for slot, shard in enumerate(shards)}
    dim_of_table = {shard.table.name: shard.table.dim for shard in shards}
    mine = [feature for feature in features if feature.table in slot_of_table]
    pooled = sorted((f for f in mine if f.pooling != "none"), key=lambda f: dim_of_table[f.table])
    sequences = [f for f in mine if f.pooling == "none"]
    return Group(
        store=store.name,
        width=width,
        shards=shards,
        pooled=tuple(pooled),
        sequences=tuple(sequences),
        slot_of_feature=tuple(slot_of_table[f.table] for f in (*pooled, *sequences)),
    )
