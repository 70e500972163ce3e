"""Errors of the operating system while a folder is written, as one line: the place, the reason and what to do."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from sharding.errors import InputError

# What the operating system says of a full disk, or of one that a user has no more room on.
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def naming_folder(folder: str | os.PathLike[str], *, instead: str, then: str = "start again") -> Iterator[None]:
    """Turns errors of the operating system into an InputError that names a folder, or the file elsewhere at fault.

    Args:
        folder: Where everything that is written goes.
        instead: What to give if the folder cannot be written: ``"another --out"``.
        then: What to do once a full disk has room again.

    Raises:
        InputError: The disk is full, the folder cannot be made or written, or a file outside it cannot be read.
    """
    path = Path(folder)
    try:
        yield
    except OSError as error:
        # Libraries write sentences of their own around the reason.
        reason = os.strerror(error.errno) if error.errno else str(error)
        at = Path(error.filename) if isinstance(error.filename, str) else path
        if not (at.is_relative_to(path) or path.is_relative_to(at)):
            raise InputError(f"{at}: cannot be read ({reason}); repair that, and {then}") from error
        if error.errno in FULL:
            raise InputError(f"{path}: {reason}; make room there, and {then}") from error
        raise InputError(f"{path}: cannot be written ({reason}); give {instead}") from error
