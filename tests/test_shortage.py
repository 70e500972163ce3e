"""What users are told whose tables do not fit: figures that can be checked by hand, and ways out that help."""

import dataclasses

from planner_cases import BATCH, MACHINE, model_of

from sharding.constraints import Constraint
from sharding.cost import DenseLoad, Step
from sharding.load import loads_by_feature
from sharding.shortage import least_bytes, shortage_error
from sharding.tables import TableSpec
from sharding.topology import Topology

GB = 10**9
PAIRS = TableSpec(name="t", num_rows=GB, dim=128, optimizer="sgd", dtype="float16")


def shortage(tables, limit: float, *constraints, buffers=0, dense: int = 0, machine: Topology = MACHINE) -> str:
    """The error, of eight devices unless another machine is given."""
    tables, features, loads = model_of(tables, [1.0] * len(tables))
    loads = loads_by_feature(features, loads)
    step = Step(topology=machine, batch_size=BATCH, loads=loads, dense=DenseLoad(memory_bytes=dense))
    return str(shortage_error(tables, features, step, constraints, int(limit), int(buffers)))


def test_shortage_then_ways_that_do_are_named_first_and_none_that_changes_nothing():
    # 256 GB: 32 GB a device beside five. They have 16 bits and no state, so that neither rule nor dtype saves any.
    message = shortage([PAIRS], 21 * GB, buffers=4 * GB, dense=GB)
    assert "need 37.00 GB a device (tables and optimizer state 32.00 GB, buffers 4.00 GB, dense 1.00 GB)" in message
    assert message.endswith(
        "of 21.00 GB, so 16.00 GB a device (128.00 GB in all) are missing; ways out: "
        "(1) 16 devices instead of 8 (21.00 GB a device, fits); "
        "(2) half of the 1000000000 rows of table 't0' (21.00 GB a device, fits); "
        "(3) halve the batch to 512 samples (35.00 GB a device, 14.00 GB too much)"
    )


def test_shortage_of_tables_with_state_then_the_figures_of_another_rule_or_dtype_and_of_the_largest_alone():
    # 16 floats and as many of state: 128 GB and 64 GB, 24 GB a device.
    large = TableSpec(name="t", num_rows=GB, dim=16, optimizer="adagrad")
    small, machine = dataclasses.replace(large, num_rows=GB // 2), dataclasses.replace(MACHINE, platform="cpu")
    message = shortage([small, large], 17 * GB, machine=machine)
    assert message.endswith(
        "7.00 GB a device (56.00 GB in all) are missing; ways out: "
        "(1) optimizer rowwise_adagrad, one number of state a row (12.75 GB a device, fits); "
        "(2) half of the 1000000000 rows of table 't1' (16.00 GB a device, fits); "
        "(3) dtype bfloat16 for float32 tables (18.00 GB a device, 1.00 GB too much)"
    )


def test_shortage_of_constrained_tables_then_to_lift_the_constraints_is_a_way_out():
    whole = Constraint(tables=("t0",), kinds=("table_wise",))
    lift = "(1) lift the constraints, so that tables may be split (32.00 GB a device, fits)"
    assert lift in shortage([PAIRS], 40 * GB, whole)
    assert "(256.00 GB a device, " not in shortage([PAIRS], 40 * GB, whole)
    assert "constraints" not in shortage([PAIRS], 20 * GB)


def test_shortage_when_the_sum_would_fit_then_shards_are_too_large():
    nine = [dataclasses.replace(PAIRS, num_rows=GB // 16)] * 9
    whole = Constraint(tables=tuple(f"t{number}" for number in range(9)), kinds=("table_wise",))
    # Of nine tables of 16 GB two must share a device.
    message = shortage(nine, 20 * GB, whole)
    assert "need 18.00 GB a device" in message
    assert "of 20.00 GB, so shards are too large to be dealt out evenly; ways out" in message
    assert "devices instead of" not in message


def test_least_bytes_then_even_or_those_of_the_largest_that_cannot_be_split():
    tables, features, loads = model_of([PAIRS], [1.0])
    step = Step(topology=MACHINE, batch_size=BATCH, loads=loads_by_feature(features, loads))
    assert least_bytes(tables, features, step, ()) == 32 * GB
    assert least_bytes(tables, features, step, [Constraint(tables=("t0",), kinds=("table_wise",))]) == 256 * GB
