"""Plans where the tables of a model live, and says what a training step would cost.

    scripts/plan.py CONFIG [--topology h200:16x8] [--out plan.json] [--picture plan.png] [--field.subfield value ...]

Prints the plan, its time by stage and its memory. --plan FILE judges that plan instead of the planner's. --compile
compiles the training step for the target, which need not be here, and prints XLA's own bytes beside the estimate, every
collective with what hides it, and the estimated time of a step (docs/overlap.md); --timeline FILE draws that step.

Without --topology the plan is for this machine's devices, --mesh.nodes times --mesh.chips of them. Constraints:

    --pin TABLE=KIND, TABLE=device:3, TABLE=devices:3,4, TABLE=node:1 or TABLE=nodes:0,1 (column slices, in order)
    --forbid TABLE=KIND[,KIND...]     --returns TABLE=rows or TABLE=partial_sums     --together TABLE,TABLE[,...]

TABLE may have * and ?, and stands for each table that it fits. Kinds: table_wise, column_wise, row_wise,
table_row_wise, grid, data_parallel. These flags may be repeated.
"""

# First, and for what its import does: how Ctrl-C ends the script while the others are imported.
import scripts.interrupts  # noqa: F401

# isort: split

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dlrm_jax.config import Config, MeshConfig
from dlrm_jax.data.card import DatasetCard
from dlrm_jax.data.write_errors import naming_folder
from dlrm_jax.plan_choice import choose_chunks
from dlrm_jax.planning import PlanningInput, check_memory_of_plan, planning_input
from dlrm_jax.sources import card_of
from dlrm_jax.target_report import bytes_table
from dlrm_jax.target_step import compile_for_target, device_bytes, lower_train_step, step_timeline
from scripts.command_line import ConfigFlags, configure_jax, parse_with_config
from scripts.constraints import parse_constraints
from scripts.one_line_errors import run
from sharding.aot import target_mesh
from sharding.errors import InputError
from sharding.measure import topology_of
from sharding.mesh import make_mesh
from sharding.plan import ShardingPlan, check_plan
from sharding.plan_report import draw_plan, plan_report
from sharding.planner import PartitionerName, PlanResult, usable_memory
from sharding.timeline_picture import draw_timeline
from sharding.timeline_report import timeline_report
from sharding.topology import Topology, parse_topology

Constraints = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Plans where the tables of a model live."""

    config: ConfigFlags
    topology: str | None = None
    """KIND:NxC, NODE times CHIP devices, such as h200:16x8; this machine's devices unless given."""
    partitioner: PartitionerName = "best"
    """How slices are dealt out to devices before the search: "best" of both, "greedy", or "ldm" (Karmarkar-Karp)."""
    memory_gb: float | None = None
    """GB of a device that a step may take; 92 % of its memory unless given."""
    pin: Constraints = ()
    """Where tables are to be, such as sparse_0=device:3."""
    forbid: Constraints = ()
    """Placements that tables may not have, such as sparse_*=data_parallel."""
    returns: Constraints = ()
    """How vectors of spread rows come home: sparse_0=rows or sparse_0=partial_sums."""
    together: Constraints = ()
    """Tables that are to be on one device, such as sparse_0,sparse_1."""
    out: Path | None = None
    """File for the plan, as JSON; give it to scripts/train.py with --plan."""
    picture: Path | None = None
    """File for a picture of each device's memory and load; its ending says the format."""
    compile: bool = False
    """Compile the training step for the target: XLA's bytes, its collectives, the estimated step. Takes minutes."""
    timeline: Path | None = None
    """File for a picture of the compiled step, which needs --compile; its ending says the format."""
    most_tables: int = 40
    """Most tables that are listed, largest first."""


