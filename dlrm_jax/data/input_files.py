"""The files that a converter reads."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sharding.errors import InputError


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns errors of the operating system into an InputError that names the file.

    Raises:
        InputError: A file or folder cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); give another file") from error


def check_outside(paths: Sequence[Path], folder: str | os.PathLike[str]) -> None:
    """Checks that no file lies in the folder of the dataset: ``--overwrite`` would remove it before it is read.

    Raises:
        InputError: A file, or the link that leads to it, lies there.
    """
    out = Path(os.path.realpath(folder))
    for path in paths:
        folders = (Path(os.path.realpath(path)).parent, Path(os.path.realpath(path.parent)))
        if any(inside.is_relative_to(out) for inside in folders):
            raise InputError(f"{path}: lies in {out}, where the dataset goes; give another --out, or move the file")


def check_distinct(paths: Sequence[Path]) -> None:
    """Checks that no file is given twice: training would see lines that it is evaluated on.

    Raises:
        InputError: Two paths lead to one file, or one is the other compressed by gzip.
    """
    seen: dict[tuple[int, int] | str, Path] = {}
    for path in paths:
        status = path.stat()
        earlier = seen.setdefault((status.st_dev, status.st_ino), path)
        if earlier is not path:
            raise InputError(f"{path}: the same file as {earlier}; give each file once")
        earlier = seen.setdefault(os.path.realpath(path).removesuffix(".gz"), path)
        if earlier is not path:
            raise InputError(f"{path}: the same lines as {earlier}, which is given, too; give one of the two")
