"""What all passes of one conversion share: its settings, its journal, its progress, and work on blocks in parallel."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dlrm_jax.data.criteo.lines import MalformedLine
from dlrm_jax.data.criteo.spec import CriteoSpec
from dlrm_jax.data.journal import Journal
from dlrm_jax.data.rejects import Rejects

SPLITS = ("train", "validation", "test")
# More threads gain little, since one thread reads and one writes; each holds some blocks.
_MAX_THREADS = 4

Progress = Callable[[str, int, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One conversion.

    Attributes:
        paths: Input files in order of time.
        out: Folder of the dataset.
        work: Folder of intermediate files, removed at the end.
        spec: What becomes of the lines.
        journal: Finished steps.
        max_reject_share: Share of malformed lines above which the run stops.
        memory_limit: Bytes for tables of counts and for vocabularies.
        rows_per_file: Lines that become one Parquet file.
        progress: Called with the name of the pass, bytes read, bytes to read, and lines read.
    """

    paths: Sequence[Path]
    out: Path
    work: Path
    spec: CriteoSpec
    journal: Journal
    max_reject_share: float
    memory_limit: int
    rows_per_file: int
    progress: Progress

    def count_folder(self, file: int) -> Path:
        """Returns the folder of the counts that were spilled from a file."""
        return self.work / f"spilled-{file:03d}"


class Tracker:
    """Reports the progress of one pass over some files."""

    def __init__(self, run: Run, stage: str, paths: Sequence[Path]):
        self._run = run
        self._stage = stage
        self._total = sum(path.stat().st_size for path in paths)
        self._done = 0
        self._lines = 0

    def bytes_read(self, position: int) -> None:
        """Reports how much of the present file has been read."""
        self._run.progress(self._stage, self._done + position, self._total, self._lines)

    def lines_read(self, lines: int) -> None:
        """Adds lines, which the next report mentions."""
        self._lines += lines

    def file_done(self, path: Path) -> None:
        """Reports that a file has been read, or skipped."""
        self._done += path.stat().st_size
        self.bytes_read(0)


def in_order[Item, Result](function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yields each item with its result, in order, while a few later ones are being computed in threads."""
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    pending: collections.deque[tuple[Item, Future[Result]]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > threads:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()


def note_lines(rejects: Rejects, path: Path, num_lines: int, malformed: Sequence[MalformedLine]) -> None:
    """Counts a block's lines as accepted or rejected."""
    rejects.accept(num_lines - len(malformed))
    for line in malformed:
        rejects.add(path, line.line + 1, line.reason, line.text)
