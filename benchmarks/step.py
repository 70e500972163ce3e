"""Time of one training step: with the next batch routed ahead, with nothing ahead, and as one would first write it.

    .venv/bin/python benchmarks/step.py
    .venv/bin/python benchmarks/step.py --nodes 2 --chips 4 --out benchmarks/results/step_mesh.json

Workloads: the Criteo Kaggle model with tables of at most 200,000 rows (one id a bag), and 26 tables of 200,000 x 64
with 10 ids a bag. Random uniform ids; all sides get the same batches and take turns. The last side, on one device only,
keeps tables as parameters: gather, sum, autodiff to dense gradients of tables, SGD; what `optax.sgd` on an `nnx.Embed`
compiles to.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from configs import CONFIGS
from configs.stated import KAGGLE_ROWS, criteo_card
from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, EmbeddingConfig, MeshConfig, TableConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.losses import weighted_bce
from dlrm_jax.model import ModelConfig
from dlrm_jax.pipelined_step import make_pipelined_step, make_prologue
from dlrm_jax.recommender import Recommender
from dlrm_jax.sources import card_of, open_split
from dlrm_jax.train_state import init_train_state, make_dense_optimizer
from dlrm_jax.train_step import StepReport, make_no_metrics, make_train_step
from scripts.command_line import configure_jax
from sharding import Embeddings
from sharding.capacities import Capacities
from sharding.mesh import make_mesh

# Steps before those that are timed: they compile.
_UNTIMED = 2


def stated_workloads(batch_size: int) -> dict[str, Config]:
    """Configs by name, of tables that need no data."""
    kaggle = dataclasses.replace(
        CONFIGS["criteo_kaggle"](),
        stated=criteo_card("kaggle", [min(rows, 200_000) for rows in KAGGLE_ROWS], splits={"train": 2**20}),
    )
    multi_hot = Config(
        name="26 x 200k x 64, 10 ids",
        embedding=EmbeddingConfig(default=TableConfig(dim=64, optimizer="sgd", learning_rate=0.1)),
        model=ModelConfig(bottom_mlp=(512, 256, 64), top_mlp=(512, 512, 256, 1)),
        dense_optimizer=DenseOptimizerConfig(name="sgd", learning_rate=0.1),
        stated=criteo_card("multi_hot", [200_000] * 26, splits={"train": 2**20}, pooling_factors=[10] * 26),
    )
    data = DataConfig(path=None, batch_size=batch_size)
    return {config.name: dataclasses.replace(config, data=data) for config in (kaggle, multi_hot)}


def _routed_ahead(recommender: Recommender, batches: list[Batch], capacities: Capacities) -> Callable[[int], None]:
    """The step of training: routes the next batch beside this one."""
    optimizer = make_dense_optimizer(recommender.config.dense_optimizer, recommender.config.schedule)
    step, first = make_pipelined_step(recommender, optimizer), make_prologue(recommender)
    state, metrics = init_train_state(recommender, optimizer), make_no_metrics(recommender.tables.mesh)()
    routed, _ = first(state, batches[-_UNTIMED % len(batches)].ids, capacities=capacities)
    held: list[Any] = [state, metrics, routed]

    def run(number: int) -> None:
        batch, upcoming = batches[number % len(batches)], batches[(number + 1) % len(batches)]
        *held[:2], report, held[2] = step(*held[:2], batch, held[2], upcoming.ids, capacities=capacities)
        _check(report)

    return run


def _nothing_ahead(recommender: Recommender, batches: list[Batch], capacities: Capacities) -> Callable[[int], None]:
    optimizer = make_dense_optimizer(recommender.config.dense_optimizer, recommender.config.schedule)
    step = make_train_step(recommender, optimizer)
    held: list[Any] = [init_train_state(recommender, optimizer), make_no_metrics(recommender.tables.mesh)()]

    def run(number: int) -> None:
        *held[:], report = step(*held, batches[number % len(batches)], capacities=capacities)
        _check(report)

    return run


def _check(report: StepReport) -> None:
    if int(report.fault):
        raise RuntimeError(f"the step has fault {int(report.fault)}: it did nothing, so its time means nothing")


def _plain(recommender: Recommender, batches: list[Batch]) -> Callable[[int], None]:
    tables, names = recommender.tables.tables, recommender.features
    rate = recommender.config.dense_optimizer.learning_rate

    def loss(params, batch: Batch):
        dense_params, weights = params
        bags = batch.ids.values.reshape(len(names), len(batch.label), -1)
        pooled = [weights[i][bags[i]].sum(axis=1) for i in range(len(names))]
        embeddings = Embeddings(blocks=(jnp.stack(pooled, axis=1),), sequences={}, names=(names,))
        return weighted_bce(recommender.logits(dense_params, batch.dense, embeddings), batch.label, batch.weight)

    def step(params, batch: Batch):
        return jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params, batch))

    compiled = jax.jit(step, donate_argnums=0)
    held = [(recommender.init_dense(), [jnp.zeros((table.num_rows, table.dim)) for table in tables])]

    def run(number: int) -> None:
        held[0] = jax.block_until_ready(compiled(held[0], batches[number % len(batches)]))

    return run


def _turns(sides: dict[str, Callable[[int], None]], first: int, steps: int) -> dict[str, float]:
    """Median time of a step of each side, in milliseconds, the sides taking turns."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(first, first + steps):
        # There and back, since a side that leaves the caches full of its own slows down the next.
        for side, run in list(sides.items())[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            run(number)
            times[side].append(1e3 * (time.perf_counter() - started))
    return {side: statistics.median(of_side) for side, of_side in times.items()}


def main(
    batch_size: int = 2048,
    steps: int = 20,
    repeats: int = 3,
    nodes: int = 1,
    chips: int = 1,
    workloads: tuple[str, ...] = (),
    out: Path = Path("benchmarks/results/step.json"),
) -> None:
    """Times training steps.

    Args:
        batch_size: Samples of a step.
        steps: Steps timed of each side, in turns.
        repeats: How often; figures are medians, ratios have their range over the repetitions.
        nodes: Nodes of the mesh; where there is no accelerator, its devices are parts of the CPU.
        chips: Chips of each.
        workloads: Names of the workloads; all unless given.
        out: Where to write the figures.
    """
    configure_jax(MeshConfig(nodes=nodes, chips=chips))
    results = []
    for name, config in stated_workloads(batch_size).items():
        if workloads and name not in workloads:
            continue
        recommender = Recommender(config, card_of(config), mesh=make_mesh(nodes, chips))
        source = open_split(recommender, "train", training=True)
        capacities = recommender.first_capacities(batch_size, source.capacity)
        stream = source.batches(0)
        batches = [recommender.to_devices(next(stream), capacities) for _ in range(4)]
        sides = {
            "routed_ahead": _routed_ahead(recommender, batches, capacities),
            "nothing_ahead": _nothing_ahead(recommender, batches, capacities),
        }
        if nodes * chips == 1:
            sides["plain"] = _plain(recommender, batches)
        _turns(sides, -_UNTIMED, _UNTIMED)
        medians = [_turns(sides, number * steps, steps) for number in range(repeats)]
        result: dict[str, Any] = {"workload": name}
        result |= {f"{side}_ms": statistics.median(median[side] for median in medians) for side in sides}
        for side in list(sides)[1:]:
            ratios = sorted(median[side] / median["routed_ahead"] for median in medians)
            result[f"{side}_ratio"] = {"median": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}
        results.append(result)
    _print(results, f"training step on {nodes} x {chips} devices: times beside that of routing ahead", batch_size)
    command = f"benchmarks/step.py --batch_size {batch_size} --steps {steps} --repeats {repeats}"
    command += f" --nodes {nodes} --chips {chips}" + "".join(f" --workloads {name!r}" for name in workloads)
    record(out, command, {"results": results})


def _print(results: list[dict[str, Any]], title: str, batch_size: int) -> None:
    table = Table("workload", "routed ahead, ms", "samples/s", "nothing ahead", "plain JAX", title=title)

    def ratio_of(result: dict[str, Any], side: str) -> str:
        ratio = result.get(f"{side}_ratio")
        return "" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(ratio["median"], *ratio["range"])

    for result in results:
        ours = result["routed_ahead_ms"]
        ratios = [ratio_of(result, side) for side in ("nothing_ahead", "plain")]
        table.add_row(result["workload"], f"{ours:.1f}", f"{1e3 * batch_size / ours:,.0f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
