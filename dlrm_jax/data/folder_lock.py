"""One process at a time in a folder: an advisory lock of the operating system, which ends with the process."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dlrm_jax.data.write_errors import naming_folder
from sharding.errors import InputError

LOCK_FILE = ".lock"
# What flock says on file systems that have no locks: there, nothing is refused.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_ATTEMPTS = 100


@contextlib.contextmanager
def exclusive(folder: str | os.PathLike[str], *, what: str, instead: str) -> Iterator[None]:
    """Keeps other processes out of a folder that is being written.

    The lock is ``flock`` on the file `LOCK_FILE` in the folder. The file is removed at the end; that of a process
    which was killed stays, but holds nobody up, since the lock has ended with the process. Folders that are made here
    are removed again if nothing has been put into them.

    Args:
        folder: The folder; made if it is absent.
        what: What is done there, as the end of "another process is ...".
        instead: What to give instead, as the end of "or give ...": ``"another --out"``.

    Raises:
        InputError: Another process is at work in the folder, or the folder cannot be made or written.
    """
    path = Path(folder)
    with naming_folder(path, instead=instead):
        absent = [parent for parent in (path, *path.parents) if not parent.exists()]
        descriptor = _lock(path, what, instead)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            Path(path, LOCK_FILE).unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for made in absent:
                made.rmdir()


def _lock(folder: Path, what: str, instead: str) -> int:
    path = Path(folder, LOCK_FILE)
    for left in reversed(range(_ATTEMPTS)):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # Whoever made the folder has removed it since; /proc says the same of its own.
            if not left:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            named = f" ({holder})" if holder else ""
            raise InputError(
                f"{folder}: another process is {what} there{named}; wait until it ends, or give {instead}"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        if _is_file(descriptor, path):
            # On a full disk the lock holds all the same, and nobody is told whose it is.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        # Whoever held the lock has removed the file since it was opened.
        os.close(descriptor)
    raise InputError(f"{folder}: other processes are {what} there; wait until they end, or give {instead}")


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
