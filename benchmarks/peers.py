"""Training steps of this project beside those of what users would pick instead, on this host, in the same run.

    make bench-peers
    .venv/bin/python benchmarks/peers.py --workloads criteo_kaggle_2048 --ids zipf --sides torchrec

Every side is a process of its own with the same model, batches and initial weights; two are alive at a time, ours and
one other, and take turns. First comes parity: with SGD all sides have the same losses for ten steps, with row-wise
AdaGrad ours and TorchRec's, or the benchmark ends there. Sides: TorchRec's DLRM with FBGEMM's fused tables, plain
PyTorch with sparse gradients, both as they are and with torch.compile; and JAX as one would first write it, with dense
gradients of tables and optax.

On a machine that others use, only ratios of one run mean something, and two more stand beside that of the clock's
medians: of the fastest turns, which others disturbed least, and of the processors' time, which counts no wait for a
processor but every thread that spins while it waits.
"""

import dataclasses
import itertools
import json
import os
import statistics
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.kernels import copy_bandwidth
from benchmarks.peers.case import Case, batches, dense_flops, table_bytes
from benchmarks.peers.environment import peers_python
from benchmarks.peers.process import OURS, PEERS, SideProcess, started
from benchmarks.record import record
from configs import CONFIGS
from configs.stated import criteo_card
from dlrm_jax.config import Config, DataConfig, EmbeddingConfig, TableConfig
from dlrm_jax.model import ModelConfig

PARITY_STEPS = 10
# Losses are float32 sums over a batch that each side orders in its own way: 2**-23 is 1.2e-7.
# In bfloat16 operands are rounded to 2**-9 of them, and torch rounds results, too.
PARITY_TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-3}
# Row-wise AdaGrad moves each row by its rate, however small the gradient. So where one rounding decides on a ReLU, rows
# of one sample differ by that much on two sides; from a rate of 0.05 on, such differences grow tenfold with each step.
# The rate of SGD is as large as shows every wrong row and lets no difference grow. Both are over the ids of a bag.
TABLE_LEARNING_RATES = {"sgd": 1.0, "rowwise_adagrad": 0.005}
OPTIMIZERS = tuple(TABLE_LEARNING_RATES)
COPIED_BYTES = 2**28
COPIES = 5


def _case(config: Config, *, name: str, batch_size: int, most_rows: int | None = None) -> Case:
    """The model of a config, with tables cut to some rows."""
    assert config.stated is not None
    model, columns = config.model, config.stated.sparse
    cross = model.interaction == "dcnv2"
    return Case(
        name=name,
        num_rows=tuple(min(column.num_rows, most_rows or column.num_rows) for column in columns),
        pooling_factors=tuple(column.max_pooling_factor or 1 for column in columns),
        dim=config.embedding.default.dim,
        num_dense=len(config.stated.dense),
        bottom_mlp=model.bottom_mlp,
        top_mlp=model.top_mlp,
        cross_layers=model.cross_layers if cross else 0,
        cross_rank=model.cross_rank if cross else 0,
        batch_size=batch_size,
        ids="",
        optimizer="",
        table_learning_rate=0.0,
    )


def workloads() -> dict[str, Case]:
    """The workloads by name, ids and optimizer still open."""
    multi_hot = Config(
        name="multi_hot",
        data=DataConfig(path=None),
        embedding=EmbeddingConfig(default=TableConfig(dim=64)),
        model=ModelConfig(bottom_mlp=(512, 256, 64), top_mlp=(512, 512, 256, 1)),
        stated=criteo_card("multi_hot", [200_000] * 26, splits={}, pooling_factors=[10] * 26),
    )
    kaggle = CONFIGS["criteo_kaggle"]()
    cases = (
        _case(kaggle, name="criteo_kaggle_2048", batch_size=2048),
        _case(kaggle, name="criteo_kaggle_16384", batch_size=16384),
        _case(multi_hot, name="multi_hot", batch_size=2048),
        _case(CONFIGS["reference_random"](), name="reference_random", batch_size=2048),
        _case(CONFIGS["dcnv2_mlperf"](), name="dcnv2_mlperf", batch_size=2048, most_rows=500_000),
    )
    return {case.name: case for case in cases}


def _losses(side: SideProcess) -> dict[str, Any]:
    return side.ask(f"losses {PARITY_STEPS}")


def _difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(ours, theirs, strict=True))


