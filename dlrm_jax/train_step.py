"""One step of training, and one of prediction.

Letters: B samples, W devices.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from dlrm_jax.data.batch import Batch
from dlrm_jax.dense_part import dense_gradients
from dlrm_jax.metrics import BinnedMetrics
from dlrm_jax.recommender import Recommender
from dlrm_jax.scheduled_step import ScheduledStep, schedulable_topology
from dlrm_jax.schedules import make_schedule
from dlrm_jax.train_state import INVALID_IDS, NON_FINITE, OVERFLOW, TrainState, abstract_train_state, shardings_of
from sharding import Embeddings, TableState
from sharding.address import Addressed
from sharding.capacities import Capacities
from sharding.compiler_options import CompilerOptions, compiler_options
from sharding.embedding import Pooled
from sharding.in_order import in_order
from sharding.mesh import BY_DEVICE, REPLICATED, sharding_on
from sharding.route import Routed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What the host may look at when the state has been donated to the next step; the same on every process.

    Attributes:
        fault: The state's fault after the step.
        needs: Room that the batch's ids needed (`sharding.capacities`), also where the step was a no-op.
        stop: Whether a process was signalled to stop.
    """

    fault: Int32[Array, ""]
    needs: Int32[Array, " needs"]
    stop: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predictions for a batch, on every process those for the samples of all.

    Attributes:
        logits: Logits; not a number if an id was outside its table.
        label: The batch's labels.
        weight: Its sample weights.
        needs: Room that its ids needed (`sharding.capacities`).
        overflow: Whether they had not that room; then the logits mean nothing.
    """

    logits: Float[Array, " B"]
    label: Float[Array, " B"]
    weight: Float[Array, " B"]
    needs: Int32[Array, " needs"]
    overflow: Bool[Array, ""]


class TrainStep(Protocol):
    """A compiled step of training."""

    def __call__(
        self,
        state: TrainState,
        metrics: BinnedMetrics,
        batch: Batch,
        *,
        stop: Bool[Array, " W"] | None = None,
        capacities: Capacities | None = None,
    ) -> tuple[TrainState, BinnedMetrics, StepReport]:
        """As `train_step`."""
        ...


class PredictStep(Protocol):
    """A compiled step of prediction."""

    def __call__(
        self, dense_params: nnx.State, tables: TableState, batch: Batch, *, capacities: Capacities | None = None
    ) -> Prediction:
        """Predicts; without capacities there is room for any ids."""
        ...


def make_train_step(recommender: Recommender, optimizer: optax.GradientTransformation) -> Any:
    """Compiles the step for a model; state and metrics are donated.

    Args:
        recommender: The model.
        optimizer: Optimizer of its dense part.

    Returns:
        A `TrainStep`, under `jax.jit`.
    """
    abstract = abstract_train_state(recommender, optimizer)
    replicated = sharding_on(recommender.tables.mesh, REPLICATED)
    # The state leaves a step as it came, so that all steps are one program.
    shardings = (shardings_of(abstract), sharding_on(recommender.tables.mesh, BY_DEVICE), replicated)
    step = partial(train_step, recommender=recommender, optimizer=optimizer)
    return jit_step(step, recommender, shardings)


def make_no_metrics(mesh: Mesh) -> Callable[[], BinnedMetrics]:
    """Compiles the metrics of no samples, made where a step leaves them, so that all steps are one program.

    Args:
        mesh: The mesh of the model.
    """
    zeros = partial(BinnedMetrics.zeros, parts=mesh.devices.size)
    return jax.jit(zeros, out_shardings=sharding_on(mesh, BY_DEVICE))


def jit_step(step: Any, recommender: Recommender, shardings: Any) -> Any:
    """A training step as one program, with what XLA has to be told so that exchanges run beside arithmetic.

    Args:
        step: A function of state and metrics, which are donated, and more.
        recommender: The model.
        shardings: Of what it returns.
    """
    mesh = recommender.tables.mesh
    device = mesh.devices.flat[0]
    options = compiler_options(device.platform, device.device_kind)

    def jit(more: CompilerOptions) -> Any:
        return jax.jit(
            step,
            donate_argnums=(0, 1),
            static_argnames="capacities",
            out_shardings=shardings,
            compiler_options=options | more or None,
        )

    topology = schedulable_topology(mesh) if recommender.config.train.order_by == "estimates" else None
    return jit({}) if topology is None else ScheduledStep(jit, topology)


def train_step(
    state: TrainState,
    metrics: BinnedMetrics,
    batch: Batch,
    *,
    stop: Bool[Array, " W"] | None = None,
    capacities: Capacities | None = None,
    recommender: Recommender,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, BinnedMetrics, StepReport]:
    """Trains on one batch. The tables never enter autodiff: they are given the gradient of what was looked up.

    Args:
        state: The state before.
        metrics: Metrics of the samples since they were last read; those of this batch, before its update, are added.
        batch: The batch.
        stop: For each device, whether its process was signalled to stop.
        capacities: Room for ids on their way (static); without, there is room for any ids. They never change results.
        recommender: The model.
        optimizer: Optimizer of its dense part.

    Returns:
        State and metrics after, and a report. If the loss or a gradient is not finite, an id is outside its table, or
        ids had not the room that they needed, the state differs from the one before in `fault` only.
    """
    tables = recommender.tables
    with jax.named_scope("route"):
        routed = tables.route(batch.ids, capacities)
    with jax.named_scope("lookup"):
        pooled = tables.pool(state.tables, routed)
    new_state, metrics, report, _ = learn(
        state, metrics, batch, routed, pooled, stop=stop, recommender=recommender, optimizer=optimizer
    )
    return new_state, metrics, report


def learn(
    state: TrainState,
    metrics: BinnedMetrics,
    batch: Batch,
    routed: Routed,
    source: Pooled | Embeddings,
    *,
    addressed: Addressed | None = None,
    ahead: Routed | None = None,
    stop: Bool[Array, " W"] | None = None,
    recommender: Recommender,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, BinnedMetrics, StepReport, Routed | None]:
    """The second half of a step: the dense part, its gradients, and all updates.

    Args:
        state: The state before.
        metrics: As in `train_step`.
        batch: The batch; its ids are not looked at.
        routed: Its ids, routed.
        source: Its vectors, as `dense_gradients` takes them.
        addressed: Ids of the next batch, addressed.
        ahead: The same, routed, where that is done already.
        stop: As in `train_step`.
        recommender: The model.
        optimizer: Optimizer of its dense part.

    Returns:
        As `train_step`, and the next batch's ids, routed. Those of a stale step are looked up before the update
        (`TrainState.stale`), and must have had room: with no later state could they be looked up again.
    """
    tables = recommender.tables
    with jax.named_scope("dense"):
        found = dense_gradients(
            state.dense_params,
            batch,
            routed,
            source,
            state.residual,
            addressed=addressed,
            recommender=recommender,
        )

    stale = state.stale
    if found.delivered is not None:
        with jax.named_scope("route_ahead"):
            ahead = tables.accept(found.delivered)
    sent, overflow, needs = found.sent, routed.overflow, routed.needs
    if ahead is not None and stale is not None:
        with jax.named_scope("lookup_stale"):
            stale = tables.lookup(state.tables, ahead)
        overflow, needs = overflow | ahead.overflow, jnp.maximum(needs, ahead.needs)
        # The update is in place. A lookup that came after it would need a copy of the tables.
        sent, stale = jax.lax.optimization_barrier((sent, stale))
    wrong = jnp.where(found.finite, 0, NON_FINITE) | jnp.where(routed.invalid > 0, INVALID_IDS, 0)
    # Where ids are missing, nothing else that was found is true; nor is it after an earlier fault.
    wrong = jnp.where(overflow, OVERFLOW, wrong)
    fault = jnp.where(state.fault == 0, wrong, state.fault)
    good = fault == 0
    with jax.named_scope("update"):
        new_tables = tables.update(
            state.tables,
            routed,
            sent,
            step=state.step + 1,
            learning_rate_scale=make_schedule(recommender.config.schedule)(state.step),
            enabled=good,
        )
    with jax.named_scope("dense"):
        gradients = found.dense
        if tables.num_devices > 1:
            # They are added up beside the update of the tables, which waits for nothing of them.
            gradients, _ = in_order((gradients, _first_numbers(new_tables, tables.mesh)), tables.mesh)
        updates, dense_optimizer = optimizer.update(gradients, state.dense_optimizer, state.dense_params)
        dense_params = jax.tree.map(jnp.add, state.dense_params, updates)
    new_state = TrainState(
        step=state.step + good.astype(jnp.int32),
        # A select would copy a table; the dense part is small.
        dense_params=_select(good, dense_params, state.dense_params),
        dense_optimizer=_select(good, dense_optimizer, state.dense_optimizer),
        tables=new_tables,
        fault=fault,
        stale=_select(good, stale, state.stale),
        residual=_select(good, found.residual, state.residual),
    )
    stopped = jnp.zeros((), bool) if stop is None else jnp.any(stop)
    report = StepReport(fault=fault, needs=needs, stop=stopped)
    update_metrics = jax.shard_map(
        BinnedMetrics.update, mesh=tables.mesh, in_specs=BY_DEVICE, out_specs=BY_DEVICE, check_vma=False
    )
    metrics = update_metrics(metrics, found.logits, batch.label, jnp.where(good, batch.weight, 0.0))
    return new_state, metrics, report, ahead


def make_predict_step(recommender: Recommender) -> Any:
    """Compiles prediction for a model.

    Args:
        recommender: The model.

    Returns:
        A `PredictStep`, under `jax.jit`.
    """

    def predict_step(
        dense_params: nnx.State, tables: TableState, batch: Batch, *, capacities: Capacities | None = None
    ) -> Prediction:
        routed = recommender.tables.route(batch.ids, capacities)
        embeddings = recommender.tables.lookup(tables, routed)
        logits = recommender.logits(dense_params, batch.dense, embeddings)
        return Prediction(
            logits=jnp.where(routed.invalid == 0, logits, jnp.nan),
            label=batch.label,
            weight=batch.weight,
            needs=routed.needs,
            overflow=routed.overflow,
        )

    replicated = sharding_on(recommender.tables.mesh, REPLICATED)
    return jax.jit(predict_step, static_argnames="capacities", out_shardings=replicated)


def _first_numbers(tables: TableState, mesh: Mesh) -> list[Array]:
    """A number of each store on each device: what can wait for an update without taking part in it."""
    first = jax.shard_map(
        lambda stores: [store.weights[:1, :1] for store in stores.values()],
        mesh=mesh,
        in_specs=BY_DEVICE,
        out_specs=BY_DEVICE,
        check_vma=False,
    )
    return first(tables)


def _select[Tree](choose_new: Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda n, o: jnp.where(choose_new, n, o), new, old)
