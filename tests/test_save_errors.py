"""What a person reads when a run's files cannot be written."""

import errno
import os
import re

import pytest

from dlrm_jax.save_errors import SaveError, check_room, saving
from dlrm_jax.workdir import Workdir

FULL = "the disk is full (No space left on device); make room there, and the same command"


def tensorstore_error(status: str, folder: object) -> ValueError:
    """As tensorstore words it."""
    return ValueError(f'{status}: Error writing local file "{folder}/tables/5/c/0/0/0": Failed writing: no [code=28]')


@pytest.fixture
def workdir(tmp_path) -> Workdir:
    """A workdir with checkpoints of two steps, and one that is on its way."""
    for name in ("40", "1200", "1600.orbax-checkpoint-tmp"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    return Workdir(tmp_path / "run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), f"{FULL} goes on from step 1,200"),
        (lambda folder: OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full (Disk quota exceeded); make"),
        (lambda folder: tensorstore_error("RESOURCE_EXHAUSTED", folder), f"{FULL} goes on from step 1,200"),
        (
            lambda folder: OSError(errno.EROFS, "Read-only file system", f"{folder}/metrics.jsonl"),
            "cannot be written (Read-only file system); repair that, and the same command goes on from step 1,200",
        ),
        (lambda folder: tensorstore_error("PERMISSION_DENIED", folder), "cannot be written (PERMISSION_DENIED: Error"),
    ],
)
def test_error_when_a_run_is_written_then_one_line_names_folder_reason_and_step(workdir, make, message):
    with pytest.raises(SaveError, match=re.escape(f"{workdir.path}: {message}")) as error, saving(workdir):
        raise make(workdir.path)
    assert "\n" not in str(error.value)


def test_error_when_there_is_no_checkpoint_yet_then_the_run_begins_anew(tmp_path):
    with pytest.raises(SaveError, match="begins anew, since there is no checkpoint yet"), saving(Workdir(tmp_path)):
        raise OSError(errno.ENOSPC, "")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "", "/elsewhere/data"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ValueError("of a shape"),
    ],
)
def test_error_when_it_is_of_something_else_then_it_stays_what_it_is(workdir, error):
    with pytest.raises(type(error)) as raised, saving(workdir):
        raise error
    assert raised.value is error


def test_room_when_there_is_enough_then_nothing_is_left_behind(workdir):
    before = sorted(workdir.path.rglob("*"))
    check_room(workdir, 10_000)
    assert sorted(workdir.path.rglob("*")) == before


def test_room_when_the_file_system_cannot_say_then_the_run_goes_on(workdir, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    check_room(workdir, 10_000)
