"""dlrm_jax/data/write_errors.py: errors of the operating system as one line."""

import errno
import os

import pytest

from dlrm_jax.data.write_errors import naming_folder
from sharding.errors import InputError


def writing(folder):
    return naming_folder(folder, instead="another --out", then="the same command continues")


def test_a_full_disk_then_error_names_the_folder_and_what_to_do(tmp_path):
    # Every write to this device finds the disk full.
    with pytest.raises(InputError) as refused, writing(tmp_path), open("/dev/full", "w") as file:
        file.write("text")
    assert str(refused.value) == (
        f"{tmp_path}: No space left on device; make room there, and the same command continues"
    )


def test_an_error_that_a_library_words_then_the_reason_is_that_of_the_operating_system(tmp_path):
    with pytest.raises(InputError, match="Permission denied"), writing(tmp_path):
        raise OSError(errno.EACCES, "Error writing bytes. Detail: [errno 13]")
    with pytest.raises(InputError, match=r"cannot be written \(all gone\); give another --out"), writing(tmp_path):
        raise OSError("all gone")


@pytest.mark.parametrize("at", ["out", "out/train/part", "."])
def test_an_error_in_the_folder_or_above_it_then_the_folder_is_named(tmp_path, at):
    with pytest.raises(InputError, match=f"{tmp_path / 'out'}: cannot be written"), writing(tmp_path / "out"):
        raise OSError(errno.EROFS, "read-only", os.fspath(tmp_path / at))


def test_an_error_elsewhere_then_the_file_is_named_as_what_cannot_be_read(tmp_path):
    with pytest.raises(InputError) as refused, writing(tmp_path / "out"):
        (tmp_path / "input").read_text()
    assert str(refused.value).startswith(f"{tmp_path / 'input'}: cannot be read (No such file or directory); repair")