def _compare(case: Case, sides: list[str], *, turns: int, steps: int, turn_s: float, warm_s: float) -> dict[str, Any]:
    """The figures of one case."""
    results: dict[str, Any] = {}
    of_ours: list[dict[str, float]] = []
    copy_rates = []
    with started(OURS, case) as ours:
        first = _losses(ours)
        for name in sides:
            with started(PEERS[name], case) as peer:
                answer = _losses(peer)
                difference = _difference(first["losses"], answer["losses"])
                if not difference <= PARITY_TOLERANCES[case.dtype]:
                    raise SystemExit(
                        f"{case.name}, {case.ids}, {case.optimizer}, {case.dtype}: losses of {name} differ from ours "
                        f"by {difference:.1e}: {answer['losses']} and {first['losses']}"
                    )
                pair = {"ours": ours, name: peer}
                # Its time says how many steps make a turn.
                warm = {side: process.ask("run 2")["step_ms"] for side, process in pair.items()}
                for side, process in pair.items():
                    process.ask(f"run {max(1, round(1e3 * warm_s / warm[side]))}")
                counts = {side: max(1, min(steps, round(1e3 * turn_s / warm[side]))) for side in pair}
                times: dict[str, list[dict[str, float]]] = {side: [] for side in pair}
                for turn in range(turns):
                    # There and back, so that no side always follows the other.
                    for side in list(pair)[:: 1 if turn % 2 else -1]:
                        times[side].append(pair[side].ask(f"run {counts[side]}"))
                copy_rates.append(copy_bandwidth(COPIED_BYTES, COPIES))
                of_ours += times["ours"]
                results[name] = _figures(times[name], peer, answer) | {
                    "parity": difference,
                    "ratio": _ratio(times[name], times["ours"], "step_ms"),
                    "cpu_ratio": _ratio(times[name], times["ours"], "cpu_ms"),
                    "fastest_ratio": min(t["step_ms"] for t in times[name]) / min(t["step_ms"] for t in times["ours"]),
                }
        results["ours"] = _figures(of_ours, ours, first)
    flops, moved = dense_flops(case), table_bytes(case, batches(case)[0])
    gflops, copy_rate = results["ours"]["gflops"], statistics.median(copy_rates)
    floor = {
        "flops": flops,
        "table_bytes": moved,
        "gflops": gflops,
        "copy_gb_s": copy_rate / 1e9,
        "ms": 1e3 * (flops / (1e9 * gflops) + moved / copy_rate),
        # Of the processors' time, matrix products alone.
        "cpu_ms": 1e3 * flops / (1e9 * results["ours"]["cpu_gflops"]),
    }
    what = {name: getattr(case, name) for name in ("ids", "optimizer", "batch_size", "dtype")}
    return {"workload": case.name, **what, "load": os.getloadavg()[0], "floor": floor, "sides": results}


def _figures(times: list[dict[str, float]], side: SideProcess, first: dict[str, Any]) -> dict[str, float]:
    medians = {name: statistics.median(turn[name] for turn in times) for name in times[0]}
    medians["fastest_ms"] = min(turn["step_ms"] for turn in times)
    peak_bytes = side.ask("memory")["peak_bytes"]
    return {**medians, "peak_bytes": peak_bytes, "start_s": side.start_s, "first_step_s": first["first_step_s"]}


def _ratio(theirs: list[dict[str, float]], ours: list[dict[str, float]], name: str) -> dict[str, Any]:
    """How often a step of ours fits into one of theirs: median and range over pairs of neighbouring turns."""
    ratios = sorted(a[name] / b[name] for a, b in zip(theirs, ours, strict=True))
    return {"median": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}


def _print(results: list[dict[str, Any]]) -> None:
    for result in results:
        title = "{workload}, {ids} ids, {optimizer}, {dtype}, batch {batch_size}; load {load:.1f}".format(**result)
        table = Table(title=title + "; the floor is {ms:.1f} ms".format(**result["floor"]))
        columns = ("side", "step, ms", "over ours", "processor time", "fastest, ms", "over ours", "samples/s")
        for column in (*columns, "peak, GB", "start, s", "1st step, s", "GFLOP/s", "a core"):
            table.add_column(column)
        for name, of in sorted(result["sides"].items(), key=lambda item: item[0] != "ours"):
            ratios = [
                "{:.2f} ({:.2f} to {:.2f})".format(of[ratio]["median"], *of[ratio]["range"]) if ratio in of else ""
                for ratio in ("ratio", "cpu_ratio")
            ]
            fastest = f"{of['fastest_ratio']:.2f}" if "fastest_ratio" in of else ""
            rate = 1e3 * result["batch_size"] / of["step_ms"]
            numbers = (of["peak_bytes"] / 1e9, of["start_s"], of["first_step_s"])
            rest = [f"{number:.1f}" for number in numbers]
            times = (f"{of['step_ms']:.1f}", *ratios, f"{of['fastest_ms']:.1f}", fastest)
            table.add_row(name, *times, f"{rate:,.0f}", *rest, f"{of['gflops']:.0f}", f"{of['cpu_gflops']:.0f}")
        Console(width=160).print(table)


