"""Preparing a dataset that was begun before: what is there already, and whether it was begun in the same way."""

import json
import os
from pathlib import Path
from typing import Any

from dlrm_jax.data.card import CARD_FILE, DatasetCard, read_card, write_card
from sharding.errors import InputError

_BEGUN_FILE = "begun.json"


def begin_dataset(directory: str | os.PathLike[str], source: dict[str, Any]) -> DatasetCard | None:
    """Begins a dataset, or takes one up that was begun before.

    Args:
        directory: Folder of the dataset; made if it is absent.
        source: How the dataset is made, as it will stand in the card: everything that decides its content.

    Returns:
        The card, if the dataset is complete already; otherwise None, and files with their final name that lie in the
        folder were written with the same ``source``.

    Raises:
        InputError: The folder holds a dataset, or a part of one, that was made in another way, or files of something
            else.
    """
    folder = Path(directory)
    source = json.loads(json.dumps(source))
    if Path(folder, CARD_FILE).exists():
        card = read_card(folder)
        _check_source(folder, card.source, source)
        return card
    begun = Path(folder, _BEGUN_FILE)
    if begun.exists():
        _check_source(folder, json.loads(begun.read_text()), source)
        return None
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty, and not a dataset that was begun here; give a new folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    partial = begun.with_suffix(".partial")
    partial.write_text(json.dumps(source))
    partial.replace(begun)
    return None


def finish_dataset(card: DatasetCard, directory: str | os.PathLike[str]) -> None:
    """Writes the card, which makes the folder a dataset."""
    write_card(card, directory)
    Path(directory, _BEGUN_FILE).unlink(missing_ok=True)


def _check_source(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = sorted(key for key in there.keys() | asked.keys() if there.get(key) != asked.get(key))
    if differing:
        key = differing[0]
        raise InputError(
            f"{folder}: made with {key} = {there.get(key)!r}, now asked for {asked.get(key)!r}; "
            "delete the folder or give another one with --out"
        )
