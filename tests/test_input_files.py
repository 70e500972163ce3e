"""dlrm_jax/data/input_files.py: what a converter is given to read."""

import os

import pytest

from dlrm_jax.data.input_files import check_distinct, check_outside, reading
from sharding.errors import InputError


@pytest.mark.parametrize("spelling", ["itself", "dots", "relative", "symbolic link", "hard link"])
def test_a_file_that_is_given_twice_by_any_path_then_error_names_both(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    first = tmp_path / "train.txt"
    first.write_text("text")
    (tmp_path / "symbolic").symlink_to(first)
    os.link(first, tmp_path / "hard")
    again = {
        "itself": tmp_path / "train.txt",
        "dots": tmp_path / ".." / tmp_path.name / "train.txt",
        "relative": (tmp_path / "train.txt").relative_to(tmp_path),
        "symbolic link": tmp_path / "symbolic",
        "hard link": tmp_path / "hard",
    }[spelling]
    with pytest.raises(InputError) as refused:
        check_distinct([first, again])
    assert str(refused.value) == f"{again}: the same file as {first}; give each file once"


def test_a_file_beside_its_compressed_self_is_refused_and_equal_copies_are_not(tmp_path):
    for name in ("day_0", "day_1", "day_1.gz"):
        (tmp_path / name).write_text("text")
    check_distinct([tmp_path / "day_0", tmp_path / "day_1"])
    with pytest.raises(InputError, match=r"day_1\.gz: the same lines as .*day_1, which is given, too"):
        check_distinct([tmp_path / "day_1", tmp_path / "day_1.gz"])


@pytest.mark.parametrize("name", ["out/train/day_0", "link_to_out/day_0", "link_in_out", "out/link_to_day_1"])
def test_a_file_in_the_folder_of_the_dataset_by_any_path_then_error_names_it(tmp_path, name):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "day_0").write_text("text")
    (tmp_path / "day_1").write_text("text")
    (tmp_path / "link_to_out").symlink_to(tmp_path / "out" / "train")
    (tmp_path / "link_in_out").symlink_to(tmp_path / "out" / "train" / "day_0")
    (tmp_path / "out" / "link_to_day_1").symlink_to(tmp_path / "day_1")
    with pytest.raises(InputError, match=rf"{name}: lies in .*out, where the dataset goes; give another --out"):
        check_outside([tmp_path / "day_1", tmp_path / name], tmp_path / "out")
    check_outside([tmp_path / "day_1"], tmp_path / "out")


def test_a_file_that_cannot_be_looked_at_then_error_names_it(tmp_path):
    long = tmp_path / ("a" * 300)
    with pytest.raises(InputError, match=r"aaa: cannot be read \(File name too long\); give another file"), reading():
        long.stat()
