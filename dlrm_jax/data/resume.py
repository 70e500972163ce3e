"""Preparing a dataset that was begun before: what is there already, and whether it was begun in the same way."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlrm_jax.data.card import CARD_FILE, DatasetCard, read_card, write_card
from dlrm_jax.data.folder_lock import LOCK_FILE, exclusive
from dlrm_jax.data.rejects import REJECTS_FILE
from dlrm_jax.data.write_errors import naming_folder
from sharding.errors import InputError
from sharding.whole_file import write_whole

WORK_FOLDER = ".prepare"
_BEGUN_FILE = "begun.json"
_PARTIAL_FILES = (CARD_FILE + ".partial", _BEGUN_FILE + ".partial")
# What the converters write: nothing else is removed to make a dataset anew.
_OWN_FILES = (CARD_FILE, _BEGUN_FILE, REJECTS_FILE, LOCK_FILE, *_PARTIAL_FILES)
_OWN_FOLDERS = (WORK_FOLDER, "vocabulary", "train", "validation", "test")
OTHER_FOLDER = "another --out"


@contextlib.contextmanager
def dataset_folder(
    directory: str | os.PathLike[str], source: dict[str, Any], *, overwrite: bool = False, resumable: bool = True
) -> Iterator[DatasetCard | None]:
    """Begins a dataset, or takes one up that was begun before: a context in which nobody else writes its folder.

    Args:
        directory: Folder of the dataset; made if it is absent.
        source: How the dataset is made, as it will stand in the card: everything that decides its content.
        overwrite: Whether a dataset that is there, or a part of one, is removed first.
        resumable: Whether the converter goes on where it stopped. Otherwise it starts from the beginning.

    Yields:
        The card, if the dataset is complete already; otherwise None, and files with their final name that lie in the
        folder were written with the same ``source``.

    Raises:
        InputError: The folder holds a dataset, or a part of one, that was made in another way, or files of something
            else; another process prepares a dataset in it; it cannot be written, or the disk is full.
    """
    folder = Path(directory)
    then = next_start(overwrite=overwrite, resumable=resumable)
    with (
        exclusive(folder, what="preparing a dataset", instead=OTHER_FOLDER),
        naming_folder(folder, instead=OTHER_FOLDER, then=then),
    ):
        if overwrite:
            _remove_dataset(folder)
        yield _begin(folder, json.loads(json.dumps(source)))


def next_start(*, overwrite: bool, resumable: bool = True) -> str:
    """Says what becomes of an interrupted preparation."""
    without = " without --overwrite" if overwrite and resumable else ""
    return f"the same command{without} {'continues' if resumable else 'begins anew'}"


def finish_dataset(card: DatasetCard, directory: str | os.PathLike[str]) -> None:
    """Writes the card, which makes the folder a dataset, and removes what only an interrupted preparation needs."""
    write_card(card, directory)
    remove_leftovers(directory)


def remove_leftovers(directory: str | os.PathLike[str]) -> None:
    """Removes from a complete dataset what a preparation that was killed after it had written the card left there.

    Only where it says that it had begun: that file goes last.
    """
    begun = Path(directory, _BEGUN_FILE)
    if begun.exists():
        shutil.rmtree(Path(directory, WORK_FOLDER), ignore_errors=True)
        with contextlib.suppress(OSError):
            begun.unlink(missing_ok=True)


def _begin(folder: Path, source: dict[str, Any]) -> DatasetCard | None:
    if Path(folder, CARD_FILE).exists():
        card = read_card(folder)
        _check_source(folder, card.source, source)
        remove_leftovers(folder)
        return card
    begun = Path(folder, _BEGUN_FILE)
    if begun.exists():
        _check_source(folder, _read_begun(begun), source)
        return None
    if any(path.name not in (LOCK_FILE, *_PARTIAL_FILES) for path in folder.iterdir()):
        raise InputError(f"{folder}: not empty, and not a dataset that was begun here; give a new folder with --out")
    write_whole(begun, json.dumps(source))
    return None


def _read_begun(begun: Path) -> dict[str, Any]:
    try:
        return json.loads(begun.read_text())
    except ValueError as error:
        raise InputError(
            f"{begun}: cannot be read as JSON ({error}); make the dataset anew with --overwrite"
        ) from error


def _remove_dataset(folder: Path) -> None:
    others = sorted(path.name for path in folder.iterdir() if path.name not in _OWN_FILES + _OWN_FOLDERS)
    if others:
        raise InputError(f"{folder}: holds {others[0]}, which --overwrite would not remove: move it, or the dataset")
    for name in _OWN_FILES:
        if name != LOCK_FILE:
            Path(folder, name).unlink(missing_ok=True)
    for name in _OWN_FOLDERS:
        if Path(folder, name).exists():
            shutil.rmtree(Path(folder, name))


def _check_source(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = sorted(key for key in there.keys() | asked.keys() if there.get(key) != asked.get(key))
    if differing:
        key = differing[0]
        raise InputError(
            f"{folder}: made with {key} = {there.get(key)!r}, now asked for {asked.get(key)!r}; "
            "delete the folder or give another one with --out"
        )
