"""What the loader says of arguments, splits, files and values that it cannot take."""

import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loader_cases import make_table, write_dataset

from dlrm_jax.data.loader import Loader
from sharding.errors import InputError


@pytest.fixture
def dataset(tmp_path):
    """100 samples in 10 row groups or more, in 3 files."""
    write_dataset(tmp_path, make_table(100))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 100}, "batch_size 100 is not a multiple of virtual_shards 64.*use batch_size 128"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"virtual_shards": 0}, "virtual_shards is 0"),
        ({"shuffle_window": 0}, "shuffle_window is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"shards": range(60, 65)}, "60, 65.*0 <= start < stop <= 64"),
        ({"shards": range(0)}, "one or more"),
        ({"shards": range(0, 64, 2)}, "consecutive"),
        ({"features": ("user", "item")}, "no sparse feature 'item'"),
        ({"features": ("user", "user")}, "'user' is asked for twice"),
    ],
)
def test_argument_out_of_its_limits_is_an_input_error(dataset, arguments, message):
    with pytest.raises(InputError, match=message):
        Loader(dataset, "train", **{"batch_size": 64, **arguments})


@pytest.mark.parametrize(("epoch", "first_step"), [(-1, 0), (0, -1), (0, 3)])
def test_step_that_does_not_exist_is_an_input_error(dataset, epoch, first_step):
    loader = Loader(dataset, "train", batch_size=64)
    assert list(loader.batches(0, 2)) == []
    with pytest.raises(InputError, match="has the steps 0 to 1"):
        loader.batches(epoch, first_step)


def test_split_that_is_missing_or_empty_or_of_another_size_is_an_input_error(dataset):
    with pytest.raises(InputError, match=r"no split 'test'; use one of \['train'\]"):
        Loader(dataset, "test", batch_size=64)
    last = sorted((dataset / "train").iterdir())[-1]
    last.unlink()
    with pytest.raises(InputError, match="hold 70 rows, but the card says 100"):
        Loader(dataset, "train", batch_size=64)
    for file in (dataset / "train").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"no \.parquet file"):
        Loader(dataset, "train", batch_size=64)
    pq.write_table(make_table(0), last)
    with pytest.raises(InputError, match="hold no rows"):
        Loader(dataset, "train", batch_size=64)


def test_column_that_is_missing_or_of_another_type_is_an_input_error_that_names_the_file(tmp_path):
    write_dataset(tmp_path / "missing", make_table(10).drop_columns("tags"))
    with pytest.raises(InputError, match=r"part-00000\.parquet.*'tags'"):
        Loader(tmp_path / "missing", "train", batch_size=64)
    assert Loader(tmp_path / "missing", "train", features=("user",), batch_size=64).num_samples == 10
    table = make_table(10)
    write_dataset(tmp_path / "type", table.set_column(4, "tags", table["ad"]))
    with pytest.raises(InputError, match=r"part-00000\.parquet.*'tags'"):
        Loader(tmp_path / "type", "train", batch_size=64)


def test_corrupt_file_is_a_one_line_input_error_from_the_iterator(dataset):
    path = dataset / "train" / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396  # the footer, at the end, stays
    path.write_bytes(content)
    before = set(threading.enumerate())
    batches = Loader(dataset, "train", batch_size=64).batches(0)
    with pytest.raises(InputError, match=r"part-00001\.parquet: row group 0 cannot be read") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    assert list(batches) == []
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_truncated_file_is_an_input_error(dataset):
    path = dataset / "train" / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"part-00001\.parquet: cannot be read as Parquet"):
        Loader(dataset, "train", batch_size=64)


def test_value_out_of_its_limits_is_an_input_error_that_names_file_and_row(tmp_path):
    table = make_table(100)
    users = table["user"].to_pylist()
    users[57] = 2**31 + 5
    write_dataset(tmp_path, table.set_column(3, "user", pa.array(users, pa.int64())))
    with pytest.raises(InputError, match=r"part-00001\.parquet.*row 22.*'user'.*2147483653"):
        list(Loader(tmp_path, "train", batch_size=64).batches(0))
