"""The training step compiles for accelerators that are not here, and copies no table there.

Needs the extra `aot`: libtpu for TPUs, ptxas and libdevice for GPUs. Without them these tests fail; they never skip.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs.quickstart import quickstart
from dlrm_jax.config import DataConfig, EmbeddingConfig, TableConfig, make_specs
from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary
from dlrm_jax.target_step import DeviceBytes, compile_for_target, device_bytes, lower_train_step
from sharding.aot import target_mesh
from sharding.layout import make_layout
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
SMALL = 32 * 2**20

Places = tuple[Callable[[TableSpec], Placement], Callable[[TableSpec], Placement]]


@pytest.fixture(autouse=True, scope="module")
def no_compilation_cache() -> Iterator[None]:
    """What was compiled for a device that is not here can be written to the cache, but never be read from it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def compiled_step(
    target: str, item: TableConfig, tags: TableConfig, places: Places | None = None, num_rows: int = NUM_ROWS
) -> tuple[DeviceBytes, int]:
    """Bytes of the step of quickstart with two tables, placed so; and those of a device's weights and state."""
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
    weights = sum(store.lines_per_device * 512 for store in make_layout(tables, features, plan).stores)
    return device_bytes(compile_for_target(lowered, topology.platform)), weights


def assert_in_place(program: DeviceBytes, table_bytes: int) -> None:
    assert table_bytes > 16 * SMALL
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


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v6e:2x4", "v5p:2x4"])
def test_the_step_for_eight_tpus_when_rows_are_as_wide_as_lines_then_no_copy_of_a_table(target: str) -> None:
    def by_id(table: TableSpec) -> Placement:
        return row_wise(table, returns="rows")

    def on_a_node(table: TableSpec) -> Placement:
        return table_row_wise(table, 1, returns="partial_sums")

    tables = TableConfig(dim=128), TableConfig(dim=128)
    assert_in_place(*compiled_step(target, *tables, (by_id, on_a_node), num_rows=2 * NUM_ROWS))


@pytest.mark.slow
def test_the_step_for_a_tpu_when_rows_are_narrow_then_compiles() -> None:
    # A TPU lays [lines, 128] and [rows, 16] out differently, so this program copies its tables: a known limit of the
    # implementation `xla`, as are wider rows and 16-bit stores.
    program, table_bytes = compiled_step("v6e:1x1", TableConfig(dim=16), TableConfig(dim=16))
    assert program.reused >= table_bytes
