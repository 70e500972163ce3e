"""Resumption: stopped or killed at any moment and started again, a run ends with the same bits."""

import os
import signal
from pathlib import Path

import kill9
import polars as pl
import pytest
import tiny

from dlrm_jax import checkpoint, loop
from dlrm_jax.checkpoint import Checkpointer
from dlrm_jax.recommender import Recommender
from dlrm_jax.report import RunLog, read_log
from dlrm_jax.sources import card_of, open_split
from dlrm_jax.workdir import Workdir
from sharding import InputError


class Killed(BaseException):
    """As sudden as a kill: nothing in the code catches it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The config of a run that nobody interrupted, and its result."""
    config = tiny.config(data, tmp_path_factory.mktemp("straight") / "run")
    return config, tiny.train_quietly(config)


@pytest.fixture
def interrupt(monkeypatch):
    """Lets a run go until something happens, and makes that happen."""

    def until(config, *, signal_at=None, killed_at=None, killed_in=None, step=None):
        """Stops by SIGTERM at a step, is killed at a step, or in the save of a step, before or after a function."""

        def advance(log, now):
            if now == signal_at:
                signal.raise_signal(signal.SIGTERM)
            if now == killed_at:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "advance", advance)
            if killed_in is not None:
                owner, name, when = killed_in
                original = getattr(owner, name)

                def kill(*arguments, **settings):
                    if when == "before" and _step_of(arguments) == step:
                        raise Killed
                    original(*arguments, **settings)
                    if when == "after" and _step_of(arguments) == step:
                        raise Killed

                patch.setattr(owner, name, kill)
            if signal_at is not None:
                return tiny.train_quietly(config)
            with pytest.raises(Killed):
                tiny.train_quietly(config)
            return None

    return until


def _step_of(arguments) -> int:
    """The step that a call of `save_tables`, or of orbax's `save`, is about."""
    last = arguments[-1]
    return int(last.name) if isinstance(last, Path) else int(last)


def progress_of(config, step):
    recommender = Recommender(config, card_of(config))
    with Checkpointer(Path(config.workdir), recommender.tables, read_only=True) as checkpointer:
        return checkpointer.steps(), checkpointer.progress(step)


@pytest.mark.slow
def test_run_when_stopped_and_killed_again_and_again_then_it_ends_with_the_same_bits(
    data, straight, tmp_path, interrupt
):
    config = tiny.config(data, tmp_path / "run")
    manager = checkpoint.ocp.CheckpointManager
    stopped = interrupt(config, signal_at=3)
    assert (stopped.step, stopped.ended) == (3, "signal")
    interrupt(config, killed_at=10)  # two steps after a checkpoint
    interrupt(config, killed_in=(checkpoint, "save_tables", "after"), step=16)
    assert (tmp_path / "run" / "tables" / "16").is_dir()
    assert 16 not in kill9.committed(tmp_path / "run")
    stopped = interrupt(config, signal_at=tiny.STEPS_PER_EPOCH)  # at the very end of an epoch
    assert stopped.step == tiny.STEPS_PER_EPOCH
    interrupt(config, killed_in=(manager, "save", "before"), step=24)
    interrupt(config, killed_in=(manager, "save", "after"), step=32)
    assert 32 in kill9.committed(tmp_path / "run")
    result = tiny.train_quietly(config)

    expected_config, expected = straight
    assert result == expected
    assert (result.step, result.ended) == (2 * tiny.STEPS_PER_EPOCH, "all steps")
    tiny.assert_identical(tiny.restore(config), tiny.restore(expected_config))
    assert progress_of(config, result.step) == progress_of(expected_config, result.step)
    assert tiny.evaluations(config) == tiny.evaluations(expected_config)
    for name in ("checkpoints", "tables"):
        left = {folder.name for folder in (tmp_path / "run" / name).iterdir()}
        assert left == {folder.name for folder in (Path(expected_config.workdir) / name).iterdir()}


def test_log_when_a_run_was_killed_and_resumed_then_no_line_is_there_twice_and_none_is_missing(
    data, tmp_path, interrupt
):
    config = tiny.config(data, tmp_path / "run", epochs=1, log_every=4, checkpoint_every=4)
    interrupt(config, killed_at=7)
    with Workdir(config.workdir).metrics_file.open("a", errors="surrogateescape") as file:
        file.write('{}\n5\n\0\0\n{"step": 6, "spl\udcff')  # what a power cut leaves, and what a kill cuts off
    interrupt(config, killed_in=(checkpoint.ocp.CheckpointManager, "save", "after"), step=12)
    tiny.train_quietly(config)
    lines = [(line["step"], line["split"]) for line in read_log(Workdir(config.workdir))]
    expected = [(step, "train") for step in (4, 8, 12, 16)] + [(step, "validation") for step in (8, 16, 19)]
    assert sorted(lines) == sorted(expected)


