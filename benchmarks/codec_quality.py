"""What quantised collectives cost in quality: test NE of KuaiRand-Pure on 8 CPU devices, by codec and seed.

    .venv/bin/python benchmarks/codec_quality.py --data data/kuairand

Prepare the dataset as configs/kuairand.py says. The plan has tables of every kind of exchange. Each run trains for one
epoch and is evaluated on the same devices, so that evaluation, too, sends codes. Its last state is what counts: the
best of several evaluations would be another step in each run. The difference in NE is to the run of the same seed that
sends float32. "neo" is the paper's pair: float16 forward, bfloat16 backward. "all-reduce" are gradients of the dense
part. Any change of last bits moves NE by some ten-thousandths after an epoch; to show how much, one variant sends
float32 under another plan, which adds partial sums in another order.

The bytes are those that a device receives from others in one step, read from the compiled lookup and update. Takes an
hour or two on 2 cores; a --folder keeps the runs, and those that are complete are not done again.
"""

import dataclasses
import itertools
import json
import math
import re
import statistics
import tempfile
from pathlib import Path
from typing import get_args

import jax
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from configs.kuairand import kuairand
from dlrm_jax.config import Config, ExchangeConfig, MeshConfig, make_specs
from dlrm_jax.data.assemble import IdCapacity
from dlrm_jax.data.card import read_card
from dlrm_jax.loop import train
from dlrm_jax.predict import Predictor
from dlrm_jax.recommender import Recommender
from scripts.command_line import configure_jax
from sharding.all_reduce import AllReduce
from sharding.codec import Codec
from sharding.plan import Placement, ShardingPlan, data_parallel, row_wise, table_row_wise, table_wise
from sharding.tables import TableSpec

_NODES, _CHIPS = 2, 4
_KINDS = "reduce-scatter|all-to-all|all-gather"
_ITEM_BYTES = {"f32": 4, "u16": 2, "u8": 1}
_OTHER_PLAN = "float32, other plan"
_EXCHANGES: dict[str, ExchangeConfig] = {
    **{codec: ExchangeConfig(forward=codec, backward=codec) for codec in get_args(Codec)},
    "neo": ExchangeConfig(forward="float16", backward="bfloat16"),
    **{f"all-reduce {how}": ExchangeConfig(all_reduce=how) for how in get_args(AllReduce) if how != "float32"},
    _OTHER_PLAN: ExchangeConfig(),
}


