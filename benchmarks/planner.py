"""Greedy, largest differencing and the final plan beside the planner's lower bound, on random skewed tables.

    .venv/bin/python benchmarks/planner.py
    .venv/bin/python benchmarks/planner.py --first 50 --instances 20 --out benchmarks/results/planner_fresh.json

Instances: 20 to 200 tables of log-normal rows and pooling factors on 8 to 64 devices of presets. "greedy" and "ldm" are
what the partitioners give for the kinds that the relaxation chose; "final" is the plan after the local search.
"""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from sharding.load import FeatureLoad
from sharding.planner import make_plan
from sharding.tables import FeatureSpec, TableSpec
from sharding.topology import parse_topology

_MACHINES = ("zionex:1x8", "h200:1x8", "zionex:2x8", "h200:4x8", "zionex:8x8")
_TABLES = (20, 50, 100, 200)
SAMPLES_PER_DEVICE = 512


def random_instance(seed: int) -> tuple[str, list[TableSpec], list[FeatureSpec], list[FeatureLoad]]:
    """A machine's name, tables, features and what is known of their ids."""
    rng = np.random.default_rng(seed)
    machine = _MACHINES[seed % len(_MACHINES)]
    tables, features, loads = [], [], []
    for number in range(_TABLES[seed % len(_TABLES)]):
        rows = int(np.clip(rng.lognormal(13.0, 2.0), 10, 200_000_000))
        dim = int(rng.choice([16, 32, 64, 128, 256], p=[0.15, 0.2, 0.3, 0.25, 0.1]))
        tables.append(TableSpec(name=f"table_{number}", num_rows=rows, dim=dim, dtype="float16"))
        features.append(FeatureSpec(name=f"feature_{number}", table=f"table_{number}"))
        factor = float(np.clip(rng.lognormal(1.8, 1.0), 1.0, 200.0))
        loads.append(FeatureLoad(feature=f"feature_{number}", pooling_factor=factor))
    return machine, tables, features, loads


def _planned(seed: int) -> dict[str, float | int | str]:
    """Plans one instance; CPU seconds, and gaps to the bound."""
    machine, tables, features, loads = random_instance(seed)
    topology = parse_topology(machine)
    started = time.process_time()
    result = make_plan(tables, features, topology, batch_size=SAMPLES_PER_DEVICE * topology.num_devices, loads=loads)
    entry = {"seed": seed, "machine": machine, "tables": len(tables), "cpu_s": time.process_time() - started}
    entry |= {name: seconds / result.lower_bound - 1.0 for name, seconds in result.partitioned}
    return entry | {"final": result.gap, "padding": result.cost.padding}


def main(
    instances: int = 50, first: int = 0, processes: int = 1, out: Path = Path("benchmarks/results/planner.json")
) -> None:
    """Plans random instances.

    Args:
        instances: How many.
        first: Seed of the first. The planner's constants were chosen looking at some of the seeds below 50.
        processes: How many to plan at a time.
        out: Where to write the figures.
    """
    with ProcessPoolExecutor(processes) as pool:
        results = []
        for entry in pool.map(_planned, range(first, first + instances)):
            results.append(entry)
            print("seed {seed}, {machine}, {tables} tables: {final:.1%}, {cpu_s:.1f} s".format(**entry), flush=True)
    table = Table("", "wins", "median gap", "worst gap", title=f"gap to the lower bound, {instances} instances")
    summary = {}
    for name in ("greedy", "ldm", "final"):
        gaps = [result[name] for result in results]
        rival = {"greedy": "ldm", "ldm": "greedy"}.get(name)
        summary[name] = {"median": float(np.median(gaps)), "worst": max(gaps)}
        if rival:
            summary[name]["wins"] = sum(result[name] < result[rival] - 1e-9 for result in results)
        table.add_row(name, str(summary[name].get("wins", "")), f"{np.median(gaps):.1%}", f"{max(gaps):.1%}")
    within = sum(result["final"] <= 0.05 for result in results)
    paddings = [result["padding"] for result in results]
    summary |= {"final_within_5_percent": within, "median_padding": float(np.median(paddings))}
    summary["median_cpu_s"] = float(np.median([result["cpu_s"] for result in results]))
    table.caption = (
        f"final within 5 %: {within} of {instances}; padding: median {np.median(paddings):.1%}, worst "
        f"{max(paddings):.1%}; CPU time: median {summary['median_cpu_s']:.1f} s"
    )
    Console().print(table)
    command = f"benchmarks/planner.py --first {first} --instances {instances}"
    record(out, command, {"summary": summary, "results": results}, packages=("highspy",))


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
