"""TrainState: everything that a step changes, in one donated pytree."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Float, Int32

from dlrm_jax.config import DenseOptimizerConfig, ScheduleConfig
from dlrm_jax.recommender import Recommender
from dlrm_jax.schedules import make_schedule
from sharding import Embeddings, TableState
from sharding.checkpoint import load_initial_values
from sharding.mesh import BY_DEVICE, REPLICATED, sharding_on

# Bits of TrainState.fault.
NON_FINITE = 1
INVALID_IDS = 2
OVERFLOW = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a step changes.

    Attributes:
        step: Updates made so far.
        dense_params: Parameters of the dense part.
        dense_optimizer: State of its optimizer.
        tables: Tables and the state of theirs.
        fault: 0, or why training cannot go on (`NON_FINITE`, `INVALID_IDS`), or not without more room for ids
            (`OVERFLOW`). While it is not 0 every step is a no-op, so that the state stays that of the last good step
            until the host has looked.
        stale: With `train.pipeline` "stale", what the next step trains on: the embeddings of its batch, looked up
            before the last update; else None. Part of the state, since no later state could look them up again.
        residual: With `exchange.all_reduce` "bfloat16_feedback", what each device's rounding still owes to the sums of
            the dense gradients (`sharding.all_reduce`); else None.
    """

    step: Int32[Any, ""]
    dense_params: nnx.State
    dense_optimizer: optax.OptState
    tables: TableState
    fault: Int32[Any, ""]
    stale: Embeddings | None = None
    residual: Float[Any, "W P"] | None = None


def make_dense_optimizer(config: DenseOptimizerConfig, schedule: ScheduleConfig) -> optax.GradientTransformation:
    """Makes the optimizer of the dense part: clipping, then weight decay, then the rule.

    Args:
        config: Its settings.
        schedule: Multiplier of the learning rate.

    Returns:
        An optax transformation.
    """
    multiplier = make_schedule(schedule)

    def learning_rate(step: Any) -> Any:
        return config.learning_rate * multiplier(step)

    moments: dict[str, Any] = {"b1": config.beta1, "b2": config.beta2, "eps": config.eps}
    match config.name:
        case "sgd":
            rule = optax.sgd(learning_rate, momentum=config.momentum or None)
        case "adagrad":
            rule = optax.adagrad(learning_rate, initial_accumulator_value=0.0, eps=config.eps)
        case "adam":
            rule = optax.adam(learning_rate, **moments)
        case "adamw":
            rule = optax.adamw(learning_rate, **moments, weight_decay=config.weight_decay)
        case "lamb":
            rule = optax.lamb(learning_rate, **moments, weight_decay=config.weight_decay)
    parts: list[optax.GradientTransformation] = [rule]
    if config.weight_decay and config.name not in ("adamw", "lamb"):
        parts.insert(0, optax.add_decayed_weights(config.weight_decay))
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*parts)


def init_train_state(recommender: Recommender, optimizer: optax.GradientTransformation) -> TrainState:
    """Makes the state before the first step.

    Args:
        recommender: The model.
        optimizer: Optimizer of its dense part.

    Returns:
        The state; files of initial values have been read into their tables.

    Raises:
        InputError: A file of initial values does not fit its table.
    """
    dense_params = recommender.init_dense()
    replicated = sharding_on(recommender.tables.mesh, REPLICATED)
    # Made on the devices: a value of the host would first be compared between all processes.
    zero = jax.jit(lambda: jnp.int32(0), out_shardings=replicated)
    return TrainState(
        step=zero(),
        dense_params=dense_params,
        dense_optimizer=jax.jit(optimizer.init, out_shardings=replicated)(dense_params),
        tables=load_initial_values(recommender.tables, recommender.tables.init()),
        fault=zero(),
        stale=_zeros_like(abstract_stale(recommender)),
        residual=_zeros_like(_abstract_residual(recommender)),
    )


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _zeros_like(abstract: Any) -> Any:
    zeros = partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    return jax.jit(zeros, out_shardings=shardings_of(abstract))()


def abstract_stale(recommender: Recommender) -> Embeddings | None:
    """Shapes and shardings of `TrainState.stale`; None where the config does not ask for it.

    Args:
        recommender: The model.
    """
    if recommender.config.train.pipeline != "stale":
        return None
    tables, batch_size = recommender.tables, recommender.config.data.batch_size
    # A mesh that predicts need not divide the training batch.
    by_sample = sharding_on(tables.mesh, REPLICATED if batch_size % tables.num_devices else BY_DEVICE)
    blocks = [(batch_size, len(block.names), block.dim) for block in tables.blocks]
    return Embeddings(
        blocks=tuple(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=by_sample) for shape in blocks),
        sequences={},
        names=tuple(block.names for block in tables.blocks),
    )


def abstract_train_state(recommender: Recommender, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and shardings of the state, without making it.

    Args:
        recommender: The model.
        optimizer: Optimizer of its dense part.

    Returns:
        A state of `jax.ShapeDtypeStruct`.
    """
    replicated = sharding_on(recommender.tables.mesh, REPLICATED)

    def on_devices(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    dense_params = recommender.abstract_dense()
    return TrainState(
        step=on_devices(jax.ShapeDtypeStruct((), jnp.int32)),
        dense_params=jax.tree.map(on_devices, dense_params),
        dense_optimizer=jax.tree.map(on_devices, jax.eval_shape(optimizer.init, dense_params)),
        tables=recommender.tables.abstract_state(),
        fault=on_devices(jax.ShapeDtypeStruct((), jnp.int32)),
        stale=abstract_stale(recommender),
        residual=_abstract_residual(recommender),
    )


def _abstract_residual(recommender: Recommender) -> jax.ShapeDtypeStruct | None:
    if recommender.config.exchange.all_reduce != "bfloat16_feedback":
        return None
    shape = (recommender.tables.num_devices, recommender.num_dense_parameters)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding_on(recommender.tables.mesh, BY_DEVICE))
