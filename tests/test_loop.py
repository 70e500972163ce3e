"""The training loop: when it ends, what it keeps, what it writes."""

import dataclasses
import io
import json
import os
import shutil
import signal
import struct
from pathlib import Path
from types import SimpleNamespace

import jax
import kill9
import numpy as np
import polars as pl
import pytest
import tiny
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from dlrm_jax import loop, replay
from dlrm_jax.config import MeshConfig, make_specs
from dlrm_jax.config_notes import steps_in_vain
from dlrm_jax.loop import TrainingError
from dlrm_jax.pipeline import Pipeline
from dlrm_jax.predict import Predictor
from dlrm_jax.recommender import Recommender
from dlrm_jax.report import read_log
from dlrm_jax.save_errors import SaveError
from dlrm_jax.schedules import ScheduleConfig
from dlrm_jax.sources import card_of
from dlrm_jax.trace import StepTrace
from dlrm_jax.train_state import init_train_state
from dlrm_jax.workdir import Workdir
from sharding import InputError
from sharding.plan import ShardingPlan, table_wise


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of 12 steps: its config, its result, its pipeline, and how many steps were compiled at each giving back."""
    config = tiny.config(data, tmp_path_factory.mktemp("trained") / "run", max_steps=12)
    made, given_back = [], []

    class Guarded(Pipeline):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

        def step(self, *arguments, **settings):
            with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
                jax.jit(lambda x: x)(np.ones(3))
            return super().step(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Pipeline", Guarded)
        patch.setattr(replay, "give_back_freed_memory", lambda: given_back.append(made[0].main_step._cache_size()))
        result = tiny.train_quietly(config)
    return config, result, made[0], given_back


def frozen(config):
    """The config with learning rates of 0, so that no evaluation is better than the first."""
    embedding = dataclasses.replace(
        config.embedding, default=dataclasses.replace(config.embedding.default, learning_rate=0.0), tables={}
    )
    dense = dataclasses.replace(config.dense_optimizer, learning_rate=0.0)
    return dataclasses.replace(config, embedding=embedding, dense_optimizer=dense)


def diverging(config):
    """The config with a learning rate at which the second step has no finite loss."""
    dense = dataclasses.replace(config.dense_optimizer, learning_rate=1e30)
    return dataclasses.replace(config, dense_optimizer=dense)


def test_early_stop_when_no_evaluation_is_better_than_the_first_then_it_ends_and_keeps_the_best(data, tmp_path):
    config = frozen(tiny.config(data, tmp_path / "run", early_stop=2, eval_every=2, checkpoint_every=1))
    result = tiny.train_quietly(config)
    assert (result.ended, result.step, result.best_step) == ("early stop", 6, 2)
    assert kill9.committed(tmp_path / "run") == {2, 5, 6}
    assert {folder.name for folder in (tmp_path / "run" / "tables").iterdir()} == {"2", "5", "6"}
    assert Predictor(config.workdir).step == 2
    assert Predictor(config.workdir, checkpoint="latest").step == 6
    assert Predictor(config.workdir, checkpoint=5).step == 5
    with pytest.raises(InputError, match="no checkpoint of step 3"):
        Predictor(config.workdir, checkpoint=3)
    # The same command again finds that it had given up.
    assert tiny.train_quietly(config) == result


def test_keep_checkpoints_when_it_is_3_then_the_best_and_the_latest_3_are_there(data, tmp_path):
    config = frozen(
        tiny.config(data, tmp_path / "run", eval_every=2, max_steps=6, checkpoint_every=1, keep_checkpoints=3)
    )
    tiny.train_quietly(config)
    assert kill9.committed(tmp_path / "run") == {2, 4, 5, 6}


def test_best_checkpoint_when_the_run_is_resumed_and_saves_more_then_it_is_still_kept(data, tmp_path):
    config = frozen(
        tiny.config(data, tmp_path / "run", eval_every=2, max_steps=4, checkpoint_every=1, keep_checkpoints=1)
    )
    tiny.train_quietly(config)
    assert kill9.committed(tmp_path / "run") == {2, 4}
    assert tiny.train_quietly(tiny.with_train(config, max_steps=7)).best_step == 2
    assert kill9.committed(tmp_path / "run") == {2, 7}
    assert Predictor(config.workdir).step == 2
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    with pytest.raises(InputError, match=r"the best .* of step 2, whose checkpoint is gone; .* there are \[7\]$"):
        Predictor(config.workdir)
    assert Predictor(config.workdir, checkpoint="latest").step == 7


def test_run_when_it_is_beyond_the_last_step_asked_for_then_training_says_so(data, tmp_path):
    config = tiny.config(data, tmp_path / "run", max_steps=3, eval_split=None)
    tiny.train_quietly(config)
    printed = io.StringIO()
    loop.train(tiny.with_train(config, max_steps=2), console=Console(file=printed, width=200))
    assert "note: the run is at step 3, beyond the last that is asked for, 2" in printed.getvalue()


@pytest.mark.parametrize("name", ["lr[0.1]", "a\\b", "a**b"])
def test_workdir_when_its_checkpoints_could_not_be_read_back_then_nothing_is_written(data, tmp_path, name):
    with pytest.raises(InputError, match="in its name cannot be read back; choose another --workdir"):
        tiny.train_quietly(tiny.config(data, tmp_path / name, max_steps=1))
    assert not any(path.is_dir() and any(path.rglob("config.json")) for path in tmp_path.iterdir())


def test_tables_when_one_device_has_no_room_for_them_then_nothing_is_written(tmp_path):
    users = dataclasses.replace(tiny.card().sparse[0], num_rows=10**9)
    data = tiny.write_dataset(tmp_path / "data", sparse=(users, *tiny.card().sparse[1:]))
    with pytest.raises(InputError, match=r"the tables do not fit cpu:1x1 \(1 devices\): they need .*; ways out: \(1\)"):
        tiny.train_quietly(tiny.config(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_plan_when_devices_have_no_room_for_it_then_nothing_is_written(tmp_path):
    # The planner would cut it; the plan that is given does not.
    users = dataclasses.replace(tiny.card().sparse[0], num_rows=10**9)
    card = tiny.card(sparse=(users, *tiny.card().sparse[1:]))
    data = tiny.write_dataset(tmp_path / "data", sparse=card.sparse)
    config = tiny.config(data, tmp_path / "run")
    tables, _ = make_specs(config.embedding, card)
    plan = ShardingPlan(nodes=1, chips=2, placements=tuple(table_wise(table, 1) for table in tables))
    plan.save(tmp_path / "plan.json")
    config = dataclasses.replace(config, mesh=MeshConfig(nodes=1, chips=2), plan=str(tmp_path / "plan.json"))
    with pytest.raises(
        InputError, match=r"the plan needs .* GB a device .*, but cpu:1x2 has .* GB for it: leave --plan"
    ):
        tiny.train_quietly(config)
    assert not (tmp_path / "run").exists()


def test_chunks_when_they_do_not_divide_a_batch_then_nothing_is_written(data, tmp_path):
    with pytest.raises(InputError, match=r"train\.chunks is 3, which does not divide the 64 samples of a device"):
        tiny.train_quietly(tiny.config(data, tmp_path / "run", chunks=3))
    assert not (tmp_path / "run").exists()


def test_signal_when_it_comes_before_the_first_step_then_that_step_is_saved(data, tmp_path, monkeypatch):
    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return init_train_state(*arguments)

    monkeypatch.setattr(loop, "init_train_state", signalled)
    result = tiny.train_quietly(tiny.config(data, tmp_path / "run", max_steps=12))
    assert (result.ended, result.step) == ("signal", 1)
    assert kill9.committed(tmp_path / "run") == {1}


def test_speed_when_checkpoints_take_long_then_it_does_not_count_them(data, tmp_path, monkeypatch):
    now, save = [0.0], loop.Checkpointer.save

    def slow(*arguments):
        now[0] += 1e6
        save(*arguments)

    def tick() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(loop.Checkpointer, "save", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=tick))
    config = tiny.config(data, tmp_path / "run", max_steps=12, checkpoint_every=1, eval_split=None)
    tiny.train_quietly(config)
    speeds = [line["samples_per_second"] for line in read_log(Workdir(config.workdir))]
    assert speeds
    assert min(speeds) > 1


def test_loss_when_it_is_not_finite_then_training_ends_naming_the_step_and_the_checkpoint_is_intact(data, tmp_path):
    config = diverging(tiny.config(data, tmp_path / "run", checkpoint_every=1))
    with pytest.raises(TrainingError, match=r"^step 2: loss or a gradient is not finite; .* of step 1 is intact$"):
        tiny.train_quietly(config)
    assert kill9.committed(tmp_path / "run") == {1}
    state = tiny.restore(config)
    assert int(state.fault) == 0
    assert all(np.isfinite(leaf.astype(np.float32)).all() for _, leaf in tiny.leaves(state))


def test_loss_when_its_fault_is_noticed_late_then_the_error_still_names_the_first_bad_step(data, tmp_path):
    config = diverging(tiny.config(data, tmp_path / "run", checkpoint_every=None, eval_every=None, log_every=5))
    with pytest.raises(TrainingError, match=r"^step 2: .* there is no checkpoint yet$"):
        tiny.train_quietly(config)
    assert read_log(Workdir(config.workdir)) == []


def test_evaluation_when_predictions_are_not_finite_then_training_ends_naming_the_step(data, tmp_path):
    config = diverging(tiny.config(data, tmp_path / "run", checkpoint_every=None, eval_every=1))
    with pytest.raises(TrainingError, match=r"^evaluation after step 1: the prediction for sample \d+ of a batch is"):
        tiny.train_quietly(config)
    assert kill9.committed(tmp_path / "run") == set()


def test_train_step_when_batches_differ_in_capacity_alone_then_it_is_compiled_once_for_each(trained):
    # 12 steps, 3 windows of metrics, an evaluation, a last step, and two capacities.
    _, _, pipeline, given_back = trained
    assert pipeline.main_step._cache_size() == 2
    # What the compiler has freed by then is no step's.
    assert given_back == [1, 2]


def test_log_when_training_ends_then_each_line_has_all_metrics_and_windows_their_samples(trained):
    config, *_ = trained
    lines = read_log(Workdir(config.workdir))
    names = {"step", "split", "num_samples", "auc", "auc_error_bound", "ne", "log_loss", "accuracy", "calibration"}
    assert [(line["step"], line["split"]) for line in lines] == [
        (5, "train"),
        (8, "validation"),
        (10, "train"),
        (12, "validation"),
    ]
    for line in lines:
        if line["split"] == "train":
            assert set(line) == names | {"samples_per_second"}
            assert line["num_samples"] == 5 * tiny.BATCH_SIZE
        else:
            assert set(line) == names
            assert line["num_samples"] == tiny.NUM_SAMPLES["validation"]
            assert line["auc_error_bound"] == 0


def test_tensorboard_when_training_ends_then_its_file_holds_the_same_figures(trained):
    config, *_ = trained
    figures = {}
    for path in Path(config.workdir, "tensorboard").iterdir():
        content = path.read_bytes()
        while content:  # length, its checksum, an event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            figures |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            content = content[16 + length :]
    for line in read_log(Workdir(config.workdir)):
        for name in ("auc", "ne"):
            assert figures[line["step"], f"{line['split']}/{name}"] == pytest.approx(line[name], rel=1e-6)


def test_files_when_training_ends_then_there_are_a_picture_and_a_result(trained):
    config, result, *_ = trained
    assert Path(config.workdir, "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path(config.workdir, "result.json").read_text()) == dataclasses.asdict(result)
    assert (result.step, result.ended) == (12, "all steps")
    assert result.last is not None
    assert result.last.num_samples == tiny.NUM_SAMPLES["validation"]


def test_run_when_it_has_no_evaluation_and_stops_before_its_first_log_line_then_it_ends_well(data, tmp_path):
    result = tiny.train_quietly(tiny.config(data, tmp_path / "run", eval_split=None, max_steps=2))
    assert (result.step, result.best_step, result.best, result.last) == (2, None, None, None)
    assert Predictor(tmp_path / "run").step == 2


@pytest.mark.parametrize(
    ("last_step", "steps", "traced"),
    [(100, 3, [14, 15, 16]), (15, 3, [13, 14, 15]), (13, 3, [11, 12, 13]), (12, 3, [11, 12]), (100, None, [])],
)
def test_trace_when_a_run_is_short_then_its_last_steps_are_traced(monkeypatch, tmp_path, last_step, steps, traced):
    running, seen = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: running.append(True))
    monkeypatch.setattr(jax.profiler, "stop_trace", running.pop)
    with StepTrace(tmp_path, first_step=11, last_step=last_step, steps=steps) as trace:
        for number in range(11, last_step + 1):
            with trace.step(number):
                seen += [number] * len(running)
            trace.finish(number, ())
    assert (seen, running) == (traced, [])


def test_trace_when_it_cannot_be_written_then_one_line_says_so_unless_training_has_failed(monkeypatch, tmp_path):
    def stop_trace():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: vm.xplane.pb\nmore")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop_trace)

    def trace(error: Exception | None):
        with StepTrace(tmp_path, first_step=1, last_step=1, steps=1) as trace, trace.step(1):
            if error is not None:
                raise error

    with pytest.raises(SaveError, match=r"the trace cannot be written \(RESOURCE_EXHAUSTED: vm.xplane.pb\); make room"):
        trace(None)
    with pytest.raises(TrainingError, match="diverged"):
        trace(TrainingError("diverged"))


@pytest.mark.parametrize(
    ("schedule", "decayed"),
    [
        (ScheduleConfig(), None),
        (ScheduleConfig(decay_start_step=100, decay_steps=50), 150),
        (ScheduleConfig(decay_start_step=100, decay_steps=50, min_multiplier=0.01), None),
        (ScheduleConfig(decay_start_step=100, decay_steps=9), None),
    ],
)
def test_steps_when_learning_rates_have_decayed_to_nothing_then_training_says_so(data, tmp_path, schedule, decayed):
    config = dataclasses.replace(tiny.config(data, tmp_path / "run"), schedule=schedule)
    assert not list(steps_in_vain(config, step=0, last_step=150))
    notes = list(steps_in_vain(config, step=0, last_step=151))
    assert [f"decayed to nothing at step {decayed} of 151" in note for note in notes] == [True] * (decayed is not None)


def test_settings_when_they_have_no_effect_then_training_says_so_first(data, tmp_path):
    config = tiny.config(data, tmp_path / "run", eval_every=None, early_stop=2, eval_split=None)
    printed = io.StringIO()
    with pytest.raises(InputError, match="is none for cpu"):
        loop.train(dataclasses.replace(config, kernels="mosaic_gpu"), console=Console(file=printed))
    assert printed.getvalue().startswith("note: train.early_stop 2 has no effect: train.eval_split is None")
    assert not (tmp_path / "run").exists()


def test_split_when_all_its_labels_are_equal_then_undefined_metrics_are_null_and_no_evaluation_is_best(tmp_path):
    data = tiny.write_dataset(tmp_path / "data", change=lambda table: table.with_columns(label=pl.lit(0.0)))
    config = tiny.config(
        data, tmp_path / "run", eval_split="train", eval_every=1, early_stop=1, max_steps=3, log_every=1
    )
    printed = io.StringIO()
    with jax.numpy_dtype_promotion("standard"):
        result = loop.train(config, console=Console(file=printed, width=200))
    assert (result.ended, result.step, result.best_step) == ("all steps", 3, None)
    assert printed.getvalue().count("note: ne of 'train' is undefined") == 1
    assert Predictor(config.workdir).step == 3
    assert {line["ne"] for line in read_log(Workdir(config.workdir))} == {None}
    assert json.loads(Path(config.workdir, "result.json").read_text())["last"]["auc"] is None


def test_samples_when_they_are_weighted_then_those_of_weight_0_count_nowhere_and_touch_no_row(tmp_path):
    user = tiny.USERS - 1
    weight = pl.when(pl.col("user") == user).then(0.0).otherwise(pl.col("weight")).cast(pl.Float32)
    data = tiny.write_dataset(
        tmp_path / "data", change=lambda table: table.with_columns(weight=weight), sample_weight="weight"
    )
    config = tiny.config(data, tmp_path / "run", epochs=1, log_every=tiny.STEPS_PER_EPOCH)
    result = tiny.train_quietly(config)
    counted = (tiny.samples(tiny.NUM_SAMPLES["validation"], 1)["weight"] > 0).sum()
    assert result.last is not None
    assert result.last.num_samples == counted
    table = pl.read_parquet(data / "train" / "*.parquet")
    lines = [line for line in read_log(Workdir(config.workdir)) if line["split"] == "train"]
    assert [line["num_samples"] for line in lines] == [(table["weight"] > 0).sum()]
    tables = Recommender(config, card_of(config)).tables
    first, last = tables.init(), tiny.restore(config).tables
    changed = [
        not np.array_equal(tables.read_rows(first, "user", [row]), tables.read_rows(last, "user", [row]))
        for row in (user, user - 1)
    ]
    assert changed == [False, True]


def test_config_when_it_has_no_data_then_it_trains_on_random_batches_that_seed_epoch_and_step_determine(tmp_path):
    config = dataclasses.replace(tiny.config(None, tmp_path / "run", max_steps=5), stated=tiny.card())
    assert tiny.train_quietly(config).step == 5
    assert Predictor(config.workdir).evaluate("validation").num_samples == 2 * tiny.BATCH_SIZE
