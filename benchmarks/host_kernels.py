"""The `cpu` kernels beside FBGEMM's CPU operators and beside `xla`, in the same run.

    .venv/bin/python benchmarks/host_kernels.py

26 tables of 200,000 rows, batch 2048: pooled lookup, and lookup with the row-wise AdaGrad update. All sides have the
same ids and gradients and take turns; FBGEMM is a process of its own in `.venv-peers` (see peers/environment.py). On a
machine that others use at the same time, only the ratios mean something: the load is written beside them.
"""

import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.peers.environment import peers_python
from benchmarks.peers.host_case import BATCH_SIZE, EPS, LEARNING_RATE, NUM_ROWS, NUM_TABLES, Case, batch_of
from benchmarks.record import record
from dlrm_jax.host_memory import keep_freed_memory
from pallas_kernels import ROW_OPTIMIZERS, Ids, Slots, Stores, cpu, xla

Times = dict[str, list[float]]

# The same for the allocator of the other process; how many arenas it has is left to it.
_KEEPS_FREED_MEMORY = {f"MALLOC_{name}_": str(2**31 - 1) for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD")}


def _ours(module: ModuleType, case: Case) -> Callable[[int], Times]:
    ids, gradients = batch_of(case)
    gradients = jnp.asarray(gradients.reshape(-1, case.width))
    table_of_ids = np.repeat(np.arange(NUM_TABLES), BATCH_SIZE * case.pooling_factor)
    batch = Ids(
        rows=jnp.asarray(ids + table_of_ids * NUM_ROWS, jnp.int32),
        slots=jnp.asarray(table_of_ids, jnp.int32),
        logical_rows=jnp.asarray(ids, jnp.uint32)[:, None],
        offsets=jnp.arange(0, case.num_ids + 1, case.pooling_factor, dtype=jnp.int32),
    )
    ones, tables = jnp.ones(NUM_TABLES, jnp.float32), jnp.arange(NUM_TABLES, dtype=jnp.int32)
    scalars_of_table = -(-NUM_ROWS // 128) * 128
    slots = Slots(
        first_row=tables * NUM_ROWS,
        first_scalar=tables * scalars_of_table,
        table=tables.astype(jnp.uint32),
        first_column=jnp.zeros(NUM_TABLES, jnp.uint32),
        dim=ones * case.width,
        learning_rate=ones * LEARNING_RATE,
        weight_decay=ones * 0,
        eps=ones * EPS,
        beta1=ones * 0.9,
        beta2=ones * 0.999,
    )
    lookup = jax.jit(functools.partial(module.pooled_lookup, width=case.width, longest_bag=case.pooling_factor))
    update = jax.jit(
        functools.partial(
            module.sparse_update,
            optimizer=ROW_OPTIMIZERS["rowwise_adagrad"],
            width=case.width,
            storage_rounding="nearest",
            statistics=None,
            enabled=jnp.bool(True),
        ),
        donate_argnums=0,
    )
    others = {"slots": slots, "step": jnp.int32(1), "seed": jnp.uint32(0)}
    stores = [
        Stores(
            weights=jnp.full((NUM_TABLES * NUM_ROWS * case.width // 128, 128), 0.1),
            row_state=(jnp.zeros((NUM_TABLES * scalars_of_table // 128, 128)),),
        )
    ]

    def run(steps: int) -> Times:
        times: Times = {"lookup": [], "lookup_update": []}
        for _ in range(steps):
            started = time.perf_counter()
            lookup(stores[0].weights, batch.rows, batch.offsets, None).block_until_ready()
            times["lookup"].append(1e3 * (time.perf_counter() - started))
            started = time.perf_counter()
            lookup(stores[0].weights, batch.rows, batch.offsets, None).block_until_ready()
            stores[0] = jax.block_until_ready(update(stores[0], batch, gradients, **others))
            times["lookup_update"].append(1e3 * (time.perf_counter() - started))
        return times

    return run


def _fbgemm(process: subprocess.Popen[str]) -> Callable[[int], Times]:
    def run(steps: int) -> Times:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
        for line in process.stdout:
            # torch prints notes of its own.
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(
            "FBGEMM's process ended early: run benchmarks/peers/environment.py and look at what it prints"
        )

    return run


def _medians(case: Case, turns: int, steps: int, warm_up_s: float) -> dict[str, dict[str, float]]:
    # As training has it. Else the system clears the pages of each result.
    keep_freed_memory()
    arguments = [str(case.width), str(case.pooling_factor), case.ids]
    # Its threads sleep while they wait, else they hold the cores during our turns.
    with subprocess.Popen(
        [str(peers_python()), str(Path(__file__).parent / "peers" / "host_fbgemm.py"), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **_KEEPS_FREED_MEMORY, "OMP_WAIT_POLICY": "passive"},
    ) as process:
        sides = {"cpu": _ours(cpu, case), "fbgemm": _fbgemm(process), "xla": _ours(xla, case)}
        times: dict[str, Times] = {side: {"lookup": [], "lookup_update": []} for side in sides}
        # Large tables move to huge pages in the first seconds.
        ready = time.perf_counter() + warm_up_s
        while time.perf_counter() < ready:
            for run in sides.values():
                run(1)
        for _ in range(turns):
            for side, run in sides.items():
                # xla's update is many times slower, and its times scatter less.
                for what, values in run(1 if side == "xla" else steps).items():
                    times[side][what] += values
        assert process.stdin is not None
        process.stdin.close()
    return {side: {what: statistics.median(values) for what, values in of.items()} for side, of in times.items()}


def main(
    widths: tuple[int, ...] = (64, 16, 128),
    pooling_factors: tuple[int, ...] = (10, 1),
    ids: tuple[str, ...] = ("uniform", "zipf"),
    turns: int = 4,
    steps: int = 4,
    warm_up_s: float = 6.0,
    out: Path = Path("benchmarks/results/host_kernels.json"),
) -> None:
    """Times lookups and updates.

    Args:
        widths: Widths of the tables.
        pooling_factors: Ids of a bag.
        ids: How ids are drawn: uniform, zipf.
        turns: Turns of each side.
        steps: Steps timed in a turn.
        warm_up_s: Seconds that all sides run before, untimed.
        out: Where to write the figures.
    """
    if not cpu.available():
        raise SystemExit("the library of the cpu kernels was not built: install the package with a C++ compiler")
    results = []
    table = Table(title="median milliseconds; in brackets how often cpu is faster than that side")
    for column in ("case", "work", "cpu", "fbgemm", "xla", "load"):
        table.add_column(column)
    for case in (
        Case(width=width, pooling_factor=factor, ids=kind)
        for width in widths
        for factor in pooling_factors
        for kind in ids
    ):
        # A process for each case: memory that another case gave back is not what a fresh table gets.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            medians = process.submit(_medians, case, turns, steps, warm_up_s).result()
        load = os.getloadavg()[0]
        for what in ("lookup", "lookup_update"):
            ours = medians["cpu"][what]
            row = {f"{side}_ms": times[what] for side, times in medians.items()}
            ratios = {f"{side}_over_cpu": medians[side][what] / ours for side in ("fbgemm", "xla")}
            results.append({**case.__dict__, "work": what, **row, **ratios, "load": load})
            others = (f"{medians[side][what]:.1f} ({medians[side][what] / ours:.2f}x)" for side in ("fbgemm", "xla"))
            name = f"{case.width} wide, {case.pooling_factor} ids, {case.ids}"
            table.add_row(name, what, f"{ours:.2f}", *others, f"{load:.1f}")
    Console().print(table)
    lists = {"widths": widths, "pooling_factors": pooling_factors, "ids": ids}
    command = "benchmarks/host_kernels.py"
    command += "".join(f" --{name} {' '.join(map(str, values))}" for name, values in lists.items())
    command += f" --turns {turns} --steps {steps} --warm_up_s {warm_up_s}"
    record(out, command, {"results": results})


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
