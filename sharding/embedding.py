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
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import ROW_OPTIMIZERS
from sharding.errors import InputError
from sharding.initial import initial_store
from sharding.jagged import KeyedJagged, check_arrays
from sharding.layout import LINE_SCALARS, Layout, Shard, StoreLayout, make_layout
from sharding.local import lookup_local, update_local
from sharding.mesh import BY_DEVICE, BY_DEVICE_SECOND, REPLICATED, make_mesh, sharding_on
from sharding.plan import ShardingPlan, check_plan, one_device_plan
from sharding.state import TableState
from sharding.table_wise import RoutedGroup, route_local
from sharding.tables import FeatureSpec, TableSpec, check_specs
from sharding.vectors import Block, Embeddings, blocks_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """Ids on the devices that hold their rows. A function of ids alone, never of weights.

    Attributes:
        groups: The ids of each group of the layout.
        invalid: Number of invalid ids, over all devices: those outside their table, those beyond their feature's
            max_ids, and those that lengths promise but values have no room for. The first contribute nothing (a mean
            still counts them); where lengths are wrong, no id of the same group contributes. A caller that has not
            validated its ids must look at this.
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
        self._init = jax.jit(self._init_on_mesh, out_shardings=self.state_shardings())
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
        return self._init()

    def _init_on_mesh(self) -> TableState:
        seed = jnp.uint32(self.seed & 0xFFFFFFFF)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract_state(sharded=False))
        weights = {store.name: initial_store(store, seed) for store in self.layout.stores}
        return dataclasses.replace(zeros, weights=weights)

    def route(self, ids: KeyedJagged) -> Routed:
        """Brings ids to the device that holds their rows.

        Args:
            ids: The batch. Features that no table is for are ignored.

        Returns:
            The ids as the lookup and the update want them.

        Raises:
            InputError: A feature is missing from the batch, or its arrays have other shapes or dtypes than their
                annotations say.
        """
        missing = sorted({feature.name for feature in self.features} - set(ids.features))
        if missing:
            raise InputError(f"the batch has no ids of feature {missing[0]!r}; it has {ids.features}")
        check_arrays(ids)
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
        local = partial(lookup_local, layout=self.layout, blocks=self.blocks)
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
        step: ArrayLike,
        learning_rate_scale: ArrayLike = 1.0,
        enabled: ArrayLike = True,
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
        local = partial(update_local, layout=self.layout, blocks=self.blocks, seed=self.seed & 0xFFFFFFFF)
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
        places = _checked_rows(shard, rows) + np.int32(shard.first_row)
        return np.asarray(_read_rows(state.weights[store.name], places, shard.width))[:, : shard.table.dim]

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
            name: np.asarray(_read_rows(lines, places + np.int32(shard.first_row), shard.width))[:, : shard.table.dim]
            for name, lines in zip(rule.element_state, state.element_state[store.name], strict=True)
        }
        scalars = {
            name: np.asarray(_read_rows(lines, places + np.int32(shard.first_scalar), 1))[:, 0]
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


def _checked_rows(shard: Shard, rows: Sequence[int] | np.ndarray) -> Int32[np.ndarray, " n"]:
    given = np.asarray(rows, np.int64)
    odd = given[(given < 0) | (given >= shard.table.num_rows)]
    if odd.size:
        raise InputError(
            f"row {odd[0]} is outside table {shard.table.name!r}, whose rows are 0 to {shard.table.num_rows - 1}"
        )
    return given.astype(np.int32)


# Compiled, so that no reshaped copy of a store is made.
@partial(jax.jit, static_argnums=2)
def _read_rows(lines: Float[Array, "lines line"], rows: Int32[Array, " n"], width: int) -> Float[Array, "n w"]:
    return lines.reshape(-1, width).at[rows].get(mode="clip", wrap_negative_indices=False)


@partial(jax.jit, donate_argnums=0)
def _write_rows(
    lines: Float[Array, "lines line"], rows: Float[Array, "n w"], first_row: Int32[Array, ""]
) -> Float[Array, "lines line"]:
    view = lines.reshape(-1, rows.shape[1])
    return jax.lax.dynamic_update_slice(view, rows, (first_row, jnp.int32(0))).reshape(lines.shape)
