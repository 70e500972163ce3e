"""Kills training again and again, at any moment and in the middle of saves, and compares what it ends with.

.venv/bin/python tests/kill9.py --kills 24
"""

import argparse
import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import tiny

from dlrm_jax.config import Config
from scripts.command_line import parse_config

ROOT = Path(__file__).resolve().parent.parent
# A machine with all cores busy takes a minute to start JAX.
PATIENCE_SECONDS = 300
POLL_SECONDS = 0.002
# Most steps that a run is let go on before it is killed again.
STEPS_BETWEEN_KILLS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a run that was killed.

    Attributes:
        kills: Kills.
        in_saves: Kills that left an incomplete checkpoint behind.
        resumed: Steps that were resumed from.
        step: Last step of the run.
    """

    kills: int
    in_saves: int
    resumed: tuple[int, ...]
    step: int


def flags(data: Path, workdir: Path, *, epochs: int, checkpoint_every: int) -> list[str]:
    """The command line of scripts/train.py: small tables in bfloat16, stochastic rounding, Adam everywhere."""
    return [
        *("quickstart", "--data.path", str(data), "--workdir", str(workdir)),
        *("--data.batch_size", str(tiny.BATCH_SIZE), "--data.eval_batch_size", str(tiny.BATCH_SIZE)),
        *("--data.virtual_shards", "4", "--data.shuffle_window", "256"),
        *("--embedding.default.dim", "8", "--embedding.default.optimizer", "adam"),
        *("--embedding.default.dtype", "bfloat16", "--embedding.default.rounding", "stochastic"),
        *("--model.bottom_mlp", "8", "--model.top_mlp", "8", "1", "--dense_optimizer.name", "adam"),
        *("--train.epochs", str(epochs), "--train.checkpoint_every", str(checkpoint_every)),
        *("--train.eval_every", "8", "--train.log_every", "5"),
    ]


def last_of_each(arguments: Iterable[object]) -> list[str]:
    """The command line in which a flag that is given again replaces the one before, as the scripts refuse to."""
    words: dict[str, list[str]] = {"": []}
    flag = ""
    for word in map(str, arguments):
        if word.startswith("--"):
            flag = word.partition("=")[0]
            words[flag] = []
        words[flag].append(word)
    return [word for of_flag in words.values() for word in of_flag]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Starts scripts/train.py."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.train", *arguments],
        cwd=ROOT,
        env=os.environ | cache,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def committed(workdir: Path) -> set[int]:
    """Steps of complete checkpoints."""
    return {int(folder.name) for folder in _children(workdir / "checkpoints") if folder.name.isdigit()}


def incomplete(workdir: Path) -> set[str]:
    """Folders that a save in progress has made, and that its commit renames or completes."""
    complete = {str(step) for step in committed(workdir)}
    tables = {folder.name for folder in _children(workdir / "tables")} - complete
    return tables | {folder.name for folder in _children(workdir / "checkpoints") if "tmp" in folder.name}


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def wait(process: subprocess.Popen[str], until: Callable[[], object]) -> bool:
    """Waits until something is so; False if the process has ended before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if until():
            return True
        if process.poll() is not None:
            return False
        time.sleep(POLL_SECONDS)
    process.kill()
    raise TimeoutError(f"nothing happened in {PATIENCE_SECONDS} seconds")


def _moments(chance: random.Random) -> Iterator[str]:
    """When to kill: half of all kills in the middle of a save, a few before the first step, the others whenever."""
    while True:
        yield from chance.sample(["save", "save", "save", "running", "running", "starting"], k=6)


def kill_and_resume(arguments: list[str], workdir: Path, *, kills: int, seed: int) -> Outcome:
    """Starts the same command until it has been killed so often, and then lets it end.

    Args:
        arguments: Command line of scripts/train.py.
        workdir: Its workdir.
        kills: How often.
        seed: Seed of the moments.
    """
    chance = random.Random(seed)
    in_saves = 0
    resumed = []
    for kill, moment in enumerate(itertools.islice(_moments(chance), kills)):
        step, left = max(committed(workdir), default=0), incomplete(workdir)
        resumed.append(step)
        process = start(arguments)
        if moment == "starting":
            alive = not _ended_within(process, chance.uniform(0, 4))
        else:
            alive = wait(process, partial(_is_beyond, workdir, step + chance.randrange(STEPS_BETWEEN_KILLS)))
            if moment == "running":
                alive = alive and not _ended_within(process, chance.uniform(0, 0.1))
            else:
                # Whatever the start found of the kill before, it has removed.
                left = set()
                alive = alive and wait(process, partial(incomplete, workdir))
        process.kill()
        _, errors = process.communicate()
        if not alive or process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"training ended by itself after {kill} kills: give it more epochs\n{errors}")
        in_saves += bool(incomplete(workdir) - left)
    process = start(arguments)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    if process.returncode:
        raise RuntimeError(errors)
    return Outcome(kills=kills, in_saves=in_saves, resumed=tuple(resumed), step=max(committed(workdir)))


def _is_beyond(workdir: Path, step: int) -> bool:
    return max(committed(workdir), default=0) > step


def _ended_within(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def compare_with_uninterrupted(folder: Path, *, kills: int, epochs: int, seed: int) -> Outcome:
    """Trains twice, once killed and resumed; raises AssertionError unless both end with the same bits.

    Args:
        folder: An empty folder.
        kills: How often to kill.
        epochs: Length of both runs.
        seed: Seed of the moments of the kills.
    """
    data = tiny.write_dataset(folder / "data")
    outcome = kill_and_resume(
        flags(data, folder / "killed", epochs=epochs, checkpoint_every=1), folder / "killed", kills=kills, seed=seed
    )
    config = in_this_process(flags(data, folder / "straight", epochs=epochs, checkpoint_every=100))
    killed = dataclasses.replace(config, workdir=str(folder / "killed"))
    assert outcome.step == epochs * tiny.STEPS_PER_EPOCH
    tiny.assert_identical(tiny.restore(killed), tiny.restore(config))
    assert tiny.evaluations(killed) == tiny.evaluations(config)
    return outcome


def in_this_process(arguments: list[str]) -> Config:
    """Trains what a command line of scripts/train.py says; returns the config."""
    config = parse_config(arguments, "")
    tiny.train_quietly(config)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(compare_with_uninterrupted(Path(folder), kills=given.kills, epochs=given.epochs, seed=given.seed))
    print("bit-identical to the uninterrupted run")


if __name__ == "__main__":
    main()
