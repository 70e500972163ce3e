"""The first passes over Criteo logs: where the splits begin, and how often each id occurs in training lines."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from dlrm_jax.data.criteo.lines import MalformedLine, TextBlock, cut_blocks, parse_block, read_blocks
from dlrm_jax.data.criteo.run import SPLITS, Run, Tracker, in_order, note_lines
from dlrm_jax.data.criteo.vocabulary import to_keys
from dlrm_jax.data.rejects import REJECTS_FILE, Rejects, RejectsState
from dlrm_jax.data.spill import BYTES_PER_ENTRY, SpilledCounts, count_keys
from sharding.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Where the splits of one file begin, as line numbers from 0; training lines come first, test lines last.

    Attributes:
        validation: First line that is not a training line; None if all are.
        test: First test line; None if there is none.
    """

    validation: int | None
    test: int | None

    def segments(self, num_lines: int) -> list[tuple[str, int, int]]:
        """Returns (split, first line, end line) for each part of the file that is not empty."""
        inner = [num_lines if line is None else min(line, num_lines) for line in (self.validation, self.test)]
        parts = zip(SPLITS, itertools.pairwise([0, *inner, num_lines]), strict=True)
        return [(split, first, end) for split, (first, end) in parts if first < end]


def place_splits(run: Run) -> list[Bounds]:
    """Counts the lines that the split depends on, and places the split in each file.

    Raises:
        InputError: There are too few lines for three splits.
    """
    by_file = run.spec.split == "last_file" or (run.spec.split == "auto" and len(run.paths) > 1)
    counted = range(len(run.paths))[-1:] if by_file else range(len(run.paths))
    tracker = Tracker(run, "counting lines", [run.paths[i] for i in counted])
    for i in counted:
        if f"lines {i}" not in run.journal:
            num_lines = 0
            for block in read_blocks(run.paths[i], progress=tracker.bytes_read):
                num_lines += block.num_lines
                tracker.lines_read(block.num_lines)
            run.journal.record(f"lines {i}", num_lines)
        tracker.file_done(run.paths[i])
    lines = [run.journal[f"lines {i}"] for i in counted]
    evaluation = lines[-1] if by_file else round(sum(lines) * run.spec.evaluation_share)
    if evaluation < 2 or (not by_file and evaluation >= sum(lines)):
        instead = "--split lines" if by_file else "another --evaluation_share"
        raise InputError(
            f"{run.paths[-1]}: {evaluation} of {sum(lines)} lines are for evaluation, but training, validation and "
            f"test need one line each: give more lines, or {instead}"
        )
    if by_file:
        last = Bounds(validation=0, test=evaluation - evaluation // 2)
        return [Bounds(validation=None, test=None)] * (len(run.paths) - 1) + [last]
    validation, test = sum(lines) - evaluation, sum(lines) - evaluation // 2
    starts = [0, *itertools.accumulate(lines)][:-1]
    return [Bounds(validation=max(0, validation - start), test=max(0, test - start)) for start in starts]


def count_ids(run: Run, bounds: Sequence[Bounds]) -> list[int]:
    """Counts the ids of training lines, which are spilled to one folder for each file.

    Returns:
        The number of lines of each file, malformed ones included.

    Raises:
        InputError: Too many lines are malformed.
    """
    tracker = Tracker(run, "counting ids", run.paths)
    steps = [f"count {i}" for i, bound in enumerate(bounds) if bound.validation != 0]
    finished = [step for step in steps if step in run.journal]
    if len(finished) < len(steps):
        state = RejectsState(**run.journal[finished[-1]]["rejects"]) if finished else None
        with Rejects(run.out / REJECTS_FILE, run.max_reject_share, state=state) as rejects:
            for i, bound in enumerate(bounds):
                if f"count {i}" in steps and f"count {i}" not in finished:
                    _count_file(run, i, bound, rejects, tracker)
                tracker.file_done(run.paths[i])
    return [
        run.journal[f"lines {i}"] if f"lines {i}" in run.journal else run.journal[f"count {i}"]["lines"]
        for i in range(len(run.paths))
    ]


def _count_file(run: Run, file: int, bound: Bounds, rejects: Rejects, tracker: Tracker) -> None:
    path = run.paths[file]
    accepted_before = rejects.accepted
    num_lines = 0
    spilled = SpilledCounts(run.count_folder(file), max_entries=run.memory_limit // BYTES_PER_ENTRY)
    blocks = read_blocks(path, progress=tracker.bytes_read)
    if bound.validation is not None:
        end = bound.validation
        blocks = itertools.takewhile(lambda block: block.first_line < end, cut_blocks(blocks, [end]))
    for block, (keys, counts, malformed) in in_order(_count_block, blocks):
        num_lines += block.num_lines
        tracker.lines_read(block.num_lines)
        note_lines(rejects, path, block.num_lines, malformed)
        spilled.add(keys, counts)
    spilled.close()
    outcome = {
        "lines": num_lines,
        "accepted": rejects.accepted - accepted_before,
        "rejects": dataclasses.asdict(rejects.state()),
    }
    run.journal.record(f"count {file}", outcome)


def _count_block(block: TextBlock) -> tuple[np.ndarray, np.ndarray, tuple[MalformedLine, ...]]:
    parsed = parse_block(block)
    return *count_keys(to_keys(parsed.ids, parsed.present)), parsed.malformed