def make_plan(tables: tuple[TableSpec, ...]) -> ShardingPlan:
    """Every kind of exchange in turn, from the largest table to the smallest."""

    def place(number: int, table: TableSpec) -> Placement:
        if table.num_rows < _NODES * _CHIPS:
            return data_parallel(table)
        match number % 6:
            case 0:
                return row_wise(table, returns="partial_sums")
            case 1:
                return table_row_wise(table, number // 6 % _NODES, returns="partial_sums")
            case 2:
                return table_wise(table, number % (_NODES * _CHIPS))
            case 3:
                return row_wise(table, returns="rows")
            case 4:
                return table_row_wise(table, number // 6 % _NODES, returns="rows")
            case _:
                return data_parallel(table)

    by_size = sorted(tables, key=lambda table: -table.num_rows)
    return ShardingPlan(
        nodes=_NODES, chips=_CHIPS, placements=tuple(place(number, table) for number, table in enumerate(by_size))
    )


def received_bytes(program: str) -> int:
    """Bytes of vectors that a device receives from others in a compiled program."""
    total = 0.0
    for shapes, kind, axes in re.findall(rf"= (.*?) ({_KINDS})\(.*?replica_groups=mesh\[.*?\] {{(.*?)}}", program):
        members = math.prod({"node": _NODES, "chip": _CHIPS}[axis] for axis in re.findall(r"'(\w+)'", axes))
        size = sum(
            math.prod(map(int, shape.split(","))) * _ITEM_BYTES[dtype]
            for dtype, shape in re.findall(r"\b(f32|u16|u8)\[([\d,]+)\]", shapes)
        )
        total += size * (members - 1) / (1 if kind == "reduce-scatter" else members)
    return round(total)


def bytes_of_step(recommender: Recommender) -> tuple[int, int]:
    """Bytes that a device receives from others in one step: vectors forward, gradients backward."""
    tables, columns = recommender.tables, recommender.card.sparse
    batch_size = recommender.config.data.batch_size
    samples = batch_size // tables.num_devices
    capacities = recommender.first_capacities(batch_size, IdCapacity(columns, batch_size).value)
    ids = recommender.abstract_batch(samples * tables.num_devices, capacities.ids * tables.num_devices).ids
    routed = jax.eval_shape(lambda ids: tables.route(ids, capacities), ids)
    state = tables.abstract_state()
    gradients = jax.eval_shape(tables.lookup, state, routed)
    programs = (
        jax.jit(tables.lookup).lower(state, routed),
        jax.jit(lambda *given: tables.update(*given, step=1)).lower(state, routed, gradients),
    )
    forward, backward = (received_bytes(program.compile().as_text() or "") for program in programs)
    return forward, backward


def run(config: Config, *, count_bytes: bool) -> dict[str, float]:
    """Trains and evaluates, unless that is done already.

    Args:
        config: The run.
        count_bytes: Whether to count the bytes of a step, which no seed changes.
    """
    done = Path(config.workdir) / "quality.json"
    if not done.exists():
        train(config, console=Console(quiet=True))
        predictor = Predictor(config.workdir, checkpoint="latest", mesh=config.mesh, plan=config.plan)
        metrics = predictor.evaluate("test")
        figures = {"test_ne": metrics.ne, "step": predictor.step}
        if count_bytes:
            figures["forward_bytes"], figures["backward_bytes"] = bytes_of_step(predictor.recommender)
        done.write_text(json.dumps(figures))
    return json.loads(done.read_text())


def main(
    data: str = "data/kuairand",
    seeds: tuple[int, ...] = (0, 1, 2),
    variants: tuple[str, ...] = tuple(_EXCHANGES),
    folder: Path | None = None,
    out: Path = Path("benchmarks/results/codec_quality.json"),
) -> None:
    """Trains with each codec, and with each way to add up gradients of the dense part.

    Args:
        data: Folder of the prepared dataset.
        seeds: Seeds of the runs.
        variants: What travels how, out of all there are; float32 is always among them.
        folder: Where the runs are kept; nowhere unless given.
        out: Where to write the figures.
    """
    mesh = MeshConfig(nodes=_NODES, chips=_CHIPS)
    configure_jax(mesh)
    with tempfile.TemporaryDirectory() as temporary:
        workdirs = Path(temporary) if folder is None else folder
        workdirs.mkdir(parents=True, exist_ok=True)
        base = kuairand()
        tables = make_specs(base.embedding, read_card(data))[0]
        mixed, other = workdirs / "plan.json", workdirs / "other_plan.json"
        make_plan(tables).save(mixed)
        ShardingPlan(
            nodes=_NODES,
            chips=_CHIPS,
            placements=tuple(table_wise(table, number % mesh.num_devices) for number, table in enumerate(tables)),
        ).save(other)
        asked = [name for name in _EXCHANGES if name == "float32" or name in variants]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
        for seed, name in itertools.product(seeds, asked):
            plan = other if name == _OTHER_PLAN else mixed
            config = dataclasses.replace(
                base,
                seed=seed,
                mesh=mesh,
                plan=str(plan),
                workdir=str(workdirs / f"{re.sub(r'[^a-z0-9]+', '_', name)}_{seed}"),
                data=dataclasses.replace(base.data, path=data),
                exchange=_EXCHANGES[name],
                train=dataclasses.replace(base.train, eval_every=None),
            )
            runs[name].append(run(config, count_bytes=seed == seeds[0]))
            _report(runs, seeds, data, out)


def _report(runs: dict[str, list[dict[str, float]]], seeds: tuple[int, ...], data: str, out: Path) -> None:
    """Prints and writes what there is so far."""
    table = Table("codec", "test NE", "difference", "by seed", "KB forward", "KB backward", title="KuaiRand")
    results = []
    for name, figures in runs.items():
        if not figures:
            continue
        test_ne = [one["test_ne"] for one in figures]
        differences = [one - other["test_ne"] for one, other in zip(test_ne, runs["float32"], strict=False)]
        mean, mean_difference = statistics.mean(test_ne), statistics.mean(differences)
        sizes = [round(figures[0][key]) for key in ("forward_bytes", "backward_bytes")]
        results.append(
            {
                "codec": name,
                "seeds": list(seeds[: len(figures)]),
                "mean_test_ne": round(mean, 6),
                "mean_difference": round(mean_difference, 6),
                "test_ne": [round(one, 6) for one in test_ne],
                "difference": [round(one, 6) for one in differences],
                "forward_bytes": sizes[0],
                "backward_bytes": sizes[1],
            }
        )
        by_seed = " ".join(f"{one:+.5f}" for one in differences)
        table.add_row(
            name, f"{mean:.5f}", f"{mean_difference:+.5f}", by_seed, *(f"{size / 1e3:,.1f}" for size in sizes)
        )
    Console(width=120).print(table)
    command = f"benchmarks/codec_quality.py --data {data} --seeds {' '.join(map(str, seeds))}"
    record(out, command, {"mesh": f"{_NODES}x{_CHIPS}", "results": results})


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
