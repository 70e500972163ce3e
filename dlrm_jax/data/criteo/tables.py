"""The second step on Criteo logs: every feature's counts become its table's rows, vocabulary and frequencies."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int64

from dlrm_jax.data.card import Frequencies, SparseColumn
from dlrm_jax.data.criteo.run import Run
from dlrm_jax.data.criteo.vocabulary import (
    CountedIds,
    check_memory,
    collect_counts,
    count_hashed_rows,
    write_vocabulary,
)
from dlrm_jax.data.criteo_columns import NUM_SPARSE, SPARSE_NAMES
from dlrm_jax.data.multi_hot import POOLING_FACTORS, expand_bags
from dlrm_jax.data.vocabulary_digest import vocabulary_digest
from dlrm_jax.data.writer import summarise_frequencies

_BYTES_TO_SUMMARISE = 40  # for each row: the counts, their order, their sums
_IDS_AT_ONCE = 2**16


def make_vocabularies(run: Run) -> tuple[SparseColumn, ...]:
    """Adds the spilled counts up and gives every feature its rows; writes the vocabularies.

    Frequencies follow from the counts: row 0 occurs in every training line whose id is missing or rare, and a bag
    holds what `expand_bags` gives its id. They are left out for a hashed table too large for the memory limit.

    Raises:
        InputError: The vocabularies do not fit in memory.
    """
    counted_files = [i for i in range(len(run.paths)) if f"count {i}" in run.journal]
    num_samples = sum(run.journal[f"count {i}"]["accepted"] for i in counted_files)
    run.progress("making vocabularies", 0, NUM_SPARSE, 0)
    if "counts" not in run.journal:
        counted = collect_counts(
            [run.count_folder(i) for i in counted_files],
            run.work / "counts",
            num_features=NUM_SPARSE,
            frequency_threshold=run.spec.frequency_threshold,
            memory_limit=run.memory_limit,
        )
        run.journal.record("counts", [dataclasses.asdict(feature) for feature in counted])
    counted = [CountedIds(**feature) for feature in run.journal["counts"]]
    check_memory(counted, [_is_hashed(run, feature) for feature in counted], SPARSE_NAMES, run.memory_limit)
    columns = []
    for feature in range(NUM_SPARSE):
        step = f"vocabulary {feature}"
        if step not in run.journal:
            column = _make_vocabulary(run, feature, counted[feature], num_samples)
            run.journal.record(step, dataclasses.asdict(column))
        columns.append(_decode(run.journal[step]))
        run.progress("making vocabularies", feature + 1, NUM_SPARSE, 0)
    return tuple(columns)


def _decode(column: dict[str, Any]) -> SparseColumn:
    frequencies = column["frequencies"]
    if frequencies is not None:
        pairs = {name: tuple(map(tuple, frequencies[name])) for name in ("top", "coverage")}
        frequencies = Frequencies(total=frequencies["total"], distinct=frequencies["distinct"], **pairs)
    return SparseColumn(**{**column, "frequencies": frequencies})


def _is_hashed(run: Run, counted: CountedIds) -> bool:
    return run.spec.max_rows is not None and 1 + counted.frequent > run.spec.max_rows


def _make_vocabulary(run: Run, feature: int, counted: CountedIds, num_samples: int) -> SparseColumn:
    name = SPARSE_NAMES[feature]
    counts_folder = run.work / "counts"
    counts = vocabulary = None
    if run.spec.max_rows is not None and _is_hashed(run, counted):
        num_rows = run.spec.max_rows
        if _BYTES_TO_SUMMARISE * num_rows <= run.memory_limit:
            num_missing = num_samples - counted.occurrences
            counts = count_hashed_rows(counts_folder, feature, num_rows=num_rows, num_missing=num_missing)
    else:
        num_rows = 1 + counted.frequent
        vocabulary = f"vocabulary/{name}.parquet"
        (run.out / vocabulary).parent.mkdir(exist_ok=True)
        frequent = write_vocabulary(
            counts_folder, feature, run.out / vocabulary, frequency_threshold=run.spec.frequency_threshold
        )
        counts = np.concatenate([[num_samples - counted.frequent_occurrences], frequent])
    pooling_factor = POOLING_FACTORS[feature] if run.spec.multi_hot else 1
    if counts is not None and pooling_factor > 1:
        counts = _count_bags(counts, feature, pooling_factor, run.spec.seed)
    return SparseColumn(
        name=name,
        num_rows=num_rows,
        bag=pooling_factor > 1,
        max_pooling_factor=pooling_factor,
        mean_pooling_factor=float(pooling_factor),
        vocabulary=vocabulary,
        vocabulary_digest=None if vocabulary is None else vocabulary_digest(run.out / vocabulary),
        frequencies=None if counts is None else summarise_frequencies(counts),
    )


def _count_bags(
    counts: Int64[np.ndarray, " rows"], feature: int, pooling_factor: int, seed: int
) -> Int64[np.ndarray, " rows"]:
    """Returns how often each row occurs in bags, given how often each bag's first row does."""
    in_bags = np.zeros_like(counts)
    for start in range(0, len(counts), _IDS_AT_ONCE):
        ids = np.arange(start, min(start + _IDS_AT_ONCE, len(counts)))
        bags = expand_bags(ids, num_rows=len(counts), pooling_factor=pooling_factor, feature=feature, seed=seed)
        np.add.at(in_bags, bags.reshape(-1), np.repeat(counts[ids], pooling_factor))
    return in_bags
