"""The weighted binary cross-entropy against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.losses import weighted_bce

# Sums of 64 float32 terms: relative errors of a few 1e-7.
RTOL = 1e-5


def samples(num_samples=64, scale=3.0):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=scale, size=num_samples).astype(np.float32)
    label = rng.integers(2, size=num_samples).astype(np.float32)
    label[:5] = rng.uniform(size=5)
    weight = rng.exponential(size=num_samples).astype(np.float32)
    weight[-7:] = 0
    return logits, label, weight


def oracle(logits, label, weight):
    logits, label, weight = (np.asarray(part, np.float64) for part in (logits, label, weight))
    loss = np.logaddexp(0, logits) - label * logits
    probability = 1 / (1 + np.exp(-logits))
    return (weight * loss).sum() / weight.sum(), weight * (probability - label) / weight.sum()


def test_loss_and_gradient_when_weighted_then_they_match_float64():
    batch = samples()
    loss, gradient = jax.jit(jax.value_and_grad(weighted_bce))(*batch)
    expected_loss, expected_gradient = oracle(*batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=RTOL)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=RTOL, atol=1e-8)


def test_loss_when_logits_are_huge_then_it_is_linear_and_finite():
    logits = jnp.array([1000.0, -1000.0, 1000.0])
    loss, gradient = jax.value_and_grad(weighted_bce)(logits, jnp.array([0.0, 1.0, 1.0]), jnp.ones(3))
    np.testing.assert_allclose(loss, 2000 / 3, rtol=RTOL)
    np.testing.assert_allclose(gradient, [1 / 3, -1 / 3, 0], atol=1e-7)


def test_gradient_when_the_logit_is_zero_then_it_is_one_half_minus_the_label():
    gradient = jax.grad(weighted_bce)(jnp.zeros(2), jnp.array([0.0, 1.0]), jnp.ones(2))
    np.testing.assert_allclose(gradient, [0.25, -0.25], rtol=RTOL)


def test_loss_when_a_sample_has_weight_zero_then_it_is_as_if_absent():
    logits, label, weight = samples()
    present = weight > 0
    kept = (jnp.asarray(part[present]) for part in (logits, label, weight))
    np.testing.assert_allclose(jax.jit(weighted_bce)(logits, label, weight), weighted_bce(*kept), rtol=RTOL)


def test_loss_when_all_weights_are_zero_then_loss_and_gradient_are_zero():
    logits, label, weight = samples()
    loss, gradient = jax.value_and_grad(weighted_bce)(logits, label, jnp.zeros_like(weight))
    assert float(loss) == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(logits))
