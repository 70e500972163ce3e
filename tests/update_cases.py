"""Stores, slots and batches for sparse_update.

Letters: R rows, w columns.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from implementation_cases import device_of, skip_unless_served
from kernel_cases import NUM_BAGS, NUM_IDS, NUM_ROWS, Batch, lines_of
from row_oracle import ELEMENT_STATES, ROW_STATES

from pallas_kernels import ROW_OPTIMIZERS, Ids, Slots, Stores, sparse_update

# Three shards lie one after the other in the store; no two agree in a hyperparameter.
ROWS_PER_SHARD = NUM_ROWS // 3
HYPER = {
    "learning_rate": (0.1, 0.03, 0.5),
    "weight_decay": (0.01, 0.0, 0.2),
    "eps": (1e-8, 1e-3, 1e-5),
    "beta1": (0.9, 0.5, 0.0),
    "beta2": (0.999, 0.9, 0.99),
}


def slots_of(width: int, **changes: jax.Array) -> Slots:
    slots = Slots(
        first_row=jnp.arange(3, dtype=jnp.int32) * ROWS_PER_SHARD,
        first_scalar=jnp.arange(3, dtype=jnp.int32) * 128,
        table=jnp.array([101, 7, 2**32 - 1], jnp.uint32),
        first_column=jnp.zeros(3, jnp.uint32),
        # What a mean divides by: fewer columns where some are padding, more where others are elsewhere.
        dim=jnp.array([width, width - 3, 2 * width], jnp.float32),
        **{name: jnp.array(values, jnp.float32) for name, values in HYPER.items()},
    )
    return dataclasses.replace(slots, **changes)


def fresh_stores(rule: str, rows: np.ndarray, *, scalar_lines: int = 3) -> Stores:
    """The stores of one rule: those rows, and state of zeros."""
    num_lines = rows.size // 128
    return Stores(
        weights=lines_of(rows),
        element_state=tuple(jnp.zeros((num_lines, 128)) for _ in range(ELEMENT_STATES[rule])),
        row_state=tuple(jnp.zeros((scalar_lines, 128)) for _ in range(ROW_STATES[rule])),
    )


def bits_of(stores: Stores) -> list[np.ndarray]:
    """Every array, as integers, so that NaN equals NaN and -0 is not 0."""
    arrays = [np.asarray(a) for a in jax.tree.leaves(stores)]
    return [a.view(np.uint16 if a.dtype.itemsize == 2 else np.uint32) for a in arrays]


@functools.cache
def compiled(implementation: str, rule: str, width: int, storage_rounding: str = "nearest"):
    return jax.jit(
        functools.partial(
            sparse_update,
            optimizer=ROW_OPTIMIZERS[rule],
            width=width,
            storage_rounding=storage_rounding,
            implementation=implementation,
        )
    )


def ids_of(batch: Batch, weights: np.ndarray | None = None) -> Ids:
    """What an update is given of a batch."""
    rows = batch.rows
    return Ids(
        rows=rows,
        slots=np.where((rows >= 0) & (rows < NUM_ROWS), rows // ROWS_PER_SHARD, 0).astype(np.int32),
        logical_rows=(rows % ROWS_PER_SHARD).astype(np.uint32)[:, None],
        offsets=batch.offsets,
        weights=weights,
    )


def update(
    implementation: str,
    rule: str,
    stores: Stores,
    batch: Batch,
    gradients: np.ndarray,
    *,
    step: int = 1,
    seed: int = 0,
    weights: np.ndarray | None = None,
    slots: Slots | None = None,
    storage_rounding: str = "nearest",
    statistics: jax.Array | None = None,
    enabled: bool = True,
    **changes: np.ndarray,
) -> Stores:
    """One update; `changes` are fields of the ids."""
    width = gradients.shape[1]
    dtype = stores.weights.dtype
    skip_unless_served(implementation, dtype=dtype, width=width, rule=rule, storage_rounding=storage_rounding)
    with device_of(implementation):
        return compiled(implementation, rule, width, storage_rounding)(
            stores,
            dataclasses.replace(ids_of(batch, weights), **changes),
            gradients,
            slots=slots_of(width) if slots is None else slots,
            step=jnp.int32(step),
            seed=jnp.uint32(seed),
            statistics=statistics,
            enabled=jnp.bool(enabled),
        )


def gradients_of(width: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(NUM_BAGS, width)).astype(np.float32)


def a_batch(seed: int = 0, *, num_rows: int = NUM_ROWS) -> Batch:
    random = np.random.default_rng(seed)
    return Batch(
        rows=random.integers(0, num_rows, NUM_IDS).astype(np.int32),
        offsets=np.sort(np.concatenate([[0, NUM_IDS], random.integers(0, NUM_IDS, NUM_BAGS - 1)])).astype(np.int32),
        weights=random.normal(size=NUM_IDS).astype(np.float32),
    )


def numbers_of_rows(stores: Stores, width: int) -> list[np.ndarray]:
    """Weights and elementwise state as [R, w], row-wise state as [R]."""
    elements = [np.asarray(array).reshape(NUM_ROWS, width) for array in (stores.weights, *stores.element_state)]
    return elements + [np.asarray(array)[:, :ROWS_PER_SHARD].reshape(NUM_ROWS) for array in stores.row_state]
