"""What is wrong with a dataset is said in one line: file, row, column, value, limit, fix."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_jax.data.card import DatasetCard, DenseColumn, Frequencies, SparseColumn, SplitSummary, write_card
from dlrm_jax.data.check import check_dataset
from dlrm_jax.data.validate import validate_row_group, validate_schema
from dlrm_jax.data.vocabulary_digest import vocabulary_digest
from sharding.errors import InputError

DOCS = Path(__file__).parents[1] / "docs" / "data.md"
NUM_SAMPLES = 40
BAG = SparseColumn(
    name="tags", num_rows=100, bag=True, max_pooling_factor=3, mean_pooling_factor=1.0, weights="tag_weights"
)
CARD = DatasetCard(
    name="small",
    sample_weight="weight",
    dense=(DenseColumn(name="price"),),
    sparse=(SparseColumn(name="user", num_rows=5_000_000_000, mean_pooling_factor=0.975), BAG),
    splits={split: SplitSummary(num_samples=NUM_SAMPLES, positive_rate=0.5) for split in ("train", "test")},
)


def make_columns() -> dict[str, list]:
    """Rows 1 to 39 hold a user and a bag of up to 3 tags; row 0 holds no user and an empty bag."""
    tags = [[], [1, 2, 99], *([[7]] * 37), None]
    return {
        "label": [0.0, 1.0] * 20,
        "weight": [1.0] * NUM_SAMPLES,
        "price": [0.5] * NUM_SAMPLES,
        "user": [None, 4_999_999_999, *range(38)],
        "tags": tags,
        "tag_weights": [[0.5] * len(bag) if bag else bag for bag in tags],
    }


def to_table(columns: dict[str, list]) -> pa.Table:
    lists = {"user": pa.int64(), "tags": pa.list_(pa.int64()), "tag_weights": pa.list_(pa.float64())}
    return pa.table({name: pa.array(values, lists.get(name)) for name, values in columns.items()})


def make_dataset(directory: Path, card: DatasetCard = CARD, **changed: list) -> Path:
    """Writes the dataset; the training split has the changed columns."""
    for split in card.splits:
        table = to_table(make_columns() | (changed if split == "train" else {}))
        (directory / split).mkdir(parents=True)
        pq.write_table(table, directory / split / "part-0.parquet", row_group_size=16)
    write_card(card, directory)
    return directory


def with_change(name: str, row: int, value: object) -> dict[str, list]:
    column = make_columns()[name]
    column[row] = value
    return {name: column}


def test_check_when_all_is_well_reports_what_is_there(tmp_path):
    report = check_dataset(make_dataset(tmp_path))
    train = report.splits["train"]
    assert (train.num_samples, train.num_files, train.num_row_groups, train.largest_row_group) == (40, 1, 3, 16)
    assert train.positive_rate == 0.5
    assert train.features["user"].max_id == 4_999_999_999
    assert train.features["user"].empty_bags == 1
    assert train.features["tags"].num_ids == 40
    assert train.features["tags"].max_pooling_factor == 3
    assert train.features["tags"].empty_bags == 2
    assert report.warnings == ()


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("label", 20, 1.5, "row 20: 'label' is 1.5, but labels lie in [0, 1]"),
        ("label", 20, float("nan"), "row 20: 'label' is nan"),
        ("label", 20, None, "row 20: 'label' is null"),
        ("weight", 39, -1.0, "row 39: 'weight' is -1.0, but sample weights are finite and at least 0"),
        ("weight", 39, float("inf"), "row 39: 'weight' is inf"),
        (
            "weight",
            39,
            1e39,
            "row 39: 'weight' is 1e+39, but sample weights are finite and at least 0, also as float32",
        ),
        ("weight", 39, 1e-50, "row 39: 'weight' is 1e-50, but weights other than 0 are at least 1.4e-45"),
        ("price", 17, float("nan"), "row 17: 'price' is nan, but dense features are finite float32 numbers"),
        ("price", 17, 1e39, "row 17: 'price' is 1e+39"),
        ("price", 17, None, "row 17: 'price' is null"),
        ("user", 18, 5_000_000_000, "row 18: 'user' is 5000000000, but ids lie in [0, 5000000000)"),
        ("user", 18, -1, "row 18: 'user' is -1"),
        ("user", 18, 2**63 - 1, "row 18: 'user' is 9223372036854775807"),
        ("tags", 33, [100], "row 33: 'tags' holds 100, but ids lie in [0, 100)"),
        ("tags", 33, [2**32 + 5], "row 33: 'tags' holds 4294967301"),
        ("tags", 33, [None], "row 33: 'tags' holds a null"),
        ("tags", 33, [1, 2, 3, 4], "row 33: 'tags' has 4 ids, but max_pooling_factor is 3"),
        ("tag_weights", 33, [0.5, 0.5], "row 33: 'tag_weights' has 2 weights, but 'tags' has 1 ids"),
        ("tag_weights", 33, None, "row 33: 'tag_weights' has 0 weights, but 'tags' has 1 ids"),
        ("tag_weights", 33, [float("inf")], "row 33: 'tag_weights' holds inf"),
        ("tag_weights", 33, [None], "row 33: 'tag_weights' holds None"),
        ("tag_weights", 33, [1e39], "row 33: 'tag_weights' holds 1e+39, but weights are finite float32 numbers"),
        ("tag_weights", 33, [-1e-50], "row 33: 'tag_weights' holds -1e-50, but weights other than 0 are at least"),
    ],
)
def test_check_when_a_value_is_wrong_names_file_row_column_value_and_limit(tmp_path, name, row, value, message):
    make_dataset(tmp_path, **with_change(name, row, value))
    with pytest.raises(InputError, match=re.escape(f"train/part-0.parquet, {message}")) as raised:
        check_dataset(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            DenseColumn(name="price", mean=0.5, std=1e-10),
            ("part-0.parquet, row 17: 'price' is 1e+30, but", "as (x - 0.5) / 1e-10: repair"),
        ),
        (
            DenseColumn(name="price", std=1e-44),
            ("part-0.parquet, row 0: 'price' is 0.5, but", "as (x - 0.0) / 1e-44: "),
        ),
    ],
)
def test_check_when_a_dense_feature_overflows_as_it_is_normalised_then_the_error_names_mean_and_std(
    tmp_path, column, message
):
    make_dataset(tmp_path, dataclasses.replace(CARD, dense=(column,)), **with_change("price", 17, 1e30))
    with pytest.raises(InputError, match="dense features are finite float32 numbers") as raised:
        check_dataset(tmp_path)
    assert all(part in str(raised.value) for part in message)


def test_weights_when_float32_just_holds_them_then_they_are_accepted():
    changed = {"weight": [0.0, 1.4e-45, 3e38, 1.0] * 10, "price": [-3e38, 3e38] * 20}
    changed["tag_weights"] = [[-1.4e-45] * len(bag) if bag else bag for bag in make_columns()["tags"]]
    validate_row_group(to_table(make_columns() | changed), CARD, "f.parquet", 0)


def test_row_group_when_it_does_not_begin_the_file_counts_rows_of_the_file():
    table = to_table(make_columns() | with_change("tags", 5, [3, 700]))
    with pytest.raises(InputError, match=r"f\.parquet, row 103: 'tags' holds 700"):
        validate_row_group(table.slice(2, 10), CARD, "f.parquet", 100)
    validate_row_group(table.slice(6, 10), CARD, "f.parquet", 100)


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int32(), pa.uint64()])
def test_ids_of_any_integer_type_are_compared_as_numbers(kind):
    card = DatasetCard(name="x", sparse=(SparseColumn(name="user", num_rows=1000),), splits={})
    table = pa.table({"label": [1.0, 0.0], "user": pa.array([1, 120], kind)})
    validate_schema(table.schema, card, "f")
    validate_row_group(table, card, "f", 0)
    small = dataclasses.replace(card, sparse=(SparseColumn(name="user", num_rows=120),))
    with pytest.raises(InputError, match=r"row 1: 'user' is 120, but ids lie in \[0, 120\)"):
        validate_row_group(table, small, "f", 0)


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int32(), pa.uint64(), pa.list_(pa.uint32())])
def test_check_when_ids_are_of_any_integer_type_reports_them(tmp_path, kind):
    column = SparseColumn(name="user", num_rows=100, bag=pa.types.is_list(kind))
    card = DatasetCard(name="x", sparse=(column,), splits={"train": SplitSummary(num_samples=2, positive_rate=0.5)})
    ids = pa.array([[1], [7]] if column.bag else [1, 7], kind)
    (tmp_path / "train").mkdir()
    pq.write_table(pa.table({"label": [1.0, 0.0], "user": ids}), tmp_path / "train" / "part-0.parquet")
    write_card(card, tmp_path)
    assert check_dataset(tmp_path).splits["train"].features["user"].max_id == 7


def test_bags_when_of_fixed_or_large_lists_are_bags_too():
    for kind in (pa.list_(pa.int32(), 2), pa.large_list(pa.int64())):
        table = pa.table({"label": [1.0, 0.0, 1.0], "tags": pa.array([[1, 2], None, [3, 100]], kind)})
        card = DatasetCard(name="x", sparse=(dataclasses.replace(BAG, weights=None),), splits={})
        validate_schema(table.schema, card, "f")
        with pytest.raises(InputError, match="row 2: 'tags' holds 100"):
            validate_row_group(table, card, "f", 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": ["0", "1"] * 20}, "column 'label' is string, but must be an integer or a float"),
        ({"price": [True] * 40}, "column 'price' is bool"),
        ({"user": None}, "column 'user' of card.json is missing"),
        ({"tags": None}, "column 'tags' of card.json is missing"),
        ({"weight": None}, "column 'weight' of card.json is missing"),
    ],
)
def test_check_when_a_column_is_missing_or_of_another_type_names_it(tmp_path, changed, message):
    make_dataset(tmp_path)
    columns = {name: values for name, values in (make_columns() | changed).items() if values is not None}
    pq.write_table(to_table(columns), tmp_path / "train" / "part-0.parquet")
    with pytest.raises(InputError, match=f"part-0.parquet: {message}"):
        check_dataset(tmp_path)


def test_check_when_single_ids_stand_where_bags_belong_and_the_reverse_names_the_column(tmp_path):
    user, tags = CARD.sparse
    for sparse, message in [
        ((dataclasses.replace(user, bag=True), tags), "'user' is int64, but must be a list of integers"),
        ((user, dataclasses.replace(tags, bag=False, max_pooling_factor=1, weights=None)), "'tags' is list<"),
    ]:
        folder = make_dataset(tmp_path / message[1:5], dataclasses.replace(CARD, sparse=sparse))
        with pytest.raises(InputError, match=re.escape(message)):
            check_dataset(folder)


def replace_sparse(**changes) -> DatasetCard:
    return dataclasses.replace(CARD, sparse=(CARD.sparse[0], dataclasses.replace(BAG, **changes)))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (
            dataclasses.replace(CARD, splits={"train": SplitSummary(num_samples=41, positive_rate=0.5)}),
            "splits.train.num_samples is 41, but the files hold 40 rows",
        ),
        (
            dataclasses.replace(CARD, splits={"train": SplitSummary(num_samples=40, positive_rate=0.4)}),
            "splits.train.positive_rate is 0.4, but the mean label is 0.500000",
        ),
        (
            replace_sparse(mean_pooling_factor=1.2),
            "mean_pooling_factor of 'tags' is 1.2, but training samples have 1.0000",
        ),
        (replace_sparse(frequencies=Frequencies(total=50, distinct=9)), "frequencies.total of 'tags' is 50"),
        (
            replace_sparse(frequencies=Frequencies(total=40, distinct=1, top=((100, 3),))),
            "frequencies.top of 'tags' names id 100",
        ),
        (replace_sparse(vocabulary="vocabulary/tags.parquet"), "tags.parquet: no such file"),
    ],
)
def test_check_when_the_card_disagrees_with_the_data_names_the_field(tmp_path, card, message):
    make_dataset(tmp_path, card)
    with pytest.raises(InputError, match=re.escape(message)):
        check_dataset(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"id": [1, 100], "value": ["a", "b"], "count": [1, 1]}, "id 100 of 'tags' lies outside [0, 100)"),
        ({"id": [1]}, "a vocabulary has the columns id, value and count"),
        ({"id": ["1"], "value": ["a"], "count": [1]}, "column 'id' is string, but must be an integer (int64): cast it"),
    ],
)
def test_check_when_a_vocabulary_does_not_fit_names_it(tmp_path, vocabulary, message):
    make_dataset(tmp_path, replace_sparse(vocabulary="tags.parquet"))
    pq.write_table(pa.table(vocabulary), tmp_path / "tags.parquet")
    with pytest.raises(InputError, match=re.escape(message)):
        check_dataset(tmp_path)


def test_check_when_a_vocabulary_says_something_else_than_it_did_names_both_digests(tmp_path):
    path = tmp_path / "tags.parquet"

    def digest_of(ids: list[int], values: list[str | None], count: int, compression: str) -> str:
        rows = pa.table({"id": ids, "value": values, "count": [count] * len(ids)})
        pq.write_table(rows, path, compression=compression)
        return vocabulary_digest(path)

    digest = digest_of([0, 1, 2], [None, "a", "b"], 1, "zstd")
    make_dataset(tmp_path, replace_sparse(vocabulary="tags.parquet", vocabulary_digest=digest))
    assert digest_of([0, 1, 2], [None, "a", "b"], 7, "none") == digest
    check_dataset(tmp_path)
    other = digest_of([0, 1, 2], [None, "b", "a"], 1, "zstd")
    assert other != digest
    message = f"{path}: ids and values have digest {other}, but card.json says {digest} of 'tags': restore the file"
    with pytest.raises(InputError, match=re.escape(message)):
        check_dataset(tmp_path)


def test_check_when_there_is_no_training_split_then_it_warns(tmp_path):
    splits = {"test": CARD.splits["test"]}
    warnings = check_dataset(make_dataset(tmp_path, dataclasses.replace(CARD, splits=splits))).warnings
    assert warnings == (f"{tmp_path}: no split 'train', so that models can be evaluated on it but not trained",)


def test_check_when_files_are_missing_empty_or_damaged_names_them(tmp_path):
    with pytest.raises(InputError, match="no dataset card there"):
        check_dataset(tmp_path)
    make_dataset(tmp_path)
    path = tmp_path / "train" / "part-0.parquet"
    whole = path.read_bytes()
    for content in (b"", whole[:-50], whole[:100] + bytes(100) + whole[200:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"part-0\.parquet: cannot be read as Parquet"):
            check_dataset(tmp_path)
    pq.write_table(to_table(make_columns()).slice(0, 0), path)
    with pytest.raises(InputError, match="train: the split is empty"):
        check_dataset(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"train: no Parquet files .* take the split off the card"):
        check_dataset(tmp_path)


def test_check_when_row_groups_are_too_large_or_too_few_warns(tmp_path):
    rows = 140_000
    card = DatasetCard(name="x", splits={"train": SplitSummary(num_samples=rows, positive_rate=0.0)})
    (tmp_path / "train").mkdir()
    table = pa.table({"label": np.zeros(rows, np.float32)})
    pq.write_table(table, tmp_path / "train" / "part-0.parquet", row_group_size=rows)
    (tmp_path / "train" / "part-1.parquet.partial").write_bytes(b"")
    write_card(card, tmp_path)
    warnings = "\n".join(check_dataset(tmp_path).warnings)
    assert "a row group of 140000 rows" in warnings
    assert "1 row groups, but the loader shuffles by group" in warnings
    assert "part-1.parquet.partial: left over" in warnings


def test_check_when_row_groups_are_too_few_then_it_names_a_size_that_it_does_not_warn_of(tmp_path):
    rows = 64 * 16_384 + 16_384
    card = DatasetCard(name="x", splits={"train": SplitSummary(num_samples=rows, positive_rate=0.0)})
    (tmp_path / "train").mkdir()
    table = pa.table({"label": np.zeros(rows, np.float32)})
    pq.write_table(table, tmp_path / "train" / "part-0.parquet", row_group_size=131_072)
    write_card(card, tmp_path)
    (warning,) = check_dataset(tmp_path).warnings
    assert warning.endswith("for example with row_group_size=16384")


@pytest.mark.parametrize("row_group_size", [16_384, 1_500_000])
def test_check_when_a_file_is_large_then_it_is_never_held(tmp_path, row_group_size):
    rows = 1_500_000
    card = DatasetCard(
        name="x",
        dense=tuple(DenseColumn(name=f"x{i}") for i in range(2)),
        splits={"train": SplitSummary(num_samples=rows, positive_rate=0.0)},
    )
    random = np.random.default_rng(0)
    (tmp_path / "train").mkdir()
    table = pa.table({"label": np.zeros(rows)} | {column.name: random.random(rows) for column in card.dense})
    path = tmp_path / "train" / "part-0.parquet"
    pq.write_table(table, path, row_group_size=row_group_size)
    write_card(card, tmp_path)
    before = pa.total_allocated_bytes()
    held = []
    check_dataset(tmp_path, progress=lambda done, total: held.append(pa.total_allocated_bytes()))
    assert max(held) - before < path.stat().st_size / 2


def test_dataset_of_the_documentation_is_valid(tmp_path, monkeypatch):
    """The code block of docs/data.md, run as it stands."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], str(DOCS), "exec"), {})
    report = check_dataset("data/mine")
    assert report.warnings == ()
    assert {name: split.num_samples for name, split in report.splits.items()} == {
        "train": 32_000,
        "validation": 4_000,
        "test": 4_000,
    }
