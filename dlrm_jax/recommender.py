"""Recommender: the static half of a model: its tables, its dense part, and how both meet a batch.

Letters: B samples.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dlrm_jax.config import Config, make_specs
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import DatasetCard
from dlrm_jax.model import DLRM
from sharding import Embeddings, KeyedJagged, ShardedTables
from sharding.errors import InputError
from sharding.mesh import BY_DEVICE, BY_DEVICE_SECOND, REPLICATED, sharding_on


class Recommender:
    """A model without its parameters.

    Attributes:
        config: The experiment.
        card: The dataset, with the sparse features in use, in the order in which batches are best given.
        tables: The embedding tables.
        features: Their names.
    """

    def __init__(self, config: Config, card: DatasetCard, *, mesh: Mesh | None = None):
        """Fits the config to the card.

        Args:
            config: The experiment.
            card: The dataset.
            mesh: Devices; one unless given.

        Raises:
            InputError: Config and card do not fit each other.
        """
        table_specs, feature_specs = make_specs(config.embedding, card)
        sequences = [feature.name for feature in feature_specs if feature.pooling == "none"]
        if sequences:
            raise InputError(
                f"feature {sequences[0]!r} is unpooled, and the DLRM takes pooled embeddings: set "
                f"embedding.pooling.{sequences[0]} to sum or mean (other models get sequences from ShardedTables)"
            )
        self.config = config
        self.tables = ShardedTables(table_specs, feature_specs, mesh=mesh, seed=config.seed)
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
        return jax.jit(lambda: nnx.split(self._build())[1], out_shardings=replicated)()

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
        return nnx.merge(self._graph, dense_params)(dense, embeddings.blocks)

    def to_devices(self, batch: Batch) -> Batch:
        """Copies a batch to the devices, each its own part."""
        return jax.device_put(batch, self._shardings_like(batch))

    def abstract_batch(self, batch_size: int, ids_capacity: int, *, weighted: bool = False) -> Batch:
        """Shapes and shardings of a batch, to compile a step without data.

        Args:
            batch_size: Samples.
            ids_capacity: Room for ids.
            weighted: Whether ids have weights.

        Returns:
            A batch of `jax.ShapeDtypeStruct`.
        """

        def floats(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        shapes = Batch(
            dense=floats(batch_size, len(self.card.dense)),
            ids=KeyedJagged(
                values=jax.ShapeDtypeStruct((ids_capacity,), jnp.int32),
                lengths=jax.ShapeDtypeStruct((len(self.features), batch_size), jnp.int32),
                weights=floats(ids_capacity) if weighted else None,
                features=self.features,
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
