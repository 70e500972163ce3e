"""What the planner has to know of an experiment: its tables and features, how many ids they bring, its dense part.

Letters: b samples of one device.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dlrm_jax.config import Config, DenseOptimizerConfig, make_specs
from dlrm_jax.data.card import DatasetCard, SparseColumn
from dlrm_jax.model import DLRM
from pallas_kernels.interaction import num_pairs
from sharding.constraints import Constraint
from sharding.cost import PlanCost, Step, cost_of_layout
from sharding.cost_settings import CostSettings, DenseLoad
from sharding.errors import InputError
from sharding.layout import Layout, make_layout
from sharding.load import FeatureLoad, loads_by_feature
from sharding.plan import ShardingPlan
from sharding.planner import PartitionerName, PlanResult, make_plan
from sharding.storage import Storage
from sharding.tables import FeatureSpec, TableSpec
from sharding.topology import Topology
from sharding.vectors import blocks_of

_FLOAT_BYTES = 4
_BFLOAT16_BYTES = 2
# A multiplication and an addition, in the forward pass and for both gradients.
_FLOPS_PER_PRODUCT = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanningInput:
    """An experiment as the planner sees it.

    Attributes:
        tables: Its tables.
        features: Its features.
        batch_size: Samples of a training step, over all devices.
        loads: Ids of each feature.
        dense: Its dense part.
        settings: Terms of the cost, with the codecs of its exchanges.
    """

    tables: tuple[TableSpec, ...]
    features: tuple[FeatureSpec, ...]
    batch_size: int
    loads: tuple[FeatureLoad, ...]
    dense: DenseLoad
    settings: CostSettings

    def make_plan(
        self,
        topology: Topology,
        *,
        constraints: Sequence[Constraint] = (),
        partitioner: PartitionerName = "best",
        memory_limit: int | None = None,
    ) -> PlanResult:
        """Plans for a machine; see `sharding.planner.make_plan`."""
        return make_plan(
            self.tables,
            self.features,
            topology,
            batch_size=self.batch_size,
            loads=self.loads,
            dense=self.dense,
            settings=self.settings,
            constraints=constraints,
            partitioner=partitioner,
            memory_limit=memory_limit,
        )

    def step(self, topology: Topology) -> Step:
        """What a training step asks of a machine, plan aside."""
        return Step(
            topology=topology,
            batch_size=self.batch_size,
            loads=loads_by_feature(self.features, self.loads),
            dense=self.dense,
            settings=self.settings,
        )

    def layout(self, plan: ShardingPlan) -> Layout:
        """A plan, laid out."""
        return make_layout(self.tables, self.features, plan)

    def cost(self, plan: ShardingPlan, topology: Topology) -> PlanCost:
        """What a plan costs on a machine."""
        return cost_of_layout(self.layout(plan), self.features, self.step(topology))


def check_memory_of_plan(storage: Storage, limit: int, machine: str) -> None:
    """Raises InputError if a plan that was not made for a machine does not fit into it.

    Args:
        storage: Bytes of a device under the plan.
        limit: Bytes that a step may take.
        machine: What to call it.
    """
    if storage.total > limit:
        gigabytes = {name: getattr(storage, name) / 1e9 for name in ("total", "stores", "buffers", "dense")}
        raise InputError(
            "the plan needs {total:.2f} GB a device (tables and optimizer state {stores:.2f} GB, buffers {buffers:.2f} "
            "GB, dense {dense:.2f} GB)".format(**gigabytes)
            + f", but {machine} has {limit / 1e9:.2f} GB for it: leave --plan out for one that fits"
        )


def planning_input(config: Config, card: DatasetCard, num_devices: int) -> PlanningInput:
    """Describes an experiment to the planner.

    Args:
        config: The experiment.
        card: Its dataset: rows, pooling factors, and how often ids occur.
        num_devices: Devices that share the batch.

    Raises:
        InputError: Config and card do not fit each other, or the batch does not divide.
    """
    tables, features = make_specs(config.embedding, card)
    batch_size = config.data.batch_size
    config.data.check_devices("batch_size", num_devices)
    return PlanningInput(
        tables=tables,
        features=features,
        batch_size=batch_size,
        loads=tuple(feature_load(card.feature(feature.name)) for feature in features),
        dense=dense_load(config, len(card.dense), tables, features, batch_size // num_devices),
        settings=CostSettings(forward_codec=config.exchange.forward, backward_codec=config.exchange.backward),
    )


def feature_load(column: SparseColumn) -> FeatureLoad:
    """The ids of a feature, as far as the card's maker has counted them."""
    counted = column.frequencies
    return FeatureLoad(
        feature=column.name,
        pooling_factor=column.mean_pooling_factor if column.bag else 1.0,
        weighted=column.weights is not None,
        top=tuple((row, count / counted.total) for row, count in counted.top) if counted and counted.total else (),
        coverage=counted.coverage if counted else (),
    )