def main(arguments: Sequence[str]) -> None:
    """Plans what the command line says."""
    given = parse_with_config(Arguments, arguments, __doc__ or "")
    if given.timeline is not None and not given.compile:
        raise InputError("--timeline draws the compiled step: give --compile, too")
    if given.most_tables < 0:
        raise InputError(f"--most_tables is {given.most_tables}, but must be at least 0: raise it")
    _check_files(given)
    topology, mesh = _target(given)
    limit = _memory_limit(given, topology)
    config = dataclasses.replace(given.config, mesh=MeshConfig(nodes=topology.nodes, chips=topology.chips))
    card = _card(config)
    described = planning_input(config, card, topology.num_devices)
    console = Console(markup=False)
    # A pipe has no width of its own, and 80 columns are too few for a table of devices.
    console = console if console.is_terminal else Console(width=160, markup=False)
    started = time.perf_counter()
    with _progress(f"planning {len(described.tables)} tables on {topology.num_devices} devices"):
        result = _plan(given, described, topology, limit)
    seconds = time.perf_counter() - started
    console.print(plan_report(result, described.tables, most_tables=given.most_tables))
    console.print(f"{topology.name}: planned in {seconds:.1f} s", highlight=False)
    if given.out is not None:
        with naming_folder(given.out, instead="another --out"):
            result.plan.save(given.out)
    if given.picture is not None:
        with naming_folder(given.picture, instead="another --picture"):
            draw_plan(result, given.picture)
    estimate = result.cost.storage.total
    check_memory_of_plan(result.cost.storage, result.memory_limit, topology.name)
    if given.compile:
        assert mesh is not None
        chunks = choose_chunks(config, card, result.plan, mesh)
        way = "the cost model's choice" if config.train.chunks is None else "--train.chunks"
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, chunks=chunks))
        started = time.perf_counter()
        with _progress(f"compiling the training step for {topology.name}"):
            lowered = lower_train_step(config, card, result.plan, mesh)
            try:
                compiled = compile_for_target(lowered, topology, order_by=config.train.order_by)
            except jax.errors.JaxRuntimeError as error:
                # Compilers for TPUs refuse what does not fit.
                raise InputError(
                    f"XLA cannot compile the step for {topology.name}: {str(error).splitlines()[0]} (the estimate was "
                    f"{estimate / 1e9:.2f} GB a device)"
                ) from error
        seconds = time.perf_counter() - started
        timeline = step_timeline(compiled, topology, described.settings)
        found = device_bytes(compiled)
        console.print(bytes_table(result.cost.storage, found))
        console.print(timeline_report(timeline, config.data.batch_size))
        console.print(f"chunks of a batch: {chunks} ({way}); compiled in {seconds:.1f} s", highlight=False)
        if given.timeline is not None:
            with naming_folder(given.timeline, instead="another --timeline"):
                draw_timeline(timeline, given.timeline)
        _judge(found.total, result, topology)


def _check_files(given: Arguments) -> None:
    """Raises InputError unless files can be written where they are to be, before planning and compiling take time."""
    written: dict[Path, str] = {}
    for flag, path, drawn in (
        ("--out", given.out, False),
        ("--picture", given.picture, True),
        ("--timeline", given.timeline, True),
    ):
        if path is None:
            continue
        if other := written.get(path.resolve()):
            raise InputError(f"{flag} {path}: is the file of {other}, too; give each its own")
        written[path.resolve()] = flag
        if not path.parent.is_dir():
            raise InputError(f"{flag} {path}: there is no folder {path.parent}; make it, or give another {flag}")
        if path.is_dir():
            raise InputError(f"{flag} {path}: is a folder; give a file in it")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InputError(f"{flag} {path}: cannot be written; give another {flag}")
        if drawn:
            # Only pictures need matplotlib, which takes a second to import.
            from matplotlib.figure import Figure

            formats = sorted(Figure().canvas.get_supported_filetypes())
            if path.suffix.removeprefix(".").lower() not in formats:
                raise InputError(f"{flag} {path}: its ending is none of a picture: use one of {', '.join(formats)}")


def _card(config: Config) -> DatasetCard:
    """The dataset's card; where the dataset is not on this machine, the one that the config states."""
    if config.stated is None or config.data.path is None or Path(config.data.path).exists():
        return card_of(config)
    print(f"{config.data.path} is not here: planning with the figures that the config states", file=sys.stderr)
    return config.stated


