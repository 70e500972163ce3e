"""Size and compile time of the training step for 10, 100 and 1,000 tables: neither should grow with their number.

    JAX_PLATFORMS=cpu .venv/bin/python benchmarks/program_size.py

Tables of two dims in every kind of placement, more of the same each time, whose bags are smaller in turn: the number of
ids stays, because XLA cuts sorts and running sums of larger arrays into more steps. The program is compiled ahead of
time for a machine that need not be here, as by `scripts/plan.py --compile`.
"""

import os
import resource
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from dlrm_jax.config import Config, DataConfig, EmbeddingConfig, TableConfig, make_specs
from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary
from dlrm_jax.model import ModelConfig
from dlrm_jax.target_step import compile_for_target, lower_train_step
from sharding.aot import target_mesh
from sharding.plan import Placement, ShardingPlan, column_wise, data_parallel, row_wise, table_row_wise, table_wise
from sharding.tables import TableSpec
from sharding.topology import parse_topology

_ROWS, _BATCH_SIZE, _IDS_PER_SAMPLE = 4096, 1024, 10_000
_DIMS = (32, 128)
_NUM_KINDS = 5


def make_config(num_tables: int) -> Config:
    """A model of so many tables, of two dims; each sample has as many ids, however many tables there are."""
    ids = _IDS_PER_SAMPLE // num_tables
    names = [f"sparse_{number}" for number in range(num_tables)]
    return Config(
        name=f"{num_tables} tables",
        data=DataConfig(path=None, batch_size=_BATCH_SIZE),
        embedding=EmbeddingConfig(
            default=TableConfig(dim=_DIMS[0]),
            tables={
                name: TableConfig(dim=_DIMS[1]) for number, name in enumerate(names) if number // _NUM_KINDS % 2 == 1
            },
        ),
        model=ModelConfig(bottom_mlp=(64,), top_mlp=(64, 1), interaction="cat", projection_dim=16),
        stated=DatasetCard(
            name="stated",
            dense=(DenseColumn(name="dense"),),
            sparse=tuple(
                SparseColumn(name=name, num_rows=_ROWS, bag=True, max_pooling_factor=ids, mean_pooling_factor=ids)
                for name in names
            ),
            splits={"train": SplitSummary(num_samples=_BATCH_SIZE, positive_rate=0.5)},
        ),
    )


def make_plan(tables: tuple[TableSpec, ...], nodes: int, chips: int) -> ShardingPlan:
    """A plan in which the kinds of placement take turns."""

    def place(number: int, table: TableSpec) -> Placement:
        device = number % (nodes * chips)
        match number % _NUM_KINDS:
            case 0:
                return table_wise(table, device)
            case 1:
                return column_wise(table, [device, (device + 1) % (nodes * chips)])
            case 2:
                return row_wise(table, returns="rows")
            case 3:
                return table_row_wise(table, number % nodes, returns="partial_sums")
            case _:
                return data_parallel(table)

    return ShardingPlan(
        nodes=nodes, chips=chips, placements=tuple(place(number, table) for number, table in enumerate(tables))
    )


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for, such as assemblers of machine code."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main(
    topology: str = "zionex:2x8",
    counts: tuple[int, ...] = (10, 100, 1000),
    out: Path = Path("benchmarks/results/program_size.json"),
) -> None:
    """Compiles training steps.

    Args:
        topology: What to compile for, as KIND:NxC.
        counts: Numbers of tables.
        out: Where to write the figures.
    """
    # What is compiled for a device that is not here cannot be read from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    machine = parse_topology(topology)
    mesh = target_mesh(machine)
    results = []
    table = Table(
        "tables", "instructions", "lowering, CPU s", "compiling, CPU s", title=f"the training step for {topology}"
    )
    for count in counts:
        config = make_config(count)
        assert config.stated is not None
        plan = make_plan(make_specs(config.embedding, config.stated)[0], machine.nodes, machine.chips)
        started = _cpu_seconds()
        lowered = lower_train_step(config, config.stated, plan, mesh)
        lowered_after = _cpu_seconds()
        compiled = compile_for_target(lowered, machine)
        seconds = (lowered_after - started, _cpu_seconds() - lowered_after)
        instructions = (compiled.as_text() or "").count(" = ")
        results.append(
            {
                "tables": count,
                "instructions": instructions,
                "lowering_cpu_seconds": round(seconds[0], 2),
                "compiling_cpu_seconds": round(seconds[1], 2),
            }
        )
        table.add_row(str(count), f"{instructions:,}", *(f"{each:.1f}" for each in seconds))
    Console().print(table)
    command = f"benchmarks/program_size.py --topology {topology} --counts {' '.join(map(str, counts))}"
    record(out, command, {"results": results})


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
