"""Synthetic click logs from a planted logistic model, so that the attainable AUC and NE are known.

Letters: n samples of a block, L ids of all bags of a block.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, UInt64

from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn
from dlrm_jax.data.hashing import mix64
from dlrm_jax.data.resume import dataset_folder, finish_dataset
from dlrm_jax.data.writer import ColumnStatistics, SplitWriter, dataset_schema, rows_per_group
from sharding.errors import InputError

PROBABILITY = "probability"
_ROWS_PER_BLOCK = 65_536
_ROWS_PER_FILE = 4 * _ROWS_PER_BLOCK
_SPLITS = ("train", "validation", "test")
# Bins of the probability for the attainable AUC; within a bin a positive and a negative sample count as a tie.
_BINS = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSpec:
    """What to generate. The defaults are the data of the `quickstart` config.

    Attributes:
        seed: Seed of everything random. A sample depends on seed, split and its block of 65,536 rows alone.
        num_train: Samples of the training split.
        num_validation: Samples of the validation split.
        num_test: Samples of the test split.
        num_dense: Dense features ``dense_0``, ..., each standard normal.
        single_rows: Rows of the table of each feature with one id: ``id_0``, ...
        bag_rows: Rows of the table of each feature with a bag of ids: ``bag_0``, ...
        mean_pooling_factor: Mean number of ids in a bag before ``max_pooling_factor`` cuts it. Lengths are geometric,
            so some bags are empty.
        max_pooling_factor: Longest bag.
        weighted_bags: Whether bags have weights, uniform in [0.5, 1.5).
        zipf_exponent: The i-th most frequent id of a feature has a frequency proportional to ``i ** -zipf_exponent``
            (nearly: a continuous power law, rounded down).
        bias: Constant term of the planted logit.
        dense_effect: Standard deviation of the dense features' part of the logit.
        sparse_effect: Standard deviation of the sparse features' part of the logit, were all ids common.
        interaction_effect: Standard deviation of the part that depends on pairs of features with one id, likewise.
        num_interactions: Number of such pairs: features 0 and 1, then 1 and 2, ...
        rare_count: An id that is expected n times in training has effects smaller by ``sqrt(n / (n + rare_count))``:
            what cannot be learnt from the training split is not planted.
    """

    seed: int = 0
    num_train: int = 2_000_000
    num_validation: int = 50_000
    num_test: int = 50_000
    num_dense: int = 8
    single_rows: tuple[int, ...] = (10, 20, 50, 100, 200, 500, 1000, 2000)
    bag_rows: tuple[int, ...] = (200, 1000)
    mean_pooling_factor: float = 4.0
    max_pooling_factor: int = 20
    weighted_bags: bool = False
    zipf_exponent: float = 1.2
    bias: float = -1.0
    dense_effect: float = 1.0
    sparse_effect: float = 1.0
    interaction_effect: float = 0.3
    num_interactions: int = 1
    rare_count: float = 1000.0

    def num_samples(self, split: str) -> int:
        """Returns the number of samples of a split."""
        return {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}[split]


def prepare_synthetic(
    out: str | os.PathLike[str],
    *,
    config: SyntheticSpec,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetCard:
    """Generates a dataset, block by block; a call that was interrupted continues at the first file that is missing.

    The files hold a column `probability` beside those of the card: the planted probability of a click. ::

        logit = bias + w . dense + sum_f sum_{i in bag_f} weight_i e(f, i) + sum_(f, g) <v(f, i_f), v(g, i_g)>

    ``e`` is a normal number and ``v`` a vector of two, both hashes of (seed, feature, id); the label is 1 with
    probability sigmoid(logit). The card's ``attainable`` has the AUC, NE and log loss of that probability on each
    split's labels.

    Args:
        out: Folder of the dataset.
        config: What to generate.
        overwrite: Whether a dataset in the folder, or a part of one, is removed first.
        progress: Called with the rows done and the rows in all.

    Returns:
        The dataset's card.

    Raises:
        InputError: A setting is out of its limits, the folder holds something else or cannot be written, another
            process is writing it, or the disk is full.
    """
    _check_spec(config)
    source = {"converter": "synthetic", **dataclasses.asdict(config)}
    # As JSON gives them back.
    source |= {"single_rows": list(config.single_rows), "bag_rows": list(config.bag_rows)}
    with dataset_folder(out, source, overwrite=overwrite) as finished:
        if finished:
            return finished
        card = _generate(out, config, source, progress)
        finish_dataset(card, out)
    return card


def _generate(
    out: str | os.PathLike[str],
    config: SyntheticSpec,
    source: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> DatasetCard:
    draft = DatasetCard(
        name="synthetic",
        dense=tuple(DenseColumn(name=f"dense_{i}") for i in range(config.num_dense)),
        sparse=tuple(_columns(config)),
        splits={},
        source=source,
    )
    schema = dataset_schema(draft).append(pa.field(PROBABILITY, pa.float32()))
    total = sum(map(config.num_samples, _SPLITS))
    done = 0
    for split in _SPLITS:
        num_samples = config.num_samples(split)
        for start in range(0, num_samples, _ROWS_PER_FILE):
            end = min(start + _ROWS_PER_FILE, num_samples)
            if not Path(out, split, f"part-{start // _ROWS_PER_FILE:05d}.parquet").exists():
                writer = SplitWriter(
                    out,
                    split,
                    schema,
                    rows_per_group=min(rows_per_group(num_samples), _ROWS_PER_BLOCK),
                    rows_per_file=2 * _ROWS_PER_FILE,
                    first_file=start // _ROWS_PER_FILE,
                )
                with writer:
                    for block_start in range(start, end, _ROWS_PER_BLOCK):
                        block = generate_block(config, split, block_start // _ROWS_PER_BLOCK)
                        writer.write(block.slice(0, end - block_start))
            done += end - start
            if progress:
                progress(done, total)
    statistics = ColumnStatistics(draft)
    statistics.add_files(out, _SPLITS)
    return dataclasses.replace(
        statistics.card(), attainable={split: _attainable(Path(out, split)) for split in _SPLITS}
    )


def generate_block(config: SyntheticSpec, split: str, block: int) -> pa.Table:
    """Generates one block of 65,536 samples: the columns of the card, and `probability`."""
    n = _ROWS_PER_BLOCK
    random = np.random.default_rng([config.seed, _SPLITS.index(split), block])
    dense = random.standard_normal((n, config.num_dense)).astype(np.float32)
    logit = np.full(n, config.bias) + dense @ _dense_weights(config)
    columns: dict[str, pa.Array | np.ndarray] = {f"dense_{i}": dense[:, i] for i in range(config.num_dense)}
    ranks = []
    scale = config.sparse_effect / math.sqrt(max(1, len(config.single_rows) + len(config.bag_rows)))
    for feature, column in enumerate(_columns(config)):
        if not column.bag:
            rank = _zipf_ranks(random.random(n), column.num_rows, config.zipf_exponent)
            ranks.append(rank)
            columns[column.name] = _permute(config, feature, rank, column.num_rows)
            logit += scale * _effects(config, feature, rank, column, 0)
            continue
        stop_probability = 1.0 / (1.0 + config.mean_pooling_factor)
        lengths = np.minimum(random.geometric(stop_probability, n) - 1, config.max_pooling_factor)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        rank = _zipf_ranks(random.random(offsets[-1]), column.num_rows, config.zipf_exponent)
        ids = _permute(config, feature, rank, column.num_rows)
        columns[column.name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))
        effects = scale / math.sqrt(config.mean_pooling_factor) * _effects(config, feature, rank, column, 0)
        if column.weights:
            weights = (random.random(offsets[-1]) + 0.5).astype(np.float32)
            columns[column.weights] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(weights))
            effects = effects * weights
        logit += np.bincount(np.repeat(np.arange(n), lengths), effects, minlength=n)
    for pair in range(config.num_interactions):
        logit += _interaction(config, pair, ranks[pair], ranks[pair + 1])
    probability = 1.0 / (1.0 + np.exp(-logit))
    columns["label"] = (random.random(n) < probability).astype(np.float32)
    columns[PROBABILITY] = probability.astype(np.float32)
    return pa.table(columns)


def _columns(config: SyntheticSpec) -> list[SparseColumn]:
    single = [SparseColumn(name=f"id_{i}", num_rows=rows) for i, rows in enumerate(config.single_rows)]
    return single + [
        SparseColumn(
            name=f"bag_{i}", num_rows=rows, bag=True, weights=f"bag_{i}_weight" if config.weighted_bags else None
        )
        for i, rows in enumerate(config.bag_rows)
    ]


def _check_spec(config: SyntheticSpec) -> None:
    num_pairs = max(0, len(config.single_rows) - 1)
    limits = {
        "num_train": (config.num_train, 1, 2**40),
        "num_validation": (config.num_validation, 1, 2**40),
        "num_test": (config.num_test, 1, 2**40),
        "num_dense": (config.num_dense, 0, 2**16),
        "mean_pooling_factor": (config.mean_pooling_factor, 0.01, 2**15),
        "max_pooling_factor": (config.max_pooling_factor, 1, 2**15),
        "zipf_exponent": (config.zipf_exponent, 0, 10),
        "rare_count": (config.rare_count, 0, math.inf),
        "num_interactions": (config.num_interactions, 0, num_pairs),
        "seed": (config.seed, 0, 2**63),
        "bias": (config.bias, -100, 100),
        "dense_effect": (config.dense_effect, 0, 100),
        "sparse_effect": (config.sparse_effect, 0, 100),
        "interaction_effect": (config.interaction_effect, 0, 100),
    }
    limits |= {f"single_rows[{i}]": (rows, 1, 2**31 - 1) for i, rows in enumerate(config.single_rows)}
    limits |= {f"bag_rows[{i}]": (rows, 1, 2**31 - 1) for i, rows in enumerate(config.bag_rows)}
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            message = f"synthetic: {name} is {value}, but must lie in [{low}, {high}]"
            if name == "num_interactions" and value > high:
                pairs = f"features with one id (--single_rows) are {len(config.single_rows)}"
                message += f", since {pairs}: give --num_interactions {num_pairs}, or more --single_rows"
            raise InputError(message)


def _dense_weights(config: SyntheticSpec) -> Float[np.ndarray, " num_dense"]:
    weights = _normals(config.seed, 2**32, np.arange(config.num_dense, dtype=np.uint64), 0)
    return weights * config.dense_effect / max(float(np.linalg.norm(weights)), 1e-12)


def _zipf_ranks(uniform: Float[np.ndarray, " n"], num_rows: int, exponent: float) -> Int[np.ndarray, " n"]:
    """Draws ranks 0, ..., num_rows - 1 by inverting the distribution of x ** -exponent on [1, num_rows + 1)."""
    if exponent == 1.0:
        x = (num_rows + 1.0) ** uniform
    else:
        power = 1.0 - exponent
        x = (1.0 + uniform * ((num_rows + 1.0) ** power - 1.0)) ** (1.0 / power)
    return np.minimum(x.astype(np.int64) - 1, num_rows - 1)


def _rank_probability(rank: Int[np.ndarray, " n"], num_rows: int, exponent: float) -> Float[np.ndarray, " n"]:
    """Returns the probability with which `_zipf_ranks` draws each rank."""
    if exponent == 1.0:
        return np.log1p(1.0 / (rank + 1.0)) / math.log(num_rows + 1.0)
    power = 1.0 - exponent
    return ((rank + 2.0) ** power - (rank + 1.0) ** power) / ((num_rows + 1.0) ** power - 1.0)


def _permute(config: SyntheticSpec, feature: int, rank: Int[np.ndarray, " n"], num_rows: int) -> Int[np.ndarray, " n"]:
    """Maps ranks to ids one to one, so that frequent ids do not lie side by side: ``a * rank + c mod num_rows``."""
    first, shift = (int(bits) for bits in _hash(config.seed, feature, np.arange(2, dtype=np.uint64), 7))
    factor = first % num_rows
    while math.gcd(factor, num_rows) != 1:
        factor += 1
    return (rank * (factor % num_rows) + shift % num_rows) % num_rows


def _effects(
    config: SyntheticSpec, feature: int, rank: Int[np.ndarray, " n"], column: SparseColumn, stream: int
) -> Float[np.ndarray, " n"]:
    """Returns one normal number for each id, smaller where the training split shows the id rarely."""
    per_sample = config.mean_pooling_factor if column.bag else 1.0
    expected = _rank_probability(rank, column.num_rows, config.zipf_exponent) * config.num_train * per_sample
    return _normals(config.seed, feature, rank.astype(np.uint64), stream) * np.sqrt(
        expected / (expected + config.rare_count)
    )


def _interaction(
    config: SyntheticSpec, pair: int, left: Int[np.ndarray, " n"], right: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Returns the inner products of two-dimensional vectors of the ids of features ``pair`` and ``pair + 1``."""
    columns = _columns(config)
    product = np.zeros(len(left))
    for axis in range(2):
        stream = 1 + 2 * pair + axis
        product += _effects(config, pair, left, columns[pair], stream) * _effects(
            config, pair + 1, right, columns[pair + 1], stream
        )
    return product * config.interaction_effect / math.sqrt(2 * config.num_interactions)


