"""The optimizer of the dense part against its rules, written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.dcnv2_mlperf import dcnv2_mlperf
from dlrm_jax.config import DenseOptimizerConfig, DenseOptimizerName
from dlrm_jax.schedules import ScheduleConfig
from dlrm_jax.train_state import make_dense_optimizer

LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM, WARMUP = 0.1, 0.02, 3.0, 4
SHAPES = {"bias": (5,), "kernel": (4, 5)}
STEPS = 6


@pytest.fixture(autouse=True)
def lenient_promotion():
    # optax's Adam raises a float to an integer power, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


def draws(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: scale * random.normal(size=shape) for name, shape in SHAPES.items()}


def to_float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def updated(settings: DenseOptimizerConfig, step: int, weights, gradient, state: dict[str, np.ndarray]):
    """One array after the step of that number, from 1; its state is changed in place."""
    rate = settings.learning_rate * min(step / WARMUP, 1.0)
    first, second = (state.get(moment, np.zeros_like(weights)) for moment in ("first", "second"))
    if settings.name not in ("adamw", "lamb"):
        gradient = gradient + settings.weight_decay * weights
    if settings.name == "sgd":
        state["first"] = settings.momentum * first + gradient
        return weights - rate * state["first"]
    if settings.name == "adagrad":
        state["second"] = second + gradient**2
        return weights - rate * gradient / np.sqrt(state["second"] + settings.eps)
    state["first"] = settings.beta1 * first + (1 - settings.beta1) * gradient
    state["second"] = settings.beta2 * second + (1 - settings.beta2) * gradient**2
    root = np.sqrt(state["second"] / (1 - settings.beta2**step))
    update = state["first"] / (1 - settings.beta1**step) / (root + settings.eps)
    if settings.name in ("adamw", "lamb"):
        update = update + settings.weight_decay * weights
    if settings.name == "lamb":
        update = update * np.linalg.norm(weights) / np.linalg.norm(update)
    return weights - rate * update


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "adamw", "lamb"])
def test_dense_optimizer_when_clipped_decayed_and_warmed_up_then_it_follows_its_rule(name: DenseOptimizerName):
    settings = DenseOptimizerConfig(
        name=name,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        momentum=0.9 if name == "sgd" else 0.0,
        eps=0.5,
        clip_norm=CLIP_NORM,
    )
    optimizer = make_dense_optimizer(settings, ScheduleConfig(warmup_steps=WARMUP))
    expected = draws(0)
    params = to_float32(expected)
    state, states = optimizer.init(params), {leaf: {} for leaf in SHAPES}
    for step in range(1, STEPS + 1):
        # By turns above the norm, of 25 numbers about 10, and below it.
        gradient = draws(step, scale=2.0 if step % 2 else 0.2)
        updates, state = optimizer.update(to_float32(gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in gradient.values()))
        assert (norm > CLIP_NORM) == bool(step % 2)
        expected = {
            leaf: updated(settings, step, expected[leaf], gradient[leaf] * min(1.0, CLIP_NORM / norm), states[leaf])
            for leaf in SHAPES
        }
    for leaf in SHAPES:
        # A few roundings of float32 at each step.
        np.testing.assert_allclose(params[leaf], expected[leaf], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1.0])
def test_mlperf_adagrad_when_gradients_are_small_then_its_updates_are_those_of_pytorch(size):
    config = dcnv2_mlperf()
    optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
    # torch.optim.Adagrad as MLPerf's DLRM-DCNv2 sets it: sums of squares that begin at 0, eps outside the root.
    learning_rate, eps, sums = 0.005, 1e-10, 0.0
    state = optimizer.init(jnp.zeros(9))
    for step in range(3):
        gradient = size * np.random.default_rng(step).uniform(0.5, 2.0, size=9)
        update, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state)
        sums = sums + gradient**2
        # Where eps counts at all, it is a hundredth.
        np.testing.assert_allclose(update, -learning_rate * gradient / (np.sqrt(sums) + eps), rtol=0.03)
