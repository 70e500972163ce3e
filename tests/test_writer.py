"""SplitWriter and ColumnStatistics: whole row groups, files that appear only when complete, figures of the card."""

import dataclasses

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_jax.data.card import DatasetCard, DenseColumn, Frequencies, SparseColumn, read_card, write_card
from dlrm_jax.data.writer import ColumnStatistics, SplitWriter, dataset_schema, rows_per_group, summarise_frequencies
from sharding.errors import InputError

CARD = DatasetCard(
    name="small",
    sample_weight="importance",
    dense=(DenseColumn(name="age"), DenseColumn(name="constant")),
    sparse=(
        SparseColumn(name="user", num_rows=10),
        SparseColumn(name="videos", num_rows=6, bag=True, weights="videos_weight"),
    ),
    splits={},
)


def rows(count: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    bags = [rng.integers(0, 6, size).tolist() for size in rng.integers(0, 4, count)]
    return pa.table(
        {
            "label": rng.integers(0, 2, count).astype(np.int8),
            "importance": np.ones(count),
            "age": rng.normal(3.0, 2.0, count),
            "constant": np.full(count, 0.1),
            "user": rng.integers(0, 10, count),
            "videos": bags,
            "videos_weight": [[0.5] * len(bag) for bag in bags],
        }
    )


def read_split(folder):
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))])


def test_schema_of_a_card_has_a_column_for_everything_it_names():
    schema = dataset_schema(CARD)
    assert schema.names == ["label", "importance", "age", "constant", "user", "videos", "videos_weight"]
    assert schema.field("label").type == pa.float32()
    assert schema.field("user").type == pa.int64()
    assert schema.field("videos").type == pa.list_(pa.int64())
    assert schema.field("videos_weight").type == pa.list_(pa.float32())


@pytest.mark.parametrize("block", [1, 7, 10, 64])
def test_writer_when_blocks_are_of_any_size_then_groups_are_whole_and_rows_in_order(tmp_path, block):
    table = rows(64)
    with SplitWriter(tmp_path, "train", dataset_schema(CARD), rows_per_group=10, rows_per_file=25) as writer:
        for start in range(0, 64, block):
            writer.write(table.slice(start, block))
    files = sorted((tmp_path / "train").iterdir())
    assert [file.name for file in files] == [f"part-{i:05d}.parquet" for i in range(4)]
    groups = [meta.row_group(i).num_rows for meta in map(pq.read_metadata, files) for i in range(meta.num_row_groups)]
    assert groups == [10] * 6 + [4]
    assert (writer.num_samples, writer.num_files) == (64, 4)
    assert read_split(tmp_path / "train").equals(table.cast(dataset_schema(CARD)))


def test_writer_when_left_by_an_exception_then_only_complete_files_remain(tmp_path):
    def write_and_fail():
        with SplitWriter(tmp_path, "train", dataset_schema(CARD), rows_per_group=10, rows_per_file=20) as writer:
            writer.write(rows(35))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail()
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["part-00000.parquet"]


def test_writer_when_given_a_first_file_then_numbers_go_on_from_it(tmp_path):
    with SplitWriter(tmp_path, "train", dataset_schema(CARD), first_file=3) as writer:
        writer.write(rows(5).to_batches()[0])
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["part-00003.parquet"]


def test_writer_when_there_are_no_rows_then_there_is_no_file(tmp_path):
    with SplitWriter(tmp_path, "test", dataset_schema(CARD)) as writer:
        writer.write(rows(0))
    assert list((tmp_path / "test").iterdir()) == []


def test_writer_when_a_column_is_missing_or_of_another_type_then_error_names_it(tmp_path):
    table = rows(5)
    with SplitWriter(tmp_path, "train", dataset_schema(CARD)) as writer:
        with pytest.raises(InputError, match="column 'user' is missing"):
            writer.write(table.drop_columns(["user"]))
        with pytest.raises(InputError, match="does not fit the schema"):
            writer.write(table.set_column(table.column_names.index("user"), "user", pa.array(["a"] * 5)))


