"""What a person sees of a run: progress, metrics files, the picture of the curves, the table of results."""

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX.event_file_writer import EventsWriter

# Protobuf makes these names as it is imported, unseen by type checkers.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from dlrm_jax.distributed import num_processes
from dlrm_jax.metrics import Metrics
from dlrm_jax.recommender import Recommender
from dlrm_jax.sources import Source
from dlrm_jax.workdir import Workdir
from sharding.whole_file import to_disk, write_whole

# TensorBoard shows a run so long after it happens, at most.
_SECONDS_BETWEEN_FLUSHES = 30
_SHOWN = ("auc", "ne", "log_loss", "accuracy", "calibration")


def first_line(recommender: Recommender, source: Source) -> str:
    """What is trained, on what, and where."""
    mesh, chunks = recommender.tables.mesh, recommender.chunks
    nodes, chips = mesh.devices.shape
    return (
        f"{recommender.config.name}: {recommender.num_table_parameters:,} parameters in "
        f"{len(recommender.tables.tables)} tables, {recommender.num_dense_parameters:,} dense; "
        f"{source.num_samples:,} training samples, {source.steps_per_epoch:,} steps an epoch; "
        f"mesh {nodes} x {chips} ({mesh.devices.flat[0].device_kind}): {num_processes()} processes, "
        f"{recommender.num_local_devices} local and {nodes * chips} global devices"
        + (f"; {chunks} chunks a batch" if chunks > 1 else "")
    )


class RunLog:
    """Progress bar, metrics.jsonl and TensorBoard of one run. A context manager.

    Where output is no terminal, each line of metrics is printed instead of a bar.
    """

    def __init__(self, workdir: Workdir, console: Console, *, first_step: int, last_step: int, writes: bool = True):
        """Takes the log up where a checkpoint was made.

        Args:
            workdir: Folder of the run.
            console: Where to print.
            first_step: Step of the checkpoint; what was logged beyond it happens again.
            last_step: Step at which training is to end.
            writes: Whether this is the process that writes files.
        """
        self._console = console
        self._file = workdir.metrics_file
        self._board = None
        if writes:
            kept = [line for line in read_log(workdir) if line["step"] <= first_step]
            write_whole(self._file, "".join(json.dumps(line) + "\n" for line in kept))
            self._board = _Board(workdir.path / "tensorboard", first_step=first_step + 1)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._training = self._progress.add_task("train", total=last_step, completed=first_step, metrics="")
        self._evaluation = self._progress.add_task("evaluate", visible=False, metrics="")

    def __enter__(self) -> "RunLog":
        """Starts the bar."""
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stops the bar and closes the files."""
        self._progress.stop()
        if self._board is not None:
            # What ended the run is not hidden behind a full disk.
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                self._board.close()

    def advance(self, step: int) -> None:
        """Moves the bar to a step."""
        self._progress.update(self._training, completed=step)

    def start_evaluation(self, split: str, total: int) -> None:
        """Shows a second bar."""
        self._progress.reset(self._evaluation, total=total, visible=True, description=split)

    def advance_evaluation(self) -> None:
        """Moves the second bar."""
        self._progress.advance(self._evaluation)

    def to_disk(self) -> None:
        """Waits until metrics.jsonl would outlast a power cut."""
        if self._board is not None:
            to_disk(self._file)

    def metrics(self, step: int, split: str, metrics: Metrics, **more: float) -> None:
        """Logs metrics.

        Args:
            step: Step that they belong to.
            split: What they were computed on.
            metrics: The metrics.
            **more: Other figures, such as samples_per_second.
        """
        figures = {**dataclasses.asdict(metrics), **more}
        line = {"step": step, "split": split, **_without_nan(figures)}
        if self._board is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._board.add(step, split, figures)
        speed = f", {more['samples_per_second']:,.0f} samples/s" if "samples_per_second" in more else ""
        summary = f"{split} NE {metrics.ne:.4f}, AUC {metrics.auc:.4f}{speed}"
        if split == "train":
            self._progress.update(self._training, metrics=summary)
        if split != "train" or not self._console.is_terminal:
            self._progress.update(self._evaluation, visible=False)
            self._console.print(f"step {step:>8,}: {summary}", highlight=False)


class _Board:
    """The figures of a run for TensorBoard.

    tensorboardX's `SummaryWriter` would write in a thread, which dies of a full disk and leaves training waiting.
    """

    def __init__(self, folder: Path, *, first_step: int):
        """Begins a file.

        Args:
            folder: Its folder.
            first_step: First step that it may tell of; what older files say of later ones is void.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        self._write(first_step, session_log=SessionLog(status=SessionLog.SessionStatus.START))

    def add(self, step: int, split: str, figures: dict[str, Any]) -> None:
        """Adds the figures of a step that are finite."""
        values = [
            Summary.Value(tag=f"{split}/{name}", simple_value=value)
            for name, value in figures.items()
            if math.isfinite(value)
        ]
        self._write(step, summary=Summary(value=values))
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        self._events.close()

    def _write(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))


