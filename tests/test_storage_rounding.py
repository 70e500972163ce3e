"""Updates of bfloat16 and float16 stores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementation_cases import device_of, each_implementation, skip_unless_served
from kernel_cases import NUM_BAGS, NUM_ROWS, Batch, lines_of, table_of
from update_cases import a_batch, bits_of, fresh_stores, gradients_of, ids_of, numbers_of_rows, slots_of, update

from pallas_kernels import ROW_OPTIMIZERS, Stores, row_statistics
from pallas_kernels.rounding import Rounding, column_bits, row_key, stochastic_round

SIXTEEN_BITS = (jnp.bfloat16, jnp.float16)


@each_implementation
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("rule", ["rowwise_adagrad", pytest.param("adam", marks=pytest.mark.slow)])
def test_an_update_of_a_16_bit_store_then_float32s_result_rounded(implementation: str, rule: str, dtype) -> None:
    rows = table_of(16, dtype=dtype)
    wide = fresh_stores(rule, rows.astype(np.float32))
    narrow = dataclasses.replace(wide, weights=lines_of(rows))
    ids, gradients = a_batch(), gradients_of(16)
    wide = update(implementation, rule, wide, ids, gradients)
    nearest = update(implementation, rule, narrow, ids, gradients)
    stochastic = update(implementation, rule, narrow, ids, gradients, storage_rounding="stochastic")
    exact = numbers_of_rows(wide, 16)[0]
    for result in (nearest, stochastic):
        assert result.weights.dtype == dtype
        for was, now in zip(bits_of(wide)[1:], bits_of(result)[1:], strict=True):
            np.testing.assert_array_equal(now, was)
    np.testing.assert_array_equal(numbers_of_rows(nearest, 16)[0], exact.astype(jnp.dtype(dtype)))
    rounded = numbers_of_rows(stochastic, 16)[0].astype(np.float32)
    spacing = np.maximum(np.abs(exact), 6e-5) * (2.0**-7 if dtype == jnp.bfloat16 else 2.0**-10)
    assert (np.abs(rounded - exact) <= spacing).all()
    assert (rounded != numbers_of_rows(nearest, 16)[0].astype(np.float32)).any()
    untouched = np.setdiff1d(np.arange(NUM_ROWS), ids.rows)
    np.testing.assert_array_equal(rounded[untouched], rows[untouched].astype(np.float32))


@pytest.mark.parametrize(
    ("implementation", "rounding"), [("mosaic_tpu", "nearest"), ("sparsecore", "nearest"), ("sparsecore", "split")]
)
def test_an_update_when_rows_end_in_the_midst_of_a_unit_then_that_of_xla(implementation: str, rounding: str) -> None:
    # Rows of 384 lie four to six lines, and 94 are 141 lines.
    rows = table_of(384)[:94]
    stores = split_stores("sgd", rows) if rounding == "split" else Stores(weights=lines_of(rows.astype(jnp.bfloat16)))
    named = np.array([93, 5, 92, 93], np.int32)
    ids = Batch(rows=named, offsets=np.arange(5, dtype=np.int32), weights=np.ones(4, np.float32))
    here, there = (
        update(name, "sgd", stores, ids, gradients_of(384)[:4], storage_rounding=rounding)
        for name in (implementation, "xla")
    )
    assert (bits_of(there)[0] != bits_of(stores)[0]).any()
    # Compilers fuse products and sums of a rule as they please; the last bit of bfloat16.
    np.testing.assert_allclose(
        np.asarray(here.weights, np.float32), np.asarray(there.weights, np.float32), rtol=2.0**-7
    )


def split_stores(rule: str, rows: np.ndarray) -> Stores:
    """The halves of float32 rows, and the state that belongs to them."""
    words = rows.view(np.uint32)
    stores = fresh_stores(rule, rows)
    high = lines_of((words >> 16).astype(np.uint16).view(jnp.bfloat16))
    low = lines_of((words & 0xFFFF).astype(np.uint16))
    return dataclasses.replace(stores, weights=high, element_state=(*stores.element_state, low))


@each_implementation
@pytest.mark.parametrize("rule", ["rowwise_adagrad", "lamb"])
def test_updates_of_split_weights_then_float32s_bits(implementation: str, rule: str) -> None:
    rows = table_of(16)
    wide, split = fresh_stores(rule, rows), split_stores(rule, rows)
    for step in (1, 2, 3):
        ids, gradients = a_batch(step), gradients_of(16, seed=step)
        wide = update(implementation, rule, wide, ids, gradients, step=step)
        split = update(implementation, rule, split, ids, gradients, step=step, storage_rounding="split")
        high, low = (
            np.asarray(a).reshape(NUM_ROWS, 16).view(np.uint16) for a in (split.weights, split.element_state[-1])
        )
        words = (high.astype(np.uint32) << 16) | low
        np.testing.assert_array_equal(words, np.asarray(wide.weights).reshape(NUM_ROWS, 16).view(np.uint32))
        for was, now in zip(bits_of(wide)[1:], bits_of(split)[1 : len(wide.element_state) + 1], strict=False):
            np.testing.assert_array_equal(now, was)


@each_implementation
def test_statistics_of_split_weights_then_those_of_the_float32_weights(implementation: str) -> None:
    rows, ids = table_of(16), ids_of(a_batch())
    results = []
    for stores, storage_rounding in ((fresh_stores("lamb", rows), "nearest"), (split_stores("lamb", rows), "split")):
        options = {"width": 16, "storage_rounding": storage_rounding}
        skip_unless_served(implementation, dtype=stores.weights.dtype, rule="lamb", **options)
        options["optimizer"] = ROW_OPTIMIZERS["lamb"]
        call = functools.partial(row_statistics, implementation=implementation, **options)
        with device_of(implementation):
            results.append(jax.jit(call)(stores, ids, gradients_of(16), slots=slots_of(16), step=jnp.int32(1)))
    np.testing.assert_array_equal(results[1], results[0])


@pytest.mark.parametrize(
    ("dtype", "element_state", "message"),
    [
        (jnp.float16, (), "split weights have their high halves in bfloat16, but the store is float16"),
        (jnp.bfloat16, (), "split weights need a store of uint16, shaped like the weights, as the last element_state"),
        (jnp.bfloat16, (jnp.zeros((3, 128)),), "split weights need a store of uint16"),
    ],
)
def test_an_update_of_split_weights_when_a_half_is_missing_then_an_error(dtype, element_state, message: str) -> None:
    stores = Stores(weights=lines_of(table_of(16, dtype=dtype)), element_state=element_state)
    with pytest.raises(ValueError, match=message):
        update("xla", "sgd", stores, a_batch(), gradients_of(16), storage_rounding="split")


def rounded(implementation: str, numbers: np.ndarray, dtype, storage_rounding: Rounding) -> np.ndarray:
    """What the first rows are when those float32 numbers are written to them, as integers; step 4, seed 2."""
    num_rows = len(numbers)
    ids = Batch(
        rows=np.arange(num_rows, dtype=np.int32),
        offsets=np.arange(num_rows + 1, dtype=np.int32),
        weights=np.ones(num_rows, np.float32),
    )
    # Rows of zeros that the numbers' opposites are subtracted from.
    stores = Stores(weights=lines_of(np.zeros((NUM_ROWS, 16), dtype)))
    slots = slots_of(16, learning_rate=jnp.ones(3), weight_decay=jnp.zeros(3))
    options = {"slots": slots, "storage_rounding": storage_rounding, "step": 4, "seed": 2}
    after = update(implementation, "sgd", stores, ids, -numbers, **options)
    return numbers_of_rows(after, 16)[0][:num_rows].view(np.uint16)


@each_implementation
@pytest.mark.parametrize(("dtype", "spacing"), [(jnp.bfloat16, 2.0**-7), (jnp.float16, 2.0**-10)])
def test_an_update_when_results_lie_midway_between_16_bit_numbers_then_the_even_ones(
    implementation: str, dtype, spacing: float
) -> None:
    steps = np.arange(8, dtype=np.float32) + np.float32(0.5)
    numbers = np.float32(1) + steps * np.float32(spacing)
    numbers = np.concatenate([numbers, -numbers])[None]
    even = 1 + 2 * np.array([0, 1, 1, 2, 2, 3, 3, 4]) * spacing
    wanted = np.concatenate([even, -even])[None].astype(dtype).view(np.uint16)
    np.testing.assert_array_equal(rounded(implementation, numbers, dtype, "nearest"), wanted)


@each_implementation
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_stochastic_rounding_of_an_update_when_numbers_are_tiny_or_huge_then_the_formulas_bits(
    implementation: str, dtype
) -> None:
    # Below, on and above the least normal number of float16, and beyond its largest.
    numbers = np.array([3e-8, 1e-7, 2.3e-6, 6.1e-5, 2.0**-14, 1.001, 65519.0, 1e9], np.float32)
    numbers = np.resize(np.concatenate([numbers, -numbers]), (NUM_BAGS, 16))
    logical_rows = jnp.arange(NUM_BAGS, dtype=jnp.uint32)[:, None]
    keys = row_key(jnp.uint32(2), jnp.uint32(4), slots_of(16).table[0], logical_rows)
    bits = column_bits(keys[:, None], jnp.arange(16, dtype=jnp.uint32)[None])
    wanted = np.asarray(stochastic_round(jnp.asarray(numbers), bits, dtype)).view(np.uint16)
    np.testing.assert_array_equal(rounded(implementation, numbers, dtype, "stochastic"), wanted)


def rounded_rows(implementation: str, dtype, *, places: np.ndarray, table: int = 7, **options) -> np.ndarray:
    """Four logical rows, updated where they lie in the store: equal numbers and gradients, whatever the places."""
    rows, logical = table_of(16, seed=9, dtype=dtype), np.array([3, 9, 17, 30])
    rows[places] = table_of(16, seed=1, dtype=dtype)[:4]
    stores = Stores(weights=lines_of(rows))
    order = np.argsort(places, kind="stable")
    ids = Batch(
        rows=places[order].astype(np.int32), offsets=np.arange(5, dtype=np.int32), weights=np.ones(4, np.float32)
    )
    slots = slots_of(
        16, table=jnp.full(3, table, jnp.uint32), learning_rate=jnp.full(3, 0.1), weight_decay=jnp.zeros(3)
    )
    after = update(
        implementation,
        "sgd",
        stores,
        ids,
        gradients_of(16)[:4][order],
        slots=slots,
        storage_rounding="stochastic",
        **{"logical_rows": logical[order].astype(np.uint32)[:, None], "step": 4, "seed": 2} | options,
    )
    return numbers_of_rows(after, 16)[0][places].astype(np.float32)


@each_implementation
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_stochastic_rounding_of_an_update_then_depends_on_seed_step_table_row_and_column_only(
    implementation: str, dtype
) -> None:
    here = rounded_rows(implementation, dtype, places=np.array([0, 1, 2, 3]))
    elsewhere = rounded_rows(implementation, dtype, places=np.array([80, 33, 5, 60]))
    np.testing.assert_array_equal(here, elsewhere)
    other_rows = np.array([[4], [10], [18], [31]], np.uint32)
    for change in ({"seed": 3}, {"step": 5}, {"table": 8}, {"logical_rows": other_rows}):
        assert (rounded_rows(implementation, dtype, places=np.array([0, 1, 2, 3]), **change) != here).any()


@each_implementation
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_stochastic_rounding_of_an_update_when_gradients_are_not_finite_then_neither_are_their_rows(
    implementation: str, dtype
) -> None:
    # What is added to round it would make a NaN of ones a zero, were it not left alone.
    gradients = np.array([[0x7FFFFFFF], [0xFFFFFFFF], [0x7F800000]], np.uint32).view(np.float32).repeat(16, axis=1)
    ids = Batch(rows=np.arange(3, dtype=np.int32), offsets=np.arange(4, dtype=np.int32), weights=np.ones(3, np.float32))
    stores = Stores(weights=lines_of(table_of(16, dtype=dtype)))
    after = update(implementation, "sgd", stores, ids, gradients, storage_rounding="stochastic")
    rows = numbers_of_rows(after, 16)[0].astype(np.float32)
    assert np.isnan(rows[:2]).all()
    assert np.isneginf(rows[2]).all()
    assert np.isfinite(rows[3:]).all()
