"""ShardedTables: embedding tables on a mesh: init, route, lookup, update.

Letters: b samples, G bags, n ids, W devices.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import ROW_OPTIMIZERS, pooled_lookup, sparse_update
from sharding.errors import InputError
from sharding.initial import initial_store
from sharding.jagged import KeyedJagged
from sharding.layout import LINE_SCALARS, Group, Layout, Shard, StoreLayout, make_layout
from sharding.mesh import BY_DEVICE, BY_DEVICE_SECOND, REPLICATED, make_mesh, sharding_on
from sharding.plan import ShardingPlan, check_plan, one_device_plan
from sharding.table_wise import NO_ROW, RoutedGroup, divide, even_bags, route_local
from sharding.tables import FeatureSpec, TableSpec, check_specs
from sharding.vectors import Block, Embeddings, blocks_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TableState:
    """All tables of a model: line stores by name, and the optimizer state beside them.

    Attributes:
        weights: Lines of weights.
        element_state: Lines of state of one number an element, in the order of the rule's `element_state`.
        row_state: Lines of state of one number a row, in the order of the rule's `row_state`.
    """

    weights: dict[str, Float[Any, "lines line"]]
    element_state: dict[str, tuple[Float[Any, "state_lines line"], ...]]
    row_state: dict[str, tuple[Float[Any, "scalar_lines line"], ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """Ids on the devices that hold their rows. A function of ids alone, never of weights.

    Attributes:
        groups: The ids of each group of the layout.
        invalid: Number of invalid ids, over all devices. They contribute nothing; a caller that has not validated its
            ids must look at this.
    """

    groups: tuple[RoutedGroup, ...]
    invalid: Int32[Array, ""]


class ShardedTables:
    """Embedding tables, laid out by a plan on a mesh.

    Holds specifications only; the arrays are a `TableState` that the caller keeps and donates:

        tables = ShardedTables(table_specs, feature_specs)
        state = tables.init()
        routed = tables.route(ids)
        embeddings = tables.lookup(state, routed)
        state = tables.update(state, routed, gradients_of_embeddings, step=1)

    All four may be called inside `jax.jit`.
    """

    def __init__(
        self,
        tables: Sequence[TableSpec],
        features: Sequence[FeatureSpec],
        *,
        plan: ShardingPlan | None = None,
        mesh: Mesh | None = None,
        seed: int = 0,
    ):
        """Lays the tables out.

        Args:
            tables: The tables.
            features: The features that look them up.
            plan: Where tables live; everything on one device unless given.
            mesh: The devices; the first one that JAX sees unless given.
            seed: Seed of initial values and of stochastic rounding.

        Raises:
            InputError: Specifications or plan that contradict themselves, each other or the mesh.
        """
        check_specs(tables, features)
        self.mesh = make_mesh() if mesh is None else mesh
        self.plan = one_device_plan(tables) if plan is None else plan
        check_plan(self.plan, tables, self.mesh)
        self.tables = tuple(tables)
        self.features = tuple(features)
        self.seed = seed
        self.layout: Layout = make_layout(tables, features, self.plan)
        self.blocks: tuple[Block, ...] = blocks_of(self.layout)
        # Called eagerly, each is one program; called inside another jit, these are inlined into it.
        self._route = jax.jit(self._route_on_mesh)
        self._lookup = jax.jit(self._lookup_on_mesh)
        self._update = jax.jit(self._update_on_mesh, donate_argnums=0)

    @property
    def feature_order(self) -> tuple[str, ...]:
        """Names of the features in the order in which routing them costs least."""
        return tuple(feature.name for group in self.layout.groups for feature in group.features)

    def state_shardings(self) -> TableState:
        """The sharding of each array of the state, in the state's own shape."""
        return jax.tree.map(lambda _: self._sharding(), self.abstract_state(sharded=False))

    def abstract_state(self, *, sharded: bool = True) -> TableState:
        """Shapes, dtypes and shardings of the state, without making it.

        Args:
            sharded: Whether to attach the shardings.

        Returns:
            A state of `jax.ShapeDtypeStruct`.
        """
        sharding = self._sharding() if sharded else None

        def lines(count: int, elements: int, dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, elements), dtype, sharding=sharding)

        def states(store: StoreLayout, count: int, names: Sequence[str]) -> tuple[jax.ShapeDtypeStruct, ...]:
            return tuple(lines(count, LINE_SCALARS, jnp.float32) for _ in names)

        stores = self.layout.stores
        rules = {store.name: ROW_OPTIMIZERS.get(store.rule_name) for store in stores}
        return TableState(
            weights={s.name: lines(s.num_lines, s.line_elements, jnp.dtype(s.dtype)) for s in stores},
            element_state={
                s.name: states(s, s.num_elements // LINE_SCALARS, rule.element_state if rule else ())
                for s, rule in ((s, rules[s.name]) for s in stores)
            },
            row_state={
                s.name: states(s, s.num_scalar_lines, rule.row_state if rule else ())
                for s, rule in ((s, rules[s.name]) for s in stores)
            },
        )

    def init(self) -> TableState:
        """Makes the tables as their initialisers say, and optimizer state of zeros.

        Returns:
            The state. Rows do not depend on plan and mesh. Files of initial values are not read here: see
            `sharding.checkpoint.load_initial_values`.
        """

        def make() -> TableState:
            seed = jnp.uint32(self.seed & 0xFFFFFFFF)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract_state(sharded=False))
            weights = {store.name: initial_store(store, seed) for store in self.layout.stores}
            return dataclasses.replace(zeros, weights=weights)

        return jax.jit(make, out_shardings=self.state_shardings())()

    def route(self, ids: KeyedJagged) -> Routed:
        """Brings ids to the device that holds their rows.

        Args:
            ids: The batch. Features that no table is for are ignored.

        Returns:
            The ids as the lookup and the update want them.

        Raises:
            InputError: A feature is missing from the batch.
        """
        missing = sorted({feature.name for feature in self.features} - set(ids.features))
        if missing:
            raise InputError(f"the batch has no ids of feature {missing[0]!r}; it has {ids.features}")
        return self._route(ids)

    def _route_on_mesh(self, ids: KeyedJagged) -> Routed:
        by_device = KeyedJagged(
            values=BY_DEVICE,  # pyright: ignore[reportArgumentType]: a tree of specs has the shape of its arrays
            lengths=BY_DEVICE_SECOND,  # pyright: ignore[reportArgumentType]: as above
            weights=None if ids.weights is None else BY_DEVICE,  # pyright: ignore[reportArgumentType]: as above
            features=ids.features,
        )
        local = partial(route_local, layout=self.layout)
        groups, invalid = jax.shard_map(
            local, mesh=self.mesh, in_specs=(by_device,), out_specs=(BY_DEVICE, REPLICATED), check_vma=False
        )(ids)
        return Routed(groups=groups, invalid=invalid)

    def lookup(self, state: TableState, routed: Routed) -> Embeddings:
        """Looks ids up and pools their rows.

        Args:
            state: The tables.
            routed: Routed ids.

        Returns:
            Embeddings of every feature, float32. Differentiate with respect to these, not to the tables.
        """
        return self._lookup(state, routed)

    def _lookup_on_mesh(self, state: TableState, routed: Routed) -> Embeddings:
        local = partial(_lookup_local, layout=self.layout, blocks=self.blocks)
        blocks, sequences = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(BY_DEVICE, BY_DEVICE),
            out_specs=(BY_DEVICE, BY_DEVICE),
            check_vma=False,
        )(state.weights, routed.groups)
        return Embeddings(blocks=blocks, sequences=sequences, names=tuple(block.names for block in self.blocks))

    def update(
        self,
        state: TableState,
        routed: Routed,
        gradients: Embeddings,
        *,
        step: Int32[Array, ""] | int,
        learning_rate_scale: Float[Array, ""] | float = 1.0,
        enabled: Bool[Array, ""] | bool = True,
    ) -> TableState:
        """Applies each table's update rule once to each row that the batch touched.

        Args:
            state: The tables; their arrays are donated.
            routed: The ids that were looked up.
            gradients: Gradient of the loss with respect to the embeddings.
            step: Number of this update, from 1.
            learning_rate_scale: Multiplies every table's learning rate: the schedule.
            enabled: False makes this a no-op, without a copy of a table.

        Returns:
            The tables after the update.
        """
        return self._update(
            state,
            routed,
            gradients,
            jnp.asarray(step, jnp.int32),
            jnp.asarray(learning_rate_scale, jnp.float32),
            jnp.asarray(enabled),
        )

    def _update_on_mesh(
        self,
        state: TableState,
        routed: Routed,
        gradients: Embeddings,
        step: Int32[Array, ""],
        learning_rate_scale: Float[Array, ""],
        enabled: Bool[Array, ""],
    ) -> TableState:
        local = partial(_update_local, layout=self.layout, blocks=self.blocks, seed=self.seed & 0xFFFFFFFF)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(BY_DEVICE, BY_DEVICE, BY_DEVICE, REPLICATED, REPLICATED, REPLICATED),
            out_specs=BY_DEVICE,
            check_vma=False,
        )(state, routed.groups, gradients, step, learning_rate_scale, enabled)

    def read_rows(self, state: TableState, table: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Reads rows of a table to the host.

        Args:
            state: The tables.
            table: Name of the table.
            rows: Rows to read.

        Returns:
            The rows, [len(rows), dim], in the table's dtype.

        Raises:
            InputError: No such table, or a row outside it.
        """
        store, shard = self._shard(table)
        view = state.weights[store.name].reshape(-1, shard.width)
        return np.asarray(view[_checked_rows(shard, rows) + shard.first_row])[:, : shard.table.dim]

    def read_optimizer_state(
        self, state: TableState, table: str, rows: Sequence[int] | np.ndarray
    ) -> dict[str, np.ndarray]:
        """Reads the optimizer state of rows of a table to the host.

        Args:
            state: The tables.
            table: Name of the table.
            rows: Rows to read.

        Returns:
            By the rule's name for it, state of one number an element as [len(rows), dim], of one a row as [len(rows)].

        Raises:
            InputError: No such table, or a row outside it.
        """
        store, shard = self._shard(table)
        places = _checked_rows(shard, rows)
        rule = shard.table.rule
        if rule is None:
            return {}
        elements = {
            name: np.asarray(lines.reshape(-1, shard.width)[places + shard.first_row])[:, : shard.table.dim]
            for name, lines in zip(rule.element_state, state.element_state[store.name], strict=True)
        }
        scalars = {
            name: np.asarray(lines.reshape(-1)[places + shard.first_scalar])
            for name, lines in zip(rule.row_state, state.row_state[store.name], strict=True)
        }
        return elements | scalars

    def write_rows(self, state: TableState, table: str, first_row: int, values: np.ndarray) -> TableState:
        """Overwrites consecutive rows of a table.

        Args:
            state: The tables; their arrays are donated.
            table: Name of the table.
            first_row: First row to write.
            values: New rows, [count, dim].

        Returns:
            The tables with those rows.

        Raises:
            InputError: No such table, rows outside it, or another dim.
        """
        store, shard = self._shard(table)
        spec = shard.table
        if values.ndim != 2 or values.shape[1] != spec.dim:
            raise InputError(f"rows of shape {values.shape} do not fit table {table!r}; its rows have dim {spec.dim}")
        if first_row < 0 or first_row + len(values) > spec.num_rows:
            raise InputError(
                f"rows {first_row} to {first_row + len(values) - 1} are not all in table {table!r}, "
                f"whose rows are 0 to {spec.num_rows - 1}"
            )
        padded = np.zeros((len(values), shard.width), jnp.dtype(store.dtype))
        padded[:, : spec.dim] = values
        lines = _write_rows(state.weights[store.name], padded, np.int32(shard.first_row + first_row))
        return dataclasses.replace(state, weights={**state.weights, store.name: lines})

    def _shard(self, table: str) -> tuple[StoreLayout, Shard]:
        try:
            return self.layout.shard(table)
        except KeyError:
            raise InputError(f"no table {table!r}; tables: {[spec.name for spec in self.tables]}") from None

    def _sharding(self) -> NamedSharding:
        return sharding_on(self.mesh, BY_DEVICE)


def _checked_rows(shard: Shard, rows: Sequence[int] | np.ndarray) -> Int32[np.ndarray, "n"]:
    given = np.asarray(rows, np.int64)
    odd = given[(given < 0) | (given >= shard.table.num_rows)]
    if odd.size:
        raise InputError(
            f"row {odd[0]} is outside table {shard.table.name!r}, whose rows are 0 to {shard.table.num_rows - 1}"
        )
    return given.astype(np.int32)


@partial(jax.jit, donate_argnums=0)
def _write_rows(
    lines: Float[Array, "lines line"], rows: Float[Array, "n w"], first_row: Int32[Array, ""]
) -> Float[Array, "lines line"]:
    view = lines.reshape(-1, rows.shape[1])
    return jax.lax.dynamic_update_slice(view, rows, (first_row, jnp.int32(0))).reshape(lines.shape)


def _lookup_local(
    weights: dict[str, Float[Array, "lines line"]],
    routed: tuple[RoutedGroup, ...],
    *,
    layout: Layout,
    blocks: tuple[Block, ...],
) -> tuple[tuple[Float[Array, "b k D"], ...], dict[str, Float[Array, "b L D"]]]:
    pooled = []
    for group, ids in zip(layout.groups, routed, strict=True):
        with jax.named_scope(f"lookup_{group.width}"):
            sums = pooled_lookup(
                weights[group.store],
                ids.rows,
                ids.offsets,
                ids.weights,
                width=group.width,
                longest_bag=even_bags(group),
            )
        pooled.append(divide(sums, ids.divisors))
    parts = [_split(bags, group) for bags, group in zip(pooled, layout.groups, strict=True)]
    of_blocks = tuple(
        parts[block.group][0][block.first : block.first + len(block.names), :, : block.dim].swapaxes(0, 1)
        for block in blocks
    )
    sequences = {}
    for group, (_, rows_of_sequences) in zip(layout.groups, parts, strict=True):
        for feature, rows in zip(group.sequences, rows_of_sequences, strict=True):
            sequences[feature.name] = rows[..., : _sequence_dim(group, feature)]
    return of_blocks, sequences


def _sequence_dim(group: Group, feature: FeatureSpec) -> int:
    return group.shards[group.slot_of_feature[group.features.index(feature)]].table.dim


def _batch_size(num_bags: int, group: Group) -> int:
    return num_bags // (len(group.pooled) + sum(feature.max_ids or 0 for feature in group.sequences))


def _split(bags: Float[Array, "G w"], group: Group) -> tuple[Float[Array, "k b w"], tuple[Float[Array, "b L w"], ...]]:
    """Cuts a group's bags into those of pooled features and those of each unpooled one."""
    batch_size = _batch_size(bags.shape[0], group)
    end = len(group.pooled) * batch_size
    pooled = bags[:end].reshape(len(group.pooled), batch_size, group.width)
    sequences = []
    for feature in group.sequences:
        first, end = end, end + batch_size * (feature.max_ids or 0)
        sequences.append(bags[first:end].reshape(batch_size, -1, group.width))
    return pooled, tuple(sequences)


def _join(gradients: Embeddings, number: int, group: Group, blocks: tuple[Block, ...]) -> Float[Array, "G w"]:
    """The transpose of cutting: gradients of a group's bags, padded to its width."""

    def padded(x: Float[Array, "... D"]) -> Float[Array, "... w"]:
        padding = [(0, 0)] * (x.ndim - 1) + [(0, group.width - x.shape[-1])]
        return jnp.pad(x, padding).reshape(-1, group.width)

    of_blocks = [
        padded(gradient.swapaxes(0, 1))
        for gradient, block in zip(gradients.blocks, blocks, strict=True)
        if block.group == number
    ]
    return jnp.concatenate(of_blocks + [padded(gradients.sequences[feature.name]) for feature in group.sequences])


def _update_local(
    state: TableState,
    routed: tuple[RoutedGroup, ...],
    gradients: Embeddings,
    step: Int32[Array, ""],
    learning_rate_scale: Float[Array, ""],
    enabled: Bool[Array, ""],
    *,
    layout: Layout,
    blocks: tuple[Block, ...],
    seed: int,
) -> TableState:
    weights, element_state, row_state = dict(state.weights), dict(state.element_state), dict(state.row_state)
    for number, (group, ids) in enumerate(zip(layout.groups, routed, strict=True)):
        store = layout.store(group.store)
        rule = group.shards[0].table.rule
        if rule is None:
            continue
        slots = group.slots()
        slots = dataclasses.replace(slots, learning_rate=slots.learning_rate * learning_rate_scale)
        with jax.named_scope(f"update_{group.width}"):
            weights[store.name], element_state[store.name], row_state[store.name] = sparse_update(
                weights[store.name],
                element_state[store.name],
                row_state[store.name],
                jnp.where(enabled, ids.rows, NO_ROW),
                ids.slots,
                ids.offsets,
                divide(_join(gradients, number, group, blocks), ids.divisors),
                ids.weights,
                logical_rows=ids.logical_rows,
                slots=slots,
                step=step,
                seed=jnp.uint32(seed),
                optimizer=rule,
                width=group.width,
                storage_rounding=group.shards[0].table.rounding,
            )
    return TableState(weights=weights, element_state=element_state, row_state=row_state)
