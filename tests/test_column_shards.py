"""Updates of column shards in two passes equal those of whole rows, bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementation_cases import device_of, each_implementation
from kernel_cases import NOWHERE, NUM_ROWS, lines_of, table_of
from update_cases import (
    a_batch,
    bits_of,
    fresh_stores,
    gradients_of,
    ids_of,
    numbers_of_rows,
    slots_of,
    update,
)

from pallas_kernels import ROW_OPTIMIZERS, Stores, row_statistics
from pallas_kernels.row_optimizers import sum_blocks


def columns_of(stores: Stores, width: int, columns: slice) -> Stores:
    """The stores of a column shard."""

    def cut(lines: jax.Array) -> jax.Array:
        return lines_of(np.asarray(lines).reshape(NUM_ROWS, width)[:, columns].copy())

    element_state = tuple(cut(state) for state in stores.element_state)
    return dataclasses.replace(stores, weights=cut(stores.weights), element_state=element_state)


@functools.cache
def compiled_statistics(implementation: str, rule: str, width: int):
    return jax.jit(
        functools.partial(row_statistics, optimizer=ROW_OPTIMIZERS[rule], width=width, implementation=implementation)
    )


@each_implementation
@pytest.mark.parametrize("rule", ["rowwise_adagrad", "partial_rowwise_adam", "lamb"])
@pytest.mark.parametrize(
    "shards",
    [(slice(0, 16), slice(16, 32)), pytest.param((slice(0, 32), slice(32, 64)), marks=pytest.mark.slow)],
    ids=["narrow", "wide"],
)
def test_column_shards_given_the_rows_statistics_then_equal_the_whole_row_bit_for_bit(
    implementation: str, rule: str, shards: tuple[slice, ...]
) -> None:
    width = shards[-1].stop
    whole = fresh_stores(rule, table_of(width))
    parts = [columns_of(whole, width, shard) for shard in shards]
    slots = slots_of(width)
    for step in (1, 2, 3):
        ids, gradients = a_batch(step), gradients_of(width, seed=step)
        whole = update(implementation, rule, whole, ids, gradients, step=step, slots=slots, weights=ids.weights)
        with device_of(implementation):
            of_blocks = [
                compiled_statistics(implementation, rule, shard.stop - shard.start)(
                    part,
                    ids_of(ids, ids.weights),
                    gradients[:, shard],
                    slots=slots,
                    step=jnp.int32(step),
                )
                for shard, part in zip(shards, parts, strict=True)
            ]
        blocks = jnp.concatenate(of_blocks, axis=1)
        statistics = jnp.concatenate([sum_blocks(blocks[:, :, k]) for k in range(blocks.shape[2])], axis=1)
        parts = [
            update(
                implementation,
                rule,
                part,
                ids,
                gradients[:, shard],
                step=step,
                slots=dataclasses.replace(slots, first_column=jnp.full(3, shard.start, jnp.uint32)),
                weights=ids.weights,
                statistics=statistics,
            )
            for shard, part in zip(shards, parts, strict=True)
        ]
        for shard, part in zip(shards, parts, strict=True):
            for wanted, result in zip(bits_of(columns_of(whole, width, shard)), bits_of(part), strict=True):
                np.testing.assert_array_equal(result, wanted)


@each_implementation
def test_statistics_then_each_id_of_a_row_has_its_sums_in_the_stated_order(implementation: str) -> None:
    # The squares of float16 numbers are exact: nothing but their sums is rounded.
    width, rows = 32, table_of(32, dtype=np.float16).astype(np.float32)
    ids = a_batch(num_rows=40)
    ids = dataclasses.replace(ids, rows=np.concatenate([np.array(NOWHERE, np.int32), ids.rows[4:]]))
    with device_of(implementation):
        found = compiled_statistics(implementation, "lamb", width)(
            fresh_stores("lamb", rows), ids_of(ids), gradients_of(width), slots=slots_of(width), step=jnp.int32(1)
        )
    squared_weights = rows.reshape(NUM_ROWS, 2, 16) ** 2
    while squared_weights.shape[-1] > 1:
        half = squared_weights.shape[-1] // 2
        squared_weights = squared_weights[..., :half] + squared_weights[..., half:]
    np.testing.assert_array_equal(found[4:, :, 0], squared_weights[ids.rows[4:], :, 0])


@each_implementation
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_of_a_column_shard_then_the_bits_of_the_whole_rows_columns(
    implementation: str, dtype
) -> None:
    rows = table_of(32, dtype=dtype)
    ids, gradients = a_batch(), gradients_of(32)
    whole = update(implementation, "sgd", Stores(weights=lines_of(rows)), ids, gradients, storage_rounding="stochastic")
    for first in (0, 16):
        columns = slice(first, first + 16)
        shard = update(
            implementation,
            "sgd",
            Stores(weights=lines_of(rows[:, columns].copy())),
            ids,
            gradients[:, columns],
            slots=slots_of(16, first_column=jnp.full(3, first, jnp.uint32)),
            storage_rounding="stochastic",
        )
        np.testing.assert_array_equal(numbers_of_rows(shard, 16)[0], numbers_of_rows(whole, 32)[0][:, columns])
