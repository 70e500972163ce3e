"""Criteo lines become the dataset that docs/data.md describes, in bounded memory."""

import csv
import math
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from criteo_samples import SPLITS, make_lines, read_split, write_lines

from dlrm_jax.data import multi_hot, spill
from dlrm_jax.data.check import check_dataset
from dlrm_jax.data.criteo import CriteoSpec, lines, prepare_criteo
from dlrm_jax.data.criteo.spec import list_files
from dlrm_jax.data.criteo.vocabulary import hash_rows
from dlrm_jax.data.multi_hot import POOLING_FACTORS, expand_bags
from sharding.errors import InputError


def expected_rows(made: list[list[str]], num_train: int, feature: int, threshold: int) -> dict[str, int]:
    counts = Counter(fields[14 + feature] for fields in made[:num_train] if fields[14 + feature])
    frequent = sorted((value for value, n in counts.items() if n >= threshold), key=lambda v: (-counts[v], v))
    return {value: row for row, value in enumerate(frequent, start=1)}


@pytest.mark.parametrize("threshold", [1, 4])
def test_dataset_when_counts_spill_has_the_rows_of_an_in_memory_count(tmp_path, monkeypatch, threshold):
    spills = []
    spill_once = spill.SpilledCounts._spill
    monkeypatch.setattr(spill.SpilledCounts, "_spill", lambda self: (spills.append(1), spill_once(self))[1])
    monkeypatch.setattr(lines, "BLOCK_BYTES", 20_000)
    made = make_lines(2100)
    path = write_lines(tmp_path / "train.txt", made)
    spec = CriteoSpec(frequency_threshold=threshold)
    # 0.12 MiB are some two thousand entries; the lines have twice as many different ids.
    card = prepare_criteo([path], tmp_path / "out", spec=spec, memory_limit_mb=0.12)
    assert len(spills) > 3
    assert {split: card.splits[split].num_samples for split in SPLITS} == {
        "train": 1800,
        "validation": 150,
        "test": 150,
    }
    written = [read_split(tmp_path / "out", split) for split in SPLITS]
    for feature in (0, 25):
        rows = expected_rows(made, 1800, feature, threshold)
        assert card.sparse[feature].num_rows == 1 + len(rows)
        expected = [rows.get(fields[14 + feature], 0) for fields in made]
        assert [row for split in written for row in split[f"cat_{feature}"]] == expected
        vocabulary = pq.read_table(tmp_path / "out" / str(card.sparse[feature].vocabulary)).to_pydict()
        assert dict(zip(vocabulary["value"], vocabulary["id"], strict=True)) == rows
        assert card.sparse[feature].vocabulary_digest is not None
        frequencies = card.sparse[feature].frequencies
        assert frequencies is not None
        assert dict(frequencies.top) == dict(Counter(expected[:1800]).most_common(64)) or frequencies.distinct > 64
        assert (frequencies.total, frequencies.distinct) == (1800, len(set(expected[:1800])))
    assert [label for split in written for label in split["label"]] == [float(fields[0]) for fields in made]
    expected = [np.float32(math.log1p(max(int(fields[3] or 0), 0))) for fields in made]
    np.testing.assert_allclose([x for split in written for x in split["int_2"]], expected, rtol=1e-6)
    check_dataset(tmp_path / "out")
    assert not (tmp_path / "out" / ".prepare").exists()


def test_dataset_does_not_depend_on_the_memory_limit_or_on_compression(tmp_path):
    made = make_lines(400)
    for number, (name, limit) in enumerate([("a.tsv", 1.0), ("a.gz", 100.0)]):
        prepare_criteo([write_lines(tmp_path / name, made)], tmp_path / str(number), memory_limit_mb=limit)
    for split in SPLITS:
        assert read_split(tmp_path / "0", split) == read_split(tmp_path / "1", split)


def test_feature_when_it_has_too_many_ids_is_hashed_into_max_rows(tmp_path):
    made = make_lines(700)
    path = write_lines(tmp_path / "a.tsv", [[*fields[:15], *["0000abcd"] * 25] for fields in made])
    card = prepare_criteo([path], tmp_path / "out", spec=CriteoSpec(max_rows=20))
    assert [column.num_rows for column in card.sparse] == [20] + [2] * 25
    assert card.sparse[0].vocabulary is None
    ids = [np.uint32(int(fields[14] or "0", 16)) for fields in made]
    hashed = hash_rows(np.array(ids), feature=0, num_rows=20)
    assert hashed.min() >= 1
    expected = [int(row) if fields[14] else 0 for row, fields in zip(hashed, made, strict=True)]
    rows = [row for split in SPLITS for row in read_split(tmp_path / "out", split)["cat_0"]]
    assert rows == expected
    frequencies = card.sparse[0].frequencies
    assert frequencies is not None
    assert dict(frequencies.top) == Counter(expected[:600])


