"""Several processes: one loss curve, one end, one error."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import kill9
import numpy as np
import processes
import pytest
import tiny

from dlrm_jax import distributed
from dlrm_jax.distributed import AgreedError, Processes, check_same, check_shared, join, together
from dlrm_jax.report import read_log
from dlrm_jax.workdir import Workdir
from scripts.command_line import parse_config, take_processes
from sharding import InputError

# Dense gradients are added in another order, which moves losses of order 1 by about 1e-7 a step.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny"))


def curve(workdir: Path) -> dict[tuple[int, str], tuple[int, float]]:
    """Number of samples and NE of each line of the log."""
    return {(line["step"], line["split"]): (line["num_samples"], line["ne"]) for line in read_log(Workdir(workdir))}


def assert_same_curve(workdir: Path, expected: Path) -> None:
    got, wanted = curve(workdir), curve(expected)
    assert {key: samples for key, (samples, _) in got.items()} == {key: count for key, (count, _) in wanted.items()}
    np.testing.assert_allclose([got[key][1] for key in got], [wanted[key][1] for key in got], rtol=TOLERANCE)


@pytest.fixture(scope="module")
def plan_file(data, tmp_path_factory) -> Path:
    return processes.write_plan(data, tmp_path_factory.mktemp("plans") / "plan.json")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """The workdir of two epochs in one process on one device."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    tiny.train_quietly(parse_config(processes.flags(data, workdir), ""))
    return workdir


def test_two_processes_when_they_train_then_the_loss_curve_is_that_of_one(data, tmp_path):
    short = ("--train.max_steps", 4, "--train.eval_split", None)
    tiny.train_quietly(parse_config(processes.flags(data, tmp_path / "one", *short), ""))
    command = processes.flags(data, tmp_path / "two", *short, *processes.mesh(2, 1))
    first, second = processes.train(command, command)
    assert "mesh 2 x 1 (cpu): 2 processes, 1 local and 2 global devices" in first
    assert "step" not in second  # one process writes and prints
    assert_same_curve(tmp_path / "two", tmp_path / "one")
    assert kill9.committed(tmp_path / "two") == {4}


def test_processes_when_their_configs_differ_then_each_ends_with_an_error_that_names_field_and_process(data, tmp_path):
    command = processes.flags(data, tmp_path / "run", *processes.mesh(2, 1))
    ended = processes.end(processes.start(command, [*command, "--seed", "7"]))
    for code, errors in ended:
        assert code == 2
        assert "error: processes differ: seed is 0 for process 0, but 7 for process 1: start all with" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_when_one_cannot_use_its_command_line_then_each_ends_with_an_error(data, tmp_path):
    command = processes.flags(data, tmp_path / "run", *processes.mesh(2, 1))
    (code, errors), (other, its_errors) = processes.end(processes.start(command, [*command, "--sed", "7"]))
    assert (code, other) == (2, 2)
    assert "error: there is no flag '--sed'; did you mean '--seed'?" in its_errors
    assert "error: process 1 cannot go on: there is no flag '--sed'" in errors


