"""The Mosaic GPU kernels: what an H200 would run compiles and copies no table; interpreted, it has `xla`'s bits.

The first half needs the extra `aot`. The inherited tests of the kernels are in test_pooled_lookup and
test_sparse_update.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementation_cases import device_of
from jax.sharding import NamedSharding, PartitionSpec
from kernel_cases import NOWHERE, NUM_BAGS, NUM_ROWS, Batch, lines_of, table_of
from update_cases import a_batch, fresh_stores, gradients_of, ids_of, slots_of

from pallas_kernels import ROW_OPTIMIZERS, Ids, Slots, Stores, mosaic_gpu, rounding, xla
from pallas_kernels.mosaic_gpu.rows import run_kernel
from pallas_kernels.traced_rules import trace_rule
from sharding.aot import target_mesh
from sharding.topology import parse_topology

NUM_IDS_COMPILED, NUM_BAGS_COMPILED = 50_000, 4_000
# Of each table compiled for.
TABLE_BYTES = 2**30
# Index arrays of an update, a few words an id.
BYTES_AN_ID = 128
H200 = "NVIDIA H200"
FAST_LOOKUPS = ((16, jnp.float32), (64, jnp.bfloat16), (128, jnp.float32), (384, jnp.float16))

slow = pytest.mark.slow


def compiled_for_an_h200(function: Callable, *shapes, donated: tuple[int, ...] = ()):
    """Bytes of a program, from (shape, dtype) of its arguments."""
    mesh = target_mesh(parse_topology("h200:1x1"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    memory = jax.jit(mapped, donate_argnums=donated).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    return memory


def some(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def table_and_ids(width: int, dtype, num_ids: int = NUM_IDS_COMPILED) -> tuple:
    """Shapes of a store and of the ids."""
    itemsize = jnp.dtype(dtype).itemsize
    lines = TABLE_BYTES // 512 // (3 * width) * 3 * width
    rows = some(jnp.int32, num_ids)
    return some(dtype, lines, 512 // itemsize), rows, some(jnp.int32, NUM_BAGS_COMPILED + 1)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        pytest.param(width, dtype, marks=() if (width, dtype) in FAST_LOOKUPS else slow)
        for width in (8, 16, 32, 64, 128, 256, 384, 512, 1024)
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    ],
)
def test_lookup_for_an_h200_then_compiles_and_needs_no_memory(no_compilation_cache, width: int, dtype) -> None:
    store, rows, offsets = table_and_ids(width, dtype)
    for weights in ((), (some(jnp.float32, NUM_IDS_COMPILED),)):

        def look_up(store, rows, offsets, *weights):
            return mosaic_gpu.pooled_lookup(store, rows, offsets, *(weights or (None,)), width=width, longest_bag=None)

        assert compiled_for_an_h200(look_up, store, rows, offsets, *weights).temp_size_in_bytes < 2**10


def compiled_update(
    rule: str, width: int, dtype, storage_rounding: rounding.Rounding = "nearest", num_ids: int = NUM_IDS_COMPILED
):
    """Bytes of an update's program, and those of its stores."""
    optimizer = ROW_OPTIMIZERS[rule]
    store, rows, offsets = table_and_ids(width, dtype, num_ids)
    size = store.shape[0] * store.shape[1]
    element_state = tuple(some(jnp.float32, size // 128, 128) for _ in optimizer.element_state)
    if storage_rounding == "split":
        element_state = (*element_state, some(jnp.uint16, *store.shape))
    row_state = tuple(some(jnp.float32, -(-size // width // 128), 128) for _ in optimizer.row_state)
    stores = Stores(weights=store, element_state=element_state, row_state=row_state)
    ids = Ids(
        rows=rows,
        slots=rows,
        logical_rows=some(jnp.uint32, num_ids, 1),
        offsets=offsets,
        weights=some(jnp.float32, num_ids),
    )

    def update(stores: Stores, ids: Ids, gradients, slots: Slots, step):
        return mosaic_gpu.sparse_update(
            stores,
            ids,
            gradients,
            slots=slots,
            step=step,
            seed=jnp.uint32(0),
            optimizer=optimizer,
            width=width,
            storage_rounding=storage_rounding,
            statistics=None,
            enabled=jnp.bool(True),
        )

    gradients, slots = some(jnp.float32, NUM_BAGS_COMPILED, width), jax.eval_shape(lambda: slots_of(width))
    memory = compiled_for_an_h200(update, stores, ids, gradients, slots, some(jnp.int32), donated=(0,))
    return memory, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stores))


@pytest.mark.filterwarnings("ignore:Some donated buffers")
@pytest.mark.parametrize(
    ("rule", "width", "dtype", "storage_rounding"),
    [
        ("rowwise_adagrad", 16, jnp.float16, "stochastic"),
        *(
            pytest.param(*case, marks=slow)
            for case in [
                ("rowwise_adagrad", 128, jnp.float32, "nearest"),
                ("sgd", 16, jnp.bfloat16, "stochastic"),
                ("adagrad", 64, jnp.bfloat16, "split"),
                ("adagrad", 32, jnp.float16, "nearest"),
                ("rowwise_adagrad", 8, jnp.bfloat16, "stochastic"),
                ("adam", 384, jnp.bfloat16, "stochastic"),
                ("partial_rowwise_adam", 256, jnp.float16, "nearest"),
                ("lamb", 512, jnp.float32, "nearest"),
            ]
        ),
    ],
)
def test_update_for_an_h200_then_compiles_in_place(
    no_compilation_cache, rule: str, width: int, dtype, storage_rounding: rounding.Rounding
) -> None:
    memory, bytes_of_stores = compiled_update(rule, width, dtype, storage_rounding)
    assert memory.alias_size_in_bytes == bytes_of_stores
    # The sums of blocks of long runs are a row for each 64 ids.
    assert memory.temp_size_in_bytes < NUM_IDS_COMPILED * (BYTES_AN_ID + 4 * width / 64)


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A kernel, as LLVM hands it to ptxas and as ptxas reports it."""

    ptx: str
    registers: int
    spilled_bytes: int


@pytest.fixture
def assembled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Assembled]:
    """What the test compiles, by the name of the kernel. Of shapes of its own: what is compiled is kept."""
    for name, value in {"PTX": "1", "PTXAS": "1", "TO": str(tmp_path)}.items():
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", value)

    def read(kernel: str) -> Assembled:
        (ptx,), (report,) = tmp_path.glob(f"{kernel}*.ptx"), tmp_path.glob(f"{kernel}*.ptxas")
        said = report.read_text()
        return Assembled(
            ptx=ptx.read_text(),
            registers=int(re.findall(r"Used (\d+) registers", said)[-1]),
            spilled_bytes=sum(int(found) for found in re.findall(r"(\d+) bytes spill", said)),
        )

    return read


def test_update_of_a_wide_row_then_all_rows_of_a_program_are_loaded_before_it_waits_for_one(
    no_compilation_cache, assembled: Callable[[str], Assembled]
) -> None:
    """LLVM moves a load behind branches, or round a loop, to where it is used: then one waits after the other."""
    compiled_update("rowwise_adagrad", 128, jnp.float32, num_ids=NUM_IDS_COMPILED + 1)
    kernel = assembled("sparse_update")
    assert kernel.registers <= 128  # Four programs a processor.
    assert kernel.spilled_bytes == 0
    parts = re.split(r"bar\.sync|\bbra\b", kernel.ptx)
    # What each of eight rows needs: row, slot, state's place, bag, weight and number of ids; then the first gradient,
    # for which nothing waits before the next part; and there row and state.
    only_loads = [part.count("ld.global") for part in parts if "f32" not in part]
    assert max(only_loads) >= 8 * 7
    assert 8 * 2 in only_loads
    # Where rows have several ids, the next one of each row: bag, weight and gradient.
    assert max(part.count("ld.global") for part in parts if "f32" in part) >= 8 * 3

    # A hot row's block: its start, its end and a zero; what names four gradients; and with those what names the next.
    assert assembled("sum_blocks").ptx.count("ld.global") == 3 + 4 * 2 + 4 * 3


def test_lookup_of_a_wide_row_then_eight_programs_share_a_processor(
    no_compilation_cache, assembled: Callable[[str], Assembled]
) -> None:
    store, rows, offsets = table_and_ids(128, jnp.float32, NUM_IDS_COMPILED + 1)
    look_up = functools.partial(mosaic_gpu.pooled_lookup, weights=None, width=128, longest_bag=None)
    compiled_for_an_h200(look_up, store, rows, offsets)
    kernel = assembled("pooled_lookup")
    assert kernel.registers <= 64
    assert kernel.spilled_bytes == 0


def check_bits(
    rule: str, width: int, ids: Batch, *, storage_rounding="nearest", dtype: Any = jnp.float32, as_shard: bool = False
) -> None:
    """Compares an interpreted update, or that of a column shard, with `xla`'s, bit for bit."""
    stores = fresh_stores(rule, table_of(width, dtype=dtype))
    if storage_rounding == "split":
        high, low = (half.reshape(-1, 256) for half in rounding.halves(jnp.asarray(table_of(width))))
        stores = dataclasses.replace(stores, weights=high, element_state=(*stores.element_state, low))
    common = {"slots": slots_of(width), "step": jnp.int32(3), "optimizer": ROW_OPTIMIZERS[rule], "width": width}
    valid = (ids.rows >= 0) & (ids.rows < NUM_ROWS) & (np.arange(len(ids.rows)) < ids.offsets[-1])

    def run(implementation, *arguments):
        statistics = blocks = None
        if as_shard:
            blocks = implementation.row_statistics(*arguments, storage_rounding=storage_rounding, **common)
            statistics = 2 * blocks.sum(axis=1)
        new = implementation.sparse_update(
            *arguments,
            seed=jnp.uint32(9),
            storage_rounding=storage_rounding,
            statistics=statistics,
            **common,
            enabled=jnp.bool(True),
        )
        return new, None if blocks is None else jnp.where(jnp.asarray(valid)[:, None, None], blocks, 0)

    arguments = stores, ids_of(ids, ids.weights), gradients_of(width)
    expected = jax.jit(functools.partial(run, xla))(*arguments)
    with device_of("mosaic_gpu"):
        result = jax.jit(functools.partial(run, mosaic_gpu))(*arguments)
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


def hot_batch(num_ids: int) -> Batch:
    """Half of the ids name one row; some name none, and the last few are padding."""
    random = np.random.default_rng(0)
    rows = np.where(random.random(num_ids) < 0.5, 5, random.integers(0, NUM_ROWS, num_ids))
    rows[::11] = random.choice(NOWHERE, len(rows[::11]))
    return Batch(
        rows=rows.astype(np.int32),
        offsets=np.linspace(0, num_ids - 3, NUM_BAGS + 1).astype(np.int32),
        weights=random.normal(size=num_ids).astype(np.float32),
    )


@pytest.mark.parametrize(("rule", "width"), [("sgd", 8), pytest.param("rowwise_adagrad", 128, marks=slow)])
def test_update_when_a_row_has_more_ids_than_a_block_then_the_bits_of_xla(rule: str, width: int) -> None:
    ids = hot_batch(2 * xla.RUN_BLOCK + 240)
    assert (ids.rows == 5).sum() > xla.RUN_BLOCK
    check_bits(rule, width, ids)


@pytest.mark.slow
@pytest.mark.parametrize("width", [8, 64, 384])
def test_update_of_a_column_shard_then_statistics_and_bits_of_xla(width: int) -> None:
    ids = a_batch(1)
    ids = dataclasses.replace(ids, offsets=np.minimum(ids.offsets, len(ids.rows) - 4))
    check_bits("rowwise_adagrad", width, ids, as_shard=True)


@pytest.mark.parametrize(
    ("dtype", "storage_rounding"),
    [
        (jnp.bfloat16, "split"),
        pytest.param(jnp.float16, "stochastic", marks=slow),
        pytest.param(jnp.bfloat16, "stochastic", marks=slow),
    ],
)
def test_update_of_a_16_bit_store_then_the_bits_of_xla(dtype, storage_rounding: str) -> None:
    check_bits("rowwise_adagrad", 16, a_batch(2), dtype=dtype, storage_rounding=storage_rounding)


@pytest.mark.parametrize("rule", ROW_OPTIMIZERS)
def test_a_rule_when_traced_for_a_kernel_then_powers_come_from_outside(rule: str) -> None:
    traced = trace_rule(ROW_OPTIMIZERS[rule], 16)
    scalars = traced.scalars_of_slots(slots_of(16), jnp.float32(3))
    powers = scalars.shape[1] - len(traced.used)
    assert powers == {"adam": 2, "partial_rowwise_adam": 2, "lamb": 4}.get(rule, 0)
    if powers:
        slots: Slots = slots_of(16)
        for power in np.asarray(scalars[:, len(traced.used) :]).T:
            assert any(np.allclose(power, np.asarray(beta) ** 3) for beta in (slots.beta1, slots.beta2))


@pytest.mark.parametrize(
    ("kind", "serves"),
    [
        ("NVIDIA H200", True),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA B200", True),
        ("NVIDIA A100-SXM4-40GB", False),
        ("NVIDIA L40S", False),
        ("NVIDIA TITAN V", False),
    ],
)
def test_a_device_then_served_from_hopper_on(kind: str, serves: bool) -> None:
    reason = mosaic_gpu.unable(device_kind=kind, dtype=jnp.dtype(jnp.float32), width=128)
    assert (reason is None) == serves
    assert serves or kind in str(reason)


def test_what_no_kernel_can_do_then_the_reason() -> None:
    def reason(**call) -> str | None:
        options = {
            "device_kind": H200,
            "dtype": jnp.dtype(jnp.float16),
            "width": 128,
            "optimizer": ROW_OPTIMIZERS["sgd"],
        }
        return mosaic_gpu.unable(**{**options, **call})

    assert reason() is None
    assert "1024 columns" in str(reason(width=1024))
    assert reason(width=1024, optimizer=None) is None


def test_lookup_of_a_million_bags_then_its_long_axis_is_the_one_that_cuda_lets_be_long() -> None:
    """CUDA's y and z have at most 65,535 blocks; Pallas makes the last axis CUDA's x. Checked where it is launched."""
    look_up = functools.partial(mosaic_gpu.pooled_lookup, weights=None, width=1024, longest_bag=None)
    store, rows, offsets = some(jnp.float32, 2**20, 128), some(jnp.int32, 2**25), some(jnp.int32, 2**20 + 1)
    assert jax.eval_shape(look_up, store, rows, offsets).shape == (2**20, 1024)
    with pytest.raises(AssertionError, match="65536"):
        run_kernel(lambda *_: None, (), (), grid={"program": 65_536, "columns": 2}, name="too_long")


def test_lookup_when_interpreted_then_adds_in_the_order_of_ids() -> None:
    ids = hot_batch(96)
    with device_of("mosaic_gpu"):
        result = jax.jit(functools.partial(mosaic_gpu.pooled_lookup, width=64, longest_bag=None))(
            lines_of(table_of(64)), ids.rows, ids.offsets, ids.weights
        )
    expected = xla.pooled_lookup(
        lines_of(table_of(64)),
        jnp.asarray(ids.rows),
        jnp.asarray(ids.offsets),
        jnp.asarray(ids.weights),
        width=64,
        longest_bag=None,
    )
    np.testing.assert_array_equal(result, expected)