def test_checkpoint_when_it_gets_its_name_then_it_and_the_log_are_on_the_disk(data, tmp_path, monkeypatch):
    run_folder, synced, lost = tmp_path / "run", {}, []
    fsync, finalize = os.fsync, checkpoint.ocp.path.atomicity.AtomicRenameTemporaryPath.finalize

    def note(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    def unsynced(*paths):
        return [path for path in paths if synced.get(path.stat().st_ino) != path.stat().st_size]

    async def named(path):
        lost.append(unsynced(*Path(path.get()).rglob("*"), run_folder / "metrics.jsonl"))
        await finalize(path)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(checkpoint.ocp.path.atomicity.AtomicRenameTemporaryPath, "finalize", named)
    tiny.train_quietly(tiny.config(data, run_folder, max_steps=2, log_every=1, eval_every=1))
    assert len(lost) >= 2
    assert not any(lost)
    assert unsynced(run_folder / "checkpoints", *(run_folder / "checkpoints").rglob("*")) == []


def test_data_of_the_run_then_some_batches_need_more_room_for_ids_than_the_first(data, tmp_path):
    config = tiny.config(data, tmp_path)
    source = open_split(Recommender(config, card_of(config)), "train", training=True)
    capacities = [batch.ids.capacity for batch in source.batches(0)]
    assert len(capacities) == tiny.STEPS_PER_EPOCH
    assert capacities[0] < capacities[-1]


def test_run_when_it_had_ended_then_starting_it_again_changes_nothing(straight):
    config, result = straight
    before = tiny.restore(config)
    assert tiny.train_quietly(config) == result
    tiny.assert_identical(tiny.restore(config), before)


def test_run_when_it_is_given_more_epochs_then_it_goes_on_to_what_a_longer_run_reaches(data, straight, tmp_path):
    config = tiny.config(data, tmp_path / "run", epochs=1)
    tiny.train_quietly(config)
    result = tiny.train_quietly(tiny.with_train(config, epochs=2))
    assert result.step == 2 * tiny.STEPS_PER_EPOCH
    tiny.assert_identical(tiny.restore(config), tiny.restore(straight[0]))


def test_run_when_its_files_have_other_row_groups_then_it_does_not_resume(tmp_path, monkeypatch):
    data = tiny.write_dataset(tmp_path / "data")
    config = tiny.config(data, tmp_path / "run", max_steps=2, eval_split=None)
    tiny.train_quietly(config)
    file = data / "train" / "part-00000.parquet"
    pl.read_parquet(file).write_parquet(file, row_group_size=60)
    compared = {}
    monkeypatch.setattr(loop, "check_same", lambda facts, **fix: compared.update(facts))
    with pytest.raises(InputError, match=r"row groups of digest .* restore the files"):
        tiny.train_quietly(tiny.with_train(config, max_steps=4))
    source = open_split(Recommender(config, card_of(config)), "train", training=True)
    assert compared["the digest of row groups of train"] == source.row_groups_digest is not None


def test_script_when_it_gets_sigterm_then_it_saves_and_exits_0_and_resumes_to_the_same_bits(data, tmp_path):
    arguments = kill9.flags(data, tmp_path / "stopped", epochs=2, checkpoint_every=1000)
    log = Workdir(tmp_path / "stopped").metrics_file
    process = kill9.start(arguments)
    assert kill9.wait(process, lambda: log.is_file() and log.stat().st_size)
    process.terminate()
    _, errors = process.communicate(timeout=kill9.PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    step = max(kill9.committed(tmp_path / "stopped"))
    assert 5 <= step < 2 * tiny.STEPS_PER_EPOCH
    assert f"ended at step {step} (signal)" in errors
    stopped = kill9.in_this_process(arguments)
    straight = kill9.in_this_process(kill9.flags(data, tmp_path / "straight", epochs=2, checkpoint_every=1000))
    tiny.assert_identical(tiny.restore(stopped), tiny.restore(straight))


def test_run_when_killed_twice_then_it_ends_with_the_same_bits(tmp_path):
    outcome = kill9.compare_with_uninterrupted(tmp_path, kills=2, epochs=2, seed=1)
    assert outcome.kills == 2
    assert outcome.in_saves >= 1


@pytest.mark.slow
def test_run_when_killed_24_times_half_of_them_in_a_save_then_it_ends_with_the_same_bits(tmp_path):
    outcome = kill9.compare_with_uninterrupted(tmp_path, kills=24, epochs=8, seed=0)
    print(outcome)
    assert outcome.kills == 24
    assert outcome.in_saves >= 8