@pytest.mark.parametrize(("num_samples", "expected"), [(0, 256), (64 * 256, 256), (167_281, 2613), (10**8, 16_384)])
def test_rows_per_group_gives_64_groups_where_it_can(num_samples, expected):
    assert rows_per_group(num_samples) == expected
    if num_samples >= 64 * 256:
        assert -(-num_samples // expected) >= 64


def test_statistics_when_blocks_are_added_then_the_card_equals_a_direct_computation(tmp_path):
    train, test = rows(1000, seed=1), rows(300, seed=2)
    statistics = ColumnStatistics(CARD)
    for start in range(0, 1000, 130):
        statistics.add("train", train.slice(start, 130))
    statistics.add("test", test.to_batches()[0])
    card = statistics.card()

    assert card.splits["train"].num_samples == 1000
    assert card.splits["test"].positive_rate == pytest.approx(np.mean(test["label"].to_numpy()))
    age, constant = card.dense
    assert age.mean == pytest.approx(np.mean(train["age"].to_numpy()), rel=1e-12)
    assert age.std == pytest.approx(np.std(train["age"].to_numpy()), rel=1e-12)
    assert constant.std == 1.0
    bags = pl.Series(train["videos"].to_pylist(), dtype=pl.List(pl.Int64))
    videos = card.feature("videos")
    assert videos.mean_pooling_factor == pytest.approx(bags.list.len().mean())
    assert videos.max_pooling_factor == 3
    assert videos.frequencies is not None
    assert dict(videos.frequencies.top) == dict(bags.explode().drop_nulls().value_counts().iter_rows())

    write_card(card, tmp_path)
    assert read_card(tmp_path) == card


def test_statistics_when_files_are_read_back_then_they_equal_those_of_writing(tmp_path):
    statistics = ColumnStatistics(CARD)
    with SplitWriter(tmp_path, "train", dataset_schema(CARD), rows_per_group=10, rows_per_file=30) as writer:
        table = rows(95).cast(dataset_schema(CARD))
        writer.write(table)
        for start in range(0, 95, 10):
            statistics.add("train", table.slice(start, 10))
    reread = ColumnStatistics(CARD)
    reread.add_files(tmp_path, ["train"])
    assert reread.card() == statistics.card()


def test_statistics_when_dense_is_not_standardised_then_the_draft_stays():
    statistics = ColumnStatistics(CARD, standardise=False)
    statistics.add("train", rows(20))
    assert statistics.card().dense == CARD.dense


@pytest.mark.parametrize("max_counters", [9, 15])
def test_statistics_when_counters_are_bounded_then_the_largest_features_are_not_counted(max_counters):
    # Of 16.
    statistics = ColumnStatistics(CARD, max_counters=max_counters)
    statistics.add("train", rows(20))
    assert statistics.card().feature("user").frequencies is None
    assert statistics.card().feature("videos").frequencies is not None


def test_statistics_when_the_draft_has_frequencies_then_they_stay():
    known = Frequencies(total=7, distinct=1, top=((3, 7),), coverage=((1, 1.0),))
    user, videos = CARD.sparse
    statistics = ColumnStatistics(
        dataclasses.replace(CARD, sparse=(dataclasses.replace(user, frequencies=known), videos))
    )
    statistics.add("train", rows(20))
    assert statistics.card().feature("user").frequencies == known


@pytest.mark.parametrize("outside", [-1, 10, 2**40])
def test_statistics_when_an_id_is_outside_its_table_then_error_names_feature_and_id(outside):
    table = rows(3)
    table = table.set_column(table.column_names.index("user"), "user", pa.array([0, outside, 1]))
    with pytest.raises(InputError, match=rf"'user' has id {outside}, but ids lie in \[0, 10\)"):
        ColumnStatistics(CARD).add("train", table)


def test_statistics_when_ids_are_null_then_they_are_empty_bags():
    table = rows(4)
    table = table.set_column(table.column_names.index("user"), "user", pa.array([None, None, 1, 1]))
    statistics = ColumnStatistics(CARD)
    statistics.add("train", table)
    user = statistics.card().feature("user")
    assert user.mean_pooling_factor == 0.5
    assert user.frequencies == Frequencies(total=2, distinct=1, top=((1, 2),), coverage=((1, 1.0),))


def test_frequencies_are_most_frequent_first_with_ties_by_id():
    summary = summarise_frequencies(np.array([0, 5, 1, 5, 0, 9] + [0] * 20 + [1] * 9))
    assert summary.top[:4] == ((5, 9), (1, 5), (3, 5), (2, 1))
    assert (summary.total, summary.distinct) == (29, 13)
    assert summary.coverage == ((1, round(9 / 29, 6)), (10, round(26 / 29, 6)), (13, 1.0))
    assert summarise_frequencies(np.zeros(4)).coverage == ()
