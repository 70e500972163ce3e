"""The last pass over Criteo logs: every well-formed line becomes a row of a split.

The lines of each split are dealt to units that become one Parquet file each: what an interrupted run does again.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from dlrm_jax.data.card import DatasetCard, DenseColumn, SplitSummary
from dlrm_jax.data.criteo.count import Bounds
from dlrm_jax.data.criteo.lines import MalformedLine, TextBlock, cut_blocks, parse_block, read_blocks
from dlrm_jax.data.criteo.run import SPLITS, Run, Tracker, in_order, note_lines
from dlrm_jax.data.criteo.vocabulary import RowLookup, read_vocabulary
from dlrm_jax.data.multi_hot import expand_bags
from dlrm_jax.data.rejects import REJECTS_FILE, Rejects, RejectsState
from dlrm_jax.data.writer import SplitWriter, dataset_schema, rows_per_group
from sharding.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unit:
    """Lines [first_line, end_line) of a file: part ``number`` of a split, in row groups of ``rows_per_group``."""

    file: int
    split: str
    number: int
    first_line: int
    end_line: int
    rows_per_group: int

    @property
    def step(self) -> str:
        """The unit's name in the journal."""
        return f"rows {self.split} {self.number}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _MappedBlock:
    """A block's rows as they are written, its malformed lines, and sums for the card."""

    rows: pa.Table
    malformed: tuple[MalformedLine, ...]
    positives: int
    dense_sum: np.ndarray
    dense_squares: np.ndarray


def write_rows(run: Run, draft: DatasetCard, bounds: Sequence[Bounds], num_lines: Sequence[int]) -> DatasetCard:
    """Writes the splits.

    Args:
        run: The conversion.
        draft: Card with the columns, whose vocabularies are written.
        bounds: Where the splits of each file begin.
        num_lines: Lines of each file.

    Returns:
        The card with sizes, positive rates and, if asked for, the normalisation of dense features.

    Raises:
        InputError: Too many lines are malformed, or a split has none that is not.
    """
    units = _deal_units(run, bounds, num_lines)
    finished = [unit for unit in units if unit.step in run.journal]
    state = RejectsState(**run.journal[finished[-1].step]["rejects"]) if finished else None
    tracker = Tracker(run, "writing rows", run.paths)
    with Rejects(run.out / REJECTS_FILE, run.max_reject_share, state=state) as rejects:
        if len(finished) < len(units):
            lookups = [
                RowLookup(
                    feature=feature,
                    num_rows=column.num_rows,
                    vocabulary=read_vocabulary(run.out / column.vocabulary) if column.vocabulary else None,
                )
                for feature, column in enumerate(draft.sparse)
            ]
            for file in range(len(run.paths)):
                _write_file(run, [unit for unit in units if unit.file == file], draft, lookups, rejects, tracker)
                tracker.file_done(run.paths[file])
    return _complete(run, draft, units)


def _deal_units(run: Run, bounds: Sequence[Bounds], num_lines: Sequence[int]) -> list[_Unit]:
    segments = [
        (file, *segment)
        for file, (bound, lines) in enumerate(zip(bounds, num_lines, strict=True))
        for segment in bound.segments(lines)
    ]
    in_split = {split: sum(end - first for _, of, first, end in segments if of == split) for split in SPLITS}
    numbers = {split: itertools.count() for split in SPLITS}
    units = []
    for file, split, first, end in segments:
        group = min(rows_per_group(in_split[split]), run.rows_per_file)
        lines_in_unit = run.rows_per_file // group * group
        for start in range(first, end, lines_in_unit):
            units.append(
                _Unit(
                    file=file,
                    split=split,
                    number=next(numbers[split]),
                    first_line=start,
                    end_line=min(start + lines_in_unit, end),
                    rows_per_group=group,
                )
            )
    return units


