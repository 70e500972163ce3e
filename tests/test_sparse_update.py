"""sparse_update, every implementation, against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from implementation_cases import device_of, each_implementation
from kernel_cases import NOWHERE, NUM_BAGS, NUM_IDS, NUM_ROWS, WIDTHS, Batch, batches, table_of
from row_oracle import ELEMENT_STATES, RULES, gradients_of_rows, updated_row
from update_cases import (
    HYPER,
    ROWS_PER_SHARD,
    a_batch,
    bits_of,
    fresh_stores,
    gradients_of,
    ids_of,
    numbers_of_rows,
    slots_of,
    update,
)

from pallas_kernels import ROW_OPTIMIZERS, Ids, Stores, row_statistics, sparse_update
from pallas_kernels.xla import RUN_BLOCK

# float32 against float64 over three updates of numbers of about 1. What loses most is 1 - beta2**step: of 0.999 to the
# power of 1, one ulp is 6e-5 of it, and half of that in its root.
TOLERANCE = {"rtol": 4e-5, "atol": 4e-5}
# Of the sum of what is added up, by so much the sum may be off. Near 0 that is much of it, and what divides by its root
# makes it larger.
SUM_ERROR = 4 * 2.0**-24


def check_updates(
    implementation: str, rule: str, width: int, steps: list[tuple[int, Batch]], *, weighted: bool
) -> None:
    """Runs updates of chosen numbers and compares everything with the float64 rule after each."""
    tables = fresh_stores(rule, table_of(width))
    slots = slots_of(width)
    hyper = [{name: float(getattr(slots, name)[slot]) for name in (*HYPER, "dim")} for slot in range(3)]
    expected = [values.astype(np.float64) for values in numbers_of_rows(tables, width)]
    room = [np.zeros_like(values) for values in expected]
    for step, ids in steps:
        gradients = gradients_of(width, seed=step)
        weights = ids.weights if weighted else None
        before = numbers_of_rows(tables, width)
        tables = update(implementation, rule, tables, ids, gradients, step=step, weights=weights)
        sums = gradients_of_rows(ids.rows, ids.bags, gradients, weights)
        sizes = gradients_of_rows(ids.rows, ids.bags, np.abs(gradients), None if weights is None else np.abs(weights))
        touched = [row for row in sums if 0 <= row < NUM_ROWS]
        for row in touched:
            weights_of_row, *state = (values[row] for values in expected)
            found = []
            for share in (-SUM_ERROR, 0.0, SUM_ERROR):
                gradient = sums[row] + share * sizes[row]
                of_slot = hyper[row // ROWS_PER_SHARD]
                new_row, new_state = updated_row(rule, weights_of_row, state, gradient, step=step, **of_slot)
                found.append((new_row, *new_state))
            for number, (low, value, high) in enumerate(zip(*found, strict=True)):
                expected[number][row] = value
                room[number][row] += np.abs(high - low)
        untouched = np.setdiff1d(np.arange(NUM_ROWS), touched)
        for was, now, value, more in zip(before, numbers_of_rows(tables, width), expected, room, strict=True):
            allowed = TOLERANCE["atol"] + TOLERANCE["rtol"] * np.abs(value) + more
            np.testing.assert_array_less(np.abs(now - value), allowed)
            np.testing.assert_array_equal(now[untouched], was[untouched])


update_numbers = st.lists(st.sampled_from([1, 2, 3, 10, 1000, 100_000]), min_size=3, max_size=3).map(sorted)


@each_implementation
@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=8)
@given(data=st.data(), numbers=update_numbers)
def test_three_updates_then_equal_the_rule_in_float64(implementation, rule, data, numbers) -> None:
    steps = [(number, data.draw(batches())) for number in numbers]
    check_updates(implementation, rule, 16, steps, weighted=True)


@each_implementation
@pytest.mark.parametrize("width", [width for width in WIDTHS if width != 16])
@settings(deadline=None, max_examples=3)
@given(ids=batches())
def test_an_update_of_any_width_then_equals_the_rule_in_float64(implementation: str, width: int, ids: Batch) -> None:
    check_updates(implementation, "partial_rowwise_adam", width, [(1, ids), (2, ids)], weighted=False)


@each_implementation
@pytest.mark.parametrize("rule", RULES)
def test_an_update_then_rows_without_ids_keep_their_bits(implementation: str, rule: str) -> None:
    width, touched_rows = 16, 40
    strange = np.array([np.nan, -np.nan, np.inf, -0.0, 1e-45, -1e-40, 3e38, 0.1], np.float32)
    rows = np.resize(strange, (NUM_ROWS, width))
    rows[:touched_rows] = table_of(width)[:touched_rows]
    tables = fresh_stores(rule, rows)
    # Every second row: its neighbours lie on the same line.
    ids = a_batch(num_rows=touched_rows // 2)
    ids = dataclasses.replace(ids, rows=2 * ids.rows)
    after = update(implementation, rule, tables, ids, gradients_of(width), weights=ids.weights)
    untouched = np.setdiff1d(np.arange(NUM_ROWS), ids.rows)
    for was, now in zip(bits_of(tables)[: 1 + ELEMENT_STATES[rule]], bits_of(after), strict=False):
        np.testing.assert_array_equal(now.reshape(NUM_ROWS, width)[untouched], was.reshape(NUM_ROWS, width)[untouched])
    assert (
        bits_of(after)[0].reshape(NUM_ROWS, width)[ids.rows] != bits_of(tables)[0].reshape(NUM_ROWS, width)[ids.rows]
    ).any()


@each_implementation
@pytest.mark.parametrize("rule", RULES)
def test_an_update_when_no_id_names_a_row_then_every_bit_stays(implementation: str, rule: str) -> None:
    tables = fresh_stores(rule, table_of(16))
    nowhere = dataclasses.replace(a_batch(), rows=np.resize(np.array(NOWHERE, np.int64), NUM_IDS).astype(np.int32))
    padding_only = dataclasses.replace(a_batch(), offsets=np.zeros(NUM_BAGS + 1, np.int32))
    for ids in (nowhere, padding_only):
        nan = np.full((NUM_BAGS, 16), np.nan, np.float32)
        after = update(implementation, rule, tables, ids, nan, weights=ids.weights)
        for was, now in zip(bits_of(tables), bits_of(after), strict=True):
            np.testing.assert_array_equal(now, was)


@each_implementation
def test_an_update_by_lamb_when_a_norm_is_zero_then_that_of_adam(implementation: str) -> None:
    # The first row has no norm to scale by, the second nothing to be scaled.
    rows, gradients = table_of(16), gradients_of(16)
    rows[0], gradients[1] = 0.0, 0.0
    ids = Batch(rows=np.arange(2, dtype=np.int32), offsets=np.arange(3, dtype=np.int32), weights=np.ones(2, np.float32))
    slots = slots_of(16, weight_decay=jnp.zeros(3))
    by_lamb, by_adam = (
        numbers_of_rows(update(implementation, rule, fresh_stores(rule, rows), ids, gradients[:2], slots=slots), 16)
        for rule in ("lamb", "adam")
    )
    assert by_lamb[0][0].all()
    for found, expected in zip(by_lamb, by_adam, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@each_implementation
@pytest.mark.parametrize(("rule", "num_ids"), [("lamb", NUM_IDS), ("rowwise_adagrad", 2 * RUN_BLOCK)])
def test_an_update_that_is_not_enabled_then_every_bit_stays(implementation: str, rule: str, num_ids: int) -> None:
    tables = fresh_stores(rule, table_of(16))
    ids = dataclasses.replace(a_batch(), rows=np.minimum(np.arange(num_ids), NUM_ROWS - 1).astype(np.int32))
    after = update(implementation, rule, tables, ids, np.full((NUM_BAGS, 16), np.nan, np.float32), enabled=False)
    for was, now in zip(bits_of(tables), bits_of(after), strict=True):
        np.testing.assert_array_equal(now, was)


@each_implementation
def test_an_update_of_no_ids_then_every_bit_stays(implementation: str) -> None:
    tables = fresh_stores("lamb", table_of(16))
    none = Batch(rows=np.zeros(0, np.int32), offsets=np.zeros(NUM_BAGS + 1, np.int32), weights=np.zeros(0, np.float32))
    after = update(implementation, "lamb", tables, none, gradients_of(16), weights=none.weights)
    for was, now in zip(bits_of(tables), bits_of(after), strict=True):
        np.testing.assert_array_equal(now, was)
    with device_of(implementation):
        statistics = row_statistics(
            tables,
            jax.tree.map(jnp.asarray, ids_of(none)),
            jnp.asarray(gradients_of(16)),
            slots=slots_of(16),
            step=jnp.int32(1),
            optimizer=ROW_OPTIMIZERS["lamb"],
            width=16,
            implementation=implementation,
        )
    assert statistics.shape == (0, 1, 2)


@each_implementation
def test_a_nan_in_one_bags_gradient_then_only_that_bags_rows_become_nan(implementation: str) -> None:
    ids = a_batch()
    gradients = gradients_of(16)
    bag = int(ids.lengths.argmax())
    gradients[bag] = np.nan
    after = update(implementation, "adagrad", fresh_stores("adagrad", table_of(16)), ids, gradients)
    poisoned = np.isnan(numbers_of_rows(after, 16)[0]).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(poisoned), np.unique(ids.rows[ids.bags == bag]))


def in_stated_order(rows: np.ndarray, contributions: np.ndarray, num_rows: int) -> np.ndarray:
    """Adds contributions in float32, in blocks of RUN_BLOCK of each row, then the blocks."""
    sums = np.zeros((num_rows, contributions.shape[1]), np.float32)
    for row in np.unique(rows):
        mine = contributions[rows == row]
        for start in range(0, len(mine), RUN_BLOCK):
            block = np.zeros(contributions.shape[1], np.float32)
            for contribution in mine[start : start + RUN_BLOCK]:
                block += contribution
            sums[row] += block
    return sums


@each_implementation
@pytest.mark.parametrize("hot", [0, RUN_BLOCK, RUN_BLOCK + 1, 5 * RUN_BLOCK - 40])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_rows_gradients_then_added_in_the_stated_order_bit_for_bit(implementation, hot: int, weighted: bool) -> None:
    num_ids, width = 5 * RUN_BLOCK, 16
    random = np.random.default_rng(hot)
    rows = random.integers(0, NUM_ROWS - 1, num_ids) if not hot else random.integers(0, 8, num_ids) + 1
    rows[random.permutation(num_ids)[:hot]] = NUM_ROWS - 1 if hot else 0
    ids = Batch(
        rows=rows.astype(np.int32),
        offsets=np.linspace(0, num_ids, NUM_BAGS + 1).astype(np.int32),
        weights=random.normal(size=num_ids).astype(np.float32),
    )
    gradients = gradients_of(width) * np.float32(1e3) ** random.integers(-1, 2, (NUM_BAGS, 1)).astype(np.float32)
    contributions = gradients[ids.bags] * (ids.weights[:, None] if weighted else np.float32(1))
    # Subtracting the sum itself from the row: nothing but the sum is rounded before.
    slots = slots_of(width, learning_rate=jnp.ones(3), weight_decay=jnp.zeros(3))
    table = table_of(width)
    after = update(
        implementation,
        "sgd",
        fresh_stores("sgd", table),
        ids,
        gradients,
        slots=slots,
        weights=ids.weights if weighted else None,
    )
    expected = table - in_stated_order(ids.rows, contributions, NUM_ROWS)
    np.testing.assert_array_equal(numbers_of_rows(after, width)[0], expected)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "sparsecore"])
@pytest.mark.parametrize(
    ("rule", "changed", "shape"),
    [("sgd", "weights", (96, 16)), ("adagrad", "element_state", (6, 256)), ("rowwise_adagrad", "row_state", (384, 1))],
)
def test_an_update_of_stores_that_have_no_lines_then_another_implementation_serves(
    implementation: str, rule: str, changed: str, shape: tuple[int, int]
) -> None:
    stores = fresh_stores(rule, table_of(16))
    stores = dataclasses.replace(
        stores, **{changed: jax.tree.map(lambda x: x.reshape(shape), getattr(stores, changed))}
    )
    call = {"slots": slots_of(16), "step": 1, "seed": 0, "optimizer": ROW_OPTIMIZERS[rule], "width": 16}
    arrays = jax.tree.map(jnp.asarray, (stores, ids_of(a_batch()), gradients_of(16)))
    with device_of(implementation):
        found = sparse_update(*arrays, **call)
        with pytest.raises(ValueError, match="the store has no lines of 512 bytes"):
            sparse_update(*arrays, **call, implementation=implementation)
    for now, wanted in zip(bits_of(found), bits_of(sparse_update(*arrays, **call, implementation="xla")), strict=True):
        np.testing.assert_array_equal(now, wanted)


@each_implementation
@pytest.mark.parametrize("rule", ["rowwise_adagrad", "lamb"])
def test_an_update_five_times_then_the_same_bits(implementation: str, rule: str) -> None:
    tables = fresh_stores(rule, table_of(16))
    results = [bits_of(update(implementation, rule, tables, a_batch(num_rows=3), gradients_of(16))) for _ in range(5)]
    for result in results[1:]:
        for was, now in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(now, was)


@pytest.mark.parametrize(
    ("of", "change", "message"),
    [
        ("call", {"width": 24}, "width 24 is not stored"),
        ("call", {"implementation": "cuda"}, "implementation 'cuda' does not exist"),
        ("stores", {"element_state": ()}, r"adagrad keeps 1 elementwise and 0 row-wise states .* was given 0 and 0"),
        ("stores", {"row_state": (jnp.zeros((1, 128)),)}, "but was given 1 and 1"),
        (
            "stores",
            {"element_state": (jnp.zeros((8, 128), jnp.bfloat16),)},
            "optimizer state is kept in float32, but was given as",
        ),
        (
            "stores",
            {"element_state": (jnp.zeros((9, 128)),)},
            "'sum_of_squares' has 1152 elements, but the store it belongs to has",
        ),
        ("stores", {"weights": jnp.zeros(1024)}, r"a store of shape \(1024,\) has no lines"),
        (
            "call",
            {"gradients": jnp.zeros((2, 16))},
            r"gradients are float32 of shape \(2, 16\); give float32 of \(1, 16\)",
        ),
        ("call", {"gradients": jnp.zeros((1, 8))}, r"give float32 of \(1, 16\): bags, stored width"),
        ("call", {"gradients": jnp.zeros((1, 16), jnp.bfloat16)}, "gradients are bfloat16"),
        ("ids", {"slots": jnp.zeros(2, jnp.int32)}, r"1 ids have int32 slots of shape \(2,\); give int32, one each"),
        ("ids", {"weights": jnp.ones(2)}, r"1 ids have float32 weights of shape \(2,\); give float32, one each"),
        (
            "ids",
            {"logical_rows": jnp.zeros(1, jnp.uint32)},
            r"1 ids have uint32 logical rows of shape \(1,\); give uint32, one or two words each",
        ),
        ("ids", {"logical_rows": jnp.zeros((2, 1), jnp.uint32)}, r"1 ids have uint32 logical rows of shape \(2, 1\)"),
        ("ids", {"logical_rows": jnp.zeros((1, 1), jnp.int32)}, r"1 ids have int32 logical rows of shape \(1, 1\)"),
        ("slots", {"eps": jnp.zeros(2)}, r"eps of the slots has shape \(2,\), and first_row \(3,\); give one number"),
        ("call", {"slots": jax.tree.map(lambda x: x[:0], slots_of(16))}, "first_row of the slots has shape .* least"),
        ("call", {"step": 0}, "step is 0; updates are counted from 1"),
    ],
)
@pytest.mark.parametrize("operation", [sparse_update, row_statistics])
def test_an_update_when_the_call_is_wrong_then_an_error_says_how(
    operation, of: str, change: dict, message: str
) -> None:
    call = {
        "stores": Stores(weights=jnp.zeros((8, 128)), element_state=(jnp.zeros((8, 128)),)),
        "ids": Ids(rows=jnp.zeros(1, jnp.int32), slots=jnp.zeros(1, jnp.int32), offsets=jnp.array([0, 1], jnp.int32)),
        "gradients": jnp.zeros((1, 16)),
        "slots": slots_of(16),
        "step": jnp.int32(1),
        "optimizer": ROW_OPTIMIZERS["adagrad"],
        "width": 16,
    }
    if operation is sparse_update:
        call["seed"] = jnp.uint32(0)
    call |= change if of == "call" else {of: dataclasses.replace(call[of], **change)}
    with pytest.raises(ValueError, match=message):
        operation(**call)


def small_update(stores: Stores, num_ids: int, rule: str, **options) -> Stores:
    """An update of the first row of stores of width 16."""
    zeros = jnp.zeros(num_ids, jnp.int32)
    return sparse_update(
        stores,
        Ids(rows=zeros, slots=zeros, offsets=jnp.array([0, num_ids], jnp.int32)),
        jnp.zeros((1, 16)),
        slots=slots_of(16),
        step=1,
        seed=0,
        optimizer=ROW_OPTIMIZERS[rule],
        width=16,
        **options,
    )


@pytest.mark.parametrize("shape", [(1, 1), (2,), (2, 2), (2, 1, 1)])
def test_an_update_when_statistics_are_not_those_of_the_ids_then_an_error_says_what_they_are(shape) -> None:
    stores = Stores(weights=jnp.zeros((8, 128)), row_state=(jnp.zeros((3, 128)),))
    with pytest.raises(ValueError, match=r"statistics are float32 of shape .*; give float32 of \(2, 1\)"):
        small_update(stores, 2, "rowwise_adagrad", statistics=jnp.zeros(shape))


def test_an_update_that_draws_bits_when_ids_have_no_logical_rows_then_an_error_says_so() -> None:
    stores = Stores(weights=jnp.zeros((8, 128), jnp.bfloat16))
    with pytest.raises(ValueError, match="stochastic rounding needs the logical row of each id"):
        small_update(stores, 1, "sgd", storage_rounding="stochastic")
