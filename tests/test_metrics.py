"""Both accumulators against definitions in float64: pairs counted one by one, sums written out."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.metrics import BinnedMetrics, ExactMetrics
from dlrm_jax.replay import Window
from sharding.mesh import BY_DEVICE, make_mesh

CAPACITY = 32
NUM_BINS = 64

# Definitions and implementation both in float64.
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
# Losses and probabilities in float32, sums compensated.
BINNED: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}

update = jax.jit(BinnedMetrics.update)

logit = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-20, 20, width=32, allow_subnormal=False))
sample = st.tuples(logit, st.sampled_from([0.0, 1.0, 1.0, 0.25]), st.sampled_from([0.0, 1.0, 1.0, 0.5, 3.0]))
batches = st.lists(sample, max_size=CAPACITY)


def columns(samples):
    """Samples, padded to the capacity with weight 0 and a logit that would spoil every sum."""
    padded = np.full((3, CAPACITY), np.nan, np.float32)
    padded[1:] = 0
    padded[:, : len(samples)] = np.array(samples, np.float32).reshape(-1, 3).T
    return padded


def exact(*batch):
    metrics = ExactMetrics()
    metrics.update(*batch)
    return metrics.compute()


def definitions(logits, label, weight):
    present = weight > 0
    logits, label, weight = (part[present].astype(np.float64) for part in (logits, label, weight))
    probability = 1 / (1 + np.exp(-logits))
    positive, negative = weight * label, weight * (1 - label)
    values = dict.fromkeys(("auc", "ne", "log_loss", "accuracy", "calibration"), math.nan)
    if weight.sum():
        losses = label * np.logaddexp(0, -logits) + (1 - label) * np.logaddexp(0, logits)
        values["log_loss"] = (weight * losses).sum() / weight.sum()
        values["accuracy"] = np.where(logits > 0, positive, negative).sum() / weight.sum()
    if positive.sum():
        values["calibration"] = (weight * probability).sum() / positive.sum()
    if positive.sum() and negative.sum():
        above = (logits[:, None] > logits) + 0.5 * (logits[:, None] == logits)
        values["auc"] = (np.outer(positive, negative) * above).sum() / (positive.sum() * negative.sum())
        p = positive.sum() / weight.sum()
        values["ne"] = values["log_loss"] / -(p * np.log(p) + (1 - p) * np.log(1 - p))
    return values


@settings(deadline=None)
@given(batches)
def test_exact_metrics_when_given_any_samples_then_they_equal_their_definitions(samples):
    batch = columns(samples)
    found = dataclasses.asdict(exact(*batch))
    assert found["num_samples"] == (batch[2] > 0).sum()
    for name, expected in definitions(*batch).items():
        np.testing.assert_allclose(found[name], expected, err_msg=name, **EXACT)


@settings(deadline=None)
@given(batches)
def test_binned_metrics_when_given_any_samples_then_they_equal_their_definitions_and_auc_its_bound(samples):
    batch = columns(samples)
    found = dataclasses.asdict(update(BinnedMetrics.zeros(NUM_BINS), *batch).compute())
    expected = definitions(*batch)
    assert found["num_samples"] == (batch[2] > 0).sum()
    for name in ("ne", "log_loss", "accuracy", "calibration"):
        np.testing.assert_allclose(found[name], expected[name], err_msg=name, **BINNED)
    if math.isnan(expected["auc"]):
        assert math.isnan(found["auc"])
        assert math.isnan(found["auc_error_bound"])
    else:
        # The weights are multiples of 1/8, which float32 adds exactly.
        assert abs(found["auc"] - expected["auc"]) <= found["auc_error_bound"] + 1e-12


def click_samples(num_samples, base_logit=-2.0):
    rng = np.random.default_rng(0)
    truth = rng.normal(base_logit, 1.0, num_samples)
    label = rng.uniform(size=num_samples) < 1 / (1 + np.exp(-truth))
    logits = truth + rng.normal(0, 0.3, num_samples)
    return logits.astype(np.float32), label.astype(np.float32), np.ones(num_samples, np.float32)


def test_binned_auc_when_logits_are_like_those_of_clicks_then_the_bound_is_below_two_in_ten_thousand():
    batch = click_samples(200_000)
    found = update(BinnedMetrics.zeros(), *batch).compute()
    assert found.auc_error_bound < 2e-4
    assert abs(found.auc - exact(*batch).auc) <= found.auc_error_bound


def test_binned_auc_when_labels_are_ordered_against_the_bins_then_the_bound_is_reached():
    logits = np.array([0.1, 0.2], np.float32)
    found = update(
        BinnedMetrics.zeros(NUM_BINS), logits, np.array([0, 1], np.float32), np.ones(2, np.float32)
    ).compute()
    assert (found.auc, found.auc_error_bound) == (0.5, 0.5)


def test_auc_when_logits_differ_beyond_the_precision_of_their_probability_then_they_are_still_ranked():
    # Both probabilities are 1 in float32.
    batch = np.array([[30.0, 31.0], [0.0, 1.0], [1.0, 1.0]], np.float32)
    assert exact(*batch).auc == 1.0


def test_metrics_when_logits_are_the_base_rate_then_ne_and_calibration_are_one_and_auc_one_half():
    label = np.array([1, 0, 0, 0], np.float32)
    logits = np.full(4, np.log(0.25 / 0.75), np.float32)
    for found in (
        exact(logits, label, np.ones(4)),
        update(BinnedMetrics.zeros(), logits, label, np.ones(4, np.float32)).compute(),
    ):
        np.testing.assert_allclose([found.ne, found.calibration, found.auc], [1, 1, 0.5], rtol=1e-6)
        assert found.accuracy == 0.75


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_metrics_when_one_class_is_missing_then_auc_and_ne_are_undefined_and_the_rest_is_not(label):
    logits, _, weight = click_samples(1000)
    weight = (weight * np.linspace(0.1, 2, 1000)).astype(np.float32)
    labels = np.full(1000, label, np.float32)
    for found in (exact(logits, labels, weight), update(BinnedMetrics.zeros(), logits, labels, weight).compute()):
        assert math.isnan(found.auc)
        assert math.isnan(found.ne)
        assert math.isfinite(found.log_loss)
        assert math.isfinite(found.accuracy)
        assert math.isnan(found.calibration) == (label == 0.0)


def test_metrics_when_there_are_no_samples_then_all_are_undefined():
    for found in (ExactMetrics().compute(), BinnedMetrics.zeros().compute()):
        values = dataclasses.asdict(found)
        assert values.pop("num_samples") == 0
        values.pop("auc_error_bound")
        assert all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_metrics_when_a_logit_is_not_finite_then_log_loss_ne_and_auc_are_not_finite(bad):
    logits, label, weight = click_samples(100)
    logits[3], label[3] = bad, 1.0
    for found in (exact(logits, label, weight), update(BinnedMetrics.zeros(), logits, label, weight).compute()):
        assert not any(math.isfinite(value) for value in (found.log_loss, found.ne, found.auc))


def test_metrics_when_given_then_they_are_plain_python_numbers():
    batch = click_samples(100)
    for found in (exact(*batch), update(BinnedMetrics.zeros(), *batch).compute()):
        assert {type(value) for name, value in dataclasses.asdict(found).items() if name != "num_samples"} == {float}
        assert type(found.num_samples) is int


def test_exact_metrics_when_samples_come_in_batches_then_they_equal_those_of_one_batch():
    logits, label, weight = click_samples(1000)
    metrics = ExactMetrics()
    for part in np.array_split(np.arange(1000), 7):
        metrics.update(jnp.asarray(logits[part]), label[part], weight[part])
    assert metrics.compute() == exact(logits, label, weight)


def test_binned_metrics_when_many_small_batches_are_added_then_the_sums_lose_nothing():
    # 2^24 + 1 is the first integer that float32 lacks: uncompensated, ones added to 2^24 would all be lost.
    logits, label = np.zeros(2, np.float32), np.array([0, 1], np.float32)
    state = update(BinnedMetrics.zeros(NUM_BINS), logits, label, np.full(2, 2.0**24, np.float32))
    state = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, 1000, lambda _, s: s.update(jnp.asarray(logits), jnp.asarray(label), jnp.ones(2)), state
        )
    )(state)
    total_weight = float(state.sums[0, 0]) + float(state.compensation[0, 0])
    assert total_weight == 2.0**25 + 2000


def test_binned_metrics_when_a_batch_outweighs_those_before_then_the_sums_lose_nothing():
    state = BinnedMetrics.zeros(NUM_BINS)
    for label, weight in ((0, 1), (1, 2.0**25)):
        state = update(state, *(np.array([value], np.float32) for value in (0, label, weight)))
    assert state.compute().accuracy == pytest.approx(1 / (1 + 2**25), rel=1e-9, abs=0)


def test_binned_metrics_when_every_device_adds_its_own_then_they_equal_those_of_one():
    batch = click_samples(4096)
    mesh = make_mesh(2, 4)
    of_devices = jax.jit(
        jax.shard_map(BinnedMetrics.update, mesh=mesh, in_specs=BY_DEVICE, out_specs=BY_DEVICE, check_vma=False)
    )
    found = of_devices(BinnedMetrics.zeros(NUM_BINS, parts=8), *batch)
    assert found.num_samples.tolist() == [512] * 8
    expected = update(BinnedMetrics.zeros(NUM_BINS), *batch).compute()
    np.testing.assert_allclose(dataclasses.astuple(found.compute()), dataclasses.astuple(expected), rtol=1e-6)


def test_binned_metrics_when_windows_are_merged_then_the_total_is_float64_and_equals_one_window():
    logits, label, weight = click_samples(4096)
    total = BinnedMetrics.zeros(NUM_BINS)
    for part in np.split(np.arange(4096), 4):
        total = total.merge(update(BinnedMetrics.zeros(NUM_BINS), logits[part], label[part], weight[part]))
    assert {leaf.dtype for leaf in jax.tree.leaves(total)} == {np.dtype(np.float64), np.dtype(np.int64)}
    found, expected = total.compute(), update(BinnedMetrics.zeros(NUM_BINS), logits, label, weight).compute()
    np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(expected), rtol=1e-6)
    assert found.auc == expected.auc


def test_window_when_its_metrics_are_full_then_it_goes_on_with_new_ones_and_computes_all():
    logits, label, weight = click_samples(4096)
    window = Window(lambda: BinnedMetrics.zeros(NUM_BINS), lambda metrics: metrics, 2)
    for part in np.split(np.arange(4096), 8)[:7]:
        window.add(update(window.metrics, logits[part], label[part], weight[part]))
        assert np.sum(window.metrics.num_samples) <= 512
    found = window.compute()
    expected = update(BinnedMetrics.zeros(NUM_BINS), logits[:3584], label[:3584], weight[:3584]).compute()
    np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(expected), rtol=1e-6)
    assert (found.num_samples, found.auc) == (3584, expected.auc)