def _target(given: Arguments) -> tuple[Topology, Mesh | None]:
    """The machine, and its devices if they are here or something is compiled for them."""
    config = given.config
    if given.topology is None:
        configure_jax(config.mesh)
        mesh = make_mesh(config.mesh.nodes, config.mesh.chips)
        return topology_of(mesh), mesh
    topology = parse_topology(given.topology)
    asked = (config.mesh.nodes, config.mesh.chips)
    if asked not in ((1, 1), (topology.nodes, topology.chips)):
        raise InputError(
            f"--topology {given.topology} has {topology.nodes} x {topology.chips} devices, but --mesh.nodes and "
            f"--mesh.chips say {asked[0]} x {asked[1]}: leave them out"
        )
    # Compilers of accelerators that are not here would look for them. All three are read when JAX first needs a device.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # What is compiled for a device that is not here can be written to the cache, but never be read from it.
    jax.config.update("jax_enable_compilation_cache", False)
    # Its compiler may not be installed: known before planning takes its time.
    return topology, target_mesh(topology) if given.compile else None


def _memory_limit(given: Arguments, topology: Topology) -> int:
    """Bytes of a device that a step may take."""
    if given.memory_gb is None:
        return usable_memory(topology)
    most = topology.hbm_bytes / 1e9
    if not 0 < given.memory_gb <= most:
        raise InputError(
            f"--memory_gb is {given.memory_gb:g}, but a device has {most:.2f}: give more than 0, at most that"
        )
    return int(given.memory_gb * 1e9)


def _judge(found: int, result: PlanResult, topology: Topology) -> None:
    """Says so where XLA's program takes more than the plan was to, and refuses what no device has.

    Args:
        found: Bytes of a device that XLA's program takes.
        result: The plan.
        topology: The machine.
    """
    limit, estimate = result.memory_limit, result.cost.storage.total
    if found <= limit:
        return
    takes = f"XLA's program takes {found / 1e9:.2f} GB a device, {(found - limit) / 1e9:.2f} more than the plan may"
    # What the estimate lacks, it lacks of a smaller plan, too.
    fix = f"--memory_gb {(limit - 1.1 * (found - estimate)) / 1e9:.1f} plans for less"
    if found > topology.hbm_bytes:
        raise InputError(f"{takes}, and {topology.name} has {topology.hbm_bytes / 1e9:.2f}: {fix}")
    print(f"note: {takes}; {topology.name} has {topology.hbm_bytes / 1e9:.2f}, and {fix}", file=sys.stderr)


def _plan(given: Arguments, described: PlanningInput, topology: Topology, limit: int) -> PlanResult:
    """The planner's plan; or the given one, beside the planner's lower bound."""
    path = given.config.plan
    plan = None
    if path is not None:
        asked = [flag for flag in ("pin", "forbid", "returns", "together") if getattr(given, flag)]
        asked += ["partitioner"] if given.partitioner != Arguments.partitioner else []
        if asked:
            raise InputError(f"--{asked[0]} would not change the plan of --plan {path}: leave one of them out")
        # Before the planner takes its time.
        plan = ShardingPlan.load(path)
        check_plan(plan, described.tables, topology.nodes, topology.chips)
    made = described.make_plan(
        topology,
        constraints=parse_constraints(
            described.tables,
            pin=given.pin,
            forbid=given.forbid,
            returns=given.returns,
            together=given.together,
        ),
        partitioner=given.partitioner,
        memory_limit=limit,
    )
    if plan is None:
        return made
    cost = described.cost(plan, topology)
    return dataclasses.replace(made, plan=plan, cost=cost, partitioner=f"none (plan of {path})", partitioned=())


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Shows that something long is under way, and for how long."""
    console = Console(stderr=True, markup=False)
    if not console.is_terminal:
        console.print(what, highlight=False)
        yield
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        progress.add_task(what, total=None)
        yield


if __name__ == "__main__":
    run(main)
