"""The loader: every sample once with all its content, the same for any number of processes and threads."""

import dataclasses
import itertools
import subprocess
import sys
import tempfile
import threading
import weakref

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_cases import CARD, make_table, write_dataset

from dlrm_jax.data import assemble
from dlrm_jax.data.assemble import one_batch
from dlrm_jax.data.card import SparseColumn, read_card
from dlrm_jax.data.loader import Loader
from dlrm_jax.data.row_groups import columns_of
from sharding.errors import InputError
from sharding.jagged import ids_of_values


@pytest.fixture
def dataset(tmp_path):
    """100 samples in 10 row groups or more, in 3 files."""
    write_dataset(tmp_path, make_table(100))
    return tmp_path


def bags(batch, feature):
    """Ids (and weights) of each sample, as Python lists."""
    ids = batch.ids
    ends = np.cumsum(ids.lengths.reshape(-1))
    position = ids.features.index(feature)
    own = slice(position * ids.batch_size, (position + 1) * ids.batch_size)
    spans = [slice(end - length, end) for end, length in zip(ends[own], ids.lengths[position], strict=True)]
    weights = None if ids.weights is None else [ids.weights[span].tolist() for span in spans]
    return [ids.values[span].tolist() for span in spans], weights


def assert_batches_hold(batches, table):
    """Every row of the table is in exactly one batch with all its content; everything else is padding."""
    seen = []
    expected = table.to_pylist()
    for batch in batches:
        columns = {feature: bags(batch, feature) for feature in batch.ids.features}
        for sample in range(len(batch.label)):
            if batch.weight[sample] == 0:
                assert batch.label[sample] == 0
                assert not batch.dense[sample].any()
                assert not any(ids[sample] for ids, _ in columns.values())
                continue
            row = expected[int(batch.dense[sample, 0])]
            seen.append(int(batch.dense[sample, 0]))
            assert batch.label[sample] == np.float32(row["label"])
            assert batch.dense[sample, 1] == (row["price"] - 2) / 4
            for feature in ("user", "ad"):
                assert columns[feature][0][sample] == ([] if row[feature] is None else [row[feature]])
            for feature in ("tags", "clicked"):
                assert columns[feature][0][sample] == (row[feature] or [])
            assert columns["clicked"][1][sample] == (row["clicked_weight"] or [])
            assert columns["tags"][1][sample] == [1.0] * len(row["tags"] or [])
    assert sorted(seen) == list(range(table.num_rows))


