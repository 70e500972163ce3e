"""mosaic_tpu beyond the inherited tests: races, chunks, and programs for TPUs that are not here."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import NOWHERE, NUM_BAGS, NUM_IDS, NUM_ROWS, Ids, lines_of, pooled, table_of
from update_cases import Tables, gradients_of, logical_rows, slots_of, slots_of_ids

from pallas_kernels import ROW_OPTIMIZERS, Slots, mosaic_tpu, xla
from pallas_kernels.target import interpreting

KIND = "TPU v6 lite"
# One chip of each generation: a slice that holds it, and its lines.
SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
NUM_LINES = 3 * 2**18
TABLE_BYTES = NUM_LINES * 512
# What a program needs beside tables: for these batches less than this, for a copy of a table far more.
SMALL = TABLE_BYTES // 8


@pytest.fixture
def racing() -> Iterator[None]:
    """The slow interpreter, which knows when two copies touch the same bytes."""
    with interpreting(KIND), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


def some_ids(seed: int) -> Ids:
    """Rows that exist and rows that do not, hot rows, empty bags, padding."""
    random = np.random.default_rng(seed)
    rows = np.minimum(random.zipf(1.3, NUM_IDS), NUM_ROWS) - 1
    rows = np.where(random.random(NUM_IDS) < 0.1, random.choice(NOWHERE, NUM_IDS), rows)
    return Ids(
        rows=rows.astype(np.int32),
        offsets=np.sort(np.concatenate([[0], random.integers(0, NUM_IDS - 5, NUM_BAGS)])).astype(np.int32),
        weights=random.normal(size=NUM_IDS).astype(np.float32),
    )


@pytest.mark.parametrize("width", [16, pytest.param(384, marks=pytest.mark.slow)])
def test_lookup_when_races_are_looked_for_then_none_and_the_sums_in_order(racing: None, width: int) -> None:
    # In float32 only: this interpreter does not see a store of bfloat16 as words.
    del racing
    table, ids = table_of(width), some_ids(0)
    look_up = functools.partial(mosaic_tpu.pooled_lookup, width=width, longest_bag=None)
    result = jax.jit(look_up)(lines_of(table), ids.rows, ids.offsets, ids.weights)
    np.testing.assert_array_equal(result, pooled(table, ids, ids.weights, np.float32))


def both_updates(rule: str, width: int, dtype, storage_rounding: str, *, longest_chunk: int, seed: int = 0) -> tuple:
    """What an update makes of the same tables here and in `xla`."""
    tables, ids = Tables.fresh(rule, table_of(width)), some_ids(seed)
    options = {"optimizer": ROW_OPTIMIZERS[rule], "width": width, "storage_rounding": storage_rounding}
    arrays = (
        lines_of(table_of(width, dtype=dtype)),
        tables.element_state,
        tables.row_state,
        ids.rows,
        slots_of_ids(ids.rows),
        ids.offsets,
        gradients_of(width),
        ids.weights,
    )
    numbers = {
        "logical_rows": jnp.asarray(logical_rows(ids.rows)),
        "slots": slots_of(width),
        "step": jnp.int32(3),
        "seed": jnp.uint32(9),
        "statistics": None,
    }
    here = functools.partial(mosaic_tpu.sparse_update, **options, longest_chunk=longest_chunk)
    there = functools.partial(xla.sparse_update, **options)
    return tuple(jax.jit(update)(*arrays, **numbers) for update in (here, there))


def assert_close(arrays: tuple, wanted: tuple) -> None:
    for array, want in zip(jax.tree.leaves(arrays), jax.tree.leaves(wanted), strict=True):
        assert array.dtype == want.dtype
        # Compilers fuse products and sums of a rule as they please; a few last bits of float32.
        np.testing.assert_allclose(np.asarray(array, np.float32), np.asarray(want, np.float32), rtol=2e-6, atol=2e-6)


def test_an_update_when_races_are_looked_for_then_none(racing: None) -> None:
    del racing
    # Three chunks, so that every buffer is used again or handed over.
    assert_close(*both_updates("rowwise_adagrad", 16, jnp.float32, "nearest", longest_chunk=32))


@pytest.mark.parametrize(
    ("rule", "width", "dtype", "storage_rounding"),
    [
        ("partial_rowwise_adam", 8, jnp.float32, "nearest"),
        pytest.param("lamb", 384, jnp.float32, "nearest", marks=pytest.mark.slow),
        ("rowwise_adagrad", 64, jnp.bfloat16, "stochastic"),
        pytest.param("adagrad", 384, jnp.bfloat16, "nearest", marks=pytest.mark.slow),
    ],
)
def test_an_update_of_many_chunks_then_that_of_xla(rule: str, width: int, dtype, storage_rounding: str) -> None:
    with interpreting(KIND):
        assert_close(*both_updates(rule, width, dtype, storage_rounding, longest_chunk=32, seed=1))


def test_stochastic_rounding_then_the_bits_of_xla() -> None:
    with interpreting(KIND):
        (here, _, _), (there, _, _) = both_updates("sgd", 32, jnp.bfloat16, "stochastic", longest_chunk=64)
    np.testing.assert_array_equal(np.asarray(here).view(np.uint16), np.asarray(there).view(np.uint16))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({}, None),
        ({"device_kind": "TPU v3"}, "too old"),
        ({"dtype": jnp.float16}, "float16"),
        ({"dtype": jnp.bfloat16, "optimizer": ROW_OPTIMIZERS["sgd"], "storage_rounding": "stochastic"}, None),
        ({"dtype": jnp.bfloat16, "optimizer": ROW_OPTIMIZERS["sgd"], "storage_rounding": "split"}, "split weights"),
        ({"width": 4096}, "too wide"),
    ],
)
def test_unable_then_says_why(call: dict, reason: str | None) -> None:
    said = mosaic_tpu.unable(**({"device_kind": KIND, "dtype": jnp.float32, "width": 64} | call))
    assert (said is None) == (reason is None)
    assert (reason or "") in (said or "")


def compiled_for(kind: str, function: Callable, shapes: tuple, donated: tuple[int, ...] = ()):
    """The bytes of a program for one chip that is not here."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[kind]).devices
    mesh = Mesh(np.array(devices[:1]), ("chip",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped, donate_argnums=donated).lower(*shapes).compile().memory_analysis()


def shape_of(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def store_of(dtype) -> jax.ShapeDtypeStruct:
    return shape_of(NUM_LINES, 512 // jnp.dtype(dtype).itemsize, dtype=dtype)


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize(("width", "dtype"), [(8, jnp.float32), (384, jnp.float32), (64, jnp.bfloat16)])
@pytest.mark.usefixtures("no_compilation_cache")
def test_lookup_for_a_tpu_then_no_copy_of_the_table(kind: str, width: int, dtype) -> None:
    def look_up(store, rows, offsets, weights):
        return mosaic_tpu.pooled_lookup(store, rows, offsets, weights, width=width, longest_bag=None)

    ids = shape_of(4096, dtype=jnp.int32)
    program = compiled_for(kind, look_up, (store_of(dtype), ids, shape_of(513, dtype=jnp.int32), shape_of(4096)))
    assert program.temp_size_in_bytes < SMALL


@pytest.mark.parametrize(
    ("kind", "rule", "width", "dtype", "storage_rounding"),
    [
        ("v6e", "rowwise_adagrad", 16, jnp.float32, "nearest"),
        pytest.param("v4", "partial_rowwise_adam", 128, jnp.bfloat16, "stochastic", marks=pytest.mark.slow),
        pytest.param("v5e", "lamb", 512, jnp.float32, "nearest", marks=pytest.mark.slow),
        pytest.param("v5p", "adam", 384, jnp.bfloat16, "stochastic", marks=pytest.mark.slow),
        pytest.param("v6e", "sgd", 8, jnp.bfloat16, "nearest", marks=pytest.mark.slow),
        pytest.param("7x", "adagrad", 64, jnp.float32, "nearest", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("no_compilation_cache")
def test_an_update_for_a_tpu_then_in_place(kind: str, rule: str, width: int, dtype, storage_rounding: str) -> None:
    optimizer, store = ROW_OPTIMIZERS[rule], store_of(dtype)

    def update(store, element_state, row_state, rows, offsets, gradients, logical_rows, slots):
        return mosaic_tpu.sparse_update(
            store,
            element_state,
            row_state,
            rows,
            rows,
            offsets,
            gradients,
            None,
            logical_rows=logical_rows,
            slots=slots,
            step=jnp.int32(1),
            seed=jnp.uint32(0),
            optimizer=optimizer,
            width=width,
            storage_rounding=storage_rounding,
            statistics=None,
        )

    slots = slots_of(width)
    arrays = {field.name: getattr(slots, field.name) for field in dataclasses.fields(Slots)}
    num_lines = store.size // 128
    shapes = (
        store,
        (shape_of(num_lines, 128),) * len(optimizer.element_state),
        (shape_of(num_lines // width + 1, 128),) * len(optimizer.row_state),
        shape_of(4096, dtype=jnp.int32),
        shape_of(513, dtype=jnp.int32),
        shape_of(512, width),
        shape_of(4096, 2, dtype=jnp.uint32),
        Slots(**{name: shape_of(3, dtype=x.dtype) for name, x in arrays.items()}),
    )
    program = compiled_for(kind, update, shapes, donated=(0, 1, 2))
    assert program.temp_size_in_bytes < SMALL
    assert program.alias_size_in_bytes >= TABLE_BYTES * (1 + len(optimizer.element_state))
