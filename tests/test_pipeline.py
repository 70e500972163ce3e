"""What runs beside a step: routing ahead changes no bit, stale embeddings lack exactly one update."""

import dataclasses
import gzip
import itertools
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import tiny

import dlrm_jax.pipeline
from dlrm_jax.config import EmbeddingConfig, ExchangeConfig, TableConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import SparseColumn
from dlrm_jax.metrics import BinnedMetrics
from dlrm_jax.pipeline import Pipeline
from dlrm_jax.pipelined_step import make_pipelined_step
from dlrm_jax.recommender import Recommender
from dlrm_jax.replay import ReplayedSteps
from dlrm_jax.report import read_log
from dlrm_jax.stop_signal import StopSignal
from dlrm_jax.train_state import TrainState, init_train_state, make_dense_optimizer
from dlrm_jax.train_step import learn, make_no_metrics
from dlrm_jax.workdir import Workdir
from scripts.command_line import parse_config
from sharding import InputError, KeyedJagged, TableSpec
from sharding.all_reduce import AllReduce
from sharding.compiler_options import compiler_options
from sharding.mesh import make_mesh
from sharding.plan import (
    Placement,
    ShardingPlan,
    column_wise,
    data_parallel,
    grid,
    row_wise,
    table_row_wise,
    table_wise,
)

NODES, CHIPS = 2, 4
ROWS = {"user": 40, "item": 30, "tags": 20, "shop": 9, "city": 24, "hour": 16, "zone": 24, "lang": 12, "page": 48}
LONGEST_BAG = 3


@pytest.fixture(autouse=True)
def lenient_promotion():
    # optax's Adam raises a float to an integer power, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def in_parts(monkeypatch: pytest.MonkeyPatch):
    """Routes as accelerators do: hosts, which all other tests train on, do it at once."""
    monkeypatch.setattr(dlrm_jax.pipeline, "make_pipelined_step", partial(make_pipelined_step, in_parts=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"))


def mixed_recommender(pipeline: str, chunks: int = 1, all_reduce: AllReduce = "float32") -> Recommender:
    """Tables on eight devices, each placed in another way."""
    embedding = EmbeddingConfig(
        default=TableConfig(dim=32, learning_rate=0.05),
        tables={"tags": TableConfig(dim=32, optimizer="adagrad", dtype="bfloat16", rounding="stochastic")},
        default_pooling="mean",
    )
    config = tiny.with_train(dataclasses.replace(tiny.config(None, Path("unused")), embedding=embedding))
    config = tiny.with_train(
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, bottom_mlp=(32,)),
            exchange=ExchangeConfig(all_reduce=all_reduce),
        ),
        pipeline=pipeline,
        chunks=chunks,
    )
    sparse = tuple(
        SparseColumn(name=name, num_rows=rows, bag=True, max_pooling_factor=LONGEST_BAG, mean_pooling_factor=2.0)
        for name, rows in ROWS.items()
    )

    def table(name: str) -> TableSpec:
        settings = embedding.tables.get(name, embedding.default)
        fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        return TableSpec(name=name, num_rows=ROWS[name], **fields)

    placements: tuple[Placement, ...] = (
        row_wise(table("user"), returns="rows"),
        column_wise(table("item"), [6, 1]),
        table_row_wise(table("tags"), 1, returns="partial_sums"),
        data_parallel(table("shop")),
        grid(table("city"), [1, 0], returns="partial_sums"),
        table_wise(table("hour"), 3),
        row_wise(table("zone"), returns="partial_sums"),
        table_row_wise(table("lang"), 0, returns="rows"),
        grid(table("page"), [0, 1], returns="rows"),
    )
    plan = ShardingPlan(nodes=NODES, chips=CHIPS, placements=placements)
    return Recommender(config, tiny.card(sparse=sparse), mesh=make_mesh(NODES, CHIPS), plan=plan)


def random_batch(recommender: Recommender, seed: int) -> Batch:
    """Bags of random ids, from none to the longest."""
    random = np.random.default_rng(seed)
    size = tiny.BATCH_SIZE
    bags = {}
    for column in recommender.card.sparse:
        lengths = random.integers(min(LONGEST_BAG, column.max_pooling_factor or 1) + 1, size=size)
        bags[column.name] = [random.integers(column.num_rows, size=length).tolist() for length in lengths]
    return Batch(
        dense=random.normal(size=(size, 2)).astype(np.float32),
        ids=KeyedJagged.from_bags(bags, capacity=size * LONGEST_BAG * len(bags)),
        label=random.integers(2, size=size).astype(np.float32),
        weight=random.choice([0.5, 1.0], size=size).astype(np.float32),
    )


