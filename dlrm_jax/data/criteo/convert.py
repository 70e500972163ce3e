"""Criteo click logs to a dataset. Described for users in docs/data.md.

Nothing is held whole: lines go by in blocks, counts are spilled to disk. Each pass is cut into steps that a journal
records, so an interrupted run is taken up where it stopped.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlrm_jax.data.card import DatasetCard, DenseColumn
from dlrm_jax.data.criteo.count import count_ids, place_splits
from dlrm_jax.data.criteo.rows import write_rows
from dlrm_jax.data.criteo.run import Progress, Run
from dlrm_jax.data.criteo.spec import CriteoSpec, check_spec, list_files
from dlrm_jax.data.criteo.tables import make_vocabularies
from dlrm_jax.data.criteo_columns import DENSE_NAMES
from dlrm_jax.data.input_files import check_outside
from dlrm_jax.data.journal import Journal
from dlrm_jax.data.rejects import check_share
from dlrm_jax.data.resume import WORK_FOLDER, dataset_folder, finish_dataset
from dlrm_jax.data.writer import ROWS_PER_FILE
from sharding.errors import InputError

# 1 PiB, more than any machine has.
MAX_MEMORY_MB = 2**30


def prepare_criteo(
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    spec: CriteoSpec | None = None,
    max_reject_share: float = 0.01,
    memory_limit_mb: float = 2048,
    rows_per_file: int = ROWS_PER_FILE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DatasetCard:
    """Converts the TSV files of Criteo Kaggle or Terabyte.

    A line holds the label, 13 integers and 26 hexadecimal ids of 32 bits, separated by tabs; integers and ids may be
    empty. An integer x becomes ``log(1 + max(x, 0))``, a missing one 0 (the reference implementations do the same). A
    missing id becomes row 0. Vocabularies are counted over training lines alone and ordered by descending count, then
    value. Malformed lines are written to rejects.csv and count as lines for the split.

    The same call takes an interrupted one up again and gives the same files, byte for byte.

    Args:
        files: Files in order of time, plain or gzip-compressed; a folder stands for the files in it in order of their
            names, where numbers count as numbers (day_2 before day_10).
        out: Folder of the dataset.
        spec: What becomes of the lines.
        max_reject_share: Share of malformed lines above which the run stops.
        memory_limit_mb: Memory for the tables of counts and for the vocabularies, in MiB. The program and the blocks
            of lines on their way take about 500 MiB besides. It does not change the result.
        rows_per_file: Lines that become one Parquet file.
        overwrite: Whether a dataset in the folder, or a part of one, is removed first.
        progress: Called with the name of the pass, bytes read, bytes to read, and lines read.

    Returns:
        The dataset's card.

    Raises:
        InputError: A file cannot be read, is given twice or lies in ``out``, too many lines are malformed, a setting
            is out of its limits, a vocabulary does not fit in memory, the folder holds a complete dataset, or one begun
            with other settings, cannot be written, or another process is writing it, or the disk is full.
    """
    spec = spec or CriteoSpec()
    paths = list_files(files)
    check_outside(paths, out)
    check_spec(spec, paths)
    check_share(max_reject_share)
    if not 0 < memory_limit_mb <= MAX_MEMORY_MB:
        raise InputError(
            f"--memory_limit_mb is {memory_limit_mb}, but it must be above 0 and at most {MAX_MEMORY_MB}: give the "
            "MiB that this machine can spare"
        )
    if rows_per_file < 1:
        raise InputError(f"rows_per_file is {rows_per_file}, but it must be at least 1")
    source = {
        "converter": "criteo",
        "files": [[path.name, path.stat().st_size] for path in paths],
        **dataclasses.asdict(spec),
        "rows_per_file": rows_per_file,
    }
    with dataset_folder(out, source, overwrite=overwrite) as finished:
        if finished:
            raise InputError(
                f"{os.fspath(out)}: complete already; make it anew with --overwrite, or give another --out"
            )
        work = Path(out, WORK_FOLDER)
        work.mkdir(exist_ok=True)
        run = Run(
            paths=paths,
            out=Path(out),
            work=work,
            spec=spec,
            journal=Journal(work / "journal.jsonl"),
            max_reject_share=max_reject_share,
            memory_limit=int(memory_limit_mb * 2**20),
            rows_per_file=rows_per_file,
            progress=progress or (lambda stage, done, total, lines: None),
        )
        card = _convert(run, source)
        finish_dataset(card, out)
    return card


def _convert(run: Run, source: dict[str, Any]) -> DatasetCard:
    bounds = place_splits(run)
    num_lines = count_ids(run, bounds)
    draft = DatasetCard(
        name="criteo",
        dense=tuple(DenseColumn(name=name) for name in DENSE_NAMES),
        sparse=make_vocabularies(run),
        splits={},
        source=source,
    )
    return write_rows(run, draft, bounds, num_lines)
