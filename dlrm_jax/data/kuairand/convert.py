"""KuaiRand-Pure to a dataset: read and sort the log, count vocabularies, then write the splits in order of time."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn
from dlrm_jax.data.input_files import check_outside, reading
from dlrm_jax.data.kuairand.features import (
    HISTORY_BAGS,
    PLAIN_BAGS,
    PLAIN_DENSE,
    SINGLE_FEATURES,
    USER_FILE,
    VIDEO_FILE,
    FeatureSet,
    join_features,
    read_users,
    read_videos,
)
from dlrm_jax.data.kuairand.history import History, dense_history_names
from dlrm_jax.data.kuairand.log import log_files, read_days, spill_days
from dlrm_jax.data.kuairand.vocabulary import ValueCounts, Vocabulary
from dlrm_jax.data.rejects import REJECTS_FILE, Rejects, check_share
from dlrm_jax.data.resume import WORK_FOLDER, dataset_folder, finish_dataset
from dlrm_jax.data.vocabulary_digest import vocabulary_digest
from dlrm_jax.data.writer import ColumnStatistics, SplitWriter, dataset_schema, rows_per_group
from sharding.errors import InputError

_SPLITS: tuple[str, ...] = ("train", "validation", "test")


def prepare_kuairand(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    features: FeatureSet = "full",
    max_recent: int = 20,
    min_count: int = 2,
    train_until: int = 20220504,
    validation_until: int = 20220505,
    max_reject_share: float = 0.01,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetCard:
    """Converts the published CSV files of KuaiRand-Pure, its standard-policy log.

    Exact duplicates of a line are dropped and the rest is split by ``date``. Features of the impression, its user and
    its video are joined; the full set adds what was known strictly before the impression (`history`), from all
    impressions with a smaller ``time_ms``, of whichever split. Nothing that is known only after a click is a feature
    of its own impression. An interrupted conversion starts again from the beginning.

    Memory: the tables of users and videos; the rows of one day at a time, about 1 kB each; at most 60 recent events
    of each user, about 40 bytes each; and 40 bytes for each key of a past rate that occurred. Most of those keys are
    pairs of user and author or tag, up to about two for each line of the log: so up to 80 bytes a line.

    Args:
        source: Folder with ``log_standard*.csv``, ``user_features_pure.csv`` and ``video_features_basic_pure.csv``.
        out: Folder of the dataset.
        features: ``plain`` for the impression, user and video alone, ``full`` for history too.
        max_recent: Longest bag of recent events.
        min_count: How often a value must occur in the training split to have an id of its own; others have id 0.
        train_until: Last ``date`` of the training split, as YYYYMMDD.
        validation_until: Last ``date`` of the validation split; what is later is the test split.
        max_reject_share: Share of malformed lines above which the run stops.
        overwrite: Whether a dataset in the folder, or a part of one, is removed first.
        progress: Called with the rows done and the rows in all, where each row counts once for each of three passes.

    Returns:
        The dataset's card.

    Raises:
        InputError: A file cannot be read, lacks a column, is there twice or lies in ``out``, too many lines are
            malformed, a split is empty, a setting is out of its limits, the folder holds something else or cannot be
            written, another process is writing it, or the disk is full.
    """
    if features not in ("plain", "full"):
        raise InputError(f"kuairand: features is {features!r}, but must be 'plain' or 'full'")
    if max_recent < 1 or min_count < 1:
        raise InputError(f"kuairand: max_recent {max_recent} and min_count {min_count} must be at least 1")
    check_share(max_reject_share)
    folder, out = Path(source), Path(out)
    with reading():
        files = log_files(folder)
        for name in (USER_FILE, VIDEO_FILE):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: no such file; give the folder of the published CSV files")
        check_outside((*files, folder / USER_FILE, folder / VIDEO_FILE), out)
        num_lines = sum(_count_lines(path) for path in files)
    settings = {
        "converter": "kuairand",
        "files": [[path.name, path.stat().st_size] for path in (*files, folder / USER_FILE, folder / VIDEO_FILE)],
        "features": features,
        "max_recent": max_recent,
        "min_count": min_count,
        "train_until": train_until,
        "validation_until": validation_until,
    }
    with dataset_folder(out, settings, overwrite=overwrite, resumable=False) as finished:
        if finished:
            return finished
        for left in (WORK_FOLDER, *_SPLITS):
            shutil.rmtree(out / left, ignore_errors=True)
        try:
            rejects = Rejects(out / REJECTS_FILE, max_reject_share)
            advance = _advance(progress, 3 * num_lines)
            card = _convert(folder, out, files, settings, rejects, advance)
            # Lines that were dropped are done, too.
            advance(3 * num_lines)
        finally:
            shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
        finish_dataset(card, out)
    return card


def _convert(
    folder: Path,
    out: Path,
    files: Sequence[Path],
    settings: dict[str, Any],
    rejects: Rejects,
    advance: Callable[[int], None],
) -> DatasetCard:
    with rejects:
        users, videos = read_users(folder, rejects), read_videos(folder, rejects)
        days = spill_days(files, out / WORK_FOLDER, rejects, advance)

    def read_joined() -> Iterator[pl.DataFrame]:
        later = pl.when(pl.col("date") <= settings["validation_until"]).then(pl.lit("validation"))
        split = pl.when(pl.col("date") <= settings["train_until"]).then(pl.lit("train"))
        split = split.otherwise(later.otherwise(pl.lit("test"))).alias("split")
        for day in read_days(days):
            yield join_features(day, users, videos).with_columns(split)

    features = settings["features"]
    vocabularies, sizes = _count(read_joined(), settings["min_count"], advance)
    for split in _SPLITS:
        if not sizes[split]:
            raise InputError(f"{folder}: no impression belongs to the {split} split; check the log's dates")
    files_of = {name: f"vocabulary/{name}.parquet" for name in vocabularies}
    for name, vocabulary in vocabularies.items():
        vocabulary.write(out / files_of[name])
    digests = {name: vocabulary_digest(out / file) for name, file in files_of.items()}
    draft = DatasetCard(
        name=f"kuairand-{features}",
        dense=tuple(DenseColumn(name=name) for name in _dense_names(features)),
        sparse=tuple(
            SparseColumn(
                name=name,
                num_rows=vocabularies[shared].num_rows,
                bag=name in _bags(features),
                vocabulary=files_of[shared],
                vocabulary_digest=digests[shared],
            )
            for name, shared in ({name: name for name in SINGLE_FEATURES} | _bags(features)).items()
        ),
        splits={},
        source=settings,
    )
    history = History(settings["max_recent"]) if features == "full" else None
    return _write(read_joined(), out, draft, vocabularies, sizes, history, advance)


def _bags(features: FeatureSet) -> dict[str, str]:
    return PLAIN_BAGS | (HISTORY_BAGS if features == "full" else {})


def _dense_names(features: FeatureSet) -> tuple[str, ...]:
    return PLAIN_DENSE + (dense_history_names() if features == "full" else ())


def _count(
    days: Iterator[pl.DataFrame], min_count: int, advance: Callable[[int], None]
) -> tuple[dict[str, Vocabulary], dict[str, int]]:
    """Makes the vocabularies from the training split, and counts the rows of every split."""
    counts = {name: ValueCounts() for name in (*SINGLE_FEATURES, *PLAIN_BAGS)}
    sizes = dict.fromkeys(_SPLITS, 0)
    for day in days:
        for split in _SPLITS:
            rows = day.filter(pl.col("split") == split)
            sizes[split] += rows.height
            if split == "train":
                for name, counted in counts.items():
                    counted.add(rows[name])
        advance(day.height)
    return {name: counted.vocabulary(min_count) for name, counted in counts.items()}, sizes


def _write(
    days: Iterator[pl.DataFrame],
    out: Path,
    draft: DatasetCard,
    vocabularies: dict[str, Vocabulary],
    sizes: dict[str, int],
    history: History | None,
    advance: Callable[[int], None],
) -> DatasetCard:
    """Writes the splits and returns the card with its figures."""
    schema = dataset_schema(draft)
    statistics = ColumnStatistics(draft)
    shared = {name: name for name in SINGLE_FEATURES} | PLAIN_BAGS | HISTORY_BAGS
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(SplitWriter(out, split, schema, rows_per_group=rows_per_group(sizes[split])))
            for split in _SPLITS
        }
        for day in days:
            rows = day
            if history:
                keyed = day.with_columns(pl.col("author_id").fill_null(-1), pl.col("music_id").fill_null(""))
                rows = pl.concat([day, history.advance(keyed)], how="horizontal")
            rows = rows.with_columns(pl.col("is_click").alias(draft.label))
            rows = rows.with_columns(
                vocabularies[shared[column.name]].ids(rows[column.name]) for column in draft.sparse
            )
            for split, writer in writers.items():
                table = rows.filter(pl.col("split") == split).select(schema.names).to_arrow().cast(schema)
                writer.write(table)
                statistics.add(split, table)
            advance(day.height)
    return statistics.card()


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def _advance(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress:
            progress(min(done, total), total)

    return advance
