"""What to tell a user whose tables do not fit: how much is missing, and the cheapest ways out with their figures.

All figures are of plans: of those that need as little memory as is found, so that a way out that is said to fit does.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from sharding.candidates import make_choices
from sharding.constraints import Constraint
from sharding.cost import Step, cost_of_layout
from sharding.errors import InputError
from sharding.layout import lay_out
from sharding.plan import one_device_plan
from sharding.starts import lightest_assignment
from sharding.storage import Storage
from sharding.tables import FeatureSpec, TableSpec

_WAYS = 3
# The share of the bytes that a way out saves.
_WORTH = 0.01
# At most so many times the devices, and by how much more of them are tried.
_MOST_TIMES = 16
_GROWTH = 1.2


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """What is to be placed, and on which machine.

    Attributes:
        tables: The tables.
        features: The features.
        step: What a step asks of the machine.
        constraints: What users want.
    """

    tables: tuple[TableSpec, ...]
    features: tuple[FeatureSpec, ...]
    step: Step
    constraints: tuple[Constraint, ...]

    def least_storage(self) -> Storage:
        """Bytes of a device under the plan that needs fewest, as far as that is easily found.

        Raises:
            InputError: A constraint cannot be obeyed.
        """
        topology = self.step.topology
        plan = one_device_plan(self.tables)
        if topology.num_devices > 1:
            choices = make_choices(self.tables, self.features, self.step, self.constraints, math.inf)
            plan = lightest_assignment(choices, self.step).to_plan(topology.nodes, topology.chips)
        return cost_of_layout(lay_out(self.tables, self.features, plan), self.features, self.step).storage


def shortage_error(demand: Demand, limit: int) -> InputError:
    """The error of tables that do not fit.

    Args:
        demand: What was to be placed.
        limit: Bytes of a device.
    """
    topology = demand.step.topology
    needed = demand.least_storage()
    ways: list[tuple[bool, str]] = []
    for text, size in _ways_out(demand, needed, limit):
        if size < needed.total * (1.0 - _WORTH):
            verdict = "fits" if size <= limit else f"{_gigabytes(size - limit)} too much"
            ways.append((size > limit, f"{text} ({_gigabytes(size)} a device, {verdict})"))
        if sum(not too_much for too_much, _ in ways) == _WAYS:
            break
    ways.sort(key=lambda way: way[0])
    missing = needed.total - limit
    options = "; ".join(f"({number}) {text}" for number, (_, text) in enumerate(ways[:_WAYS], 1))
    return InputError(
        f"the tables do not fit {topology.name} ({topology.num_devices} devices): they need "
        f"{_gigabytes(needed.total)} a device (tables and optimizer state {_gigabytes(needed.stores)}, buffers "
        f"{_gigabytes(needed.buffers)}, dense {_gigabytes(needed.dense)}) of {_gigabytes(limit)}, so "
        f"{_gigabytes(missing)} a device ({_gigabytes(missing * topology.num_devices)} in all) are missing; ways out: "
        f"{options or 'more memory a device'}"
    )


def _ways_out(demand: Demand, needed: Storage, limit: int) -> Iterator[tuple[str, int]]:
    """What to do, and bytes of a device then. The cheapest first: what costs but speed, then accuracy, then money."""
    step, tables = demand.step, demand.tables

    def way(text: str, **changes: Any) -> list[tuple[str, int]]:
        other = dataclasses.replace(demand, **changes)
        try:
            return [(text, other.least_storage().total)] if other != demand else []
        except InputError:
            # Fewer rows may be too few to be spread as users want.
            return []

    if demand.constraints and step.topology.num_devices > 1:
        yield from way("lift the constraints, so that tables may be split", constraints=())
    half = step.batch_size // 2
    if half and half % step.topology.num_devices == 0:
        yield from way(f"halve the batch to {half} samples", step=dataclasses.replace(step, batch_size=half))
    rowwise = tuple(
        dataclasses.replace(table, optimizer="rowwise_adagrad") if table.rule and table.rule.element_state else table
        for table in tables
    )
    yield from way("optimizer rowwise_adagrad, one number of state a row", tables=rowwise)
    half_width = tuple(
        dataclasses.replace(table, dtype="bfloat16") if table.dtype == "float32" else table for table in tables
    )
    yield from way("dtype bfloat16 for float32 tables", tables=half_width)
    for more in _machines(demand, needed, limit):
        larger = dataclasses.replace(step.topology, nodes=more // step.topology.chips)
        text = f"{more} devices instead of {step.topology.num_devices}"
        found = way(text, step=dataclasses.replace(step, topology=larger))
        if found and found[0][1] <= limit:
            yield found[0]
            break
    largest = max(tables, key=lambda table: table.num_rows * table.dim)
    fewer = dataclasses.replace(largest, num_rows=max(1, largest.num_rows // 2))
    yield from way(
        f"half of the {largest.num_rows} rows of table {largest.name!r}",
        tables=tuple(fewer if table is largest else table for table in tables),
    )


def _machines(demand: Demand, needed: Storage, limit: int) -> Iterator[int]:
    """Numbers of devices that may do, all of which the batch can be dealt out to."""
    topology = demand.step.topology
    room = limit - needed.dense
    # Devices that are made of one CPU share its memory.
    if topology.platform == "cpu" or room <= 0:
        return
    # As many as stores alone need, then more and more.
    more = max(topology.num_devices + 1, math.ceil(sum(needed.weights_alone) / room))
    while more <= topology.num_devices * _MOST_TIMES:
        more = -(-more // topology.chips) * topology.chips
        # Most slices of TPUs are powers of two.
        exists = topology.platform != "tpu" or more.bit_count() == 1
        if exists and demand.step.batch_size % more == 0:
            yield more
            more = math.ceil(more * _GROWTH)
        else:
            more += 1
