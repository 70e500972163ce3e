"""mosaic_tpu beyond the inherited tests: races, chunks, and programs for TPUs that are not here."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import NOWHERE, NUM_BAGS, NUM_IDS, NUM_ROWS, Batch, lines_of, pooled, table_of
from tpu_programs import SLICES, SMALL, TABLE_BYTES, compiled_lookup, compiled_update
from update_cases import fresh_stores, gradients_of, ids_of, slots_of

from pallas_kernels import ROW_OPTIMIZERS, Stores, mosaic_tpu, xla
from pallas_kernels.mosaic_tpu.sorted_ids import sort_ids
from pallas_kernels.target import interpreting

KIND = "TPU v6 lite"


@pytest.fixture
def racing() -> Iterator[None]:
    """The slow interpreter, which knows when two copies touch the same bytes."""
    with interpreting(KIND), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


def some_ids(seed: int) -> Batch:
    """Rows that exist and rows that do not, hot rows, empty bags, padding."""
    random = np.random.default_rng(seed)
    rows = np.minimum(random.zipf(1.3, NUM_IDS), NUM_ROWS) - 1
    rows = np.where(random.random(NUM_IDS) < 0.1, random.choice(NOWHERE, NUM_IDS), rows)
    return Batch(
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


def both_updates(
    rule: str, width: int, dtype, storage_rounding: str, *, longest_chunk: int, seed: int = 0
) -> tuple[Stores, ...]:
    """What an update makes of the same tables here and in `xla`."""
    ids = some_ids(seed)
    options = {"optimizer": ROW_OPTIMIZERS[rule], "width": width, "storage_rounding": storage_rounding}
    stores = dataclasses.replace(fresh_stores(rule, table_of(width)), weights=lines_of(table_of(width, dtype=dtype)))
    arrays = stores, ids_of(ids, ids.weights), gradients_of(width)
    numbers = {
        "slots": slots_of(width),
        "step": jnp.int32(3),
        "seed": jnp.uint32(9),
        "statistics": None,
        "enabled": jnp.bool(True),
    }
    here = functools.partial(mosaic_tpu.sparse_update, **options, longest_chunk=longest_chunk)
    there = functools.partial(xla.sparse_update, **options)
    return tuple(jax.jit(update)(*arrays, **numbers) for update in (here, there))


def assert_close(arrays: Stores, wanted: Stores) -> None:
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
        pytest.param("partial_rowwise_adam", 8, jnp.float32, "nearest", marks=pytest.mark.slow),
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
        here, there = both_updates("sgd", 32, jnp.bfloat16, "stochastic", longest_chunk=64)
    np.testing.assert_array_equal(np.asarray(here.weights).view(np.uint16), np.asarray(there.weights).view(np.uint16))


@pytest.mark.parametrize("num_slots", [3, 2**28], ids=["slots beside bags", "too many for that"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("kind", "on_tensorcore"), [("TPU v5 lite", True), (KIND, False)])
def test_sorted_ids_then_those_of_numpy_and_few_arrays_moved(
    kind: str, on_tensorcore: bool, weighted: bool, num_slots: int
) -> None:
    batch = some_ids(2)
    ids = ids_of(batch, batch.weights if weighted else None)
    sort = functools.partial(sort_ids, statistics=None, num_rows=NUM_ROWS, num_slots=num_slots)
    with interpreting(kind):
        result, jaxpr = jax.jit(sort)(ids), jax.make_jaxpr(sort)(ids)
    named = np.flatnonzero((batch.rows >= 0) & (batch.rows < NUM_ROWS) & (np.arange(NUM_IDS) < batch.offsets[-1]))
    order = named[np.argsort(batch.rows[named], kind="stable")]
    assert result.count == len(order)
    np.testing.assert_array_equal(result.rows[: len(order)], batch.rows[order])
    np.testing.assert_array_equal(result.fields["bag"][: len(order)], batch.bags[order])
    np.testing.assert_array_equal(result.fields["slot"][: len(order)], ids.slots[order])
    np.testing.assert_array_equal(np.sort(result.order), np.arange(NUM_IDS))
    np.testing.assert_array_equal(batch.rows[result.order[: len(order)]], batch.rows[order])
    if weighted:
        np.testing.assert_array_equal(result.fields["weight"][: len(order)], batch.weights[order])
    # Rows, bags with slots, numbers: a sort for a TensorCore takes the longer to compile, the more it moves.
    (sorting,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "sort")
    assert len(sorting.invars) == 3 + weighted + (num_slots > 3 or not on_tensorcore)
    assert sorting.params["num_keys"] == (2 if on_tensorcore and not weighted else 1)


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


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize(("width", "dtype"), [(8, jnp.float32), (384, jnp.float32), (64, jnp.bfloat16)])
@pytest.mark.usefixtures("no_compilation_cache")
def test_lookup_for_a_tpu_then_no_copy_of_the_table(kind: str, width: int, dtype) -> None:
    assert compiled_lookup(mosaic_tpu, kind, width, dtype).temp_size_in_bytes < SMALL


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
    optimizer = ROW_OPTIMIZERS[rule]
    program = compiled_update(
        mosaic_tpu, kind, rule, width, dtype=dtype, storage_rounding=storage_rounding, weighted=False
    )
    assert program.temp_size_in_bytes < SMALL
    assert program.alias_size_in_bytes >= TABLE_BYTES * (1 + len(optimizer.element_state))
