"""The training step compiles for accelerators that are not here, and copies no table there.

Needs the extra `aot`: libtpu for TPUs, ptxas and libdevice for GPUs. Without them these tests fail; they never skip.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import pytest

from configs.quickstart import quickstart
from dlrm_jax.config import DataConfig, EmbeddingConfig, TableConfig, make_specs
from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary
from dlrm_jax.target_step import DeviceBytes, compile_for_target, device_bytes, lower_train_step
from pallas_kernels import xla
from sharding import FeatureSpec, KeyedJagged, ShardedTables
from sharding.aot import target_mesh
from sharding.codec import Codec, code_bytes
from sharding.layout import make_layout
from sharding.mesh import BY_DEVICE, BY_DEVICE_SECOND, sharding_on
from sharding.plan import (
    Placement,
    ShardingPlan,
    column_wise,
    data_parallel,
    grid,
    one_device_plan,
    row_wise,
    table_row_wise,
    table_wise,
)
from sharding.tables import TableSpec
from sharding.topology import parse_topology

BATCH_SIZE, LONGEST_BAG = 256, 8
NUM_ROWS = 4_000_000
# What a step needs beside its state: for batches of 256 samples less than this, for a copy of a table far more.
SMALL = 64 * 2**20

Places = tuple[Callable[[TableSpec], Placement], Callable[[TableSpec], Placement]]


pytestmark = pytest.mark.usefixtures("no_compilation_cache")


# How compiled programs call Pallas kernels.
KERNEL_CALLS = {"gpu": "mosaic_gpu", "tpu": "tpu_custom_call"}


def compiled_step(
    target: str, item: TableConfig, tags: TableConfig, places: Places | None = None, num_rows: int = NUM_ROWS
) -> tuple[DeviceBytes, int]:
    """Bytes of the step of quickstart with two tables, placed so; and those of a device's weights.

    Each group has its kernel for the lookup, and one for the update.
    """
    card = DatasetCard(
        name="stated",
        dense=(DenseColumn(name="price"), DenseColumn(name="age")),
        sparse=(
            SparseColumn(name="item", num_rows=num_rows),
            SparseColumn(name="tags", num_rows=num_rows, bag=True, max_pooling_factor=LONGEST_BAG),
        ),
        splits={"train": SplitSummary(num_samples=1000, positive_rate=0.5)},
    )
    config = quickstart()
    config = dataclasses.replace(
        config,
        data=DataConfig(batch_size=BATCH_SIZE),
        embedding=EmbeddingConfig(tables={"item": item, "tags": tags}),
        model=dataclasses.replace(config.model, bottom_mlp=(64, item.dim)),
    )
    topology = parse_topology(target)
    tables, features = make_specs(config.embedding, card)
    if places is None:
        plan = one_device_plan(tables)
    else:
        placements = tuple(place(table) for place, table in zip(places, tables, strict=True))
        plan = ShardingPlan(nodes=topology.nodes, chips=topology.chips, placements=placements)
    lowered = lower_train_step(config, card, plan, target_mesh(topology))
    layout = make_layout(tables, features, plan)
    compiled = compile_for_target(lowered, topology)
    calls = compiled.as_text().count(f'custom_call_target="{KERNEL_CALLS[topology.platform]}')
    assert calls >= 2 * len(layout.groups)
    return device_bytes(compiled), sum(store.lines_per_device * 512 for store in layout.stores)


def assert_in_place(program: DeviceBytes, table_bytes: int) -> None:
    assert table_bytes > 8 * SMALL
    assert program.reused >= table_bytes
    assert program.temporary < SMALL


@pytest.mark.parametrize(
    ("item", "tags"),
    [
        (TableConfig(dim=16), TableConfig(dim=64, optimizer="adam", dtype="bfloat16", rounding="stochastic")),
        pytest.param(
            TableConfig(dim=384, optimizer="lamb"),
            TableConfig(dim=128, optimizer="partial_rowwise_adam", dtype="float16"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["narrow", "wide"],
)
def test_the_step_for_an_h200_then_compiles_without_a_copy_of_a_table(item: TableConfig, tags: TableConfig) -> None:
    assert_in_place(*compiled_step("h200:1x1", item, tags))


@pytest.mark.slow
@pytest.mark.parametrize(
    "places",
    [
        (lambda table: row_wise(table, returns="rows"), lambda table: table_row_wise(table, 1, returns="partial_sums")),
        (lambda table: column_wise(table, [0, 1, 2, 3]), lambda table: grid(table, [0, 1], returns="partial_sums")),
        (lambda table: table_wise(table, 5), data_parallel),
    ],
    ids=["by rows", "by columns", "whole"],
)
def test_the_step_for_two_nodes_of_h200_then_compiles_without_a_copy_of_a_table(places: Places) -> None:
    tables = TableConfig(dim=64), TableConfig(dim=128, optimizer="lamb", dtype="float16", rounding="stochastic")
    # A device has a part of the tables only: it is to be large enough for a copy to be seen.
    assert_in_place(*compiled_step("h200:2x4", *tables, places, num_rows=8 * NUM_ROWS))


@pytest.mark.parametrize("kind", ["v6e", pytest.param("v5p", marks=pytest.mark.slow)])
def test_the_step_for_a_tpu_when_rows_are_as_wide_as_lines_then_no_copy_of_a_table(kind: str) -> None:
    assert_in_place(*compiled_step(f"{kind}:1x1", TableConfig(dim=128), TableConfig(dim=128)))


NARROW_AND_16_BITS = (
    TableConfig(dim=16),
    TableConfig(dim=64, optimizer="adam", dtype="bfloat16", rounding="stochastic"),
)


@pytest.mark.parametrize("kind", ["v5p", pytest.param("v6e", marks=pytest.mark.slow)])
def test_the_step_for_a_tpu_when_rows_are_narrow_or_of_16_bits_then_no_copy_of_a_table(kind: str) -> None:
    assert_in_place(*compiled_step(f"{kind}:1x1", *NARROW_AND_16_BITS))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h200:1x8", "v5e:2x4", "v5p:2x4", "v6e:2x4", "tpu7x:2x4"])
def test_the_step_for_eight_accelerators_then_kernels_and_no_copy_of_a_table(target: str) -> None:
    def by_id(table: TableSpec) -> Placement:
        return row_wise(table, returns="rows")

    def whole(table: TableSpec) -> Placement:
        return table_wise(table, 5)

    assert_in_place(*compiled_step(target, *NARROW_AND_16_BITS, (by_id, whole), num_rows=4 * NUM_ROWS))


def sent_bytes(program: str) -> dict[str, int]:
    """Bytes that a device sends in all-to-alls and all-gathers of vectors, by XLA's name of the dtype."""
    sizes = {"f32": 4, "u16": 2, "u8": 1}
    total: dict[str, int] = {}
    for results, kind in re.findall(r" = (.*?) (all-to-all|all-to-all-start|all-gather-start)\(", program):
        # What has started holds its operands, too; those of an all-gather are what a device sends.
        arrays = re.findall(r"(f32|u16|u8)\[([\d,]+)\]", results)
        for dtype, shape in arrays[: len(arrays) // 2] if kind.endswith("start") else arrays:
            total[dtype] = total.get(dtype, 0) + math.prod(map(int, shape.split(","))) * sizes[dtype]
    return total


@pytest.mark.parametrize(
    ("codec", "word", "backward"),
    [
        ("int8", "u8", False),
        pytest.param("bfloat16", "u16", False, marks=pytest.mark.slow),
        pytest.param("int8", "u8", True, marks=pytest.mark.slow),
        pytest.param("bfloat16", "u16", True, marks=pytest.mark.slow),
    ],
)
def test_exchanges_of_eight_h200s_when_codes_travel_then_they_carry_the_bytes_of_codes_alone(
    codec: Codec, word: str, backward: bool
) -> None:
    specs = [TableSpec(name=name, num_rows=4096, dim=128, optimizer="sgd") for name in "abcde"]
    features = [FeatureSpec(name=table.name, table=table.name, max_ids=2) for table in specs]
    placements = (
        table_wise(specs[0], 3),
        row_wise(specs[1], returns="partial_sums"),
        table_row_wise(specs[2], 0, returns="partial_sums"),
        row_wise(specs[3], returns="rows"),
        data_parallel(specs[4]),
    )
    topology = parse_topology("h200:1x8")
    mesh = target_mesh(topology)
    plan = ShardingPlan(nodes=1, chips=8, placements=placements)
    tables = ShardedTables(specs, features, plan=plan, mesh=mesh, forward_codec=codec, backward_codec=codec)
    ids = KeyedJagged(
        values=jax.ShapeDtypeStruct((10 * BATCH_SIZE,), "int32", sharding=sharding_on(mesh, BY_DEVICE)),
        lengths=jax.ShapeDtypeStruct((5, BATCH_SIZE), "int32", sharding=sharding_on(mesh, BY_DEVICE_SECOND)),
        features=tables.feature_order,
        parts=tables.num_devices,
    )
    state, routed = tables.abstract_state(), jax.eval_shape(tables.route, ids)
    if backward:
        gradients = jax.eval_shape(tables.lookup, state, routed)
        lowered = jax.jit(lambda *given: tables.update(*given, step=1)).lower(state, routed, gradients)
    else:
        lowered = jax.jit(tables.lookup).lower(state, routed)
    found = sent_bytes(compile_for_target(lowered, topology).as_text() or "")
    # By id there is room for both ids of every bag on each owner. Gathered gradients are sent as they are, once.
    forward_vectors = (1 + 1 + 1 + 2) * BATCH_SIZE
    backward_vectors = (1 + 2) * BATCH_SIZE + (1 + 1 + 1) * BATCH_SIZE // 8
    assert found == {word: (backward_vectors if backward else forward_vectors) * code_bytes(codec, 128)}


@pytest.mark.parametrize("weighted", [False, True])
def test_an_update_for_an_a100_then_it_holds_the_vectors_an_id_that_plans_count(weighted: bool) -> None:
    table = TableSpec(name="t", num_rows=NUM_ROWS, dim=128)
    tables = ShardedTables([table], [FeatureSpec(name="f", table="t")], mesh=target_mesh(parse_topology("zionex:1x1")))
    bags, ids = 1024, 200_000
    given = KeyedJagged(
        values=jax.ShapeDtypeStruct((ids,), "int32"),
        lengths=jax.ShapeDtypeStruct((1, bags), "int32"),
        weights=jax.ShapeDtypeStruct((ids,), "float32") if weighted else None,
        features=tables.feature_order,
    )
    state = tables.abstract_state()
    routed = jax.eval_shape(tables.route, given)
    gradients = jax.eval_shape(tables.lookup, state, routed)
    step = jax.ShapeDtypeStruct((), "int32")
    update = jax.jit(lambda *args: tables.update(*args[:3], step=args[3]), donate_argnums=0)
    memory = update.lower(state, routed, gradients, step).compile().memory_analysis()
    vectors = memory.temp_size_in_bytes / (ids * 128 * 4)
    assert xla.VECTORS_PER_ID - 1 + weighted < vectors < xla.VECTORS_PER_ID + weighted + 0.25