def _write_file(
    run: Run,
    units: Sequence[_Unit],
    draft: DatasetCard,
    lookups: Sequence[RowLookup],
    rejects: Rejects,
    tracker: Tracker,
) -> None:
    starts = [unit.first_line for unit in units]
    resume_at = next((unit.first_line for unit in units if unit.step not in run.journal), None)
    if resume_at is None:
        return
    path = run.paths[units[0].file]
    blocks = cut_blocks(read_blocks(path, progress=tracker.bytes_read), starts)
    blocks = (block for block in blocks if block.first_line >= resume_at)
    mapped = in_order(lambda block: _map_block(run, block, draft, lookups), blocks)
    for unit, of_unit in itertools.groupby(
        mapped, key=lambda pair: units[bisect.bisect_right(starts, pair[0].first_line) - 1]
    ):
        _write_unit(run, unit, path, of_unit, draft, rejects, tracker)


def _write_unit(
    run: Run,
    unit: _Unit,
    path: Path,
    blocks: Iterable[tuple[TextBlock, _MappedBlock]],
    draft: DatasetCard,
    rejects: Rejects,
    tracker: Tracker,
) -> None:
    positives = 0
    dense_sum, dense_squares = np.zeros(len(draft.dense)), np.zeros(len(draft.dense))
    with SplitWriter(
        run.out,
        unit.split,
        dataset_schema(draft),
        rows_per_group=unit.rows_per_group,
        rows_per_file=run.rows_per_file,
        first_file=unit.number,
    ) as writer:
        for block, mapped in blocks:
            note_lines(rejects, path, block.num_lines, mapped.malformed)
            tracker.lines_read(block.num_lines)
            writer.write(mapped.rows)
            positives += mapped.positives
            dense_sum += mapped.dense_sum
            dense_squares += mapped.dense_squares
    outcome = {
        "samples": writer.num_samples,
        "positives": positives,
        "dense_sum": dense_sum.tolist(),
        "dense_squares": dense_squares.tolist(),
        "rejects": dataclasses.asdict(rejects.state()),
    }
    run.journal.record(unit.step, outcome)


def _map_block(run: Run, block: TextBlock, draft: DatasetCard, lookups: Sequence[RowLookup]) -> _MappedBlock:
    parsed = parse_block(block)
    columns: dict[str, pa.Array | np.ndarray] = {draft.label: parsed.label}
    columns |= {column.name: values for column, values in zip(draft.dense, parsed.dense, strict=True)}
    for feature, column in enumerate(draft.sparse):
        ids = lookups[feature](parsed.ids[feature], parsed.present[feature])
        if not column.bag:
            columns[column.name] = ids
            continue
        size = column.max_pooling_factor
        bags = expand_bags(
            ids, num_rows=column.num_rows, pooling_factor=size, feature=feature, seed=run.spec.seed
        ).reshape(-1)
        offsets = np.arange(0, len(bags) + 1, size, dtype=np.int32)
        columns[column.name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(bags))
    dense = parsed.dense.astype(np.float64)
    return _MappedBlock(
        rows=pa.table(columns, schema=dataset_schema(draft)),
        malformed=parsed.malformed,
        positives=int(np.count_nonzero(parsed.label)),
        dense_sum=dense.sum(axis=1),
        dense_squares=(dense**2).sum(axis=1),
    )


def _complete(run: Run, draft: DatasetCard, units: Sequence[_Unit]) -> DatasetCard:
    splits = {}
    for split in SPLITS:
        outcomes = [run.journal[unit.step] for unit in units if unit.split == split]
        num_samples = sum(outcome["samples"] for outcome in outcomes)
        if not num_samples:
            raise InputError(
                f"{run.out}: the split {split!r} is empty, since all of its lines are malformed; see {REJECTS_FILE}"
            )
        positives = sum(outcome["positives"] for outcome in outcomes)
        splits[split] = SplitSummary(num_samples=num_samples, positive_rate=positives / num_samples)
    dense = draft.dense
    if run.spec.standardise:
        outcomes = [run.journal[unit.step] for unit in units if unit.split == "train"]
        mean = sum(np.array(outcome["dense_sum"]) for outcome in outcomes) / splits["train"].num_samples
        squares = sum(np.array(outcome["dense_squares"]) for outcome in outcomes) / splits["train"].num_samples
        std = np.sqrt(np.maximum(squares - mean**2, 0))
        dense = tuple(
            # A constant column has nothing to scale.
            DenseColumn(name=column.name, mean=float(mean[i]), std=float(std[i]) if std[i] > 1e-6 else 1.0)
            for i, column in enumerate(dense)
        )
    return dataclasses.replace(draft, dense=dense, splits=splits)
