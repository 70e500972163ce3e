"""A plan and its cost as text tables and as a picture."""

import io
import os
from collections.abc import Sequence

import numpy as np
from rich.console import Console, Group
from rich.table import Table

from sharding.cost import PlanCost
from sharding.cost_settings import STAGES
from sharding.layout import stored_width
from sharding.plan import Placement, ShardingPlan
from sharding.planner import PlanResult
from sharding.storage import bytes_per_row
from sharding.tables import TableSpec

# More devices than this are summed up.
_MOST_DEVICES = 16
_QUANTILES = (("fewest", 0.0), ("10 %", 0.1), ("median", 0.5), ("90 %", 0.9), ("most", 1.0))


def _size(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:.0f} B"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def _owners(placement: Placement) -> str:
    owners = [str(piece.owner) for piece in placement.slices if piece.owner is not None]
    if not owners:
        return "all"
    word = "devices" if placement.kind in ("table_wise", "column_wise") else "nodes"
    return f"{word if len(owners) > 1 else word.removesuffix('s')} {', '.join(owners)}"


def placements_table(plan: ShardingPlan, tables: Sequence[TableSpec], limit: int | None = None) -> Table:
    """Placement, rows, dim and bytes (with optimizer state, of all devices together) of each table, largest first.

    Args:
        plan: The plan.
        tables: Its tables.
        limit: Most tables listed; all unless given.
    """
    by_name = {table.name: table for table in tables}
    rows = []
    for placement in plan.placements:
        table = by_name[placement.table]
        widths = sum(stored_width(piece.num_columns) for piece in placement.slices)
        # Row-wise state is kept by each column slice.
        per_row = sum(bytes_per_row(table, stored_width(piece.num_columns)) for piece in placement.slices)
        copies = plan.num_devices if placement.kind == "data_parallel" else 1
        rows.append((copies * table.num_rows * per_row, placement, table, widths))
    rows.sort(key=lambda entry: (-entry[0], entry[1].table))
    shown = rows[:limit]
    caption = None if len(shown) == len(rows) else f"and {len(rows) - len(shown)} smaller tables"
    result = Table(
        "table", "placement", "where", "returns", "rows", "dim", "stored", "bytes", title="tables", caption=caption
    )
    for size, placement, table, widths in shown:
        count = len(placement.slices)
        kind = placement.kind if count == 1 else f"{placement.kind}, {count} slices"
        result.add_row(
            table.name,
            kind,
            _owners(placement),
            placement.returns or "",
            f"{table.num_rows:,}",
            str(table.dim),
            str(widths),
            _size(size),
        )
    return result


def kinds_table(plan: ShardingPlan, tables: Sequence[TableSpec]) -> Table:
    """How many tables and parameters each kind of placement has."""
    by_name = {table.name: table for table in tables}
    sums: dict[str, list[int]] = {}
    for placement in plan.placements:
        table = by_name[placement.table]
        name = placement.kind if placement.returns is None else f"{placement.kind}, {placement.returns}"
        entry = sums.setdefault(name, [0, 0])
        entry[0] += 1
        entry[1] += table.num_rows * table.dim
    result = Table("placement", "tables", "parameters", title="placements")
    for name, (count, parameters) in sorted(sums.items()):
        result.add_row(name, str(count), f"{parameters:,}")
    return result


def stages_table(cost: PlanCost) -> Table:
    """Time of each stage: padded, of the mean device alone, and of the slowest alone."""
    result = Table("stage", "padded, ms", "mean alone, ms", "most alone, ms", title="time of a step")
    for stage, seconds, alone in zip(STAGES, cost.seconds, cost.device_seconds, strict=True):
        if seconds > 0:
            figures = (seconds, float(np.mean(alone)), max(alone))
            result.add_row(stage, *(_milliseconds(figure) for figure in figures))
    result.add_section()
    if cost.hidden_seconds:
        result.add_row("hidden", _milliseconds(-cost.hidden_seconds), "", "")
    alone = cost.unpadded_seconds
    result.add_row(
        "all", *(_milliseconds(figure) for figure in (cost.total_seconds, float(np.mean(alone)), max(alone)))
    )
    result.caption = f"padding {cost.padding:.1%} of the padded time"
    return result


def storage_table(cost: PlanCost, memory_limit: int | None = None) -> Table:
    """What takes a device's memory."""
    storage = cost.storage
    result = Table("memory of a device", "bytes", title="memory")
    for name in ("weights", "element_state", "row_state", "ids", "vectors", "rows", "dense"):
        result.add_row(name.replace("_", " "), _size(getattr(storage, name)))
    result.add_section()
    result.add_row("all", _size(storage.total))
    if memory_limit is not None:
        result.add_row("of", _size(memory_limit))
    return result


