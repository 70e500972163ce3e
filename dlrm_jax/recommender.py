"""Recommender: the static half of a model: its tables, its dense part, and how both meet a batch.

Letters: B samples, b of one device.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from dlrm_jax.config import Config, make_specs
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import DatasetCard
from dlrm_jax.kernel_choice import check_kernels
from dlrm_jax.model import DLRM
from dlrm_jax.plan_choice import choose_chunks, choose_plan
from sharding import Embeddings, KeyedJagged, ShardedTables
from sharding.capacities import Capacities
from sharding.compiler_options import options_to_run_once
from sharding.errors import InputError
from sharding.jagged import for_devices
from sharding.mesh import BY_DEVICE, BY_DEVICE_SECOND, REPLICATED, make_mesh, sharding_on
from sharding.plan import ShardingPlan


class Recommender:
    """A model without its parameters.

    Attributes:
        config: The experiment.
        card: The dataset, with the sparse features in use, in the order in which batches are best given.
        tables: The embedding tables.
        features: Their names.
    """

    def __init__(
        self, config: Config, card: DatasetCard, *, mesh: Mesh | None = None, plan: ShardingPlan | None = None
    ):
        """Fits the config to the card and to devices.

        Args:
            config: The experiment.
            card: The dataset.
            mesh: Devices; those that the config says unless given.
            plan: Where tables live; the config's plan, else the planner's, unless given.

        Raises:
            InputError: Config, card, devices and plan do not fit each other.
        """
        table_specs, feature_specs = make_specs(config.embedding, card)
        sequences = [feature.name for feature in feature_specs if feature.pooling == "none"]
        if sequences:
            raise InputError(
                f"feature {sequences[0]!r} is unpooled, and the DLRM takes pooled embeddings: set "
                f"embedding.pooling.{sequences[0]} to sum or mean (other models get sequences from ShardedTables)"
            )
        self.config = config
        mesh = make_mesh(config.mesh.nodes, config.mesh.chips) if mesh is None else mesh
        # Once before the planner takes its time, and once when it has said how wide rows are stored.
        check_kernels(config.kernels, mesh)
        plan = choose_plan(config, card, mesh) if plan is None else plan
        self.tables = ShardedTables(
            table_specs,
            feature_specs,
            plan=plan,
            mesh=mesh,
            seed=config.seed,
            kernels=config.kernels,
            forward_codec=config.exchange.forward,
            backward_codec=config.exchange.backward,
        )
        check_kernels(config.kernels, mesh, self.tables.layout)
        self.features = self.tables.feature_order
        self.card = dataclasses.replace(card, sparse=tuple(card.feature(name) for name in self.features))
        self._graph, self._abstract_params = nnx.split(nnx.eval_shape(self._build))

    def _build(self) -> DLRM:
        return DLRM(
            self.config.model,
            num_dense=len(self.card.dense),
            embedding_shapes=[(len(block.names), block.dim) for block in self.tables.blocks],
            rngs=nnx.Rngs(params=self.config.seed),
        )

    @functools.cached_property
    def chunks(self) -> int:
        """Parts of a device's samples that train one after the other, see `ShardedTables.bring_home`."""
        return choose_chunks(self.config, self.card, self.tables.plan, self.tables.mesh)

    @property
    def num_dense_parameters(self) -> int:
        """Parameters of the dense part."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._abstract_params))

    @property
    def num_table_parameters(self) -> int:
        """Parameters of all tables, padding left out."""
        return sum(table.num_rows * table.dim for table in self.tables.tables)

    def init_dense(self) -> nnx.State:
        """Draws the dense parameters, the same on every device."""
        replicated = sharding_on(self.tables.mesh, REPLICATED)
        options = options_to_run_once(self.tables.mesh.devices.flat[0].platform)
        return jax.jit(
            lambda: nnx.split(self._build())[1], out_shardings=replicated, compiler_options=options or None
        )()

    def abstract_dense(self) -> nnx.State:
        """Shapes of the dense parameters."""
        return self._abstract_params

    def logits(
        self, dense_params: nnx.State, dense: Float[Array, "B num_dense"], embeddings: Embeddings
    ) -> Float[Array, " B"]:
        """Computes the logits of a batch.

        Args:
            dense_params: Parameters of the dense part.
            dense: Dense features.
            embeddings: Pooled embeddings.

        Returns:
            Logits, float32.
        """
        spread = jax.shard_map(
            self.logits_local,
            mesh=self.tables.mesh,
            in_specs=(REPLICATED, BY_DEVICE, BY_DEVICE),
            out_specs=BY_DEVICE,
            check_vma=False,
        )
        return spread(dense_params, dense, embeddings)

    def logits_local(
        self, dense_params: nnx.State, dense: Float[Array, "b num_dense"], embeddings: Embeddings
    ) -> Float[Array, " b"]:
        """As `logits`, for samples of one device; to be called inside `jax.shard_map`."""
        return nnx.merge(self._graph, dense_params)(dense, embeddings.blocks)

    @property
    def num_local_devices(self) -> int:
        """Devices of the mesh that belong to this process, and get its batches."""
        return len(self.tables.mesh.local_devices)

    def first_capacities(self, batch_size: int, ids_capacity: int) -> Capacities:
        """Room for the ids of ordinary batches. It depends on its arguments alone, so it is the same on all processes.

        Args:
            batch_size: Samples of a batch of this process.
            ids_capacity: Room for their ids.

        Returns:
            Capacities to begin with; `grown_capacities` raises them where a batch needs more.
        """
        devices = self.num_local_devices
        mean_ids = {column.name: column.mean_pooling_factor if column.bag else 1.0 for column in self.card.sparse}
        return self.tables.expected_capacities(batch_size // devices, -(-ids_capacity // devices), mean_ids)

    def grown_capacities(self, capacities: Capacities, needs: Sequence[Int32[Array, " needs"]]) -> Capacities:
        """Raises capacities to what batches needed.

        Args:
            capacities: The capacities that did not suffice.
            needs: Needs of one or more batches.

        Returns:
            Larger ones.
        """
        return capacities.grown(np.max([np.asarray(need) for need in needs], axis=0), self.tables.num_devices)

    def to_devices(self, batch: Batch, capacities: Capacities | None = None) -> Batch:
        """Copies a batch to the devices, each its own part of the samples.

        Args:
            batch: This process's part of the batch, as numpy arrays.
            capacities: Room for ids; as much on each device as the batch has unless given. Ids that have no room are
                left out, which the step then reports.

        Returns:
            The batch of all processes.

        Raises:
            InputError: The samples do not divide over the devices, or lengths promise ids that are not there.
        """
        room = batch.ids.capacity if capacities is None else capacities.ids
        parts = dataclasses.replace(batch, ids=for_devices(batch.ids, self.num_local_devices, room))
        whole = jax.tree.map(
            lambda part, sharding: jax.make_array_from_process_local_data(sharding, part),
            parts,
            self._shardings_like(parts),
        )
        return dataclasses.replace(whole, ids=dataclasses.replace(whole.ids, parts=self.tables.num_devices))

    def abstract_batch(self, batch_size: int, ids_capacity: int, *, weighted: bool = False) -> Batch:
        """Shapes and shardings of a batch, to compile a step without data.

        Args:
            batch_size: Samples.
            ids_capacity: Room for ids, of all devices together.
            weighted: Whether ids have weights.

        Returns:
            A batch of `jax.ShapeDtypeStruct`.
        """

        def floats(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        shapes = Batch(
            dense=floats(batch_size, len(self.card.dense)),
            ids=KeyedJagged(
                values=jax.ShapeDtypeStruct((ids_capacity, 2), jnp.uint32)
                if self.tables.layout.wide
                else jax.ShapeDtypeStruct((ids_capacity,), jnp.int32),
                lengths=jax.ShapeDtypeStruct((len(self.features), batch_size), jnp.int32),
                weights=floats(ids_capacity) if weighted else None,
                features=self.features,
                parts=self.tables.num_devices,
            ),
            label=floats(batch_size),
            weight=floats(batch_size),
        )
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self._shardings_like(shapes),
        )

    def _shardings_like(self, batch: Batch) -> Any:
        """The shardings of a batch, in its own shape: each device has its own samples, and their ids."""
        mesh = self.tables.mesh
        first, second = sharding_on(mesh, BY_DEVICE), sharding_on(mesh, BY_DEVICE_SECOND)
        by_samples = jax.tree.map(lambda _: first, batch)
        return dataclasses.replace(by_samples, ids=dataclasses.replace(by_samples.ids, lengths=second))
