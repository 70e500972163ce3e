"""Validation of a whole dataset against its card: what prepare.py check runs."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from dlrm_jax.data.card import CARD_FILE, DatasetCard, SparseColumn, read_card
from dlrm_jax.data.stream import open_stream
from dlrm_jax.data.validate import pooling_factors, validate_row_group, validate_schema
from dlrm_jax.data.vocabulary_digest import vocabulary_digest
from dlrm_jax.data.writer import rows_per_group
from sharding.errors import InputError

ROWS_AT_ONCE = 65_536
# Above this the loader's shuffle window holds too few groups; below 64 groups some virtual shards stay empty.
MAX_ROWS_PER_GROUP = 131_072
MIN_TRAIN_GROUPS = 64
MIN_ROWS_PER_GROUP = 256
# Cards are written by hand too, with figures rounded by people.
POSITIVE_RATE_TOLERANCE = 1e-3
POOLING_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureReport:
    """What a split holds of one sparse feature.

    Attributes:
        num_ids: Ids in all bags.
        max_id: Largest id; -1 if there is none.
        max_pooling_factor: Ids in the longest bag.
        empty_bags: Samples with no id.
    """

    num_ids: int = 0
    max_id: int = -1
    max_pooling_factor: int = 0
    empty_bags: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What a split holds.

    Attributes:
        num_files: Parquet files.
        num_row_groups: Row groups in all files.
        largest_row_group: Rows of the largest one.
        num_samples: Rows in all files.
        positive_rate: Mean label.
        features: Sparse features by name.
    """

    num_files: int
    num_row_groups: int
    largest_row_group: int
    num_samples: int
    positive_rate: float
    features: dict[str, FeatureReport]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What a valid dataset holds.

    Attributes:
        card: Its card.
        splits: Its splits by name.
        warnings: What is allowed but makes training slower or shuffling worse, one line each.
    """

    card: DatasetCard
    splits: dict[str, SplitReport]
    warnings: tuple[str, ...]


def split_files(directory: str | os.PathLike[str], split: str) -> list[Path]:
    """Returns the Parquet files of a split, in order of their names.

    Raises:
        InputError: There is none.
    """
    folder = Path(directory, split)
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise InputError(
            f"{folder}: no Parquet files (*.parquet) there, but {CARD_FILE} names the split {split!r}: "
            "write them, or take the split off the card"
        )
    return files


def check_dataset(
    directory: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> DatasetReport:
    """Reads a whole dataset once and checks it against its card, in the memory of some ten thousand rows.

    Checked are the card itself, the columns and their types, every value (see `validate_row_group`), that no split is
    empty, that sizes and mean labels of the splits, mean pooling factors and frequencies are what the card says, and
    that vocabularies exist and fit.

    Args:
        directory: Folder of the dataset.
        progress: Called with the number of rows checked so far and of all rows.

    Returns:
        What the dataset holds.

    Raises:
        InputError: The first thing that is wrong, naming file, row and column where there are such.
    """
    card = read_card(directory)
    total = sum(summary.num_samples for summary in card.splits.values())
    done = 0
    splits = {}
    for split in card.splits:
        accumulator = _SplitAccumulator(card)
        for path in split_files(directory, split):
            for rows in _checked_rows(path, card, accumulator):
                accumulator.add(rows)
                done += len(rows)
                if progress:
                    progress(done, max(done, total))
        splits[split] = accumulator.report()
        _compare_split(Path(directory, CARD_FILE), card, split, splits[split])
    if "train" in splits:
        for column in card.sparse:
            _compare_feature(Path(directory, CARD_FILE), column, splits["train"])
    for column in card.sparse:
        if column.vocabulary is not None:
            _check_vocabulary(Path(directory, column.vocabulary), column)
            _check_digest(Path(directory, column.vocabulary), column)
    return DatasetReport(card=card, splits=splits, warnings=tuple(_warnings(Path(directory), card, splits)))


class _SplitAccumulator:
    """Adds up a split's report, block by block."""

    def __init__(self, card: DatasetCard):
        self.num_files = 0
        self.group_sizes: list[int] = []
        self._card = card
        self._num_samples = 0
        self._label_sum = 0.0
        self._features = {column.name: FeatureReport() for column in card.sparse}

    def add(self, rows: pa.RecordBatch) -> None:
        self._num_samples += rows.num_rows
        self._label_sum += float(rows.column(self._card.label).to_numpy(zero_copy_only=False).sum(dtype=np.float64))
        for column in self._card.sparse:
            values = rows.column(column.name)
            lengths = (
                pooling_factors(values)
                if column.bag
                else (~values.is_null().to_numpy(zero_copy_only=False)).astype(np.int64)
            )
            ids = (values.flatten() if column.bag else values.drop_null()).to_numpy()
            before = self._features[column.name]
            self._features[column.name] = FeatureReport(
                num_ids=before.num_ids + len(ids),
                max_id=max(before.max_id, int(ids.max()) if len(ids) else -1),
                max_pooling_factor=max(before.max_pooling_factor, int(np.max(lengths, initial=0))),
                empty_bags=before.empty_bags + int(np.count_nonzero(lengths == 0)),
            )

    def report(self) -> SplitReport:
        return SplitReport(
            num_files=self.num_files,
            num_row_groups=len(self.group_sizes),
            largest_row_group=max(self.group_sizes, default=0),
            num_samples=self._num_samples,
            positive_rate=self._label_sum / max(self._num_samples, 1),
            features=self._features,
        )


