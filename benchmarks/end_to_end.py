"""Samples per second of scripts/train.py on a prepared dataset, beside those of its training steps alone.

    .venv/bin/python benchmarks/end_to_end.py   # about a quarter of an hour on 2 cores

The data are 5 million generated Criteo lines, which benchmarks/prepare.py makes unless they are there. A turn is: steps
alone, one epoch by scripts/train.py from an empty workdir with loader, metrics, log and checkpoints, then steps alone
again. Steps alone are those that the loop of training runs, look-ahead and checks included, on a few batches at
hand. Time of training counts from the end of its first step, which compiles, to the last line of its log; what
scripts/train.py takes from its start to its end stands beside it.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.peers.repeated_steps import RepeatedSteps
from benchmarks.prepare import REPOSITORY, PrepareBenchmark, run_benchmark
from benchmarks.record import record
from configs import CONFIGS
from dlrm_jax.config import Config
from dlrm_jax.recommender import Recommender
from dlrm_jax.sources import card_of, open_split
from scripts.command_line import configure_jax

BATCHES_AT_HAND = 4


def _steps_alone(config: Config) -> RepeatedSteps:
    recommender = Recommender(config, card_of(config))
    source = open_split(recommender, "train", training=True)
    batches = list(itertools.islice(source.batches(0), BATCHES_AT_HAND))
    return RepeatedSteps(recommender, batches, recommender.first_capacities(config.data.batch_size, source.capacity))


def _seconds(alone: RepeatedSteps, steps: int) -> float:
    begun = time.perf_counter()
    alone.run(steps)
    return (time.perf_counter() - begun) / steps


def _trained(config: Config, log_every: int, checkpoint_every: int) -> dict[str, float]:
    """Trains an epoch with scripts/train.py; returns its samples a second, and the seconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "data.path": config.data.path,
            "data.batch_size": config.data.batch_size,
            "train.eval_split": None,
            "train.log_every": log_every,
            "train.checkpoint_every": checkpoint_every,
            "workdir": folder,
        }
        command = [sys.executable, "scripts/train.py", config.name]
        command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        begun = time.perf_counter()
        ended = subprocess.run(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
        whole = time.perf_counter() - begun
        if ended.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{ended.stderr.decode()[-3000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    # The first window's speed leaves out the first step.
    counted = [(line["num_samples"], line["samples_per_second"]) for line in lines if "samples_per_second" in line]
    samples = sum(count for count, _ in counted)
    return {"samples_per_second": samples / sum(count / rate for count, rate in counted), "whole_s": whole}


def main(
    data: Path = PrepareBenchmark.out,
    batch_size: int = 2048,
    steps: int = 300,
    turns: int = 3,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    out: Path = Path("benchmarks/results/end_to_end.json"),
) -> None:
    """Times epochs and steps alone.

    Args:
        data: A dataset of Criteo's columns, as benchmarks/prepare.py leaves one.
        batch_size: Samples of a step.
        steps: Steps alone, before each epoch and after it.
        turns: Epochs.
        log_every: Steps between lines of the log.
        checkpoint_every: Steps between checkpoints.
        out: Where to write the figures.
    """
    if not (data / "card.json").exists():
        run_benchmark(PrepareBenchmark(out=data))
    config = CONFIGS["criteo_kaggle"]()
    config = replace(config, data=replace(config.data, path=str(data), batch_size=batch_size))
    configure_jax(config.mesh)
    alone = _steps_alone(config)
    # The first compiles, and large tables move to large pages in the seconds after it.
    alone.run(steps)
    table = Table("turn", "training, samples/s", "steps alone, samples/s", "ratio", "whole command, s", "load")
    results: list[dict[str, Any]] = []
    for turn in range(turns):
        before = _seconds(alone, steps)
        trained = _trained(config, log_every, checkpoint_every)
        load, after = os.getloadavg()[0], _seconds(alone, steps)
        rate = 2 * batch_size / (before + after)
        ratio = trained["samples_per_second"] / rate
        results.append({**trained, "steps_alone_samples_per_second": rate, "ratio": ratio, "load": load})
        cells = (f"{trained['samples_per_second']:,.0f}", f"{rate:,.0f}", f"{ratio:.2f}", f"{trained['whole_s']:.0f}")
        table.add_row(str(turn + 1), *cells, f"{load:.1f}")
    Console().print(table)
    median = statistics.median(result["ratio"] for result in results)
    print(f"median: training has {median:.2f} of the rate of its steps alone")
    command = f"benchmarks/end_to_end.py --data {data} --batch_size {batch_size} --steps {steps} --turns {turns}"
    command += f" --log_every {log_every} --checkpoint_every {checkpoint_every}"
    record(out, command, {"median_ratio": median, "results": results})


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