def dense_load(
    config: Config, num_dense: int, tables: Sequence[TableSpec], features: Sequence[FeatureSpec], samples: int
) -> DenseLoad:
    """The dense part of a model: ``flops = 6 (sum of its matrices' numbers + products of the interaction)`` a sample.

    Memory is that of parameters, gradients, optimizer state and what feedback owes, and of what the backward pass keeps
    of the forward pass, the shapes of which JAX's differentiation says.

    Args:
        config: The experiment.
        num_dense: Dense features.
        tables: Tables.
        features: Features.
        samples: b.
    """
    shapes = [(len(block.names), block.dim) for block in blocks_of(tables, features) if not block.sequence]
    graph, params = nnx.split(
        nnx.eval_shape(
            lambda: DLRM(config.model, num_dense=num_dense, embedding_shapes=shapes, rngs=nnx.Rngs(params=0))
        )
    )

    def kept(batch_size: int) -> int:
        """Bytes of the arrays that the backward pass reads."""

        def logits(params: nnx.State, dense: Array, embeddings: list[Array]) -> Float[Array, " B"]:
            return nnx.merge(graph, params)(dense, embeddings)

        def residuals(*arguments: object) -> object:
            return jax.vjp(logits, *arguments)[1]

        floats = jnp.float32
        dense = jax.ShapeDtypeStruct((batch_size, num_dense), floats)
        embeddings = [jax.ShapeDtypeStruct((batch_size, *shape), floats) for shape in shapes]
        leaves = jax.tree.leaves(jax.eval_shape(residuals, params, dense, embeddings))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    sizes = [leaf.shape for leaf in jax.tree.leaves(params)]
    parameters = sum(math.prod(shape) for shape in sizes)
    products = sum(math.prod(shape) for shape in sizes if len(shape) > 1)
    if config.model.interaction == "dot":
        vectors = sum(count for count, _ in shapes) + bool(num_dense)
        width = config.model.bottom_mlp[-1] if config.model.bottom_mlp else num_dense or max(dim for _, dim in shapes)
        products += num_pairs(vectors, self_interaction=config.model.self_interaction) * width
    how = config.exchange.all_reduce
    # What rounding took is owed to the next step.
    copies = 2 + _state_numbers(config.dense_optimizer) + (how == "bfloat16_feedback")
    return DenseLoad(
        parameters=parameters,
        gradient_bytes=_FLOAT_BYTES if how == "float32" else _BFLOAT16_BYTES,
        flops_per_sample=float(_FLOPS_PER_PRODUCT * products),
        memory_bytes=copies * parameters * _FLOAT_BYTES + samples * (kept(2) - kept(1)),
        dtype=config.model.dtype,
    )


def _state_numbers(optimizer: DenseOptimizerConfig) -> int:
    """Numbers of optimizer state a parameter."""
    return {"sgd": int(optimizer.momentum > 0), "adagrad": 1}.get(optimizer.name, 2)
