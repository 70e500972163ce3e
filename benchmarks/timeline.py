"""The model of time of docs/overlap.md beside measurements: the computing of one device, also of a whole step.

    JAX_PLATFORMS=cpu .venv/bin/python benchmarks/timeline.py

Each program is compiled and its seconds are estimated from its text, with the bandwidth and the rate of matrix products
that `sharding.measure` finds in the same run; then it runs.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.step import stated_workloads
from dlrm_jax.recommender import Recommender
from dlrm_jax.sources import card_of, open_split
from dlrm_jax.train_state import init_train_state, make_dense_optimizer
from dlrm_jax.train_step import StepReport, make_no_metrics, make_train_step
from pallas_kernels.linear import linear
from pallas_kernels.lookup import pooled_lookup
from sharding.cost_settings import CostSettings
from sharding.measure import measure
from sharding.mesh import make_mesh
from sharding.program import parse_program
from sharding.timeline import estimate_timeline

_ROUNDS, _REPEATS = 5, 3
# Peaks are measured, so they are reached.
_REACHED = CostSettings(dense_efficiency=1.0, bandwidth_efficiency=1.0)
_ROWS, _DIM, _IDS, _BAG = 2**20, 128, 2**18, 16
_BATCH, _WIDTH = 2048, 1024


def _programs() -> dict[str, tuple[jax.stages.Compiled, Callable[[], Any]]]:
    """Programs by what they are, and what runs each."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (_BATCH, _WIDTH))
    weights = jax.random.normal(keys[1], (4, _WIDTH, _WIDTH)) / _WIDTH**0.5
    table = jnp.zeros((_ROWS, _DIM))
    ids = jax.random.randint(keys[2], (_IDS,), 0, _ROWS)
    offsets = jnp.arange(0, _IDS + 1, _BAG, dtype=jnp.int32)
    target = jnp.ones(_BATCH)

    def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        for number in range(len(weights)):
            x = linear(x, weights[number], None, True)
        return x

    def gradients(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.grad(lambda *given: jnp.mean((layers(*given).sum(1) - target) ** 2), argnums=(0, 1))(x, weights)

    # Their results are small: to find pages for large ones would take the operating system longer than all else.
    def row_sums(table: jax.Array) -> jax.Array:
        return table.sum(axis=1)

    def gathered(table: jax.Array, ids: jax.Array) -> jax.Array:
        return table[ids].reshape(-1, _BAG, _DIM).sum(axis=1)

    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "matrix products": (layers, (x, weights)),
        "matrix products and their gradients": (gradients, (x, weights)),
        "one pass over memory": (row_sums, (table,)),
        "pooled lookup": (partial(pooled_lookup, width=_DIM), (table, ids, offsets)),
        "pooled lookup in XLA's operations": (gathered, (table, ids)),
        "sort of ids": (lambda ids: lax.sort((ids, ids), num_keys=1), (ids,)),
    }
    programs = {}
    for name, (run, given) in calls.items():
        compiled = jax.jit(run).lower(*given).compile()
        programs[name] = compiled, partial(compiled, *given)
    return programs | {"training step": _training_step()}


def _training_step() -> tuple[jax.stages.Compiled, Callable[[], Any]]:
    config = stated_workloads(_BATCH)["criteo_kaggle"]
    recommender = Recommender(config, card_of(config), mesh=make_mesh(1, 1))
    optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
    source = open_split(recommender, "train", training=True)
    capacities = recommender.first_capacities(_BATCH, source.capacity)
    batch = recommender.to_devices(next(source.batches(0)), capacities)
    held: list[Any] = [init_train_state(recommender, optimizer), make_no_metrics(recommender.tables.mesh)()]
    compiled = make_train_step(recommender, optimizer).lower(*held, batch, capacities=capacities).compile()

    def run() -> StepReport:
        *held[:], report = compiled(*held, batch)
        return report

    return compiled, run


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def compare() -> dict[str, dict[str, float]]:
    """Estimated and measured milliseconds of each program, and their ratio: medians of rounds.

    In each round the machine is measured first, then the programs, so that both see the same load.
    """
    programs = _programs()
    parsed = {name: parse_program(compiled.as_text() or "") for name, (compiled, _) in programs.items()}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(_ROUNDS):
        machine = measure(make_mesh(1, 1))
        for name, (_, run) in programs.items():
            measured = min(_seconds(run) for _ in range(_REPEATS))
            rounds[name].append((estimate_timeline(parsed[name], machine, _REACHED).seconds, measured))
    return {
        name: {
            "estimated ms": 1e3 * statistics.median(estimated for estimated, _ in pairs),
            "measured ms": 1e3 * statistics.median(measured for _, measured in pairs),
            "estimated / measured": statistics.median(estimated / measured for estimated, measured in pairs),
        }
        for name, pairs in rounds.items()
    }


def main(out: Path = Path("benchmarks/results/timeline.json")) -> None:
    """Prints and writes the comparison.

    Args:
        out: File for the figures.
    """
    found = compare()
    table = Table("program", "estimated, ms", "measured, ms", "estimated / measured", title="the model of time")
    for name, figures in found.items():
        table.add_row(name, *(f"{figure:.2f}" for figure in figures.values()))
    Console().print(table)
    record(out, "JAX_PLATFORMS=cpu .venv/bin/python benchmarks/timeline.py", {"programs": found})


if __name__ == "__main__":
    tyro.cli(main)
