"""ShardedTables: embedding tables on a mesh: init, route, lookup, update.

Letters: b samples of a device or of a chunk, W devices, S senders, P vectors a sample of an owner, w stored width.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from pallas_kernels.implementations import Implementation
from sharding import rows as logical_rows
from sharding.address import Addressed, address_local
from sharding.assemble import block_sources
from sharding.capacities import EXCHANGE_BYTES, Capacities, expected_capacities, sufficient_capacities
from sharding.codec import Codec
from sharding.deliver import Delivered, deliver_local, delivered_specs
from sharding.errors import InputError, check_type
from sharding.jagged import KeyedJagged, for_devices
from sharding.layout import Layout, make_layout
from sharding.lookup import bring_home_local, pool_local
from sharding.mesh import BY_DEVICE, BY_DEVICE_SECOND, REPLICATED, make_mesh, sharding_on
from sharding.place import Place, check_settings, means_of
from sharding.plan import ShardingPlan, check_plan, one_device_plan
from sharding.route import Routed, accept_local, check_batch
from sharding.state import TableState, abstract_state, init_state
from sharding.tables import FeatureSpec, TableSpec, check_specs
from sharding.update import check_update, send_back_local, update_local
from sharding.vectors import Block, Embeddings, blocks_of

# The vectors of each group, or their gradients, where the rows are.
Pooled = tuple[Float[Array, "S b P w"], ...]


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
        self.mesh = make_mesh() if mesh is None else mesh
        check_settings(self.mesh, plan, kernels, forward_codec, backward_codec)
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
            means=tuple(means_of(block, self._means) for block in all_blocks),
            nodes=nodes,
            kernels=kernels,
            forward=forward_codec,
            backward=backward_codec,
        )
        # Called eagerly, each is one program; called inside another jit, these are inlined into it.
        self._init = jax.jit(partial(init_state, self.layout, self.mesh, self.seed), out_shardings=self._sharding())
        self._route = jax.jit(self._route_in_parts, static_argnums=1)
        self._pool = jax.jit(self._pool_on_mesh)
        self._bring_home = jax.jit(self._bring_home_on_mesh, static_argnums=(2, 3))
        self._send_back = jax.jit(self._send_back_on_mesh, static_argnums=(2, 3))
        self._update = jax.jit(self._update_on_mesh, donate_argnums=0)

    @property
    def feature_order(self) -> tuple[str, ...]:
        """Names of the features in the order in which routing them costs least; no plan changes it."""
        return tuple(name for block in (*self.blocks, *self._sequences) for name in block.names)

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.mesh.devices.size

    def abstract_state(self, *, sharded: bool = True) -> TableState:
        """Shapes, dtypes and shardings of the state, without making it.

        Args:
            sharded: Whether to attach the shardings.

        Returns:
            A state of `jax.ShapeDtypeStruct`.
        """
        return abstract_state(self.layout, self._sharding() if sharded else None)

    def init(self) -> TableState:
        """Makes the tables as their initialisers say, and optimizer state of zeros.

        Returns:
            The state. Rows do not depend on plan and mesh. Files of initial values are not read here: see
            `sharding.checkpoint.load_initial_values`.
        """
        return self._init()

    def to_devices(self, ids: KeyedJagged, capacity: int | None = None) -> KeyedJagged:
        """Gives each device the ids of its part of the samples, on one process.

        Args:
            ids: The batch, as numpy arrays; the samples divide over the devices.
            capacity: Room for the ids of one device; as many as the batch has room for unless given. Give every batch
                the same, or each is a program of its own.

        Returns:
            The batch that `route` takes. Ids beyond the capacity of a device are left out, and nothing is raised here:
            the lengths still tell of them, so that `Routed.overflow` is set and `Routed.needs` begins with the room
            that they take. Do nothing with what such a batch gives: call this again with more room.

        Raises:
            InputError: See `sharding.jagged.for_devices`.
        """
        parts = for_devices(ids, self.num_devices, capacity)
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
            InputError: See `sharding.route.check_batch`.
        """
        check_batch(ids, self.features, self.layout, capacities)
        return self._route(ids, capacities)

    def _route_in_parts(self, ids: KeyedJagged, capacities: Capacities | None) -> Routed:
        return self.accept(self.deliver(self.address(ids, capacities)))

    def address(self, ids: KeyedJagged, capacities: Capacities | None = None) -> Addressed:
        """The first part of `route`, for use inside `jax.jit`: sorts ids by the owners of their rows."""
        check_batch(ids, self.features, self.layout, capacities)
        samples, room = ids.batch_size // self.num_devices, ids.capacity // self.num_devices
        capacities = (capacities or self.sufficient_capacities(samples, room)).of_batch(room)
        local = partial(address_local, layout=self.layout, means=self._means, capacities=capacities)
        return self._spread(local, (_specs(ids),), BY_DEVICE)(ids)

    def deliver(self, addressed: Addressed) -> Delivered:
        """The second part of `route`, for use inside `jax.jit`: ids travel to the owners of their rows."""
        local = partial(deliver_local, layout=self.layout)
        return self._spread(local, (BY_DEVICE,), delivered_specs(addressed.capacities))(addressed)

    def accept(self, delivered: Delivered) -> Routed:
        """The third part of `route`, for use inside `jax.jit`: puts the ids that have arrived in order."""
        local, specs = partial(accept_local, layout=self.layout), delivered_specs(delivered.capacities)
        groups, needs = self._spread(local, (specs,), BY_DEVICE)(delivered), delivered.needs
        overflow = jnp.any(needs > jnp.asarray(delivered.capacities.as_needs()))
        return Routed(
            groups=groups, divisors=delivered.divisors, invalid=delivered.invalid, needs=needs, overflow=overflow
        )

    def lookup(self, state: TableState, routed: Routed) -> Embeddings:
        """Looks ids up and pools their rows.

        Args:
            state: The tables.
            routed: Routed ids.

        Returns:
            Embeddings of every feature, float32. Differentiate with respect to these, not to the tables.
        """
        return self.bring_home(self.pool(state, routed), routed)

    def pool(self, state: TableState, routed: Routed) -> Pooled:
        """The first half of `lookup`: pools rows where they are.

        Args:
            state: The tables.
            routed: Routed ids.

        Returns:
            Vectors at the owners of the rows, for `bring_home`.
        """
        check_type(routed, Routed, "what was routed")
        return self._pool({name: stores.weights for name, stores in state.items()}, routed.groups)

    def bring_home(self, pooled: Pooled, routed: Routed, *, chunk: int = 0, chunks: int = 1) -> Embeddings:
        """The second half: brings vectors home, all or, so that one chunk computes while others travel, a chunk.

        Args:
            pooled: From `pool`.
            routed: Routed ids.
            chunk: Number of the chunk, from 0.
            chunks: Parts of equal size that each device's samples are cut into, in their order.

        Returns:
            Embeddings of the chunk, of each device's part device by device.

        Raises:
            InputError: The chunks do not divide the samples of a device.
        """
        samples = routed.divisors.shape[0] // self.num_devices
        if not 0 <= chunk < chunks or samples % chunks:
            raise InputError(f"there is no chunk {chunk} of {chunks} of the {samples} samples of a device")
        blocks = self._bring_home(pooled, routed.divisors, chunk, chunks)
        sequences = zip(self._sequences, blocks[len(self.blocks) :], strict=True)
        return Embeddings(
            blocks=blocks[: len(self.blocks)],
            sequences={block.names[0]: vectors for block, vectors in sequences},
            names=tuple(block.names for block in self.blocks),
        )

    def send_back(self, routed: Routed, gradients: Embeddings, *, chunk: int = 0, chunks: int = 1) -> Pooled:
        """The first half of `update`: sends gradients to the owners of the rows.

        Args:
            routed: The ids that were looked up.
            gradients: Gradient of the loss with respect to the embeddings of the chunk.
            chunk: Its number.
            chunks: Chunks of each device's samples.

        Returns:
            Gradients of vectors, for `update`.
        """
        check_type(gradients, Embeddings, "gradients")
        vectors = (*gradients.blocks, *(gradients.sequences[block.names[0]] for block in self._sequences))
        return self._send_back(vectors, routed.divisors, chunk, chunks)

    def update(
        self,
        state: TableState,
        routed: Routed,
        gradients: Embeddings | Sequence[Pooled],
        *,
        step: ArrayLike,
        learning_rate_scale: ArrayLike = 1.0,
        enabled: ArrayLike = True,
    ) -> TableState:
        """Applies each table's update rule once to each row that the batch touched.

        Args:
            state: The tables; their arrays are donated.
            routed: The ids that were looked up.
            gradients: Gradient of the loss with respect to the embeddings; or what `send_back` gave for each chunk.
            step: Number of this update, from 1.
            learning_rate_scale: Multiplies every table's learning rate: the schedule.
            enabled: False makes this a no-op, without a copy of a table.

        Returns:
            The tables after the update.

        Raises:
            InputError: The step is below 1, or gradients are no embeddings, or not float32.
        """
        check_update(gradients, step)
        sent = (self.send_back(routed, gradients),) if isinstance(gradients, Embeddings) else tuple(gradients)
        return self._update(
            state,
            routed.groups,
            sent,
            jnp.asarray(step, jnp.int32),
            jnp.asarray(learning_rate_scale, jnp.float32),
            jnp.asarray(enabled),
        )

    def _pool_on_mesh(self, *given: Any) -> Pooled:
        return self._on_mesh(pool_local, given)

    def _bring_home_on_mesh(self, pooled: Pooled, divisors: Array, chunk: int, chunks: int) -> Any:
        return self._on_mesh(partial(bring_home_local, chunk=chunk, chunks=chunks), (pooled, divisors))

    def _send_back_on_mesh(self, vectors: Any, divisors: Array, chunk: int, chunks: int) -> Pooled:
        return self._on_mesh(partial(send_back_local, chunk=chunk, chunks=chunks), (vectors, divisors))

    def _update_on_mesh(self, state: TableState, routed: Any, sent: Any, *rest: Any) -> TableState:
        update = partial(update_local, seed=self.seed & 0xFFFFFFFF)
        return self._on_mesh(update, (state, routed, sent), *rest)

    def _on_mesh(self, local: Callable, given: Any, *arrays: Any) -> Any:
        """Runs a function of the place on every device's part of the arrays that are given, and on the others whole."""
        specs = (BY_DEVICE,) * len(given) + (REPLICATED,) * len(arrays)
        return self._spread(partial(local, place=self._place), specs, BY_DEVICE)(*given, *arrays)

    def _spread(self, local: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """A function that runs on every device."""
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def read_rows(self, state: TableState, table: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Reads rows of a table, given by name, to the host.

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
    by_device, second = cast(Any, BY_DEVICE), cast(Any, BY_DEVICE_SECOND)
    return KeyedJagged(
        values=by_device,
        lengths=second,
        weights=None if ids.weights is None else by_device,
        features=ids.features,
        parts=ids.parts,
    )
