"""Errors while a run's files are written, as one line: the folder, the reason, and where the run goes on from."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from dlrm_jax.data.write_errors import FULL
from dlrm_jax.workdir import Workdir

# Tensorstore, and orbax with it, puts the file and what the operating system said into a ValueError's text.
_FULL_STATUS = "RESOURCE_EXHAUSTED: "


class SaveError(RuntimeError):
    """A checkpoint, metrics or a picture cannot be written; the message says from where the run goes on."""


@contextlib.contextmanager
def saving(workdir: Workdir) -> Iterator[None]:
    """Turns errors of the operating system, while files of a run are written, into one line.

    Args:
        workdir: The run's folder.

    Raises:
        SaveError: The disk is full, or the folder cannot be written for another reason.
    """
    try:
        yield
    except (ConnectionError, TimeoutError):
        # Of another process, or of whoever reads what is printed.
        raise
    except OSError as error:
        folder = workdir.path.resolve()
        if isinstance(error.filename, str) and not Path(error.filename).resolve().is_relative_to(folder):
            raise
        reason = error.strerror or str(error) or type(error).__name__
        raise _save_error(workdir, reason, full=error.errno in FULL) from error
    except ValueError as error:
        text = str(error)
        if str(workdir.path.resolve()) not in text:
            raise
        full = text.startswith(_FULL_STATUS)
        reason = os.strerror(errno.ENOSPC) if full else text.splitlines()[0][:200]
        raise _save_error(workdir, reason, full=full) from error


def check_room(workdir: Workdir, num_bytes: int) -> None:
    """Asks the file system for room, and gives it back.

    Orbax writes in threads of its own, whose errors each print a traceback: this asks before they begin.

    Args:
        workdir: The run's folder.
        num_bytes: Bytes that are going to be written.

    Raises:
        OSError: There is no such room.
    """
    probe = workdir.path / "room.partial"
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, max(num_bytes, 1))
    except OSError as error:
        # Some file systems have no such call.
        if error.errno in FULL:
            raise
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)


def _save_error(workdir: Workdir, reason: str, *, full: bool) -> SaveError:
    steps = workdir.checkpoint_steps()
    goes_on = f"goes on from step {steps[-1]:,}" if steps else "begins anew, since there is no checkpoint yet"
    what = "the disk is full" if full else "cannot be written"
    fix = "make room there" if full else "repair that"
    return SaveError(f"{workdir.path}: {what} ({reason}); {fix}, and the same command {goes_on}")