def train(recommender: Recommender, batches: list[Batch]) -> tuple[ReplayedSteps, BinnedMetrics, Pipeline]:
    """Trains on batches with room for any ids."""
    optimizer = make_dense_optimizer(recommender.config.dense_optimizer, recommender.config.schedule)
    pipeline = Pipeline(recommender, optimizer)
    devices = recommender.tables.num_devices
    ids = tiny.BATCH_SIZE * LONGEST_BAG * len(recommender.features) // devices
    steps = ReplayedSteps(
        recommender,
        pipeline,
        init_train_state(recommender, optimizer),
        step=0,
        capacities=recommender.tables.sufficient_capacities(tiny.BATCH_SIZE // devices, ids),
        stop=StopSignal(recommender.tables.mesh),
    )
    window = steps.new_window()
    last = batches[0] if pipeline.needs_next else None
    for batch, upcoming in zip(batches, [*batches[1:], last], strict=True):
        steps.start(batch, window, upcoming)
        assert pipeline.ahead is (upcoming if pipeline.looks_ahead else None)
    assert [entry.fault for entry in steps.checked(ahead=0)] == [0] * len(batches)
    return steps, window.metrics, pipeline


@pytest.fixture(scope="module")
def plain_steps() -> tuple[ReplayedSteps, BinnedMetrics, Pipeline]:
    """Four steps of whole batches, with nothing ahead."""
    recommender = mixed_recommender("none")
    with jax.numpy_dtype_promotion("standard"):
        return train(recommender, batches_of(recommender))


def batches_of(recommender: Recommender) -> list[Batch]:
    return [random_batch(recommender, seed) for seed in range(4)]


@pytest.mark.parametrize("at_once", [False, True])
def test_steps_on_eight_devices_when_routed_ahead_then_the_bits_of_plain_steps_from_one_program(
    plain_steps, monkeypatch, at_once
):
    if at_once:
        monkeypatch.setattr(dlrm_jax.pipeline, "make_pipelined_step", make_pipelined_step)
    routed_ahead = mixed_recommender("route")
    steps, metrics, pipeline = train(routed_ahead, batches_of(routed_ahead))
    expected, expected_metrics, _ = plain_steps
    tiny.assert_identical(steps.state, expected.state)
    tiny.assert_identical(metrics, expected_metrics)
    assert pipeline.main_step._cache_size() == 1


@pytest.mark.parametrize(
    ("pipeline", "chunks", "all_reduce", "tolerance"),
    [
        ("route", 4, "float32", 1e-4),
        pytest.param("none", 2, "float32", 1e-4, marks=pytest.mark.slow),
        pytest.param("route", 2, "bfloat16_feedback", 2e-2, marks=pytest.mark.slow),
    ],
)
def test_steps_on_eight_devices_when_batches_are_cut_then_those_of_whole_ones_but_for_the_order_of_sums(
    plain_steps, pipeline, chunks, all_reduce, tolerance
):
    recommender = mixed_recommender(pipeline, chunks, all_reduce)
    steps, _, _ = train(recommender, batches_of(recommender))
    expected = dataclasses.replace(plain_steps[0].state, residual=steps.state.residual)
    assert_close(recommender, steps.state, expected, tolerance)


def assert_close(recommender: Recommender, found: TrainState, expected: TrainState, tolerance: float) -> None:
    """States of `mixed_recommender` are equal up to a tolerance."""
    for (name, one), (_, other) in zip(tiny.leaves(found), tiny.leaves(expected), strict=True):
        if "tables" not in name:
            np.testing.assert_allclose(one, other, atol=tolerance, err_msg=name)
    for table, rows in ROWS.items():
        if table == "tags":  # bfloat16, whose rounding is drawn anew where the last bit differs
            continue
        one, other = (recommender.tables.read_rows(state.tables, table, range(rows)) for state in (found, expected))
        np.testing.assert_allclose(one, other, atol=tolerance, err_msg=table)


def looked_up_before_each_update(plain: Recommender, batches: list[Batch]) -> TrainState:
    """The state after what stale steps should do, by a loop; a batch comes after the last one."""
    tables, config = plain.tables, plain.config
    optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
    # The same bits come of the same matrix products.
    options = compiler_options("cpu", jax.devices()[0].device_kind)
    update = jax.jit(partial(learn, recommender=plain, optimizer=optimizer), compiler_options=options)
    state, metrics = init_train_state(plain, optimizer), make_no_metrics(tables.mesh)()
    on_devices = [plain.to_devices(batch) for batch in batches]
    routed = tables.route(on_devices[0].ids)
    embeddings = tables.lookup(state.tables, routed)
    for batch, following in itertools.pairwise(on_devices):
        following_routed = tables.route(following.ids)
        before_the_update = tables.lookup(state.tables, following_routed)
        state, metrics, *_ = update(state, metrics, batch, routed, embeddings)
        routed, embeddings = following_routed, before_the_update
    return dataclasses.replace(state, stale=embeddings)


@pytest.mark.slow
def test_stale_steps_in_chunks_on_eight_devices_then_those_of_a_loop_but_for_the_order_of_sums():
    plain, stale = mixed_recommender("none"), mixed_recommender("stale", chunks=2)
    batches = batches_of(plain)
    steps, _, _ = train(stale, batches)
    assert_close(stale, steps.state, looked_up_before_each_update(plain, [*batches, batches[0]]), 1e-4)


@pytest.mark.slow
def test_stale_steps_then_those_of_a_loop_that_looks_up_before_each_update(data, tmp_path):
    config = tiny.config(data, tmp_path)
    # Tables of one rule, for the sake of the compiler.
    embedding = EmbeddingConfig(default=config.embedding.default, default_pooling="mean")
    config = dataclasses.replace(config, embedding=embedding)
    plain = Recommender(config, tiny.card())
    stale = Recommender(tiny.with_train(config, pipeline="stale"), tiny.card())
    batches = [random_batch(plain, seed) for seed in range(4)]
    steps, _, _ = train(stale, batches)
    tiny.assert_identical(steps.state, looked_up_before_each_update(plain, [*batches, batches[0]]))

    for count, same in ((1, True), (2, False)):
        one, _, _ = train(stale, batches[:count])
        other, _, _ = train(plain, batches[:count])
        rows = [plain.tables.read_rows(each.state.tables, "user", range(tiny.USERS)) for each in (one, other)]
        assert np.array_equal(rows[0], rows[1]) == same


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The config of a run that routes nothing ahead."""
    config = tiny.config(data, tmp_path_factory.mktemp("plain") / "run", pipeline="none")
    with jax.numpy_dtype_promotion("standard"):
        return config, tiny.train_quietly(config)


def test_run_when_routed_ahead_then_it_writes_what_a_plain_one_does(data, straight, tmp_path):
    # Two epochs whose last batches are short, evaluations between steps, and batches that need more room.
    expected_config, expected = straight
    config = tiny.config(data, tmp_path / "run", pipeline="route")
    assert tiny.train_quietly(config) == expected
    tiny.assert_identical(tiny.restore(config), tiny.restore(expected_config))
    lines, expected_lines = (read_log(Workdir(each.workdir)) for each in (config, expected_config))
    for line in (*lines, *expected_lines):
        line.pop("samples_per_second", None)
    assert lines == expected_lines


@pytest.mark.parametrize(("how", "before_first"), [("none", 1), ("route", 2)])
def test_batches_then_each_is_copied_once_while_the_step_before_the_first_that_wants_it_computes(
    data, tmp_path, monkeypatch, how, before_first
):
    events = []
    start, to_devices = ReplayedSteps.start, Recommender.to_devices

    def started(steps, *args):
        start(steps, *args)
        events.append("step")

    def copied(recommender, *args):
        events.append("copy")
        return to_devices(recommender, *args)

    monkeypatch.setattr(ReplayedSteps, "start", started)
    monkeypatch.setattr(Recommender, "to_devices", copied)
    # The fifth batch would need more room, and be copied again.
    tiny.train_quietly(tiny.config(data, tmp_path / "run", pipeline=how, max_steps=4, eval_split=None))
    assert events == ["copy"] * before_first + ["step", "copy"] * (4 - before_first) + ["step"] * before_first


def test_run_when_resumed_with_another_pipeline_then_the_same_bits(data, straight, tmp_path):
    config = tiny.config(data, tmp_path / "run", pipeline="none", max_steps=11)
    tiny.train_quietly(config)
    tiny.train_quietly(tiny.with_train(config, pipeline="route", max_steps=22))
    assert tiny.train_quietly(tiny.with_train(config, pipeline="none", max_steps=None)) == straight[1]
    tiny.assert_identical(tiny.restore(config), tiny.restore(straight[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stops", [(2, 4), (5, tiny.STEPS_PER_EPOCH, 30, 38)], ids=["once", "also at the end of an epoch"]
)
def test_stale_run_when_stopped_then_it_resumes_to_the_same_bits(data, tmp_path, stops):
    whole = tiny.config(data, tmp_path / "whole", pipeline="stale", max_steps=stops[-1], eval_every=None)
    tiny.train_quietly(whole)
    config = dataclasses.replace(whole, workdir=str(tmp_path / "parts"))
    for step in stops:
        tiny.train_quietly(tiny.with_train(config, max_steps=step))
    tiny.assert_identical(tiny.restore(config), tiny.restore(whole))


def test_stale_run_when_evaluations_and_want_of_room_interrupt_it_then_the_bits_of_one_without_either(
    data, tmp_path, monkeypatch
):
    # Steps that are done again begin with a prologue, which must keep what the step before them has looked up.
    replays = []
    replay = ReplayedSteps._replay

    def counted(steps: ReplayedSteps) -> None:
        replays.append(steps.step)
        replay(steps)

    monkeypatch.setattr(ReplayedSteps, "_replay", counted)
    config = tiny.config(data, tmp_path / "run", pipeline="stale", max_steps=9, eval_every=2)
    tiny.train_quietly(config)
    assert max(replays) > 1

    def sufficient(recommender: Recommender, batch_size: int, ids_capacity: int):
        return recommender.tables.sufficient_capacities(batch_size, batch_size * (2 + tiny.MAX_TAGS))

    replays.clear()
    monkeypatch.setattr(Recommender, "first_capacities", sufficient)
    straight = tiny.config(data, tmp_path / "straight", pipeline="stale", max_steps=9, eval_split=None)
    tiny.train_quietly(straight)
    assert not replays
    tiny.assert_identical(tiny.restore(config), tiny.restore(straight))


@pytest.mark.parametrize(("was", "now"), [("route", "stale"), ("stale", "none")])
def test_workdir_when_a_run_becomes_stale_or_ceases_to_be_then_the_error_names_the_setting(data, tmp_path, was, now):
    config = tiny.config(data, tmp_path / "run", max_steps=1, eval_split=None, pipeline=was)
    tiny.train_quietly(config)
    with pytest.raises(InputError, match=r"holds a run with train\.pipeline = "):
        tiny.train_quietly(tiny.with_train(config, pipeline=now))


def test_profile_when_steps_are_asked_for_then_a_trace_that_names_stages_and_steps(data, tmp_path):
    config = tiny.config(data, tmp_path / "run", max_steps=7, eval_split=None, profile=2)
    tiny.train_quietly(config)
    folder = tmp_path / "run" / "profile"
    (of_tensorboard,) = folder.rglob("*.xplane.pb")
    program = of_tensorboard.read_bytes()
    assert all(b"/%s/" % stage in program for stage in (b"route_ahead", b"lookup", b"dense", b"update"))
    (path,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train" and "args" in event}
    assert steps == {"4", "5"}
    # Python's own calls would be nearly all of it.
    assert not [event for event in events if ".py:" in event.get("name", "")]


@pytest.fixture
def plan_file(data, tmp_path) -> Path:
    return processes.write_plan(data, tmp_path / "plan.json")


@pytest.mark.slow
def test_two_processes_when_batches_are_routed_ahead_then_the_bits_of_plain_steps_but_for_sums_over_chunks(
    data, tmp_path, plan_file
):
    mesh = [*processes.mesh(2, 2), "--plan", plan_file]
    states = []
    for pipeline, chunks in (("none", 1), ("route", 1), ("route", 4)):
        workdir = tmp_path / f"{pipeline}_{chunks}"
        settings = ("--train.pipeline", pipeline, "--train.chunks", chunks, "--train.max_steps", 22)
        command = processes.flags(data, workdir, *settings, *mesh)
        first, _ = processes.train(command, command)
        assert (f"; {chunks} chunks a batch" in first) == (chunks > 1)
        recommender, state = tiny.restored(parse_config(processes.flags(data, workdir, *mesh), ""))
        states.append(state)
    plain, routed_ahead, in_chunks = states
    assert int(plain.step) == 22
    tiny.assert_identical(routed_ahead, plain)
    for (name, one), (_, other) in zip(
        tiny.leaves(in_chunks.dense_params), tiny.leaves(plain.dense_params), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-3, err_msg=name)
    for table in recommender.tables.tables:
        rows = range(table.num_rows)
        one, other = (recommender.tables.read_rows(state.tables, table.name, rows) for state in (in_chunks, plain))
        np.testing.assert_allclose(one, other, atol=1e-3, err_msg=table.name)