def _draw(results: list[dict[str, Any]], picture: Path) -> None:
    """Bars: the time of a step of each side over that of ours."""
    names = [name for name in PEERS if any(name in result["sides"] for result in results)]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.14 * len(results) * (len(names) + 1)), layout="constrained")
    labels = []
    for place, result in enumerate(results):
        present = [name for name in names if name in result["sides"]]
        for number, name in enumerate(present):
            ratio = result["sides"][name]["ratio"]
            height = 0.8 / len(present)
            y = place - 0.4 + (number + 0.5) * height
            spread = [[ratio["median"] - ratio["range"][0]], [ratio["range"][1] - ratio["median"]]]
            label = None if any(name in earlier["sides"] for earlier in results[:place]) else name
            bar = {"height": height, "color": f"C{names.index(name)}", "label": label}
            axes.barh(y, ratio["median"], xerr=spread, error_kw={"elinewidth": 0.6}, **bar)
        labels.append("{workload}, {ids}\n{optimizer}, {dtype}".format(**result))
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="time of a step over that of dlrm_jax: median and range of turns")
    widest = max(of["ratio"]["range"][1] for result in results for of in result["sides"].values() if "ratio" in of)
    ticks = [tick for tick in (0.5, 1, 1.5, 2, 3, 5, 10, 20, 50) if tick <= 1.5 * widest]
    axes.set_xlim(0.5, 1.2 * widest)
    axes.minorticks_off()
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks(range(len(results)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    figure.savefig(picture, dpi=130)


def main(
    workloads: tuple[str, ...] = tuple(workloads()),
    ids: tuple[str, ...] = ("zipf", "uniform"),
    optimizers: tuple[str, ...] = OPTIMIZERS,
    dtypes: tuple[str, ...] = tuple(PARITY_TOLERANCES),
    sides: tuple[str, ...] = tuple(PEERS),
    turns: int = 6,
    steps: int = 8,
    turn_s: float = 2.0,
    warm_s: float = 10.0,
    out: Path = Path("benchmarks/results/peers.json"),
) -> None:
    """Compares training steps.

    Args:
        workloads: Names of the workloads.
        ids: How ids are drawn: zipf, uniform.
        optimizers: Of the tables: sgd, rowwise_adagrad. Only ours and TorchRec's know the second.
        dtypes: Of the operands of matrix products: float32, bfloat16 (torch's by `torch.autocast`). Plain JAX is in
            float32 alone.
        sides: What ours is compared with.
        turns: Turns of each side.
        steps: Most steps of a turn.
        turn_s: Seconds that a turn should not exceed, if a step does not.
        warm_s: Seconds of each side before its first turn. What only a run's first seconds have is left out: ours moves
            its tables to huge pages then.
        out: Where to write the figures; the picture lies beside it. Cases that are there already and are not asked for
            stay, so that a long run can be made in parts.
    """
    jax.config.update("jax_platforms", "cpu")
    peers_python()
    known = _known()
    results = {_key(result): result for result in (json.loads(out.read_text())["results"] if out.exists() else [])}
    made = []
    for name in workloads:
        for optimizer in optimizers:
            for kind, dtype in itertools.product(ids, dtypes):
                able = [side for side in sides if PEERS[side].serves(optimizer, dtype)]
                if not able:
                    continue
                rate = TABLE_LEARNING_RATES[optimizer] / statistics.mean(known[name].pooling_factors)
                case = dataclasses.replace(
                    known[name], ids=kind, optimizer=optimizer, table_learning_rate=rate, dtype=dtype
                )
                result = _compare(case, able, turns=turns, steps=steps, turn_s=turn_s, warm_s=warm_s)
                _print([result])
                made.append(result)
                results[_key(result)] = result
                command = f"benchmarks/peers.py --turns {turns} --steps {steps} --turn_s {turn_s} --warm_s {warm_s}"
                record(out, command, {"results": sorted(results.values(), key=_key)})
    _draw(sorted(results.values(), key=_key), out.with_suffix(".png"))


def _key(result: dict[str, Any]) -> tuple[int, int, str, int]:
    dtype = list(PARITY_TOLERANCES).index(result["dtype"])
    return list(_known()).index(result["workload"]), OPTIMIZERS.index(result["optimizer"]), result["ids"], dtype


# `main` has an argument of that name.
_known = workloads

if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
