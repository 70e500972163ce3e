"""ShardedTables: embedding tables on a mesh: init, route, lookup, update.

Letters: b samples, W devices.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int32, UInt16

from pallas_kernels.implementations import Implementation
from sharding import rows as logical_rows
from sharding.assemble import block_sources
from sharding.capacities import EXCHANGE_BYTES, Capacities, expected_capacities, sufficient_capacities
from sharding.codec import Codec, check_codec
from sharding.errors import InputError
from sharding.initial import initial_store
from sharding.jagged import KeyedJagged, check_arrays, for_devices
from sharding.layout import LINE_BYTES, Layout, make_layout
from sharding.lookup import lookup_local
from sharding.mesh import BY_DEVICE, BY_DEVICE_SECOND, REPLICATED, device_number, make_mesh, sharding_on
from sharding.place import Place
from sharding.plan import ShardingPlan, check_plan, one_device_plan
from sharding.route import Routed, route_local
from sharding.state import TableState
from sharding.tables import FeatureSpec, TableSpec, check_specs
from sharding.update import update_local
from sharding.vectors import Block, Embeddings, blocks_of


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
        kernels: Implementation | None = None,
        forward_codec: Codec = "float32",
        backward_codec: Codec = "float32",
    ):
        """Lays the tables out.

        Args:
            tables: The tables.
            features: The features that look them up.
            plan: Where tables live; on a mesh of one device everything on that, unless given.
            mesh: The devices; the first one that JAX sees unless given.
            seed: Seed of initial values and of stochastic rounding.
            kernels: Implementation of lookups and updates; the best for the devices unless given. A call that it cannot
                serve is a ValueError.
            forward_codec: How vectors travel home, see `sharding.codec`.
            backward_codec: How their gradients travel back.

        Raises:
            InputError: Specifications or plan that contradict themselves, each other or the mesh; no such codec.
        """
        check_specs(tables, features)
        check_codec(forward_codec, "forward_codec")
        check_codec(backward_codec, "backward_codec")
        self.mesh = make_mesh() if mesh is None else mesh
        if plan is None and self.mesh.devices.size > 1:
            raise InputError(
                f"a mesh of {self.mesh.devices.size} devices needs a plan: make one with sharding.planner.make_plan"
            )
        self.plan = one_device_plan(tables) if plan is None else plan
        nodes, chips = self.mesh.devices.shape
        check_plan(self.plan, tables, nodes, chips)
        self.tables = tuple(tables)
        self.features = tuple(features)
        self.seed = seed
        self.layout: Layout = make_layout(tables, features, self.plan)
        all_blocks = blocks_of(tables, features)
        self.blocks: tuple[Block, ...] = tuple(block for block in all_blocks if not block.sequence)
        self._sequences = tuple(block for block in all_blocks if block.sequence)
        self._means = tuple(feature for feature in features if feature.pooling == "mean")
        self._place = Place(
            layout=self.layout,
            sources=block_sources(self.layout, all_blocks, chips),
            means=tuple(_means_of(block, self._means) for block in all_blocks),
            nodes=nodes,
            kernels=kernels,
            forward=forward_codec,
            backward=backward_codec,
        )
        # Called eagerly, each is one program; called inside another jit, these are inlined into it.
        self._init = jax.jit(self._init_on_mesh, out_shardings=self.state_shardings())
        self._route = jax.jit(self._route_on_mesh, static_argnums=1)
        self._lookup = jax.jit(self._lookup_on_mesh)
        self._update = jax.jit(self._update_on_mesh, donate_argnums=0)

    @property
    def feature_order(self) -> tuple[str, ...]:
        """Names of the features in the order in which routing them costs least; no plan changes it."""
        return tuple(name for block in (*self.blocks, *self._sequences) for name in block.names)

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.mesh.devices.size

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

        def lines(per_device: int, dtype: str) -> jax.ShapeDtypeStruct:
            shape = (per_device * self.num_devices, LINE_BYTES // jnp.dtype(dtype).itemsize)
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

        stores = self.layout.stores
        return TableState(
            weights={s.name: lines(s.lines_per_device, s.dtype) for s in stores},
            element_state={
                s.name: tuple(lines(s.state_lines(a.dtype), a.dtype) for a in s.element_state) for s in stores
            },
            row_state={s.name: tuple(lines(s.scalar_lines_per_device, a.dtype) for a in s.row_state) for s in stores},
        )

    def init(self) -> TableState:
        """Makes the tables as their initialisers say, and optimizer state of zeros.

        Returns:
            The state. Rows do not depend on plan and mesh. Files of initial values are not read here: see
            `sharding.checkpoint.load_initial_values`.
        """
        return self._init()

    def _init_on_mesh(self) -> TableState:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract_state(sharded=False))
        seed = jnp.uint32(self.seed & 0xFFFFFFFF)

        def init_local() -> tuple[dict[str, Float[Array, "lines line"]], dict[str, UInt16[Array, "lines line"]]]:
            device, stores = device_number(), self.layout.stores
            high = {store.name: initial_store(store, seed, device) for store in stores}
            low = {store.name: initial_store(store, seed, device, low_halves=True) for store in stores if store.split}
            return high, low

        weights, low = jax.shard_map(init_local, mesh=self.mesh, in_specs=(), out_specs=BY_DEVICE, check_vma=False)()
        state = {name: (*zeros.element_state[name][:-1], of_store) for name, of_store in low.items()}
        return dataclasses.replace(zeros, weights=weights, element_state={**zeros.element_state, **state})

    def to_devices(self, ids: KeyedJagged, capacity: int | None = None) -> KeyedJagged:
        """Gives each device the ids of its part of the samples, on one process.

        Args:
            ids: The batch, as numpy arrays; the samples divide over the devices.
            capacity: Room for the ids of one device; as many as the batch has room for unless given.

        Returns:
            The batch that `route` takes.

        Raises:
            InputError: The samples do not divide.
        """
        parts = for_devices(ids, self.num_devices, ids.capacity if capacity is None else capacity)
        return jax.device_put(parts, jax.tree.map(lambda spec: sharding_on(self.mesh, spec), _specs(parts)))

    def sufficient_capacities(self, samples: int, ids: int, exchange_bytes: int = EXCHANGE_BYTES) -> Capacities:
        """Room for the worst case, see `sharding.capacities`, given one device's samples and room for their ids."""
        return sufficient_capacities(self.layout, samples, ids, exchange_bytes)

    def expected_capacities(
        self, samples: int, ids: int, mean_ids: Mapping[str, float], exchange_bytes: int = EXCHANGE_BYTES
    ) -> Capacities:
        """Room for ordinary batches, see `sharding.capacities`, given one device's samples and room for their ids."""
        return expected_capacities(self.layout, samples, ids, mean_ids, exchange_bytes)

    def route(self, ids: KeyedJagged, capacities: Capacities | None = None) -> Routed:
        """Brings ids to the devices that hold their rows.

        Args:
            ids: The batch: each device's part of the samples, and its ids (see `to_devices`). Features that no table
                is for are ignored.
            capacities: Room on the way; enough for the worst case unless given.

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
        if ids.values.ndim == 2 and not self.layout.wide:
            raise InputError(
                "ids are two words of 32 bits, but no table has more than 2**31 - 1 rows: give them as int32"
            )
        if ids.batch_size % self.num_devices or ids.capacity % self.num_devices:
            raise InputError(
                f"{ids.batch_size} samples with room for {ids.capacity} ids do not divide over {self.num_devices} "
                "devices: use multiples (see ShardedTables.to_devices)"
            )
        if capacities is None:
            capacities = self.sufficient_capacities(
                ids.batch_size // self.num_devices, ids.capacity // self.num_devices
            )
        return self._route(ids, capacities)

    def _route_on_mesh(self, ids: KeyedJagged, capacities: Capacities) -> Routed:
        local = partial(route_local, layout=self.layout, means=self._means, capacities=capacities)
        groups, divisors, invalid, needs = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(_specs(ids),),
            out_specs=(BY_DEVICE, BY_DEVICE, REPLICATED, REPLICATED),
            check_vma=False,
        )(ids)
        overflow = jnp.any(needs > jnp.asarray(capacities.as_needs()))
        return Routed(groups=groups, divisors=divisors, invalid=invalid, needs=needs, overflow=overflow)

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
        blocks = jax.shard_map(
            partial(lookup_local, place=self._place),
            mesh=self.mesh,
            in_specs=(BY_DEVICE, BY_DEVICE, BY_DEVICE),
            out_specs=BY_DEVICE,
            check_vma=False,
        )(state.weights, routed.groups, routed.divisors)
        sequences = zip(self._sequences, blocks[len(self.blocks) :], strict=True)
        return Embeddings(
            blocks=blocks[: len(self.blocks)],
            sequences={block.names[0]: vectors for block, vectors in sequences},
            names=tuple(block.names for block in self.blocks),
        )

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
        vectors = (*gradients.blocks, *(gradients.sequences[block.names[0]] for block in self._sequences))
        return jax.shard_map(
            partial(update_local, place=self._place, seed=self.seed & 0xFFFFFFFF),
            mesh=self.mesh,
            in_specs=(BY_DEVICE,) * 4 + (REPLICATED,) * 3,
            out_specs=BY_DEVICE,
            check_vma=False,
        )(state, routed.groups, vectors, routed.divisors, step, learning_rate_scale, enabled)

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
        return logical_rows.read_rows(self.layout, self.mesh, state, table, rows)

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
        return logical_rows.read_optimizer_state(self.layout, self.mesh, state, table, rows)

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
        return logical_rows.write_rows(self.layout, self.mesh, state, table, first_row, values)

    def _sharding(self) -> NamedSharding:
        return sharding_on(self.mesh, BY_DEVICE)


def _specs(ids: KeyedJagged) -> KeyedJagged:
    """Which part of each array of a batch a device has, in the batch's own shape."""
    by_device: Any = BY_DEVICE
    second: Any = BY_DEVICE_SECOND
    return KeyedJagged(
        values=by_device,
        lengths=second,
        weights=None if ids.weights is None else by_device,
        features=ids.features,
    )


def _means_of(block: Block, means: Sequence[FeatureSpec]) -> Int32[np.ndarray, " k"] | None:
    """Number of the mean that each vector of a block is; beyond all for one that is none. None if none is."""
    numbers = np.array([means.index(f) if f in means else len(means) for f in block.features], np.int32)
    return None if (numbers == len(means)).all() else numbers
