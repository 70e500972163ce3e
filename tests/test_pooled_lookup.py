"""pooled_lookup, every implementation, against numpy."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from implementation_cases import device_of, each_implementation, skip_unless_served
from kernel_cases import NOWHERE, NUM_BAGS, NUM_IDS, NUM_ROWS, WIDTHS, Batch, batches, lines_of, pooled, table_of
from update_cases import a_batch

from pallas_kernels import pooled_lookup
from pallas_kernels.implementations import IMPLEMENTATIONS
from pallas_kernels.target import Target, current_target

KIND = "TPU v6 lite"
LONGEST_BAG = 9


@functools.cache
def compiled(implementation: str, width: int, longest_bag: int | None):
    return jax.jit(
        functools.partial(pooled_lookup, width=width, longest_bag=longest_bag, implementation=implementation)
    )


def look_up(implementation, table, ids, weights=None, *, longest_bag=None) -> np.ndarray:
    skip_unless_served(implementation, dtype=table.dtype, width=table.shape[1])
    function = compiled(implementation, table.shape[1], longest_bag)
    with device_of(implementation):
        return np.asarray(function(lines_of(table), ids.rows, ids.offsets, weights))


@each_implementation
@pytest.mark.parametrize("width", WIDTHS)
@settings(deadline=None, max_examples=12)
@given(ids=batches(longest_bag=LONGEST_BAG))
def test_lookup_then_equals_numpys_float32_sum_in_the_order_of_ids(implementation: str, width: int, ids: Batch) -> None:
    table = table_of(width)
    for weights in (None, ids.weights):
        result = look_up(implementation, table, ids, weights)
        np.testing.assert_array_equal(result, pooled(table, ids, weights, np.float32))
        terms = pooled(np.abs(table), ids, None if weights is None else np.abs(weights))
        # Each of at most LONGEST_BAG products and sums rounds once.
        error = np.abs(result - pooled(table, ids, weights))
        assert (error <= (LONGEST_BAG + 1) * 2.0**-24 * terms).all()


@each_implementation
@pytest.mark.parametrize("width", [8, 64, 384])
@settings(deadline=None, max_examples=8)
@given(ids=batches(longest_bag=LONGEST_BAG))
def test_lookup_when_the_longest_bag_is_promised_then_the_same_bits(
    implementation: str, width: int, ids: Batch
) -> None:
    table = table_of(width)
    for weights in (None, ids.weights):
        np.testing.assert_array_equal(
            look_up(implementation, table, ids, weights, longest_bag=LONGEST_BAG),
            look_up(implementation, table, ids, weights),
        )


@each_implementation
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("width", [8, 128, 384])
def test_lookup_in_a_16_bit_store_then_sums_in_float32(implementation: str, width: int, dtype) -> None:
    random = np.random.default_rng(1)
    ids = Batch(
        rows=random.integers(0, NUM_ROWS, NUM_IDS).astype(np.int32),
        offsets=np.arange(0, NUM_IDS + 1, 4, dtype=np.int32),
        weights=random.normal(size=NUM_IDS).astype(np.float32),
    )
    table = table_of(width, dtype=dtype)
    result = look_up(implementation, table, ids, ids.weights)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, pooled(table, ids, ids.weights, np.float32))


@each_implementation
@pytest.mark.parametrize("longest_bag", [None, 0, 3])
def test_lookup_when_there_are_no_ids_then_zeros(implementation: str, longest_bag: int | None) -> None:
    ids = Batch(rows=np.zeros(0, np.int32), offsets=np.zeros(NUM_BAGS + 1, np.int32), weights=np.zeros(0, np.float32))
    for weights in (None, ids.weights):
        result = look_up(implementation, table_of(16), ids, weights, longest_bag=longest_bag)
        np.testing.assert_array_equal(result, np.zeros((NUM_BAGS, 16)))


@each_implementation
@pytest.mark.parametrize("longest_bag", [None, 0, 3])
def test_lookup_when_every_bag_is_empty_then_zeros(implementation: str, longest_bag: int | None) -> None:
    rows, weights = np.zeros(NUM_IDS, np.int32), np.full(NUM_IDS, np.nan, np.float32)
    ids = Batch(rows=rows, offsets=np.zeros(NUM_BAGS + 1, np.int32), weights=weights)
    result = look_up(implementation, table_of(16), ids, weights, longest_bag=longest_bag)
    np.testing.assert_array_equal(result, np.zeros((NUM_BAGS, 16)))


@each_implementation
@pytest.mark.parametrize("longest_bag", [None, 3])
@pytest.mark.parametrize("num_ids", [0, 5])
def test_lookup_when_there_are_no_bags_then_nothing(implementation: str, num_ids: int, longest_bag) -> None:
    ids = Batch(rows=np.zeros(num_ids, np.int32), offsets=np.zeros(1, np.int32), weights=np.ones(num_ids, np.float32))
    assert look_up(implementation, table_of(16), ids, ids.weights, longest_bag=longest_bag).shape == (0, 16)


@each_implementation
@pytest.mark.parametrize("longest_bag", [None, 1])
@pytest.mark.parametrize("row", NOWHERE)
def test_lookup_of_a_row_outside_the_store_then_zeros(implementation: str, row: int, longest_bag: int | None) -> None:
    offsets = np.minimum(np.arange(NUM_BAGS + 1, dtype=np.int32), 1)
    ids = Batch(rows=np.full(1, row, np.int32), offsets=offsets, weights=np.ones(1, np.float32))
    result = look_up(implementation, table_of(16), ids, longest_bag=longest_bag)
    np.testing.assert_array_equal(result, np.zeros((NUM_BAGS, 16)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lookup_when_bags_end_beyond_the_ids_then_those_that_there_are(implementation: str) -> None:
    # As where a device has not room for all ids: their lengths are known, and it says so.
    ids = a_batch()
    offsets = ids.offsets * 8
    cut = Batch(rows=ids.rows, offsets=np.minimum(offsets, NUM_IDS), weights=ids.weights)
    result = look_up(implementation, table_of(16), dataclasses.replace(ids, offsets=offsets), ids.weights)
    np.testing.assert_array_equal(result, pooled(table_of(16), cut, ids.weights, np.float32))


@each_implementation
@pytest.mark.parametrize("longest_bag", [None, 4])
@pytest.mark.parametrize("weight", [np.inf, np.nan])
def test_lookup_of_rows_outside_the_store_when_weights_are_not_finite_then_zeros(
    implementation: str, weight: float, longest_bag: int | None
) -> None:
    for width, bag in ((16, 4), (128, 1)):
        offsets = np.minimum(np.arange(NUM_BAGS + 1, dtype=np.int32) * bag, 4)
        ids = Batch(rows=np.array(NOWHERE, np.int32), offsets=offsets, weights=np.full(4, weight, np.float32))
        result = look_up(implementation, table_of(width), ids, ids.weights, longest_bag=longest_bag)
        np.testing.assert_array_equal(result, np.zeros((NUM_BAGS, width)))


@each_implementation
def test_lookup_one_id_a_bag_then_the_rows_themselves(implementation: str) -> None:
    rows = np.random.default_rng(0).integers(0, NUM_ROWS, NUM_IDS).astype(np.int32)
    ids = Batch(rows=rows, offsets=np.arange(NUM_IDS + 1, dtype=np.int32), weights=np.ones(NUM_IDS, np.float32))
    table = table_of(32)
    np.testing.assert_array_equal(look_up(implementation, table, ids, longest_bag=1), table[rows])


@each_implementation
@pytest.mark.parametrize("width", [16, 128])
def test_lookup_of_negative_zeros_then_the_zeros_that_sums_from_zero_are(implementation: str, width: int) -> None:
    # Bags of one id and of several.
    offsets = np.minimum(np.arange(NUM_BAGS + 1) * 2, NUM_BAGS + np.arange(NUM_BAGS + 1) // 4).astype(np.int32)
    rows = np.arange(NUM_IDS, dtype=np.int32)
    ids = Batch(rows=rows, offsets=offsets, weights=np.ones(NUM_IDS, np.float32))
    for weights in (None, ids.weights):
        result = look_up(implementation, np.full((NUM_ROWS, width), -0.0, np.float32), ids, weights)
        np.testing.assert_array_equal(result.view(np.uint32), 0)


@each_implementation
def test_lookup_five_times_then_the_same_bits(implementation: str) -> None:
    random = np.random.default_rng(0)
    rows = random.integers(0, 3, NUM_IDS).astype(np.int32)
    ids = Batch(rows=rows, offsets=np.array([0] * NUM_BAGS + [NUM_IDS], np.int32), weights=random.normal(size=NUM_IDS))
    weights = ids.weights.astype(np.float32)
    results = [look_up(implementation, table_of(64), ids, weights) for _ in range(5)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize(
    ("store", "options", "message"),
    [
        (jnp.zeros((6, 128)), {"width": 24}, "width 24 is not stored: rows are padded to 8, 16, 32, 64, 128 or"),
        (jnp.zeros((6, 128)), {"width": 0}, "width 0 is not stored"),
        (jnp.zeros((6, 128)), {"width": 192}, "width 192 is not stored"),
        (jnp.zeros((7, 128)), {"width": 384}, "a store of 896 elements is no whole number of rows of width 384"),
        (jnp.zeros((6, 128), jnp.int32), {"width": 8}, "a store of int32 is not supported; use float32, bfloat16 or"),
        (
            jnp.zeros((6, 128)),
            {"width": 8, "implementation": "cuda"},
            "implementation 'cuda' does not exist; there are",
        ),
    ],
)
def test_lookup_when_the_call_is_wrong_then_an_error_says_how(store, options: dict, message: str) -> None:
    rows, offsets = jnp.zeros(1, jnp.int32), jnp.array([0, 1], jnp.int32)
    with pytest.raises(ValueError, match=message):
        pooled_lookup(store, rows, offsets, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": jnp.zeros((1, 1), jnp.int32)}, r"rows are int32 of shape \(1, 1\); give int32, one for each id"),
        ({"rows": jnp.zeros(1)}, "rows are float32"),
        ({"offsets": jnp.zeros(0, jnp.int32)}, r"offsets are int32 of shape \(0,\); give int32, one more than bags"),
        ({"weights": jnp.ones(2)}, r"1 ids have float32 weights of shape \(2,\); give float32, one each"),
        ({"weights": jnp.ones(1, jnp.int32)}, "1 ids have int32 weights"),
    ],
)
def test_lookup_when_arrays_do_not_fit_each_other_then_an_error_says_how(change: dict, message: str) -> None:
    arguments = {"rows": jnp.zeros(1, jnp.int32), "offsets": jnp.array([0, 1], jnp.int32), "weights": None} | change
    with pytest.raises(ValueError, match=message):
        pooled_lookup(jnp.zeros((6, 128)), **arguments, width=128)


def test_the_target_when_the_default_device_is_named_by_its_platform_then_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices_of(backend: str | None = None) -> list[SimpleNamespace]:
        return [SimpleNamespace(platform=backend or "tpu", device_kind=backend or KIND)]

    monkeypatch.setattr(jax, "local_devices", devices_of)
    assert current_target() == Target(platform="tpu", device_kind=KIND)
    with jax.default_device("cpu"):
        assert current_target() == Target(platform="cpu", device_kind="cpu")


@each_implementation
def test_lookup_in_a_store_of_more_rows_than_an_int32_names_then_traced(implementation: str) -> None:
    store = jax.ShapeDtypeStruct((2**27 + 1, 128), jnp.float32)
    skip_unless_served(implementation, dtype=store.dtype, width=8, largest_store=store.size * store.dtype.itemsize)
    rows, offsets = (jax.ShapeDtypeStruct((length,), jnp.int32) for length in (NUM_IDS, NUM_BAGS + 1))
    look_up = functools.partial(pooled_lookup, width=8, implementation=implementation)
    with device_of(implementation):
        assert jax.eval_shape(look_up, store, rows, offsets).shape == (NUM_BAGS, 8)