def test_hashed_rows_are_the_same_everywhere():
    values = np.array([0, 1, 0x68FD1E64, 2**32 - 1], np.uint32)
    assert hash_rows(values, feature=3, num_rows=1000).tolist() == [737, 923, 962, 698]


def test_split_when_there_are_several_files_evaluates_on_the_last(tmp_path):
    for day, count in enumerate([300, 200, 101]):
        write_lines(tmp_path / f"day_{day + 8}.gz", make_lines(count, seed=day))
    card = prepare_criteo([tmp_path], tmp_path / "out", rows_per_file=128)
    assert [path.name for path in list_files([tmp_path])] == ["day_8.gz", "day_9.gz", "day_10.gz"]
    assert [card.splits[split].num_samples for split in SPLITS] == [500, 51, 50]
    labels = [x for split in SPLITS for x in read_split(tmp_path / "out", split)["label"]]
    made = [fields for day, count in enumerate([300, 200, 101]) for fields in make_lines(count, seed=day)]
    assert labels == [float(fields[0]) for fields in made]


def test_split_when_by_lines_may_lie_across_files(tmp_path):
    for part in range(3):
        write_lines(tmp_path / f"part_{part}.tsv", make_lines(100, seed=part))
    spec = CriteoSpec(split="lines", evaluation_share=0.5)
    card = prepare_criteo([tmp_path], tmp_path / "out", spec=spec)
    assert [card.splits[split].num_samples for split in SPLITS] == [150, 75, 75]
    labels = [x for split in SPLITS for x in read_split(tmp_path / "out", split)["label"]]
    assert labels == [float(fields[0]) for part in range(3) for fields in make_lines(100, seed=part)]


def test_card_when_standardised_has_the_moments_of_training_lines(tmp_path):
    path = write_lines(tmp_path / "a.tsv", make_lines(700))
    card = prepare_criteo([path], tmp_path / "out", spec=CriteoSpec(standardise=True))
    train = np.array(read_split(tmp_path / "out", "train")["int_0"])
    assert card.dense[0].mean == pytest.approx(train.mean(), rel=1e-5)
    assert card.dense[0].std == pytest.approx(train.std(), rel=1e-5)


def test_multi_hot_gives_every_id_its_fixed_bag_that_begins_with_it(tmp_path):
    path = write_lines(tmp_path / "a.tsv", make_lines(700))
    single = prepare_criteo([path], tmp_path / "single")
    card = prepare_criteo([path], tmp_path / "bags", spec=CriteoSpec(multi_hot=True))
    assert [column.max_pooling_factor for column in card.sparse] == list(POOLING_FACTORS)
    assert sum(POOLING_FACTORS) == 214
    ids, bags = read_split(tmp_path / "single", "train"), read_split(tmp_path / "bags", "train")
    for feature in (0, 20):
        column = card.sparse[feature]
        assert [bag[0] for bag in bags[column.name]] == ids[column.name]
        bag_of = dict(zip(ids[column.name], map(tuple, bags[column.name]), strict=True))
        assert [bag_of[i] for i in ids[column.name]] == [tuple(bag) for bag in bags[column.name]]
        frequencies = column.frequencies
        assert frequencies is not None
        counted = Counter(i for bag in bags[column.name] for i in bag)
        assert (frequencies.total, frequencies.distinct) == (600 * column.max_pooling_factor, len(counted))
        assert dict(frequencies.top).items() <= counted.items()
    assert bags["cat_5"] == ids["cat_5"]
    assert single.sparse[0].num_rows == card.sparse[0].num_rows
    check_dataset(tmp_path / "bags")


def test_bags_are_a_function_of_seed_feature_and_id_spread_over_the_table():
    ids = np.arange(5000) % 100
    bags = expand_bags(ids, num_rows=100, pooling_factor=30, feature=2, seed=1)
    np.testing.assert_array_equal(bags[:100], bags[4900:])
    assert set(bags[:100, 1:].reshape(-1)) == set(range(100))
    assert not np.array_equal(bags, expand_bags(ids, num_rows=100, pooling_factor=30, feature=3, seed=1))
    assert not np.array_equal(bags, expand_bags(ids, num_rows=100, pooling_factor=30, feature=2, seed=2))


def test_bags_when_there_are_more_ids_than_are_hashed_at_a_time_are_the_same(monkeypatch):
    ids = np.arange(5000) % 100
    expected = expand_bags(ids, num_rows=100, pooling_factor=30, feature=2, seed=1)
    monkeypatch.setattr(multi_hot, "_HASHES_AT_ONCE", 1000)
    np.testing.assert_array_equal(expand_bags(ids, num_rows=100, pooling_factor=30, feature=2, seed=1), expected)


def test_bags_stay_what_they_were():
    # A change here is a change of every dataset that is prepared from now on.
    bags = expand_bags(np.array([0, 7]), num_rows=1000, pooling_factor=4, feature=2, seed=1)
    assert bags.tolist() == [[0, 781, 237, 589], [7, 937, 727, 715]]


