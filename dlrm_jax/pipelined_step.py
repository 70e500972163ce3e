"""The pipelined step: batch i trains while the ids of batch i+1 are routed, in one compiled program.

Routing depends on ids alone, never on a parameter, so its three parts may run wherever the step has room for them: ids
are addressed while vectors travel home, delivered beside the dense part, and put in order while gradients travel back.
On hosts, where nothing runs beside anything, they are routed at once, before anything else. Parameters are those of
`train_step`, bit for bit.

The stale step also looks batch i+1 up before the update of batch i. Its results differ: each batch trains on
embeddings that lack the last update (`TrainState.stale`).

Letters: W devices.
"""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from dlrm_jax.data.batch import Batch
from dlrm_jax.metrics import BinnedMetrics
from dlrm_jax.recommender import Recommender
from dlrm_jax.train_state import TrainState, abstract_stale, abstract_train_state, shardings_of
from dlrm_jax.train_step import StepReport, jit_step, learn
from sharding import Embeddings, KeyedJagged
from sharding.capacities import Capacities
from sharding.in_order import in_order
from sharding.mesh import BY_DEVICE, REPLICATED, is_of_hosts, sharding_on
from sharding.route import Routed


class PipelinedStep(Protocol):
    """A compiled pipelined step."""

    def __call__(
        self,
        state: TrainState,
        metrics: BinnedMetrics,
        batch: Batch,
        routed: Routed,
        next_ids: KeyedJagged,
        *,
        stop: Bool[Array, " W"] | None = None,
        capacities: Capacities | None = None,
    ) -> tuple[TrainState, BinnedMetrics, StepReport, Routed]:
        """As `pipelined_step`."""
        ...


class Prologue(Protocol):
    """A compiled prologue."""

    def __call__(
        self, state: TrainState, ids: KeyedJagged, *, capacities: Capacities | None = None
    ) -> tuple[Routed, Embeddings | None]:
        """As `prologue`."""
        ...


def make_pipelined_step(
    recommender: Recommender, optimizer: optax.GradientTransformation, *, in_parts: bool | None = None
) -> Any:
    """Compiles the pipelined step for a model; state and metrics are donated.

    The routed ids are not: those that come in are needed until the update, when those that go out have long been made,
    so in one buffer they would wait for each other, or be copied.

    Args:
        recommender: The model; its config says whether the step is stale.
        optimizer: Optimizer of its dense part.
        in_parts: Whether ids are routed in three parts, each beside what it can hide behind; else all at once, before
            anything else. None: in parts, but not on hosts, where nothing runs beside anything.

    Returns:
        A `PipelinedStep`, under `jax.jit`.
    """
    if in_parts is None:
        in_parts = not is_of_hosts(recommender.tables.mesh)
    abstract = abstract_train_state(recommender, optimizer)
    by_device, replicated = (sharding_on(recommender.tables.mesh, spec) for spec in (BY_DEVICE, REPLICATED))
    shardings = (shardings_of(abstract), by_device, replicated, routed_shardings(recommender))
    step = partial(pipelined_step, recommender=recommender, optimizer=optimizer, in_parts=in_parts)
    return jit_step(step, recommender, shardings)


def pipelined_step(
    state: TrainState,
    metrics: BinnedMetrics,
    batch: Batch,
    routed: Routed,
    next_ids: KeyedJagged,
    *,
    stop: Bool[Array, " W"] | None = None,
    capacities: Capacities | None = None,
    recommender: Recommender,
    optimizer: optax.GradientTransformation,
    in_parts: bool,
) -> tuple[TrainState, BinnedMetrics, StepReport, Routed]:
    """Trains on one batch, and routes the next.

    Args:
        state: The state before.
        metrics: As in `train_step`.
        batch: The batch; its ids are not looked at.
        routed: Its ids, from the step before or from the prologue.
        next_ids: Ids of the next batch.
        stop: As in `train_step`.
        capacities: Room for the next batch's ids (static).
        recommender: The model; its config says whether the step is stale.
        optimizer: Optimizer of its dense part.
        in_parts: As in `make_pipelined_step`.

    Returns:
        State, metrics and report as of `train_step`, and the next batch's ids, routed. What was found in routing those
        is the next step's fault; of a stale step, want of room for them is this one's.
    """
    tables = recommender.tables
    source, addressed, ahead = state.stale, None, None
    if not in_parts:
        with jax.named_scope("route_ahead"):
            ahead = tables.route(next_ids, capacities)
        routed, ahead = jax.lax.optimization_barrier((routed, ahead))
    if source is None:
        with jax.named_scope("lookup"):
            source = tables.pool(state.tables, routed)
        if in_parts and tables.num_devices > 1:
            # While the first vectors travel there is nothing else to do yet.
            next_ids, source = in_order((next_ids, source), tables.mesh)
    if in_parts:
        with jax.named_scope("route_ahead"):
            addressed = tables.address(next_ids, capacities)
    new_state, metrics, report, next_routed = learn(
        state,
        metrics,
        batch,
        routed,
        source,
        addressed=addressed,
        ahead=ahead,
        stop=stop,
        recommender=recommender,
        optimizer=optimizer,
    )
    assert next_routed is not None
    return new_state, metrics, report, next_routed


def make_prologue(recommender: Recommender) -> Any:
    """Compiles the prologue for a model.

    Args:
        recommender: The model.

    Returns:
        A `Prologue`, under `jax.jit`.
    """
    shardings = (routed_shardings(recommender), shardings_of(abstract_stale(recommender)))
    step = partial(prologue, recommender=recommender)
    return jax.jit(step, static_argnames="capacities", out_shardings=shardings)


def prologue(
    state: TrainState, ids: KeyedJagged, *, capacities: Capacities | None = None, recommender: Recommender
) -> tuple[Routed, Embeddings | None]:
    """Routes a batch that no step before it has routed: the first, or one that is done again with more room.

    Args:
        state: The state before the batch's step.
        ids: Its ids.
        capacities: Room for them (static).
        recommender: The model.

    Returns:
        The ids, routed; and what is to be `TrainState.stale`: for the very first batch, it is looked up here.
    """
    tables = recommender.tables
    with jax.named_scope("route"):
        routed = tables.route(ids, capacities)
    if state.stale is None:
        return routed, None
    with jax.named_scope("lookup"):
        first = tables.lookup(state.tables, routed)
    # Those of later batches have been looked up before the last update, in tables that are no more.
    return routed, jax.tree.map(lambda new, held: jnp.where(state.step == 0, new, held), first, state.stale)


def routed_shardings(recommender: Recommender) -> Any:
    """Where routed ids are: the shardings of `Routed`, as a prefix of its tree."""
    mesh = recommender.tables.mesh
    by_device, replicated = sharding_on(mesh, BY_DEVICE), sharding_on(mesh, REPLICATED)
    groups: Any = by_device
    return Routed(groups=groups, divisors=by_device, invalid=replicated, needs=replicated, overflow=replicated)


def abstract_routed(recommender: Recommender, ids: KeyedJagged, capacities: Capacities) -> Routed:
    """Shapes and shardings of routed ids.

    Args:
        recommender: The model.
        ids: Shapes and shardings of the ids of a batch.
        capacities: Room for them.
    """
    shapes = jax.eval_shape(partial(recommender.tables.route, capacities=capacities), ids)
    shardings = routed_shardings(recommender)
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part
        ),
        shardings,
        shapes,
    )