def _hash(seed: int, feature: int, counter: UInt64[np.ndarray, " n"], stream: int) -> UInt64[np.ndarray, " n"]:
    """Mixes the four into 64 random bits."""
    bits = np.zeros_like(counter)
    for word in (seed, feature, stream):
        bits = mix64(bits ^ np.uint64(word))
    return mix64(bits ^ counter)


def _normals(seed: int, feature: int, counter: UInt64[np.ndarray, " n"], stream: int) -> Float[np.ndarray, " n"]:
    """Returns standard normal numbers that depend on the arguments alone (Box and Muller)."""
    bits = _hash(seed, feature, counter, stream)
    radius = np.sqrt(-2.0 * np.log(((bits >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32))
    return radius * np.cos(2.0 * np.pi * (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32)


def _attainable(folder: Path) -> dict[str, float]:
    """Returns AUC, NE and log loss of the planted probability on the labels of a split, one row group at a time."""
    negatives, positives = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
    log_loss = 0.0
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=["label", PROBABILITY])
                label = rows.column("label").to_numpy() > 0.5
                probability = rows.column(PROBABILITY).to_numpy().astype(np.float64)
                bins = (probability * (_BINS - 1)).astype(np.int64)
                positives += np.bincount(bins[label], minlength=_BINS)
                negatives += np.bincount(bins[~label], minlength=_BINS)
                log_loss -= np.log(np.clip(np.where(label, probability, 1.0 - probability), 1e-12, None)).sum()
    num_positive, num_negative = int(positives.sum()), int(negatives.sum())
    num_samples = num_positive + num_negative
    log_loss /= num_samples
    rate = num_positive / num_samples
    figures = {"log_loss": float(log_loss)}
    if num_positive and num_negative:
        below = np.cumsum(negatives) - negatives
        figures["auc"] = float((positives * (below + 0.5 * negatives)).sum() / num_positive / num_negative)
        figures["ne"] = float(log_loss / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)))
    return figures
