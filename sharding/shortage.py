"""What to tell a user whose tables do not fit: how much is missing, and the cheapest ways out with their figures."""

import dataclasses
import math
from collections.abc import Sequence

from sharding.candidates import make_choices
from sharding.constraints import Constraint
from sharding.cost import Step
from sharding.errors import InputError
from sharding.tables import FeatureSpec, TableSpec
from sharding.topology import Topology

_WAYS = 3


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def least_bytes(
    tables: Sequence[TableSpec],
    features: Sequence[FeatureSpec],
    step: Step,
    constraints: Sequence[Constraint],
) -> float:
    """Bytes of a device that tables and optimizer state take at least, as even as can be.

    Args:
        tables: The tables.
        features: The features.
        step: What a step asks of the machine.
        constraints: What users want.
    """
    choices = make_choices(tables, features, step, constraints, math.inf)
    devices = step.topology.num_devices
    total, largest = 0.0, 0.0
    for candidates in choices.of_table:
        total += min(candidate.total_bytes for candidate in candidates)
        largest = max(largest, min(candidate.owner_bytes for candidate in candidates))
    return max(total / devices, largest)


def shortage_error(
    tables: Sequence[TableSpec],
    features: Sequence[FeatureSpec],
    step: Step,
    constraints: Sequence[Constraint],
    limit: int,
    buffers: int,
) -> InputError:
    """The error of tables that do not fit.

    Args:
        tables: The tables.
        features: The features.
        step: What a step asks of the machine.
        constraints: What users want.
        limit: Bytes of a device.
        buffers: Bytes of a step's buffers, where a plan was made far enough to know.
    """
    topology = step.topology
    devices = topology.num_devices
    beside = buffers + step.dense.memory_bytes
    stores = least_bytes(tables, features, step, constraints)
    needed = stores + beside

    def figure(size: float) -> str:
        verdict = "fits" if size <= limit else f"{_gigabytes(size - limit)} too much"
        return f"{_gigabytes(size)} a device, {verdict}"

    # Cheapest first: what costs nothing but speed, then accuracy, then money.
    ways: list[tuple[bool, str]] = []

    def way(size: float, text: str) -> None:
        if size < needed:
            ways.append((size > limit, f"{text} ({figure(size)})"))

    if constraints:
        way(least_bytes(tables, features, step, ()) + beside, "lift the constraints, so that tables may be split")
    if buffers:
        half = stores + buffers / 2 + step.dense.memory_bytes
        way(half, f"halve the batch to {step.batch_size // 2} samples")
    wide = ("adagrad", "adam", "lamb", "partial_rowwise_adam")
    rowwise = [
        dataclasses.replace(table, optimizer="rowwise_adagrad") if table.optimizer in wide else table
        for table in tables
    ]
    way(
        least_bytes(rowwise, features, step, constraints) + beside,
        "optimizer rowwise_adagrad, one number of state a row",
    )
    half_width = [
        dataclasses.replace(table, dtype="bfloat16") if table.dtype == "float32" else table for table in tables
    ]
    way(least_bytes(half_width, features, step, constraints) + beside, "dtype bfloat16 for float32 tables")
    total = stores * devices
    # Devices that are made of one CPU share its memory.
    if limit > beside and topology.platform != "cpu":
        more = math.ceil(total / (limit - beside) / topology.chips) * topology.chips
        if more > devices:
            ways.append((False, f"{more} devices instead of {devices} ({figure(total / more + beside)})"))
    largest = max(tables, key=lambda table: table.num_rows * table.dim)
    fewer = [
        dataclasses.replace(table, num_rows=max(1, table.num_rows // 2)) if table is largest else table
        for table in tables
    ]
    way(
        least_bytes(fewer, features, step, constraints) + beside,
        f"half of the {largest.num_rows} rows of table {largest.name!r}",
    )
    ways.sort(key=lambda entry: entry[0])
    missing = needed - limit
    if missing > 0:
        what = f"{_gigabytes(missing)} a device ({_gigabytes(missing * devices)} in all) are missing"
    else:
        what = "shards are too large to be dealt out evenly"
    options = "; ".join(f"({number}) {text}" for number, (_, text) in enumerate(ways[:_WAYS], 1))
    return InputError(
        f"the tables do not fit {_machine(topology)}: they need {_gigabytes(needed)} a device (tables and optimizer "
        f"state {_gigabytes(stores)}, buffers {_gigabytes(buffers)}, dense {_gigabytes(step.dense.memory_bytes)}) of "
        f"{_gigabytes(limit)}, so {what}; ways out: {options or 'more memory a device'}"
    )


def _machine(topology: Topology) -> str:
    return f"{topology.name} ({topology.num_devices} devices)"
