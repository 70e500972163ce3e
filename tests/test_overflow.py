"""Room for ids: whatever a batch needs, in training and in prediction, results are those of unlimited room."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import pytest
import tiny

from dlrm_jax.config import EmbeddingConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.pipeline import Pipeline
from dlrm_jax.predictions import Predictions
from dlrm_jax.recommender import Recommender
from dlrm_jax.replay import Checked, ReplayedSteps
from dlrm_jax.stop_signal import StopSignal
from dlrm_jax.train_state import INVALID_IDS, init_train_state, make_dense_optimizer
from dlrm_jax.train_step import make_predict_step
from sharding import KeyedJagged
from sharding.capacities import Capacities
from sharding.mesh import make_mesh
from sharding.plan import Placement, ShardingPlan, row_wise, table_row_wise

NODES, CHIPS = 2, 2
SAMPLES = tiny.BATCH_SIZE // (NODES * CHIPS)
# Ids of one device that there is room for at first: those of short bags.
IDS = 5 * SAMPLES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same model, with each way of doing something ahead, and in chunks."""
    config = tiny.config(None, tmp_path_factory.mktemp("tiny"))
    # Tables of one rule, for the sake of the compiler.
    embedding = EmbeddingConfig(default=config.embedding.default, pooling=config.embedding.pooling)
    config = dataclasses.replace(config, embedding=embedding)
    whole = Recommender(config, tiny.card(), mesh=make_mesh())
    by_name = {table.name: table for table in whole.tables.tables}
    placements: tuple[Placement, ...] = (
        row_wise(by_name["user"], returns="rows"),
        row_wise(by_name["item"], returns="partial_sums"),
        table_row_wise(by_name["tags"], 1, returns="partial_sums"),
    )
    plan = ShardingPlan(nodes=NODES, chips=CHIPS, placements=placements)

    def model_of(pipeline: str, chunks: int = 1):
        way = tiny.with_train(config, pipeline=pipeline, chunks=chunks)
        recommender = Recommender(way, tiny.card(), mesh=make_mesh(NODES, CHIPS), plan=plan)
        optimizer = make_dense_optimizer(way.dense_optimizer, way.schedule)
        return recommender, optimizer, Pipeline(recommender, optimizer)

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam
        yield {pipeline: model_of(pipeline) for pipeline in ("none", "route", "stale")} | {
            "route, in chunks": model_of("route", chunks=2)
        }


def make_batch(recommender: Recommender, seed: int, **bags: Sequence[Sequence[int]]) -> Batch:
    """One id of each feature a sample, but for the bags given."""
    random = np.random.default_rng(seed)
    rows = {"user": tiny.USERS, "item": tiny.ITEMS, "tags": tiny.TAGS}
    size = tiny.BATCH_SIZE
    ordinary = {name: [[id] for id in random.integers(rows[name], size=size).tolist()] for name in rows}
    return Batch(
        dense=random.normal(size=(size, 2)).astype(np.float32),
        ids=KeyedJagged.from_bags({name: (ordinary | bags)[name] for name in recommender.features}, capacity=2048),
        label=random.integers(2, size=size).astype(np.float32),
        weight=np.ones(size, np.float32),
    )


def skewed(recommender: Recommender) -> list[Batch]:
    """Ordinary batches, and among them those that need more room, twice in a row, and again later."""
    one_row = [[0]] * tiny.BATCH_SIZE
    long = [[tag] * tiny.MAX_TAGS for tag in range(SAMPLES)]
    on_first = long + [[]] * (tiny.BATCH_SIZE - SAMPLES)
    on_last = [[]] * (tiny.BATCH_SIZE - SAMPLES) + [[7] * (tiny.MAX_TAGS - 1)] * SAMPLES
    return [
        make_batch(recommender, 0),
        make_batch(recommender, 1, user=one_row, item=one_row, tags=one_row),  # all ids on one shard
        make_batch(recommender, 2, tags=[[0, 2]] * tiny.BATCH_SIZE),
        make_batch(recommender, 3),
        make_batch(recommender, 4),
        make_batch(recommender, 5, tags=on_first),  # one device's samples bring all ids
        make_batch(recommender, 6, user=one_row, tags=on_last),
        make_batch(recommender, 7),
    ]


