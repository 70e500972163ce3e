"""What a person sees while a dataset is made, checked or evaluated: progress bars, and the report of a check."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from dlrm_jax.data.card import DatasetCard
from dlrm_jax.data.check import DatasetReport
from dlrm_jax.data.rejects import REJECTS_FILE


class ProgressDisplay:
    """A progress bar on stderr for each pass over data: a context manager."""

    def __init__(self) -> None:
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
        self._progress = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
        self._tasks: dict[str, tuple[TaskID, float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def update(self, stage: str, done: int, total: int, rows: int) -> None:
        """Shows how much of a pass is done, and how many rows a second it handles."""
        if not self._tasks:
            self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, rate=""), time.monotonic()
        task, start = self._tasks[stage]
        rate = f"{rows:,} rows, {rows / max(time.monotonic() - start, 1e-3):,.0f} rows/s" if rows else ""
        self._progress.update(task, completed=done, total=total, rate=rate)

    def of_stage(self, stage: str) -> Callable[[int, int], None]:
        """Returns the callback of a converter that counts rows and has one pass."""
        return lambda done, total: self.update(stage, done, total, done)


def print_report(report: DatasetReport, directory: str | os.PathLike[str]) -> None:
    """Prints what a valid dataset holds: its splits, its sparse features as the first split shows them, warnings."""
    splits = Table("split", "samples", "files", "row groups", "positive rate", title=f"{os.fspath(directory)}: valid")
    for name, split in report.splits.items():
        figures = (f"{split.num_samples:,}", f"{split.num_files}", f"{split.num_row_groups}")
        splits.add_row(name, *figures, f"{split.positive_rate:.4f}")
    name, first = next(iter(report.splits.items()))
    features = Table("feature", "rows", "bag", "mean ids", "longest", "empty", title=f"sparse features of {name}")
    for column in report.card.sparse:
        feature = first.features[column.name]
        mean, empty = feature.num_ids / first.num_samples, feature.empty_bags / first.num_samples
        features.add_row(
            column.name,
            f"{column.num_rows:,}",
            "weighted" if column.weights else "yes" if column.bag else "",
            f"{mean:.2f}",
            f"{feature.max_pooling_factor}",
            f"{empty:.1%}",
        )
    # Names may hold brackets, which rich would take for its own.
    console = Console(markup=False)
    console.print(splits, features)
    for warning in report.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)


def print_summary(card: DatasetCard, directory: str | os.PathLike[str]) -> None:
    """Prints one line on a dataset that has been made, and one that names the rejects, if there are any."""
    sizes = ", ".join(f"{name} {split.num_samples:,}" for name, split in card.splits.items())
    num_rows = sum(column.num_rows for column in card.sparse)
    columns = f"{len(card.dense)} dense and {len(card.sparse)} sparse features"
    print(f"{os.fspath(directory)}: {sizes} samples; {columns}, {num_rows:,} rows")
    rejects = Path(directory, REJECTS_FILE)
    if rejects.exists():
        print(f"{rejects}: malformed input lines with their reasons")
