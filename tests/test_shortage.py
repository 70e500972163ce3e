"""What users are told whose tables do not fit: figures that can be checked by hand, and ways out that help."""

import dataclasses
import re

import pytest
from planner_cases import BATCH, MACHINE, model_of

from sharding.constraints import Constraint
from sharding.cost import DenseLoad
from sharding.errors import InputError
from sharding.planner import make_plan
from sharding.tables import TableSpec
from sharding.topology import Topology

GB = 10**9
PAIRS = TableSpec(name="t", num_rows=GB, dim=128, optimizer="sgd", dtype="float16")
LIFT = "lift the constraints, so that tables may be split"
HALF_ROWS = re.compile(r"half of the (\d+) rows of table '(\w+)'")


def shortage(tables, limit: float, *constraints, batch_size: int = BATCH, dense: int = 0, machine: Topology = MACHINE):
    """The error, of eight devices unless another machine is given; whatever it says to fit must be planned."""
    named, features, loads = model_of(tables, [1.0] * len(tables))
    arguments = {
        "tables": named,
        "features": features,
        "topology": machine,
        "loads": loads,
        "batch_size": batch_size,
        "dense": DenseLoad(memory_bytes=dense),
        "constraints": constraints,
        "memory_limit": int(limit),
    }
    with pytest.raises(InputError, match=r"^the tables do not fit .* are missing; ways out: ") as raised:
        make_plan(**arguments)
    message = str(raised.value)
    for way in re.findall(r"\(\d\) ([^;]*) \([\d.,]+ GB a device, fits\)", message):
        plan = make_plan(**arguments | _taken(way, named, machine))
        assert plan.cost.storage.total <= int(limit), way
    return message


def _taken(way: str, tables: list[TableSpec], machine: Topology) -> dict:
    """What a way out changes."""
    if way == LIFT:
        return {"constraints": ()}
    if "batch" in way:
        return {"batch_size": int(way.split()[-2])}
    if "devices instead" in way:
        nodes = int(way.split()[0]) // machine.chips
        return {"topology": dataclasses.replace(machine, nodes=nodes)}
    rows = HALF_ROWS.fullmatch(way)
    if rows is not None:
        half = int(rows[1]) // 2
        return {"tables": [dataclasses.replace(t, num_rows=half) if t.name == rows[2] else t for t in tables]}
    changed = {"optimizer": "rowwise_adagrad"} if "optimizer" in way else {"dtype": "bfloat16"}
    return {"tables": [dataclasses.replace(table, **changed) for table in tables]}


def test_shortage_then_ways_that_do_are_named_and_none_that_changes_nothing():
    # 256 GB: 32 GB a device beside one. They have 16 bits and no state, so that neither rule nor dtype saves any;
    # buffers are a few megabytes, so neither does a smaller batch.
    message = shortage([PAIRS], 21 * GB, dense=GB)
    assert "need 33.00 GB a device (tables and optimizer state 32.00 GB, buffers 0.00 GB, dense 1.00 GB)" in message
    assert message.endswith(
        "of 21.00 GB, so 12.00 GB a device (96.00 GB in all) are missing; ways out: "
        "(1) 16 devices instead of 8 (17.00 GB a device, fits); "
        "(2) half of the 1000000000 rows of table 't0' (17.00 GB a device, fits)"
    )


def test_shortage_of_tables_with_state_then_the_figures_of_another_rule_or_dtype_and_of_the_largest_alone():
    # 16 floats and as many of state: 128 GB and 64 GB, 24 GB a device.
    large = TableSpec(name="t", num_rows=GB, dim=16, optimizer="adagrad")
    small, machine = dataclasses.replace(large, num_rows=GB // 2), dataclasses.replace(MACHINE, platform="cpu")
    message = shortage([small, large], 17 * GB, batch_size=8, machine=machine)
    assert message.endswith(
        "7.00 GB a device (56.00 GB in all) are missing; ways out: "
        "(1) optimizer rowwise_adagrad, one number of state a row (12.75 GB a device, fits); "
        "(2) half of the 1000000000 rows of table 't1' (16.00 GB a device, fits); "
        "(3) dtype bfloat16 for float32 tables (18.00 GB a device, 1.00 GB too much)"
    )


def test_shortage_when_buffers_are_what_is_too_large_then_to_halve_the_batch_helps():
    large_batch = BATCH << 12
    message = shortage([dataclasses.replace(PAIRS, num_rows=1 << 20)] * 8, 6 * GB, batch_size=large_batch)
    assert f"(1) halve the batch to {large_batch // 2} samples (4.67 GB a device, fits)" in message


@pytest.mark.parametrize("batch_size", [8, 24])
def test_shortage_when_the_devices_do_not_divide_half_the_batch_then_it_is_not_halved(batch_size: int):
    assert "halve the batch" not in shortage([PAIRS], 21 * GB, batch_size=batch_size)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(tables=("t0", "t1"), devices=(3,)),
        Constraint(tables=("t0", "t1"), together=True),
        Constraint(tables=("t0", "t1"), kinds=("data_parallel",)),
    ],
    ids=["pinned", "together", "replicas"],
)
def test_shortage_when_users_have_tables_on_one_device_then_it_needs_all_their_bytes(constraint: Constraint):
    # 32 GB each: 8 GB a device where they may be split.
    tables = [dataclasses.replace(PAIRS, num_rows=GB // 8)] * 2
    message = shortage(tables, 20 * GB, constraint)
    assert "need 64.00 GB a device" in message
    assert "44.00 GB a device" in message
    assert f"ways out: (1) {LIFT} (8.00 GB a device, fits)" in message
    assert "devices instead of" not in message


def test_shortage_when_tables_are_whole_then_two_share_a_device():
    nine = [dataclasses.replace(PAIRS, num_rows=GB // 16)] * 9
    whole = Constraint(tables=tuple(f"t{number}" for number in range(9)), kinds=("table_wise",))
    message = shortage(nine, 20 * GB, whole)
    assert "need 32.00 GB a device" in message
    assert f"(1) {LIFT} (18.00 GB a device, fits); (2) 16 devices instead of 8" in message


def test_shortage_when_32_bits_cannot_name_the_rows_either_then_memory_is_what_is_said():
    narrow = TableSpec(name="t", num_rows=30 * GB, dim=4, optimizer="sgd", dtype="float16")
    for machine in (MACHINE, dataclasses.replace(MACHINE, nodes=1, chips=1)):
        assert f"of {GB / 1e9:.2f} GB" in shortage([narrow], GB, machine=machine)


def test_rows_when_there_is_memory_for_more_than_32_bits_name_then_an_error_says_so():
    tables, features, loads = model_of([TableSpec(name="t", num_rows=30 * GB, dim=4, optimizer="sgd")], [1.0])
    with pytest.raises(InputError, match="32 bits name 2147483647: spread its rows over more devices"):
        make_plan(tables, features, MACHINE, batch_size=BATCH, loads=loads, memory_limit=1 << 50)
