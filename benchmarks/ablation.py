"""What each optimisation is worth on the paper's models, and how they scale: estimates of the cost model.

    .venv/bin/python benchmarks/ablation.py [--models paper_a ...] [--picture docs/scaling.svg]

Nothing runs: seconds come from bytes over bandwidths (sharding/cost.py, sharding/chunks.py). Optimisations are added
one after the other: placement by the planner, float16 tables, quantised exchanges, overlap, and at the end a batch four
times as large. Weak scaling: as many samples a GPU on every size, and tables whose rows grow with the GPUs.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import matplotlib
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from configs.paper_a import paper_a
from configs.paper_f import paper_f
from configs.paper_i import paper_i
from dlrm_jax.config import Config
from dlrm_jax.planning import PlanningInput, planning_input
from sharding.chunks import best_chunks, overlapped_seconds
from sharding.constraints import Constraint
from sharding.cost import cost_of_layout
from sharding.errors import InputError
from sharding.plan import ShardingPlan
from sharding.topology import Topology, preset

MODELS = {"paper_a": paper_a, "paper_f": paper_f, "paper_i": paper_i}
NODES = (2, 4, 8, 16)
CHIPS = 8
_FLOAT_BYTES = 4
STEPS = ("table-wise", "+ placement", "+ float16 tables", "+ quantised exchange", "+ overlap", "+ batch x 4")
# Of the rows, so that float32 fits in any placement (model F is larger than 128 A100s anyway). Which bytes a step moves
# depends on ids, not on rows.
_SHARE_OF_ROWS = {"paper_a": 1 / 8, "paper_f": 1 / 64, "paper_i": 1 / 8}
# Queries a second on 128 GPUs, and the share of linear scaling from 8 to 128 GPUs (paper.md says which are recalled).
_PAPER = {"paper_a": (1.2e6, 0.50), "paper_f": (1.7e6, None), "paper_i": (3.4e6, 0.75)}


def _estimates(name: str, config: Config, nodes: int) -> dict[str, float | None]:
    """Samples a second with each optimisation added; None where the batch does not fit."""
    topology = preset("zionex", nodes, CHIPS)
    share = _SHARE_OF_ROWS[name] * nodes / max(NODES)
    batch_size = config.data.batch_size * nodes // max(NODES)
    half = _described(config, topology, share, batch_size, "float16")
    single = _described(config, topology, share, batch_size, "float32")
    coded = dataclasses.replace(
        half, settings=dataclasses.replace(half.settings, forward_codec="float16", backward_codec="bfloat16")
    )
    large = _described(config, topology, share, 4 * batch_size, "float16")
    large = dataclasses.replace(large, settings=coded.settings)
    whole = [
        table.name for table in single.tables if _FLOAT_BYTES * table.num_rows * table.dim < topology.hbm_bytes // 4
    ]
    simple = Constraint(
        tables=tuple(whole), forbidden=("column_wise", "row_wise", "table_row_wise", "grid", "data_parallel")
    )
    by_coded = _plan(coded, topology, ())
    seconds = [
        _seconds(single, topology, _plan(single, topology, (simple,)), overlap=False),
        _seconds(single, topology, _plan(single, topology, ()), overlap=False),
        _seconds(half, topology, _plan(half, topology, ()), overlap=False),
        _seconds(coded, topology, by_coded, overlap=False),
        _seconds(coded, topology, by_coded, overlap=True),
    ]
    rates: dict[str, float | None] = {step: batch_size / each for step, each in zip(STEPS[:-1], seconds, strict=True)}
    try:
        by_large = _plan(large, topology, ())
    except InputError:  # Its buffers are larger than the memory.
        return rates | {STEPS[-1]: None}
    return rates | {STEPS[-1]: large.batch_size / _seconds(large, topology, by_large, overlap=True)}


def _described(config: Config, topology: Topology, share: float, batch_size: int, dtype: Any) -> PlanningInput:
    data = dataclasses.replace(config.data, batch_size=batch_size)
    card = config.stated
    assert card is not None
    known = planning_input(dataclasses.replace(config, data=data), card, topology.num_devices)
    rounding = "stochastic" if dtype == "float16" else "nearest"
    tables = tuple(
        dataclasses.replace(table, num_rows=max(1, round(table.num_rows * share)), dtype=dtype, rounding=rounding)
        for table in known.tables
    )
    return dataclasses.replace(known, tables=tables)


def _plan(known: PlanningInput, topology: Topology, constraints: Sequence[Constraint]) -> ShardingPlan:
    # Whole tables of a few large features may not fit: were they to.
    limit = 2**50 if constraints else None
    partitioner = "greedy" if constraints else "best"
    made = known.make_plan(topology, constraints=constraints, partitioner=partitioner, memory_limit=limit)
    return made.plan


def _seconds(known: PlanningInput, topology: Topology, plan: ShardingPlan, *, overlap: bool) -> float:
    step, layout = known.step(topology), known.layout(plan)
    seconds = cost_of_layout(layout, known.features, step).seconds
    if not overlap:
        return sum(seconds)
    return overlapped_seconds(seconds, layout, step, best_chunks(layout, known.features, step))


def main(
    models: tuple[str, ...] = tuple(MODELS),
    out: Path = Path("benchmarks/results/ablation.json"),
    picture: Path | None = None,
) -> None:
    """Estimates samples a second of the paper's models on ZionEX.

    Args:
        models: Names of their configs.
        out: Where to write the figures.
        picture: Where to draw them.
    """
    results: dict[str, dict[int, dict[str, float | None]]] = {}
    for name in models:
        results[name] = {nodes * CHIPS: _estimates(name, MODELS[name](), nodes) for nodes in NODES}
        Console().print(_table(name, results[name]))
    figures = {name: {str(gpus): of_size for gpus, of_size in sizes.items()} for name, sizes in results.items()}
    record(out, f"benchmarks/ablation.py --models {' '.join(models)}", {"samples_per_second": figures})
    if picture is not None:
        _draw(results, picture)


def _table(name: str, sizes: dict[int, dict[str, float | None]]) -> Table:
    rate, efficiency = _PAPER[name]
    recalled = f"{rate / 1e6:.1f} M" + (f", {efficiency:.0%} of linear" if efficiency else "")
    table = Table(
        "estimated samples/s",
        *(f"{gpus} GPUs" for gpus in sizes),
        "16 to 128 GPUs, of linear",
        title=f"{name} on ZionEX (the paper, 128 GPUs: {recalled})",
    )
    first, last = min(sizes), max(sizes)
    for step in STEPS:
        rates = [sizes[gpus][step] for gpus in sizes]
        small, large = sizes[first][step], sizes[last][step]
        scaling = f"{large / small * first / last:.0%}" if small and large else ""
        table.add_row(step, *("does not fit" if each is None else f"{each / 1e6:.2f} M" for each in rates), scaling)
    return table


def _draw(results: dict[str, dict[int, dict[str, float | None]]], path: Path) -> None:
    figure = Figure(figsize=(4 * len(results), 3.6), layout="constrained")
    # The same file from the same figures.
    matplotlib.rcParams["svg.hashsalt"] = "dlrm_jax"
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (name, sizes) in zip(axes, results.items(), strict=True):
        for step in STEPS:
            known = {gpus: rate / 1e6 for gpus, of_size in sizes.items() if (rate := of_size[step]) is not None}
            axis.plot(list(known), list(known.values()), marker="o", label=step)
        axis.plot([max(sizes)], [_PAPER[name][0] / 1e6], "k*", markersize=10, label="the paper")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(sizes), [str(gpus) for gpus in sizes])
        axis.set_title(name)
        axis.set_xlabel("GPUs (A100-40)")
    axes[0].set_ylabel("estimated samples/s, millions")
    axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