def test_malformed_lines_are_written_down_with_line_and_reason(tmp_path):
    made = make_lines(2000)
    made[4] = ["only", "three", "columns"]
    made[1990][0] = "7"
    card = prepare_criteo([write_lines(tmp_path / "a.gz", made)], tmp_path / "out")
    assert sum(split.num_samples for split in card.splits.values()) == 1998
    with open(tmp_path / "out" / "rejects.csv", newline="") as file:
        rejects = list(csv.DictReader(file))
    assert [(row["file"], row["line"], row["reason"]) for row in rejects] == [
        (str(tmp_path / "a.gz"), "5", "3 columns instead of 40"),
        (str(tmp_path / "a.gz"), "1991", "label '7' is not 0 or 1"),
    ]
    assert rejects[0]["text"] == "only\tthree\tcolumns"


def test_conversion_when_too_many_lines_are_malformed_stops_and_goes_on_when_allowed(tmp_path):
    made = make_lines(1000)
    for line in range(0, 1000, 50):
        made[line] = ["x"]
    path = write_lines(tmp_path / "a.tsv", made)
    with pytest.raises(
        InputError, match=r"a\.tsv, line 1: 1 columns .*first of 18 malformed .*--max_reject_share 0\.05"
    ):
        prepare_criteo([path], tmp_path / "out")
    assert not (tmp_path / "out" / "card.json").exists()
    card = prepare_criteo([path], tmp_path / "out", max_reject_share=0.05)
    assert sum(split.num_samples for split in card.splits.values()) == 980


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": CriteoSpec(frequency_threshold=0)}, "--frequency_threshold is 0"),
        ({"spec": CriteoSpec(max_rows=1)}, "--max_rows is 1"),
        ({"spec": CriteoSpec(evaluation_share=1.0)}, "--evaluation_share is 1.0"),
        ({"spec": CriteoSpec(split="last_file")}, "--split last_file needs at least 2 files"),
        ({"spec": CriteoSpec(multi_hot=True, seed=-1)}, r"--seed is -1, but it must lie in \[0, 2\^64 - 1\]"),
        ({"max_reject_share": 2.0}, "--max_reject_share is 2.0"),
        ({"max_reject_share": -1.0}, "--max_reject_share is -1.0"),
        ({"memory_limit_mb": 0.0}, "--memory_limit_mb is 0.0"),
        ({"memory_limit_mb": float("inf")}, "--memory_limit_mb is inf"),
        (
            {"memory_limit_mb": 1e30},
            r"--memory_limit_mb is 1e\+30, but it must be above 0 and at most 1073741824: give",
        ),
        ({"rows_per_file": 0}, "rows_per_file is 0"),
    ],
)
def test_setting_when_out_of_its_limits_is_an_error_before_anything_is_read_or_written(
    tmp_path, monkeypatch, options, message
):
    path = write_lines(tmp_path / "a.tsv", make_lines(100))
    monkeypatch.setattr(lines, "_opened", pytest.fail)
    with pytest.raises(InputError, match=message):
        prepare_criteo([path], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": CriteoSpec(evaluation_share=0.001)}, "0 of 100 lines are for evaluation"),
        (
            {"memory_limit_mb": 0.001},
            r"vocabularies of .* ids .*raise --frequency_threshold, or hash .* with --max_rows",
        ),
    ],
)
def test_setting_when_the_lines_do_not_fit_it_is_an_input_error(tmp_path, options, message):
    path = write_lines(tmp_path / "a.tsv", make_lines(100))
    with pytest.raises(InputError, match=message):
        prepare_criteo([path], tmp_path / "out", **options)
    assert not (tmp_path / "out" / "card.json").exists()


def test_files_when_missing_or_empty_are_an_input_error(tmp_path):
    (tmp_path / "empty.tsv").write_bytes(b"")
    for files, message in [
        ([tmp_path / "none.tsv"], "none.tsv: no such file"),
        ([tmp_path / "empty.tsv"], "empty.tsv: the file is empty"),
        ([], "no input files"),
        ([tmp_path / ("a" * 300)], r"a: cannot be read \(File name too long\)"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare_criteo(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_split_when_the_last_file_is_too_short_then_the_error_names_a_split_that_helps(tmp_path):
    paths = [write_lines(tmp_path / name, make_lines(count)) for name, count in (("day_0", 100), ("day_1", 1))]
    with pytest.raises(InputError, match=r"day_1: 1 of 1 lines are for evaluation.*, or --split lines$"):
        prepare_criteo(paths, tmp_path / "out")


def test_files_when_one_is_given_twice_are_an_input_error(tmp_path):
    folder = tmp_path / "days"
    folder.mkdir()
    path = write_lines(folder / "day_0", make_lines(10))
    for files in ([path, path], [folder, path], [path, folder / ".." / "days" / "day_0"]):
        with pytest.raises(InputError, match=r"day_0: the same file as .*day_0; give each file once"):
            prepare_criteo(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()