def read_log(workdir: Workdir) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a last line that was cut off by a kill, or whatever else is no line of it, is left out.

    Args:
        workdir: Folder of the run.

    Returns:
        One dictionary a line.
    """
    if not workdir.metrics_file.is_file():
        return []
    lines = []
    for text in workdir.metrics_file.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"step", "split"} <= line.keys():
            lines.append(line)
    return lines


def logged_metrics(workdir: Workdir, split: str) -> dict[int, Metrics]:
    """Reads the evaluations of a split that were logged.

    Args:
        workdir: Folder of the run.
        split: The split.

    Returns:
        Metrics by step.
    """
    names = [field.name for field in dataclasses.fields(Metrics)]
    logged = {}
    for line in read_log(workdir):
        # The training split may be evaluated, too; only windows of training steps have a speed.
        if line["split"] == split and "samples_per_second" not in line:
            figures: dict[str, Any] = {name: math.nan if line[name] is None else line[name] for name in names}
            logged[line["step"]] = Metrics(**figures)
    return logged


def write_result(workdir: Workdir, result: dict[str, Any]) -> None:
    """Writes result.json.

    Args:
        workdir: Folder of the run.
        result: The result as a dictionary; an undefined figure becomes null.
    """
    write_whole(workdir.path / "result.json", json.dumps(_without_nan(result), indent=1) + "\n")


def _without_nan(figures: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan: an undefined figure is null."""
    return {
        name: _without_nan(value)
        if isinstance(value, dict)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in figures.items()
    }


def draw_curves(workdir: Workdir, attainable: dict[str, float]) -> Path:
    """Draws NE and AUC over steps into curves.png.

    Args:
        workdir: Folder of the run.
        attainable: Figures of the model that generated the data, where they are known.

    Returns:
        The picture's path.
    """
    # Only the pictures need matplotlib, which takes a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    log = read_log(workdir)
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, name, label in zip(axes, ("ne", "auc"), ("normalised entropy", "AUC"), strict=True):
        for split in dict.fromkeys(line["split"] for line in log):
            points = [(line["step"], line[name]) for line in log if line["split"] == split and line[name] is not None]
            style = {"alpha": 0.6} if split == "train" else {"marker": "o"}
            axis.plot([x for x, _ in points], [y for _, y in points], label=split, **style)
        if name in attainable:
            axis.axhline(attainable[name], color="gray", linestyle="--", label="attainable")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.lines:
            for text in axis.legend().get_texts():
                text.set_parse_math(False)
    # Names are no formulas, whatever dollar signs they hold.
    figure.suptitle(workdir.path.name, parse_math=False)
    path = workdir.path / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def result_table(title: str, rows: dict[str, Metrics | dict[str, float]]) -> Table:
    """A table of metrics.

    Args:
        title: Its title.
        rows: Metrics by name of the row; where a metric is missing the cell is empty.

    Returns:
        A table to print with rich.
    """
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", no_wrap=True)
    for name in ("samples", *_SHOWN):
        table.add_column(name.replace("_", " "), justify="right")
    for name, metrics in rows.items():
        figures = metrics if isinstance(metrics, dict) else dataclasses.asdict(metrics)
        samples = figures.get("num_samples")
        cells = [f"{figures[key]:.5f}" if key in figures else "" for key in _SHOWN]
        table.add_row(name, "" if samples is None else f"{int(samples):,}", *cells)
    return table
