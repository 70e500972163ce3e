"""Workdir: the folder of one run, and what it remembers of the experiment that it belongs to.

config.json     the experiment, the dataset card, the row groups of its files: what may not change when it is resumed
checkpoints/    dense state, by step (orbax);  tables/ the tables of the same steps (sharding/checkpoint.py)
metrics.jsonl   one line for each log window and evaluation;  tensorboard/ the same
curves.png      the picture at the end;  result.json the result
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec

from dlrm_jax.config import Config, flatten
from dlrm_jax.data.card import DatasetCard
from dlrm_jax.data.card_identity import card_identity, differing
from dlrm_jax.data.folder_lock import LOCK_FILE
from dlrm_jax.data.write_errors import naming_folder
from sharding.errors import InputError
from sharding.whole_file import write_whole

_CONFIG_FILE = "config.json"
# Orbax takes brackets and two asterisks for a pattern, tensorstore a backslash for a slash.
_UNWRITABLE = ("[", "]", "\\", "**")
# What a run may leave that was killed before it had a config.
_BEGINNINGS = (_CONFIG_FILE + ".partial", LOCK_FILE)


class Workdir:
    """The folder of one run.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: str | Path):
        """Names the folder; touches nothing.

        Args:
            path: The folder.
        """
        self.path = Path(path)

    @property
    def metrics_file(self) -> Path:
        """Where metrics are logged."""
        return self.path / "metrics.jsonl"

    def claim(self, config: Config, card: DatasetCard, *, row_groups: str | None = None) -> None:
        """Makes this the folder of an experiment, or makes sure that it already is.

        As long as a run has no checkpoint, there is nothing that another could spoil, and the folder is the other's.

        Args:
            config: The experiment.
            card: Its dataset, with the sparse features in use, in the model's order.
            row_groups: Digest of the training split's row groups; None where there are no files.

        Raises:
            InputError: The folder belongs to another experiment or dataset, is no run's, or cannot be written.
        """
        path = self.path / _CONFIG_FILE
        odd = [character for character in _UNWRITABLE if character in str(self.path.resolve())]
        if odd:
            raise InputError(
                f"{self.path.resolve()}: checkpoints below a folder with {odd[0]!r} in its name cannot be read back; "
                "choose another --workdir"
            )
        if path.is_file():
            if self.checkpoint_steps():
                self._compare(path, config, card, row_groups)
        elif self.path.is_dir() and any(file.name not in _BEGINNINGS for file in self.path.iterdir()):
            raise InputError(f"{self.path}: not empty, and not the folder of a run; choose another --workdir")
        body = {
            "config": config.identity(),
            "experiment": dataclasses.asdict(config),
            "dataset": dataclasses.asdict(card),
            "row_groups": row_groups,
        }
        with naming_folder(self.path, instead="another --workdir"):
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(body, indent=1) + "\n")

    def is_claimed(self) -> bool:
        """Whether it is the folder of a run."""
        return (self.path / _CONFIG_FILE).is_file()

    def checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(int(folder.name) for folder in (self.path / "checkpoints").glob("*") if folder.name.isdigit())

    def read(self) -> tuple[Config, DatasetCard]:
        """Reads the experiment that the folder belongs to.

        Returns:
            The config, and the dataset card that it was trained with.

        Raises:
            InputError: The folder is not that of a run.
        """
        path = self.path / _CONFIG_FILE
        if not path.is_file():
            raise InputError(
                f"{path}: not there, so {self.path} is not the folder of a run; train one with scripts/train.py"
            )
        body = self._decode(path)
        return _part(body, "experiment", Config, path), _part(body, "dataset", DatasetCard, path)

    def _compare(self, path: Path, config: Config, card: DatasetCard, row_groups: str | None) -> None:
        saved = self._decode(path)
        settings = _plain(flatten(dataclasses.asdict(config)))
        trained = _plain(card_identity(_part(saved, "dataset", DatasetCard, path)))
        # What is no part of an identity may be a setting all the same, such as a pipeline that is not stale.
        for what, was, now, known in (
            ("", saved.get("config", {}), _plain(config.identity()), (flatten(saved.get("experiment", {})), settings)),
            ("dataset ", trained, _plain(card_identity(card)), ({}, {})),
        ):
            for field in sorted(differing(was, now)):
                before, after = _brief({**known[0], **was}, field), _brief({**known[1], **now}, field)
                raise InputError(
                    f"{self.path}: holds a run with {what}{field} = {before}, but now it is {after}: choose "
                    "another --workdir, or restore the setting"
                )
        # Earlier versions did not note them.
        known_row_groups = saved.get("row_groups")
        if None not in (known_row_groups, row_groups) and known_row_groups != row_groups:
            raise InputError(
                f"{self.path}: holds a run whose training files have row groups of digest {known_row_groups}, but now "
                f"it is {row_groups}, which puts samples in another order: restore the files with their names and row "
                "groups, or choose another --workdir"
            )

    def _decode(self, path: Path) -> dict[str, Any]:
        try:
            return msgspec.convert(json.loads(path.read_text()), dict[str, Any])
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); choose another --workdir") from error


def _part[Part](body: dict[str, Any], name: str, kind: type[Part], path: Path) -> Part:
    """A part of a decoded config file."""
    try:
        return msgspec.convert(body[name], kind)
    except (KeyError, msgspec.ValidationError) as error:
        raise InputError(f"{path}: written by another version ({error}); train again in a new --workdir") from error


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _brief(values: dict[str, Any], field: str) -> str:
    """A value as the command line takes it, or that there is none."""
    if field not in values:
        return "not there"
    text = "None" if values[field] is None else json.dumps(values[field])
    return text if len(text) <= 80 else text[:77] + "..."
