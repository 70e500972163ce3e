"""What a conversion of Criteo logs is given: settings, and files in order of time."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dlrm_jax.data.input_files import check_distinct, reading
from sharding.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriteoSpec:
    """What becomes of the lines.

    Attributes:
        frequency_threshold: An id has a row of its own if it occurs in so many training lines; rarer ones share row 0
            with missing ones.
        max_rows: Largest number of rows of a table. A feature with more frequent ids than fit is hashed to the rows
            1, ..., max_rows - 1 (all its ids, the rare ones too); None: no limit, nothing is hashed.
        split: "lines": the last lines are for evaluation; "last_file": the last file is; "auto": last_file if there are
            several files, otherwise lines. The first half of the evaluation lines is the validation split, the other
            half the test split.
        evaluation_share: Share of all lines that are for evaluation where the split is by lines; a seventh is the
            last day of Criteo Kaggle.
        standardise: Whether the card gives each dense feature the mean and standard deviation of its training lines,
            instead of 0 and 1 as the reference implementations have it.
        multi_hot: Whether single ids are expanded to bags of the sizes of MLPerf DLRM-DCNv2.
        seed: Seed of the ids that fill these bags.
    """

    frequency_threshold: int = 1
    max_rows: int | None = None
    split: Literal["auto", "lines", "last_file"] = "auto"
    evaluation_share: float = 1 / 7
    standardise: bool = False
    multi_hot: bool = False
    seed: int = 0


def list_files(files: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Returns the files named, with the files of a folder in order of their names (day_2 before day_10).

    Raises:
        InputError: A file does not exist, cannot be read or is empty, one is given twice, or none is given.
    """
    paths: list[Path] = []
    with reading():
        for path in map(Path, files):
            inside = (
                [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")] if path.is_dir() else [path]
            )
            paths += sorted(inside, key=_natural_order)
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path}: no such file; give the TSV files in order of time, or their folder")
            if not path.stat().st_size:
                raise InputError(f"{path}: the file is empty; copy it again, or leave it out")
        check_distinct(paths)
    if not paths:
        raise InputError(f"no input files in {[os.fspath(f) for f in files]}; give the TSV files in order of time")
    return paths


def _natural_order(path: Path) -> list[tuple[bool, int, str]]:
    runs = ["".join(run) for _, run in itertools.groupby(path.name, str.isdecimal)]
    return [(run.isdecimal(), int(run) if run.isdecimal() else 0, run) for run in runs]


def check_spec(spec: CriteoSpec, paths: Sequence[Path]) -> None:
    """Checks the settings.

    Raises:
        InputError: One is out of its limits.
    """
    if spec.frequency_threshold < 1:
        raise InputError(f"--frequency_threshold is {spec.frequency_threshold}, but it must be at least 1")
    if spec.max_rows is not None and not 2 <= spec.max_rows <= 2**31:
        raise InputError(f"--max_rows is {spec.max_rows}, but it must lie in [2, 2^31]")
    if not 0 <= spec.seed < 2**64:
        raise InputError(f"--seed is {spec.seed}, but it must lie in [0, 2^64 - 1]")
    if not 0 < spec.evaluation_share < 1:
        raise InputError(f"--evaluation_share is {spec.evaluation_share}, but it must lie between 0 and 1")
    if spec.split == "last_file" and len(paths) < 2:
        raise InputError(f"--split last_file needs at least 2 files, but there is {paths[0]} alone: use --split lines")
