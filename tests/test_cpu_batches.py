"""Batches that the C++ kernels cut up: bags of many tasks, several long runs, rows sorted digit by digit."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import Batch, pooled
from update_cases import HYPER

from pallas_kernels import ROW_OPTIMIZERS, Ids, Slots, Stores, cpu, xla

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the library of the cpu kernels was not built here")

# Rows of more ids than this are added up by several threads; `kLongRun` of runs.h.
LONG_RUN = 2048


def many_bags(num_bags: int, num_rows: int) -> Batch:
    """Bags of few ids, every third one empty, one of thousands among them, empty ones at the end."""
    random = np.random.default_rng(0)
    lengths = random.integers(0, 7, num_bags)
    lengths[::3] = lengths[-20:] = 0
    lengths[num_bags // 2] = 5000
    num_ids = int(lengths.sum())
    return Batch(
        rows=random.integers(0, num_rows, num_ids).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        weights=random.normal(size=num_ids).astype(np.float32),
    )


@pytest.mark.parametrize("width", [8, 128])
def test_lookup_of_thousands_of_bags_then_equals_numpys_float32_sum_in_the_order_of_ids(width: int) -> None:
    table = np.random.default_rng(1).normal(size=(512, width)).astype(np.float32)
    ids = many_bags(4000, 512)
    look_up = jax.jit(functools.partial(cpu.pooled_lookup, width=width, longest_bag=None))
    for weights in (None, ids.weights):
        found = look_up(table.reshape(-1, 128), ids.rows, ids.offsets, weights)
        np.testing.assert_array_equal(found, pooled(table, ids, weights, np.float32))


def test_lookup_of_thousands_of_bags_when_rows_are_subnormal_then_zeros() -> None:
    ids = many_bags(4000, 500)
    table = np.full((500, 128), 1e-40, np.float32)
    look_up = jax.jit(functools.partial(cpu.pooled_lookup, width=128, longest_bag=None))
    found = np.asarray(look_up(table, ids.rows, ids.offsets, None))
    np.testing.assert_array_equal(found.view(np.uint32), 0)


def updated(module: ModuleType, rule: str, stores: Stores, rows: np.ndarray, gradients: np.ndarray) -> list[np.ndarray]:
    """The arrays after one update from ids that are shared out evenly to bags."""
    width, num_ids = gradients.shape[1], len(rows)
    hyper = {name: jnp.array(values[:1], jnp.float32) for name, values in HYPER.items()}
    hyper |= {"learning_rate": jnp.ones(1), "weight_decay": jnp.zeros(1)}
    zeros = jnp.zeros(1, jnp.int32)
    slots = Slots(
        first_row=zeros,
        first_scalar=zeros,
        table=zeros.astype(jnp.uint32),
        first_column=zeros.astype(jnp.uint32),
        dim=jnp.full(1, width, jnp.float32),
        **hyper,
    )
    ids = Ids(
        rows=jnp.asarray(rows, jnp.int32),
        slots=jnp.zeros(num_ids, jnp.int32),
        offsets=jnp.linspace(0, num_ids, len(gradients) + 1).astype(jnp.int32),
        weights=None,
        logical_rows=None,
    )
    call = functools.partial(
        module.sparse_update,
        optimizer=ROW_OPTIMIZERS[rule],
        width=width,
        storage_rounding="nearest",
        statistics=None,
        enabled=jnp.bool(True),
    )
    new = jax.jit(call)(stores, ids, gradients, slots=slots, step=jnp.int32(1), seed=jnp.uint32(0))
    return [np.asarray(array) for array in jax.tree.leaves(new)]


def test_an_update_when_several_rows_have_thousands_of_ids_then_the_sums_of_xla_bit_for_bit() -> None:
    random = np.random.default_rng(0)
    rows = np.repeat([3, 9, 4, 0, 31], [LONG_RUN + 1, LONG_RUN + 500, LONG_RUN, 100, 3 * LONG_RUN])
    gradients = random.normal(size=(900, 8)).astype(np.float32)
    call = Stores(weights=jnp.zeros((2, 128))), random.permutation(rows), gradients
    # Weights of zero that only the gradients' sums are subtracted from.
    np.testing.assert_array_equal(updated(cpu, "sgd", *call)[0], updated(xla, "sgd", *call)[0])


def test_an_update_when_rows_are_wide_and_all_have_thousands_of_ids_then_memory_for_their_blocks() -> None:
    width, num_rows = 2048, 6
    # Small integers: exact whatever the order.
    gradients = np.random.default_rng(0).integers(-8, 9, (24, width)).astype(np.float32)
    rows = np.tile(np.arange(num_rows), LONG_RUN + 1)
    found = updated(cpu, "sgd", Stores(weights=jnp.zeros((num_rows * width // 128, 128))), rows, gradients)[0]
    ends = np.linspace(0, len(rows), len(gradients) + 1, dtype=np.float32).astype(np.int32)
    bags = np.repeat(np.arange(len(gradients)), np.diff(ends))
    counts = np.zeros((num_rows, len(gradients)))
    np.add.at(counts, (rows, bags), 1)
    np.testing.assert_array_equal(found.reshape(num_rows, width), -counts @ gradients)


# With a stride of 256, the rows of a bucket have their lowest digit in common.
@pytest.mark.parametrize("stride", [1, 256])
def test_an_update_when_the_store_has_many_rows_then_each_is_updated_once_as_by_xla(stride: int) -> None:
    num_rows, width = 300_000, 8
    random = np.random.default_rng(0)
    rows = random.choice(np.arange(0, num_rows, stride), 1000)[random.integers(0, 1000, 9000)]
    gradients = random.normal(size=(900, width)).astype(np.float32)
    state = jnp.zeros((num_rows * width // 128, 128))
    call = Stores(weights=state, element_state=(state,)), rows, gradients
    for found, wanted in zip(updated(cpu, "adagrad", *call), updated(xla, "adagrad", *call), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2.0**-21, atol=2.0**-20)