@pytest.mark.slow
def test_processes_when_one_finds_a_damaged_file_while_it_trains_then_all_end_within_a_minute(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    path = copy / "train" / "part-00000.parquet"
    damaged = shutil.copytree(copy, tmp_path / "damaged") / "train" / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 8 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 8)
    damaged.write_bytes(content)
    run = (tmp_path / "run", *processes.mesh(2, 1))
    job = processes.start(processes.flags(copy, *run), processes.flags(tmp_path / "damaged", *run))
    (code, _), (other, errors) = processes.end(job)
    assert code not in (0, None)
    assert other == 2
    assert "error: process 1: " in errors
    assert "part-00000.parquet" in errors


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_when_they_train_by_a_plan_then_the_loss_curve_is_that_of_one(
    data, straight, plan_file, tmp_path, count
):
    command = processes.flags(data, tmp_path / "run", *processes.mesh(2, 2), "--plan", plan_file)
    processes.train(*[command] * count)
    assert_same_curve(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_job_when_a_process_is_killed_then_the_others_end_and_it_resumes_on_another_mesh(
    data, straight, tmp_path, victim
):
    workdir = tmp_path / "run"
    command = processes.flags(data, workdir, "--train.checkpoint_every", 1, *processes.mesh(2, 1))
    job = processes.start(command, command)
    assert kill9.wait(job[victim], lambda: max(kill9.committed(workdir), default=0) >= 10)
    job[victim].kill()
    died = time.monotonic()
    ended = processes.end(job)
    assert time.monotonic() - died < processes.LOST_WITHIN_SECONDS
    assert ended[victim][0] == -signal.SIGKILL
    assert ended[1 - victim][0] not in (0, -signal.SIGKILL)
    step = max(kill9.committed(workdir))
    assert 10 <= step < 2 * tiny.STEPS_PER_EPOCH
    # From two processes of one device to one process of four.
    (errors,) = processes.train(processes.flags(data, workdir, *processes.mesh(1, 4)))
    assert f"resuming from step {step} in" in errors
    assert "each process makes 4 devices of its CPU" in errors
    assert_same_curve(workdir, straight)


@pytest.mark.slow
def test_job_when_one_process_gets_sigterm_then_all_save_the_same_step_and_it_resumes(data, straight, tmp_path):
    workdir = tmp_path / "run"
    command = processes.flags(data, workdir, *processes.mesh(2, 1))
    job = processes.start(command, command)
    assert kill9.wait(job[1], lambda: bool(kill9.committed(workdir)))
    job[1].terminate()
    ended = processes.end(job)
    assert [code for code, _ in ended] == [0, 0], ended
    step = max(kill9.committed(workdir))
    assert f"ended at step {step} (signal)" in ended[0][1]
    assert step < 2 * tiny.STEPS_PER_EPOCH
    processes.train(command, command)
    assert_same_curve(workdir, straight)


def test_facts_when_processes_differ_then_the_error_names_the_fact_and_the_processes(monkeypatch):
    def gather(text):
        facts = json.loads(text)
        return [json.dumps(facts | {"the code": code}) for code in ("a", "b", "a", "c")]

    monkeypatch.setattr(distributed, "gather", gather)
    with pytest.raises(AgreedError, match=r'the code is "a" for process 0, but "b" for process 1 \(and 1 other proc'):
        check_same({"seed": 0, "the code": "a"})
    with pytest.raises(AgreedError, match=r"process 1 .*: copy the files again$"):
        check_same({"seed": 0, "the code": "a"}, fix="copy the files again")
    monkeypatch.setattr(distributed, "gather", lambda text: [text] * 4)
    check_same({"seed": 0, "the code": "a"})


@pytest.mark.parametrize(
    ("one", "other", "where"),
    [
        ({"a": [1, {"name": "b", "rows": 2}]}, {"a": [1, {"name": "b", "rows": 3}]}, "a, 'b', rows is 2 .* but 3 for"),
        ({"a": [[1], [2]]}, {"a": [[1], [4]]}, "a, number 1, number 0 is 2 .* but 4 for"),
        ({"a": [1]}, {"a": [1, 2]}, r"a is \[1\] .* but \[1, 2\] for"),
        ({"a": {"b": 1}}, {"a": {}}, "a, b is 1 .* but null for"),
        ({"a": float("nan"), "b": 1}, {"a": float("nan"), "b": 2}, "fact, b is 1 .* but 2 for"),
    ],
)
def test_facts_when_they_are_large_then_the_error_names_the_place_that_differs(monkeypatch, one, other, where):
    monkeypatch.setattr(distributed, "gather", lambda _: [json.dumps({"the fact": fact}) for fact in (one, other)])
    with pytest.raises(AgreedError, match=rf"the fact, {where.removeprefix('fact, ')} process 1"):
        check_same({"the fact": one})


def test_block_when_another_process_fails_in_it_then_this_one_fails_too(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda text: [text, "", "no such file"])
    with pytest.raises(AgreedError, match="process 2 cannot go on: no such file"), together():
        pass
    monkeypatch.setattr(distributed, "gather", lambda text: [text, "", ""])
    with pytest.raises(AgreedError, match=r"^mine$"), together():
        raise InputError("mine")
    with together():
        pass


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        ("DEADLINE_EXCEEDED: GetKeyValue() timed out", "not all of 2 processes have answered in 300 seconds: see", 2),
        ("UNAVAILABLE: Socket closed\nmore", "another process of this job has ended (coordination service: UNAVA", 1),
    ],
)
def test_processes_when_one_does_not_answer_then_the_others_say_whether_it_has_ended(
    monkeypatch, capsys, status, message, code
):
    class Client:
        def key_value_set(self, key, value):
            pass

        def blocking_key_value_get(self, key, milliseconds):
            raise jax.errors.JaxRuntimeError(status)

    ended = []
    monkeypatch.setattr(distributed.global_state, "client", Client())
    monkeypatch.setattr(distributed.global_state, "num_processes", 2)
    monkeypatch.setattr(os, "_exit", ended.append)
    with distributed.ending_together():
        distributed.gather("here")
    assert ended == [code]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: process 0: {message}")