def _checked_rows(path: Path, card: DatasetCard, accumulator: _SplitAccumulator) -> Iterator[pa.RecordBatch]:
    try:
        with open_stream(path) as file:
            validate_schema(file.schema_arrow, card, path)
            accumulator.num_files += 1
            accumulator.group_sizes += [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            columns = [card.label, *([card.sample_weight] if card.sample_weight else [])]
            columns += [column.name for column in (*card.dense, *card.sparse)]
            columns += [column.weights for column in card.sparse if column.weights]
            first_row = 0
            for rows in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
                validate_row_group(pa.Table.from_batches([rows]), card, path, first_row)
                first_row += rows.num_rows
                yield rows
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read as Parquet ({reason}): write the file again") from error


def _compare_split(card_path: Path, card: DatasetCard, split: str, report: SplitReport) -> None:
    expected = card.splits[split]
    if report.num_samples == 0:
        raise InputError(f"{card_path.parent / split}: the split is empty: write rows, or take it off {CARD_FILE}")
    if report.num_samples != expected.num_samples:
        raise InputError(
            f"{card_path}: splits.{split}.num_samples is {expected.num_samples}, but the files hold "
            f"{report.num_samples} rows: correct the card, or write the files again"
        )
    if not abs(report.positive_rate - expected.positive_rate) <= POSITIVE_RATE_TOLERANCE:
        raise InputError(
            f"{card_path}: splits.{split}.positive_rate is {expected.positive_rate}, but the mean label is "
            f"{report.positive_rate:.6f} (they may differ by {POSITIVE_RATE_TOLERANCE}): correct the card"
        )


def _compare_feature(card_path: Path, column: SparseColumn, train: SplitReport) -> None:
    num_ids = train.features[column.name].num_ids
    mean = num_ids / train.num_samples
    if not abs(column.mean_pooling_factor - mean) <= POOLING_TOLERANCE * max(mean, 1.0):
        raise InputError(
            f"{card_path}: mean_pooling_factor of {column.name!r} is {column.mean_pooling_factor}, but training "
            f"samples have {mean:.4f} ids on average (they may differ by {POOLING_TOLERANCE:.0%}): correct the card"
        )
    frequencies = column.frequencies
    if frequencies is None:
        return
    if not abs(frequencies.total - num_ids) <= POOLING_TOLERANCE * num_ids:
        raise InputError(
            f"{card_path}: frequencies.total of {column.name!r} is {frequencies.total}, but the training split holds "
            f"{num_ids} ids: count again, or set frequencies to null"
        )
    for id_, _ in frequencies.top:
        if not 0 <= id_ < column.num_rows:
            raise InputError(
                f"{card_path}: frequencies.top of {column.name!r} names id {id_}, but ids lie in "
                f"[0, {column.num_rows}): count again, or set frequencies to null"
            )


def _check_vocabulary(path: Path, column: SparseColumn) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file, but it is the vocabulary of {column.name!r}: write it, or set null")
    try:
        with open_stream(path) as file:
            names = file.schema_arrow.names
            if not {"id", "value", "count"} <= set(names):
                raise InputError(f"{path}: a vocabulary has the columns id, value and count; this one has {names}")
            kind = file.schema_arrow.field("id").type
            if not pa.types.is_integer(kind):
                raise InputError(f"{path}: column 'id' is {kind}, but must be an integer (int64): cast it")
            for rows in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=["id"]):
                ids = rows.column("id").to_numpy(zero_copy_only=False)
                outside = ids[~((ids >= 0) & (ids < column.num_rows))]
                if len(outside):
                    raise InputError(
                        f"{path}: id {outside[0]} of {column.name!r} lies outside [0, {column.num_rows}): "
                        f"repair it, or raise num_rows in {CARD_FILE}"
                    )
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read as Parquet ({reason}): write the file again") from error


def _check_digest(path: Path, column: SparseColumn) -> None:
    if column.vocabulary_digest is None:
        return
    digest = vocabulary_digest(path)
    if digest != column.vocabulary_digest:
        raise InputError(
            f"{path}: ids and values have digest {digest}, but {CARD_FILE} says {column.vocabulary_digest} of "
            f"{column.name!r}: restore the file, or set vocabulary_digest to null"
        )


def _warnings(directory: Path, card: DatasetCard, splits: dict[str, SplitReport]) -> Iterator[str]:
    for split, report in splits.items():
        if report.largest_row_group > MAX_ROWS_PER_GROUP:
            yield (
                f"{directory / split}: a row group of {report.largest_row_group} rows; groups of 16,384 "
                f"(at most {MAX_ROWS_PER_GROUP}) load faster and shuffle better"
            )
    train = splits.get("train")
    if train and train.num_samples >= MIN_TRAIN_GROUPS * MIN_ROWS_PER_GROUP and train.num_row_groups < MIN_TRAIN_GROUPS:
        yield (
            f"{directory / 'train'}: {train.num_row_groups} row groups, but the loader shuffles by group: "
            f"write at least {MIN_TRAIN_GROUPS}, for example with row_group_size={rows_per_group(train.num_samples)}"
        )
    if "train" not in splits:
        yield f"{directory}: no split 'train', so that models can be evaluated on it but not trained"
    for folder in sorted(path.parent.name for path in directory.glob("*/*.parquet")):
        if folder not in card.splits and folder != "vocabulary":
            yield f"{directory / folder}: holds Parquet files, but {CARD_FILE} names no such split"
            break
    for path in sorted(directory.glob("*/*.partial")):
        yield f"{path}: left over from an interrupted run; it is not read"
