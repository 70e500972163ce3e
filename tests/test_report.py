"""The log of a run: metrics.jsonl and TensorBoard's files, where it begins and where it is taken up."""

import dataclasses
import io
import json
import math
import struct
from pathlib import Path

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dlrm_jax.metrics import Metrics
from dlrm_jax.report import RunLog, draw_curves, logged_metrics, read_log
from dlrm_jax.workdir import Workdir

METRICS = Metrics(**{field.name: 0.5 for field in dataclasses.fields(Metrics)})


@pytest.fixture
def workdir(tmp_path) -> Workdir:
    return Workdir(tmp_path)


def log_of(workdir: Workdir, *, first_step: int, writes: bool = True) -> RunLog:
    return RunLog(workdir, Console(file=io.StringIO()), first_step=first_step, last_step=100, writes=writes)


def events_of(workdir: Workdir) -> list[Event]:
    """What the newest of TensorBoard's files holds: records of a length, its checksum, an event, its checksum."""
    data = max((workdir.path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns).read_bytes()
    events = []
    while data:
        (size,) = struct.unpack_from("<Q", data)
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_log_when_a_run_is_resumed_then_lines_up_to_its_step_stay_and_later_ones_go(workdir) -> None:
    with log_of(workdir, first_step=0) as log:
        for step in (4, 8, 12):
            log.metrics(step, "train", METRICS)
    before = workdir.metrics_file.read_text().splitlines()
    with log_of(workdir, first_step=8) as log:
        assert workdir.metrics_file.read_text().splitlines() == before[:2]
        log.metrics(12, "validation", METRICS)
    assert [(line["step"], line["split"]) for line in read_log(workdir)] == [
        (4, "train"),
        (8, "train"),
        (12, "validation"),
    ]
    (start,) = [event for event in events_of(workdir) if event.HasField("session_log")]
    assert (start.step, start.session_log.status) == (9, SessionLog.SessionStatus.START)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_are_not_finite_then_null_in_the_file_and_absent_from_tensorboard(workdir, value) -> None:
    with log_of(workdir, first_step=0) as log:
        log.metrics(4, "train", dataclasses.replace(METRICS, ne=value), samples_per_second=7.0)
    (line,) = map(json.loads, workdir.metrics_file.read_text().splitlines())
    assert (line["ne"], line["auc"], line["samples_per_second"]) == (None, 0.5, 7.0)
    (event,) = [event for event in events_of(workdir) if event.HasField("summary")]
    tags = {each.tag for each in event.summary.value}
    assert event.step == 4
    assert {"train/auc", "train/samples_per_second"} <= tags
    assert "train/ne" not in tags


def test_evaluations_when_they_are_of_the_training_split_then_windows_of_training_are_none_of_them(workdir) -> None:
    with log_of(workdir, first_step=0) as log:
        log.metrics(4, "train", dataclasses.replace(METRICS, ne=math.nan))
        log.metrics(5, "train", METRICS, samples_per_second=7.0)
    evaluated = logged_metrics(workdir, "train")
    assert list(evaluated) == [4]
    assert math.isnan(evaluated[4].ne)


def test_log_of_a_process_that_does_not_write_then_no_file(workdir) -> None:
    with log_of(workdir, first_step=0, writes=False) as log:
        log.metrics(4, "train", METRICS)
        log.to_disk()
    assert list(Path(workdir.path).iterdir()) == []


@pytest.mark.parametrize("name", ["cost$_$", r"$\q$"])
def test_curves_when_names_hold_dollar_signs_then_they_are_no_formulas(tmp_path, name) -> None:
    workdir = Workdir(tmp_path / name)
    workdir.path.mkdir()
    with log_of(workdir, first_step=0) as log:
        log.metrics(4, name, METRICS)
    assert draw_curves(workdir, {}).read_bytes().startswith(b"\x89PNG")