def test_process_when_it_is_interrupted_then_it_does_not_wait_for_the_others(monkeypatch):
    ended = []
    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    with pytest.raises(KeyboardInterrupt), distributed.ending_together():
        raise KeyboardInterrupt
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    with distributed.ending_together():
        raise KeyboardInterrupt
    assert ended == [130]


def test_workdir_when_processes_do_not_share_it_then_every_process_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "_SECONDS_TO_SHOW", 0.5)
    with pytest.raises(AgreedError, match="process 0 does not see: give all processes one --workdir on a file system"):
        check_shared(Workdir(tmp_path))
    (tmp_path / "config.json").touch()
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    check_shared(Workdir(tmp_path))

    def gather(text):
        return [text, text and json.dumps({name: [] for name in json.loads(text)})]

    monkeypatch.setattr(distributed, "gather", gather)
    with pytest.raises(AgreedError, match=r"the checkpoints in .*, is \[7\] for process 0, but \[\] for process 1"):
        check_shared(Workdir(tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 2}, "--coordinator is missing: give all of --coordinator, --num_processes, --process_id"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "--process_id is 2, but 2 processes count from 0",
        ),
        ({"num_processes": 0}, "--num_processes is 0, but must be at least 1"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 1}, "--coordinator is 'a', but must be HOST:PORT"),
        ({"coordinator": "a:65536", "num_processes": 2, "process_id": 1}, "--coordinator is 'a:65536', but must be"),
    ],
)
def test_processes_when_they_are_stated_wrongly_then_one_line_says_how(given, message):
    with pytest.raises(InputError, match=message):
        join(Processes(**given))


def test_processes_when_they_do_not_come_then_this_one_says_that_it_waits_and_ends_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "_SECONDS_OF_SILENCE", 0.1)
    monkeypatch.setattr(distributed, "PATIENCE_SECONDS", 0.3)
    ended, signals = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())

    def initialize(*_, **settings):
        signals.append(signal.getsignal(signal.SIGINT))
        assert ended.wait(10)
        raise RuntimeError("late")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    # A shell's background jobs ignore Ctrl-C.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(InputError, match="the 2 processes of a:1 did not all come"):
            join(Processes(coordinator="a:1", num_processes=2, process_id=1))
    finally:
        afterwards = signal.signal(signal.SIGINT, inherited)
    assert capsys.readouterr().err.splitlines() == [
        "waiting for the 2 processes of a:1, 0.3 seconds at most",
        "error: the 2 processes of a:1 did not all come in 0.3 seconds: start them all, with the same --coordinator "
        "and --num_processes",
    ]
    # Ctrl-C ends it meanwhile, and is Python's again afterwards.
    assert signals == [signal.SIG_DFL]
    assert afterwards is signal.default_int_handler


@pytest.mark.slow
def test_job_when_it_gets_sigterm_before_it_trains_then_it_ends_at_once(data, tmp_path):
    command = processes.flags(data, tmp_path / "run", *processes.mesh(2, 1))
    job = processes.start(command, command)
    # Both have met by then, and compile nothing yet.
    assert kill9.wait(job[0], (tmp_path / "run" / ".lock").exists)
    for process in job:
        process.terminate()
    assert [code for code, _ in processes.end(job)] == [-signal.SIGTERM] * 2


def test_processes_when_there_is_one_then_nobody_is_waited_for():
    assert join(Processes(num_processes=1)) == 1
    assert distributed.gather("alone") == ["alone"]


def test_command_line_when_it_states_processes_then_the_config_does_not_see_them():
    arguments = ["quickstart", "--num_processes", "4", "--seed", "3", "--process_id=1", "--coordinator", "host:1"]
    given, others = take_processes(arguments)
    assert given == Processes(coordinator="host:1", num_processes=4, process_id=1)
    assert others == ["quickstart", "--seed", "3"]
    with pytest.raises(InputError, match="--num_processes: invalid int value: 'many'"):
        take_processes(["--num_processes", "many"])
