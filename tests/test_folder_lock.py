"""dlrm_jax/data/folder_lock.py: one process at a time in a folder."""

import os
import signal
import subprocess
import sys

import pytest

from dlrm_jax.data.folder_lock import LOCK_FILE, exclusive
from sharding.errors import InputError

HOLDER = """
import sys
from dlrm_jax.data.folder_lock import exclusive
with exclusive(sys.argv[1], what="training", instead="another --workdir"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def taken(folder):
    return exclusive(folder, what="training", instead="another --workdir")


def test_exclusive_when_another_process_holds_the_folder_names_it_until_that_is_killed(tmp_path):
    with hold(tmp_path) as process:
        with pytest.raises(InputError) as refused, taken(tmp_path):
            pass
        message = str(refused.value)
        assert message.startswith(f"{tmp_path}: another process is training there (process {process.pid} on ")
        assert message.endswith("); wait until it ends, or give another --workdir")
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (tmp_path / LOCK_FILE).exists()
    with taken(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_exclusive_when_held_in_this_process_is_refused_and_free_afterwards(tmp_path):
    with taken(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"), taken(tmp_path):
        pass
    with taken(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_exclusive_when_an_error_ends_it_frees_the_folder_and_removes_what_it_made_and_is_empty(tmp_path):
    with pytest.raises(KeyError), taken(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with taken(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_exclusive_when_the_file_was_removed_meanwhile_takes_the_new_one(tmp_path, monkeypatch):
    opened = os.open
    times = 0

    def removed_once(path, *rest):
        nonlocal times
        times += 1
        descriptor = opened(path, *rest)
        if times == 1:
            os.unlink(path)
        return descriptor

    monkeypatch.setattr(os, "open", removed_once)
    with taken(tmp_path):
        assert times == 2
        with pytest.raises(InputError, match="another process"), taken(tmp_path):
            pass


def test_exclusive_when_the_name_is_too_long_then_one_line_says_so(tmp_path):
    reason = r"cannot be written \(File name too long\); give another --workdir"
    with pytest.raises(InputError, match=reason), taken(tmp_path / ("a" * 256)):
        pass


@pytest.mark.parametrize("below", ["", "below"])
def test_exclusive_when_a_file_stands_in_the_way_says_so(tmp_path, below):
    path = tmp_path / "file"
    path.touch()
    reason = r"cannot be written \((File exists|Not a directory)\); give another --workdir"
    with pytest.raises(InputError, match=reason), taken(path / below):
        pass
