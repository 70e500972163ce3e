"""Malformed input lines: counted, written down with their reason, and judged against the share that is allowed."""

import csv
import dataclasses
import os
from pathlib import Path
from typing import IO, Self

from sharding.errors import InputError

REJECTS_FILE = "rejects.csv"
TEXT_LIMIT = 500  # characters of a rejected line that are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectsState:
    """Where a `Rejects` stands, so that an interrupted run can go on.

    Attributes:
        accepted: Lines accepted so far.
        rejected: Lines rejected so far.
        size: Bytes of the rejects file.
        first: The first rejected line as the error message names it; empty if there is none.
    """

    accepted: int = 0
    rejected: int = 0
    size: int = 0
    first: str = ""


def check_share(max_share: float) -> None:
    """Checks a share of malformed lines that is allowed.

    Raises:
        InputError: It is outside [0, 1].
    """
    if not 0 <= max_share <= 1:
        raise InputError(f"--max_reject_share is {max_share}, but it must lie in [0, 1]")


class Rejects:
    """Collects the malformed lines of a conversion in a CSV file with columns file, line, reason and text.

    The file exists only if a line was rejected; an older one is removed. As soon as more than ``max_share`` of the
    lines are malformed the run is stopped with an error. The share is judged from ``min_lines`` lines on, so that a
    bad first line does not stop a long run, and once more by `finish`.

    Args:
        path: The CSV file.
        max_share: Largest share of malformed lines, in [0, 1].
        min_lines: Number of lines, good and bad, from which on the share is judged.
        state: Where an interrupted run stood; what the file holds beyond it is cut off.

    Raises:
        InputError: ``max_share`` is outside [0, 1].
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_share: float = 0.01,
        min_lines: int = 1000,
        *,
        state: RejectsState | None = None,
    ):
        check_share(max_share)
        self._path = Path(path)
        self._max_share = max_share
        self._min_lines = min_lines
        self._stream: IO[str] | None = None
        state = state or RejectsState()
        self._accepted = state.accepted
        self._rejected = state.rejected
        self._first = state.first
        if state.rejected and self._path.is_file():
            os.truncate(self._path, state.size)
        else:
            self._path.unlink(missing_ok=True)

    @property
    def accepted(self) -> int:
        """Lines accepted so far."""
        return self._accepted

    @property
    def rejected(self) -> int:
        """Lines rejected so far."""
        return self._rejected

    def accept(self, lines: int = 1) -> None:
        """Counts well-formed lines."""
        self._accepted += lines

    def add(self, file: str | os.PathLike[str], line_number: int, reason: str, text: str | bytes) -> None:
        """Writes one malformed line down.

        Args:
            file: Input file.
            line_number: Line in that file, from 1; also for compressed files the line of the text.
            reason: What is wrong with it, such as "39 columns instead of 40".
            text: The line; cut after 500 characters, bytes that are not UTF-8 are written as escapes.

        Raises:
            InputError: More than the allowed share of the lines is malformed.
        """
        if isinstance(text, bytes):
            text = text[: 4 * TEXT_LIMIT].decode("utf-8", errors="backslashreplace")
        # The csv module cannot read NUL back, and a line break would make one reject look like two.
        text = text[:TEXT_LIMIT].rstrip("\r\n").replace("\0", "\\0").replace("\r", "\\r").replace("\n", "\\n")
        if self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self._path.exists()
            # Lone surrogates of a badly decoded line must not stop the run either.
            self._stream = open(self._path, "a", newline="", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115, closed by finish
            if is_new:
                csv.writer(self._stream, lineterminator="\n").writerow(["file", "line", "reason", "text"])
        csv.writer(self._stream, lineterminator="\n").writerow([os.fspath(file), line_number, reason, text])
        self._rejected += 1
        self._first = self._first or f"{os.fspath(file)}, line {line_number}: {reason}"
        if self._accepted + self._rejected >= self._min_lines:
            self._judge()

    def state(self) -> RejectsState:
        """Writes everything out and returns where the collection stands."""
        if self._stream is not None:
            self._stream.flush()
        # Whoever has looked at the rejects of an interrupted run may have removed them.
        size = self._path.stat().st_size if self._path.is_file() else 0
        return RejectsState(accepted=self._accepted, rejected=self._rejected, size=size, first=self._first)

    def finish(self) -> None:
        """Closes the file and judges the whole.

        Raises:
            InputError: More than the allowed share of the lines is malformed.
        """
        self.close()
        self._judge()

    def close(self) -> None:
        """Closes the file without judging."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def _judge(self) -> None:
        lines = self._accepted + self._rejected
        if self._rejected <= self._max_share * lines:
            return
        self.close()
        raise InputError(
            f"{self._first} (first of {self._rejected} malformed lines among {lines}: "
            f"{self._rejected / lines:.2%}, more than the {self._max_share:.2%} allowed; all are in {self._path}): "
            f"repair the input, or allow more with --max_reject_share {_next_share(self._rejected / lines)}"
        )


def _next_share(share: float) -> float:
    """The next larger share that reads well."""
    return next((step for step in (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if step >= share), 1.0)