def tight(recommender: Recommender) -> Capacities:
    return recommender.first_capacities(tiny.BATCH_SIZE, IDS * NODES * CHIPS)


def sufficient(recommender: Recommender) -> Capacities:
    return recommender.tables.sufficient_capacities(SAMPLES, 1024)


def train(model, batches: list[Batch], capacities: Capacities) -> tuple[ReplayedSteps, dict, list[Checked]]:
    recommender, optimizer, pipeline = model
    pipeline.forget()
    stop = StopSignal(recommender.tables.mesh)
    state = init_train_state(recommender, optimizer)
    steps = ReplayedSteps(recommender, pipeline, state, step=0, capacities=capacities, stop=stop)
    first, second = steps.new_window(), steps.new_window()
    checked: list[Checked] = []
    upcoming = [*batches[1:], batches[0] if pipeline.needs_next else None]
    for number, (batch, following) in enumerate(zip(batches, upcoming, strict=True)):
        # The windows change between two steps that are done again together.
        steps.start(batch, first if number < 6 else second, following)
        # As on accelerators, so that several steps are done again.
        checked += steps.checked(ahead=2)
    checked += steps.checked(ahead=0)
    metrics = {"first": first.metrics, "second": second.metrics}
    return steps, jax.device_get(metrics), checked


@pytest.mark.slow
# What is routed ahead changes nothing, with or without room.
@pytest.mark.parametrize(
    ("way", "expected_way"),
    [("none", "none"), ("route", "none"), ("stale", "stale"), ("route, in chunks", "route, in chunks")],
)
def test_training_when_ids_need_more_room_again_and_again_then_its_bits_are_those_of_unlimited_room(
    models, way, expected_way
):
    recommender = models[way][0]
    batches = skewed(recommender)
    expected, expected_metrics, _ = train(models[expected_way], batches, sufficient(recommender))
    steps, metrics, checked = train(models[way], batches, tight(recommender))
    assert [entry.step for entry in checked] == list(range(1, len(batches) + 1))
    assert {entry.fault for entry in checked} == {0}
    tiny.assert_identical(steps.state, expected.state)
    tiny.assert_identical(metrics, expected_metrics)
    assert metrics["first"].num_samples.sum() == 6 * tiny.BATCH_SIZE
    # Room grew, and for all that came at once.
    assert steps.capacities.ids == 512
    assert (steps.capacities.as_needs() >= tight(recommender).as_needs()).all()
    assert expected.capacities == sufficient(recommender)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["none", "route"])
def test_fault_when_it_comes_after_a_step_without_room_then_the_steps_between_are_done(models, pipeline):
    recommender = models[pipeline][0]
    batches = skewed(recommender)
    outside = make_batch(recommender, 8, user=[[tiny.USERS]] * tiny.BATCH_SIZE)
    steps, _, checked = train(models[pipeline], [batches[0], batches[5], outside, batches[0]], tight(recommender))
    assert [(entry.step, entry.fault) for entry in checked] == [(1, 0), (2, 0), (3, INVALID_IDS), (4, INVALID_IDS)]
    assert int(steps.state.step) == 2


@pytest.mark.slow
def test_prediction_when_ids_need_more_room_then_its_bits_are_those_of_unlimited_room(models):
    recommender, optimizer, _ = models["none"]
    state = init_train_state(recommender, optimizer)
    # All ids on one shard, and from one device.
    ordinary, one_row, *_, on_first, on_last, _ = skewed(recommender)
    batches = [ordinary, one_row, on_first, on_last]
    predictions, step = Predictions(recommender), make_predict_step(recommender)
    # All are under way before the first is looked at.
    room = IDS * NODES * CHIPS
    started = [predictions.start(state.dense_params, state.tables, batch, ids_capacity=room) for batch in batches]
    enough = sufficient(recommender)
    for batch, under_way in zip(batches, started, strict=True):
        expected = step(state.dense_params, state.tables, recommender.to_devices(batch, enough), capacities=enough)
        predicted = predictions.finish(under_way)
        assert not bool(expected.overflow)
        tiny.assert_identical(predicted.logits, expected.logits)
        tiny.assert_identical(predicted.label, batch.label)