def assert_equal_batches(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        for name in ("dense", "label", "weight"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(one.ids.lengths, other.ids.lengths)
        count = one.ids.lengths.sum()
        np.testing.assert_array_equal(one.ids.values[:count], other.ids.values[:count])
        np.testing.assert_array_equal(one.ids.weights[:count], other.ids.weights[:count])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_epoch_holds_every_sample_exactly_once_for_any_sizes_and_processes(data):
    num_rows = data.draw(st.integers(1, 80), "rows")
    table = make_table(num_rows)
    virtual_shards = data.draw(st.sampled_from([1, 4, 8]), "virtual shards")
    processes = data.draw(st.sampled_from([1, 2, 4]), "processes") if virtual_shards > 1 else 1
    configuration = {
        "batch_size": virtual_shards * data.draw(st.integers(1, 4), "samples a shard"),
        "virtual_shards": virtual_shards,
        "shuffle_window": data.draw(st.integers(1, 100), "window"),
        "shuffle": data.draw(st.booleans(), "shuffle"),
        "threads": data.draw(st.integers(1, 3), "threads"),
        "prefetch": data.draw(st.integers(1, 3), "prefetch"),
    }
    with tempfile.TemporaryDirectory() as directory:
        write_dataset(directory, table, rows_per_group=data.draw(st.integers(1, 30), "rows a group"))
        whole = Loader(directory, "train", **configuration)
        batches = list(whole.batches(2))
        assert whole.num_samples == num_rows
        assert len(batches) == whole.steps_per_epoch
        assert {len(batch.label) for batch in batches} == {configuration["batch_size"]}
        assert_batches_hold(batches, table)

        first_step = data.draw(st.integers(0, whole.steps_per_epoch), "first step")
        assert_equal_batches(list(whole.batches(2, first_step)), batches[first_step:])

        per_process = virtual_shards // processes
        parts = [
            list(
                Loader(
                    directory, "train", **configuration, shards=range(p * per_process, (p + 1) * per_process)
                ).batches(2)
            )
            for p in range(processes)
        ]
        for step, batch in enumerate(batches):
            for name in ("dense", "label", "weight"):
                side_by_side = np.concatenate([getattr(part[step], name) for part in parts])
                np.testing.assert_array_equal(side_by_side, getattr(batch, name))
            for feature in batch.ids.features:
                ids, weights = zip(*(bags(part[step], feature) for part in parts), strict=True)
                side_by_side = [list(itertools.chain(*column)) for column in (ids, weights)]
                assert side_by_side == list(bags(batch, feature))


def test_seed_and_epoch_change_the_order(dataset):
    def order(seed, epoch):
        loader = Loader(dataset, "train", batch_size=20, virtual_shards=4, seed=seed)
        return np.concatenate([batch.dense[:, 0] for batch in loader.batches(epoch)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("num_rows", [0, 1, 20, 32])
def test_one_batch_of_rows_keeps_their_order_and_pads_at_the_end(num_rows):
    table = make_table(num_rows)
    batch = one_batch(columns_of(table, CARD, "samples"), CARD, 32)
    assert_batches_hold([batch], table)
    assert batch.dense[:num_rows, 0].tolist() == list(range(num_rows))
    assert batch.weight.tolist() == [1] * num_rows + [0] * (32 - num_rows)


def test_features_are_those_asked_for_in_that_order(dataset):
    loader = Loader(dataset, "train", features=("ad", "user"), batch_size=64)
    batch = next(loader.batches(0))
    assert batch.ids.features == ("ad", "user")
    assert batch.ids.weights is None
    assert [column.name for column in loader.card.sparse] == ["ad", "user"]
    (users, _), rows = bags(batch, "user"), batch.dense[:, 0].astype(int)
    assert users == [[] if row % 13 == 0 else [row] for row in rows]


def test_arrays_have_the_dtypes_of_a_batch(dataset):
    batch = next(Loader(dataset, "train", batch_size=64).batches(0))
    arrays = (batch.dense, batch.label, batch.weight, batch.ids.weights, batch.ids.values, batch.ids.lengths)
    assert [array.dtype for array in arrays if array is not None] == [np.float32] * 4 + [np.int32] * 2


def test_digest_when_files_or_their_row_groups_differ_then_it_does_and_content_does_not_count(tmp_path):
    rows = make_table(100)
    for name, table, sizes in (
        ("same", rows, {}),
        ("content", rows.set_column(0, "label", pa.array(np.ones(100, np.float32))), {}),
        ("groups", rows, {"rows_per_group": 11}),
        ("files", rows, {"rows_per_file": 40}),
    ):
        write_dataset(tmp_path / name, table, **sizes)
    write_dataset(tmp_path / "names", rows)
    last = sorted((tmp_path / "names" / "train").iterdir())[-1]
    last.rename(last.with_name("part-00009.parquet"))
    digest = {path.name: Loader(path, "train", batch_size=64).row_groups_digest for path in tmp_path.iterdir()}
    assert digest["same"] == digest["content"]
    assert len({digest[name] for name in ("same", "groups", "files", "names")}) == 4


def test_labels_and_other_columns_of_other_numeric_types_are_narrowed(tmp_path):
    table = make_table(60)
    columns = {"label": pa.int8(), "price": pa.float64(), "ad": pa.uint16(), "tags": pa.large_list(pa.int32())}
    for name, kind in columns.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    write_dataset(tmp_path, table)
    assert_batches_hold(list(Loader(tmp_path, "train", batch_size=64).batches(0)), table)


def test_bags_of_equal_length_are_read(tmp_path):
    table = make_table(96)
    for name, value in (("tags", 3), ("clicked", 2), ("clicked_weight", 2)):
        bags_of_equal_length = pa.array([[row % 50] * value for row in range(96)], table[name].type)
        table = table.set_column(table.column_names.index(name), name, bags_of_equal_length)
    write_dataset(tmp_path, table)
    assert_batches_hold(list(Loader(tmp_path, "train", batch_size=32, virtual_shards=4).batches(0)), table)


def test_window_of_more_bags_than_are_located_at_a_time_holds_every_sample(dataset, monkeypatch):
    monkeypatch.setattr(assemble, "_BAGS_AT_ONCE", 7)
    batches = list(Loader(dataset, "train", batch_size=20, virtual_shards=4).batches(0))
    assert_batches_hold(batches, make_table(100))


def test_sample_weights_are_read_and_a_weight_of_zero_empties_the_bags(tmp_path):
    weights = np.arange(100) % 3
    table = make_table(100).append_column("importance", pa.array(weights.astype(np.float32)))
    write_dataset(tmp_path, table, card=dataclasses.replace(CARD, sample_weight="importance"))
    (batch,) = Loader(tmp_path, "train", batch_size=100, virtual_shards=1, shuffle=False).batches(0)
    np.testing.assert_array_equal(batch.weight, weights)
    assert not batch.ids.lengths[:, weights == 0].any()
    for found, column in zip(
        (bags(batch, "tags")[0], *bags(batch, "clicked")), ("tags", "clicked", "clicked_weight"), strict=True
    ):
        expected = table.column(column).to_pylist()
        assert found == [(expected[row] or []) if weights[row] else [] for row in range(100)]


def test_dataset_without_dense_or_sparse_features_is_read(tmp_path):
    write_dataset(tmp_path, make_table(50), card=dataclasses.replace(CARD, dense=(), sparse=()))
    batch = next(Loader(tmp_path, "train", batch_size=64).batches(0))
    assert batch.dense.shape == (64, 0)
    assert (batch.ids.lengths.shape, batch.ids.capacity) == ((0, 64), 0)
    assert batch.weight.sum() == 50


def test_process_without_samples_yields_padding(tmp_path):
    write_dataset(tmp_path, make_table(1))
    (batch,) = Loader(tmp_path, "train", batch_size=4, virtual_shards=4, shards=range(2)).batches(0)
    assert_batches_hold([batch], make_table(0))
    assert len(batch.label) == 2


def test_window_of_padding_when_ids_are_wide_then_its_batches_have_the_shapes_of_others(tmp_path):
    sparse = tuple(dataclasses.replace(c, num_rows=2**33) if c.name == "ad" else c for c in CARD.sparse)
    write_dataset(tmp_path, make_table(1), card=dataclasses.replace(CARD, sparse=sparse))
    halves = [
        next(Loader(tmp_path, "train", batch_size=4, virtual_shards=4, shards=shards).batches(0))
        for shards in (range(2), range(2, 4))
    ]
    assert sorted(half.weight.sum() for half in halves) == [0, 1]
    assert {(half.ids.values.dtype.name, half.ids.values.shape) for half in halves} == {
        ("uint32", (halves[0].ids.capacity, 2))
    }


def test_capacity_is_exact_when_all_features_have_one_id(dataset):
    loader = Loader(dataset, "train", features=("user", "ad"), batch_size=64)
    assert loader.capacity == 128
    assert all(batch.ids.capacity == 128 for batch in loader.batches(0))


def test_capacity_leaves_room_beyond_the_mean_pooling_factor_up_to_the_maximum(dataset):
    # 1,024 samples of "tags": 1.25 times the mean of 1.5 is 1,920, which rounds up to 2,048.
    assert Loader(dataset, "train", features=("tags", "ad"), batch_size=1024).capacity == 2048 + 1024
    # 64 samples of at most 5 ids are at most 320.
    assert Loader(dataset, "train", features=("tags", "ad"), batch_size=64).capacity == 320 + 64


def test_capacity_grows_to_a_power_of_two_when_a_batch_needs_more_and_drops_nothing(tmp_path):
    table = pa.table({"label": [0.0] * 4096, "tags": [[0]] * 2048 + [[1] * 4] * 2048})
    sparse = SparseColumn(name="tags", num_rows=2, bag=True, max_pooling_factor=4, mean_pooling_factor=1)
    card = dataclasses.replace(CARD, dense=(), sparse=(sparse,))
    write_dataset(tmp_path, table, card=card, rows_per_group=4096, rows_per_file=4096)
    loader = Loader(tmp_path, "train", batch_size=1024, virtual_shards=1, shuffle=False)
    assert loader.capacity == 2048
    batches = list(loader.batches(0))
    assert [batch.ids.capacity for batch in batches] == [2048, 2048, 4096, 4096]
    assert [batch.ids.lengths.sum() for batch in batches] == [1024, 1024, 4096, 4096]
    assert loader.capacity == next(loader.batches(0)).ids.capacity == 4096


def test_starting_at_a_step_reads_nothing_that_only_earlier_windows_need(dataset):
    loader = Loader(dataset, "train", batch_size=5, virtual_shards=1, shuffle=False, shuffle_window=10)
    whole = list(loader.batches(0))
    first_file = dataset / "train" / "part-00000.parquet"  # rows 0 to 34, steps 0 to 6
    first_file.write_bytes(b"not Parquet")
    assert_equal_batches(list(loader.batches(0, first_step=8)), whole[8:])
    with pytest.raises(InputError, match=r"part-00000\.parquet"):
        list(loader.batches(0, first_step=5))


def test_each_row_group_is_read_once_an_epoch(dataset, monkeypatch):
    loader = Loader(dataset, "train", batch_size=8, virtual_shards=4, shuffle_window=16)
    read, row_groups = [], loader._row_groups
    original = row_groups.read
    monkeypatch.setattr(row_groups, "read", lambda group: (read.append(group), original(group))[1])
    list(loader.batches(0))
    assert sorted(read) == list(range(len(row_groups.num_rows)))


def test_row_groups_are_let_go_after_their_last_window(tmp_path, monkeypatch):
    write_dataset(tmp_path, make_table(400))
    loader = Loader(tmp_path, "train", batch_size=5, virtual_shards=1, shuffle_window=10, shuffle=False, threads=1)
    groups, original = [], loader._row_groups.read

    def read(number):
        group = original(number)
        groups.append(weakref.ref(group))
        return group

    monkeypatch.setattr(loader._row_groups, "read", read)
    batches = loader.batches(0)
    for _ in range(60):
        next(batches)
    assert len(groups) >= 30
    # One or two of a window, and four that are read ahead.
    assert sum(group() is not None for group in groups) < 10
    batches.close()


def test_training_and_validation_are_read_at_the_same_time(tmp_path):
    write_dataset(tmp_path, make_table(100))
    write_dataset(tmp_path, make_table(90), split="validation", card=read_card(tmp_path))
    training = Loader(tmp_path, "train", batch_size=8, virtual_shards=4)
    validation = Loader(tmp_path, "validation", batch_size=8, virtual_shards=4, shuffle=False)
    batches = training.batches(0)
    first = [next(batches) for _ in range(3)]
    assert_batches_hold(list(validation.batches(0)), make_table(90))
    assert_batches_hold([*first, *batches], make_table(100))


@pytest.mark.parametrize("ending", ["exhausted", "closed", "dropped", "closed before its first batch"])
def test_threads_end_when_an_iterator_is(dataset, ending):
    before = set(threading.enumerate())
    batches = Loader(dataset, "train", batch_size=4, virtual_shards=4, shuffle_window=4).batches(0)
    if ending == "exhausted":
        list(batches)
    elif ending == "closed before its first batch":
        batches.close()
    else:
        next(batches)
        assert set(threading.enumerate()) > before
        if ending == "closed":
            batches.close()
        else:
            del batches
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_closed_iterator_has_no_more_batches(dataset):
    batches = Loader(dataset, "train", batch_size=64).batches(0)
    batches.close()
    batches.close()
    assert list(batches) == []


def test_interpreter_exits_while_an_iterator_is_open(dataset):
    program = f"""
from dlrm_jax.data.loader import Loader
batches = Loader({str(dataset)!r}, "train", batch_size=4, virtual_shards=4, shuffle_window=4).batches(0)
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_table_of_more_rows_than_31_bits_name_then_ids_come_as_two_words(tmp_path):
    rows = 2**33
    card = dataclasses.replace(CARD, sparse=(SparseColumn(name="user", num_rows=rows), *CARD.sparse[1:]))
    table = make_table(64)
    users = [rows - 1 - i for i in range(64)]
    place = table.column_names.index("user")
    write_dataset(tmp_path, table.set_column(place, "user", pa.array(users, pa.int64())), card=card)
    (batch,) = Loader(tmp_path, "train", features=("user",), batch_size=64, shuffle=False).batches(0)
    assert batch.ids.values.dtype == np.uint32
    assert sorted(ids_of_values(batch.ids.values[:64])) == sorted(users)