def devices_table(plan: ShardingPlan, cost: PlanCost) -> Table:
    """Memory, padding, time by stage and share of the slowest, of each device; of many devices, quantiles.

    Memory is that of tables and optimizer state which a device has of its own, padding what its stores are larger,
    since all are as large as the fullest. Times are those that a device would need alone.
    """
    own = np.array(cost.storage.weights_alone, np.float64)
    stages: dict[str, np.ndarray] = {}
    for stage, seconds in zip(STAGES, cost.device_seconds, strict=True):
        name = stage.split()[0]
        stages[name] = stages.get(name, np.zeros(len(own))) + np.array(seconds)
    stages = {name: seconds for name, seconds in stages.items() if seconds.max() > 0}
    share = np.array(cost.share_of_slowest)
    columns = [own, cost.storage.stores - own, *stages.values(), share]
    headings = ("device", "memory", "padding", *(f"{name}, ms" for name in stages), "of slowest")

    def row(name: str, values: Sequence[float]) -> tuple[str, ...]:
        times = (_milliseconds(value) for value in values[2:-1])
        return name, _size(values[0]), _size(values[1]), *times, f"{values[-1]:.1%}"

    result = Table(*headings, title="devices")
    if len(own) <= _MOST_DEVICES:
        for device in range(len(own)):
            name = f"{device} ({device // plan.chips}, {device % plan.chips})"
            result.add_row(*row(name, [float(column[device]) for column in columns]))
        return result
    for name, quantile in _QUANTILES:
        result.add_row(*row(name, [float(np.quantile(column, quantile)) for column in columns]))
    result.add_section()
    for what, device in (("fullest", int(own.argmax())), ("slowest", int(share.argmax()))):
        result.add_row(*row(f"{what}: {device}", [float(column[device]) for column in columns]))
    result.caption = f"{len(own)} devices: each column's quantiles, then two devices"
    return result


def plan_report(result: PlanResult, tables: Sequence[TableSpec], *, most_tables: int | None = 40) -> Group:
    """All tables of a plan, to print with rich.

    Args:
        result: What the planner returned.
        tables: The tables.
        most_tables: Most tables listed; None for all.
    """
    cost = result.cost
    line = (
        f"{cost.total_seconds * 1e3:.3f} ms a step, {result.gap:.1%} above the lower bound of "
        f"{result.lower_bound * 1e3:.3f} ms; partitioner {result.partitioner}"
    )
    return Group(
        placements_table(result.plan, tables, most_tables),
        kinds_table(result.plan, tables),
        stages_table(cost),
        storage_table(cost, result.memory_limit),
        devices_table(result.plan, cost),
        line,
    )


def plan_text(result: PlanResult, tables: Sequence[TableSpec], *, most_tables: int | None = 40) -> str:
    """The same as plain text."""
    console = Console(width=160, file=io.StringIO(), markup=False)
    with console.capture() as captured:
        console.print(plan_report(result, tables, most_tables=most_tables))
    return captured.get()


def draw_plan(result: PlanResult, path: str | os.PathLike[str]) -> None:
    """Writes a picture: memory of each device above, seconds that it would need alone below.

    Args:
        result: What the planner returned.
        path: File; its ending says which format.
    """
    # Here, because it takes a second that only a picture is worth; and not pyplot, which would look for a display.
    from matplotlib.figure import Figure

    cost, plan = result.cost, result.plan
    devices = np.arange(plan.num_devices)
    figure = Figure(figsize=(10, 7), layout="constrained")
    memory, load = figure.subplots(2, 1, sharex=True)
    storage = cost.storage
    own = np.array(storage.weights_alone) / 1e9
    base = own.copy()
    memory.bar(devices, own, width=1.0, label="tables and optimizer state")
    parts = (
        ("padding", storage.stores / 1e9 - own),
        ("buffers", storage.buffers / 1e9),
        ("dense", storage.dense / 1e9),
    )
    for name, size in parts:
        height = np.broadcast_to(size, base.shape)
        memory.bar(devices, height, bottom=base, width=1.0, label=name)
        base = base + height
    memory.axhline(result.memory_limit / 1e9, color="black", linestyle="--", label="limit")
    memory.set_ylabel("GB a device")
    memory.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    base = np.zeros(len(devices))
    stages: dict[str, np.ndarray] = {}
    for stage, seconds in zip(STAGES, cost.device_seconds, strict=True):
        name = stage.split()[0]
        stages[name] = stages.get(name, np.zeros(len(devices))) + 1e3 * np.array(seconds)
    for name, height in stages.items():
        if height.max() > 0:
            load.bar(devices, height, bottom=base, width=1.0, label=name)
            base = base + height
    load.axhline(1e3 * sum(cost.seconds), color="black", linestyle="--", label="padded")
    load.set_ylabel("ms a device")
    load.set_xlabel(f"device ({plan.nodes} nodes of {plan.chips})")
    load.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=120)
