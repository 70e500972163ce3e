"""One step of training, and one of prediction.

Letters: B samples.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32

from dlrm_jax.data.batch import Batch
from dlrm_jax.losses import weighted_bce
from dlrm_jax.metrics import BinnedMetrics
from dlrm_jax.recommender import Recommender
from dlrm_jax.schedules import make_schedule
from dlrm_jax.train_state import INVALID_IDS, NON_FINITE, TrainState, abstract_train_state
from sharding import Embeddings, TableState
from sharding.mesh import REPLICATED, sharding_on

TrainStep = Callable[[TrainState, BinnedMetrics, Batch], tuple[TrainState, BinnedMetrics, Int32[Array, ""]]]
PredictStep = Callable[[nnx.State, TableState, Batch], Float[Array, " B"]]


def make_train_step(recommender: Recommender, optimizer: optax.GradientTransformation) -> TrainStep:
    """Compiles the step for a model; state and metrics are donated.

    Args:
        recommender: The model.
        optimizer: Optimizer of its dense part.

    Returns:
        ``(state, metrics, batch) -> (state, metrics, fault)``.
    """
    abstract = abstract_train_state(recommender, optimizer)
    replicated = sharding_on(recommender.tables.mesh, REPLICATED)
    # The state leaves a step as it came, so that all steps are one program.
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, abstract), replicated, replicated)
    step = partial(train_step, recommender=recommender, optimizer=optimizer)
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)


def train_step(
    state: TrainState,
    metrics: BinnedMetrics,
    batch: Batch,
    *,
    recommender: Recommender,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, BinnedMetrics, Int32[Array, ""]]:
    """Trains on one batch. The tables never enter autodiff: they are given the gradient of what was looked up.

    Args:
        state: The state before.
        metrics: Metrics of the samples since they were last read; those of this batch, before its update, are added.
        batch: The batch.
        recommender: The model.
        optimizer: Optimizer of its dense part.

    Returns:
        State and metrics after, and the state's `fault` once more, which the host can look at when the state has been
        donated to the next step. If the loss or a gradient is not finite, or an id is outside its table, the state
        differs from the one before in `fault` only.
    """
    tables = recommender.tables
    with jax.named_scope("route"):
        routed = tables.route(batch.ids)
    with jax.named_scope("lookup"):
        embeddings = tables.lookup(state.tables, routed)

    def loss_of(dense_params: nnx.State, embeddings: Embeddings) -> tuple[Float[Array, ""], Float[Array, " B"]]:
        logits = recommender.logits(dense_params, batch.dense, embeddings)
        return weighted_bce(logits, batch.label, batch.weight), logits

    with jax.named_scope("dense"):
        (loss, logits), (d_dense, d_embeddings) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(
            state.dense_params, embeddings
        )
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm((d_dense, d_embeddings)))
        updates, dense_optimizer = optimizer.update(d_dense, state.dense_optimizer, state.dense_params)
        dense_params = jax.tree.map(jnp.add, state.dense_params, updates)

    fault = state.fault | jnp.where(finite, 0, NON_FINITE) | jnp.where(routed.invalid > 0, INVALID_IDS, 0)
    good = fault == 0
    with jax.named_scope("update"):
        new_tables = tables.update(
            state.tables,
            routed,
            d_embeddings,
            step=state.step + 1,
            learning_rate_scale=make_schedule(recommender.config.schedule)(state.step),
            enabled=good,
        )
    new_state = TrainState(
        step=state.step + good.astype(jnp.int32),
        # A select would copy a table; the dense part is small.
        dense_params=_select(good, dense_params, state.dense_params),
        dense_optimizer=_select(good, dense_optimizer, state.dense_optimizer),
        tables=new_tables,
        fault=fault,
    )
    return new_state, metrics.update(logits, batch.label, jnp.where(good, batch.weight, 0.0)), fault


def make_predict_step(recommender: Recommender) -> PredictStep:
    """Compiles prediction for a model.

    Args:
        recommender: The model.

    Returns:
        ``(dense_params, tables, batch) -> logits``; ids outside their table make every logit NaN.
    """

    def predict_step(dense_params: nnx.State, tables: TableState, batch: Batch) -> Float[Array, " B"]:
        routed = recommender.tables.route(batch.ids)
        embeddings = recommender.tables.lookup(tables, routed)
        logits = recommender.logits(dense_params, batch.dense, embeddings)
        return jnp.where(routed.invalid == 0, logits, jnp.nan)

    return jax.jit(predict_step)


def _select[Tree](choose_new: Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda n, o: jnp.where(choose_new, n, o), new, old)
