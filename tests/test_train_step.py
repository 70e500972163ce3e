"""The train step on batches that must not be learnt from."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from dlrm_jax.metrics import BinnedMetrics
from dlrm_jax.recommender import Recommender
from dlrm_jax.sources import open_split
from dlrm_jax.train_state import INVALID_IDS, NON_FINITE, init_train_state, make_dense_optimizer
from dlrm_jax.train_step import make_predict_step, make_train_step
from sharding import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny.config(tiny.write_dataset(folder / "data"), folder / "run")
    recommender = Recommender(config, tiny.card())
    optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam
        yield recommender, optimizer, make_train_step(recommender, optimizer)


@pytest.fixture(scope="module")
def batches(model):
    return list(open_split(model[0], "train", training=True).batches(0))[:2]


def with_dense(batch, value):
    dense = batch.dense.copy()
    dense[3, 1] = value
    return dataclasses.replace(batch, dense=dense)


def with_id(batch, value):
    values = batch.ids.values.copy()
    values[0] = value
    return dataclasses.replace(batch, ids=dataclasses.replace(batch.ids, values=values))


def with_length(batch, value):
    lengths = batch.ids.lengths.copy()
    lengths[0, 0] = value
    return dataclasses.replace(batch, ids=dataclasses.replace(batch.ids, lengths=lengths))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda batch: with_dense(batch, np.nan), NON_FINITE),
        (lambda batch: with_dense(batch, np.inf), NON_FINITE),
        (lambda batch: with_id(batch, -1), INVALID_IDS),
        (lambda batch: with_id(batch, 2**31 - 1), INVALID_IDS),
        (lambda batch: with_length(batch, 40), INVALID_IDS),
    ],
    ids=["nan", "infinite", "negative id", "large id", "bag of more ids than its feature may have"],
)
def test_step_when_the_batch_is_bad_then_the_state_stays_that_of_the_last_good_step(model, batches, spoil, fault):
    recommender, optimizer, step = model
    state, metrics, report = step(
        init_train_state(recommender, optimizer), BinnedMetrics.zeros(), recommender.to_devices(batches[0])
    )
    assert (int(state.step), int(report.fault)) == (1, 0)
    good, counted = jax.device_get((state, metrics))
    good = jax.tree.map(np.array, good)
    for bad in (spoil(batches[1]), batches[0], batches[1]):  # also the good ones that follow
        state, metrics, report = step(state, metrics, recommender.to_devices(bad))
        assert int(report.fault) == int(state.fault) == fault
        tiny.assert_identical(dataclasses.replace(state, fault=good.fault), good)
        assert metrics.num_samples.tolist() == counted.num_samples.tolist() == [tiny.BATCH_SIZE]


def test_batch_when_lengths_promise_more_ids_than_there_are_values_then_it_never_reaches_a_device(model, batches):
    with pytest.raises(InputError, match=r"lengths add up to \d+ ids, but values has \d+"):
        model[0].to_devices(with_length(batches[0], 10_000))


def test_prediction_when_an_id_is_outside_its_table_then_it_is_not_a_number(model, batches):
    recommender, optimizer, _ = model
    state = init_train_state(recommender, optimizer)
    predict = make_predict_step(recommender)
    predicted = predict(state.dense_params, state.tables, recommender.to_devices(with_id(batches[0], -1)))
    assert np.isnan(np.asarray(predicted.logits)).all()


def test_dense_parameters_when_a_step_is_taken_then_every_one_has_moved(model, batches):
    recommender, optimizer, step = model
    before = dict(tiny.leaves(init_train_state(recommender, optimizer)))
    state, _, _ = step(
        init_train_state(recommender, optimizer), BinnedMetrics.zeros(), recommender.to_devices(batches[0])
    )
    still = {name for name, leaf in tiny.leaves(state) if np.array_equal(leaf, before[name])}
    assert still == {".fault"}
