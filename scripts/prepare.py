"""Makes datasets in the format of docs/data.md, and checks them.

scripts/prepare.py {criteo FILES..., kuairand FOLDER, synthetic} --out DIR

scripts/prepare.py check DIR
"""

# First, and for what its import does: how Ctrl-C ends the script while the others are imported.
import scripts.interrupts  # noqa: F401

# isort: split

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import tyro

from dlrm_jax.data.card import CARD_FILE
from dlrm_jax.data.check import check_dataset
from dlrm_jax.data.criteo import CriteoSpec, prepare_criteo
from dlrm_jax.data.display import ProgressDisplay, print_report, print_summary
from dlrm_jax.data.kuairand import prepare_kuairand
from dlrm_jax.data.resume import OTHER_FOLDER, next_start, remove_leftovers
from dlrm_jax.data.synthetic import SyntheticSpec, prepare_synthetic
from dlrm_jax.data.write_errors import naming_folder
from scripts.one_line_errors import one_line_errors, run
from scripts.repeated_flags import refuse_repeats
from sharding.errors import InputError


def criteo(
    files: tyro.conf.Positional[tuple[Path, ...]],
    out: Path,
    spec: tyro.conf.OmitArgPrefixes[CriteoSpec] = CriteoSpec(),  # noqa: B008, frozen
    max_reject_share: float = 0.01,
    memory_limit_mb: float = 2048,
    overwrite: bool = False,
) -> None:
    """Converts Criteo Kaggle or Terabyte: lines of label, 13 integers and 26 hexadecimal ids, plain or .gz.

    Args:
        files: TSV files in order of time, or their folder.
        out: Folder of the dataset. The same command continues an interrupted one.
        spec: What becomes of the lines.
        max_reject_share: Share of malformed lines above which the run stops.
        memory_limit_mb: MiB for tables of counts and for vocabularies; the program takes about 500 MiB besides.
        overwrite: Remove the dataset, or part of one, that is in the folder.
    """
    _refuse_complete(out, overwrite)
    with _interruptible(next_start(overwrite=overwrite)), ProgressDisplay() as display:
        card = prepare_criteo(
            files,
            out,
            spec=spec,
            max_reject_share=max_reject_share,
            memory_limit_mb=memory_limit_mb,
            overwrite=overwrite,
            progress=display.update,
        )
    print_summary(card, out)


def kuairand(
    source: tyro.conf.Positional[Path],
    out: Path,
    features: Literal["plain", "full"] = "full",
    max_recent: int = 20,
    min_count: int = 2,
    max_reject_share: float = 0.01,
    overwrite: bool = False,
) -> None:
    """Converts KuaiRand-Pure: the published CSV files, split by date as its README says.

    Args:
        source: Folder of the CSV files.
        out: Folder of the dataset.
        features: plain: of the impression, its user and its video alone; full: also recent clicks and past rates.
        max_recent: Longest bag of a user's recent clicks.
        min_count: A value has a row of its own if it occurs in so many training rows; rarer ones share row 0.
        max_reject_share: Share of malformed lines above which the run stops.
        overwrite: Remove the dataset, or part of one, that is in the folder.
    """
    _refuse_complete(out, overwrite)
    with _interruptible(next_start(overwrite=overwrite, resumable=False)), ProgressDisplay() as display:
        card = prepare_kuairand(
            source,
            out,
            features=features,
            max_recent=max_recent,
            min_count=min_count,
            max_reject_share=max_reject_share,
            overwrite=overwrite,
            progress=display.of_stage("converting"),
        )
    print_summary(card, out)


def synthetic(
    out: Path,
    spec: tyro.conf.OmitArgPrefixes[SyntheticSpec] = SyntheticSpec(),  # noqa: B008, frozen
    overwrite: bool = False,
) -> None:
    """Generates a click log from a planted logistic model, whose attainable AUC and NE go to the card.

    Args:
        out: Folder of the dataset. The same command continues an interrupted one.
        spec: What to generate.
        overwrite: Remove the dataset, or part of one, that is in the folder.
    """
    _refuse_complete(out, overwrite)
    with _interruptible(next_start(overwrite=overwrite)), ProgressDisplay() as display:
        card = prepare_synthetic(out, config=spec, overwrite=overwrite, progress=display.of_stage("generating"))
    print_summary(card, out)


def check(directory: tyro.conf.Positional[Path]) -> None:
    """Reads a whole dataset and checks it against its card: exit code 0 if it is valid, 2 with the reason if not.

    Args:
        directory: Folder of the dataset.
    """
    with ProgressDisplay() as display:
        report = check_dataset(directory, progress=display.of_stage("checking"))
    print_report(report, directory)


def _refuse_complete(out: Path, overwrite: bool) -> None:
    with naming_folder(out, instead=OTHER_FOLDER):
        if not overwrite and Path(out, CARD_FILE).exists():
            remove_leftovers(out)
            raise InputError(f"{out}: complete already; make it anew with --overwrite, or give {OTHER_FOLDER}")


@contextlib.contextmanager
def _interruptible(then: str) -> Iterator[None]:
    """Has the line with which Ctrl-C ends the script say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(then) from None


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A function of the same flags that only says what to run, so that parsing ends before work begins."""

    @functools.wraps(command)
    def parse(*args: object, **kwargs: object) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    return parse


def _command(arguments: Sequence[str]) -> None:
    commands = {command.__name__: _deferred(command) for command in (criteo, kuairand, synthetic, check)}
    refuse_repeats(arguments)
    with one_line_errors():
        chosen = tyro.extras.subcommand_cli_from_dict(
            commands, description=__doc__, args=list(arguments), use_underscores=True
        )
    chosen()


def main() -> None:
    """Runs the command that the command line names."""
    run(_command)


if __name__ == "__main__":
    main()
