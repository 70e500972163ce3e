"""sparse_update: the optimizer applied once to each row that a batch touches, in place.

Letters: n ids, G bags, w width of a row, k statistics.
"""

import dataclasses
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int32

from pallas_kernels.ids import Ids
from pallas_kernels.implementations import Implementation, implementation_of
from pallas_kernels.lookup import check_ids, check_store, is_empty, is_in_lines
from pallas_kernels.rounding import Rounding, draws_bits
from pallas_kernels.row_optimizers import STATISTICS_BLOCK, RowOptimizer
from pallas_kernels.slots import Slots
from pallas_kernels.stores import Stores


def sparse_update(
    stores: Stores,
    ids: Ids,
    gradients: Float[Array, "G w"],
    *,
    slots: Slots,
    step: ArrayLike,
    seed: ArrayLike,
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: Rounding = "nearest",
    statistics: Float[Array, "n k"] | None = None,
    enabled: ArrayLike = True,
    implementation: Implementation | None = None,
) -> Stores:
    """Updates every row that an id of the batch names, once, by the sum of the gradients of all its occurrences.

    For a row r: ``g = sum_i weights[i] * gradients[bag of i]`` over the ids i with ``rows[i] = r``, added in the order
    of the ids (in blocks of `xla.RUN_BLOCK` counted from the row's first id, then block after block); then
    ``optimizer.apply`` in float32; then rounding to the dtype of the weights. Rows that no id names keep their bits.

    Args:
        stores: Weights and state; donate them.
        ids: The ids of the batch.
        gradients: Gradient of the loss with respect to each pooled row.
        slots: Per-slot arrays.
        step: Number of this update, from 1.
        seed: Seed of the run.
        optimizer: The rule.
        width: Stored width of a row, in elements.
        storage_rounding: How weights are rounded to a bfloat16 or float16 store: to the nearest, or stochastically by
            `rounding.stochastic_round`. "split" rounds nothing: the bfloat16 store has the high 16 bits of each float32
            weight, and the update is that of float32 (Split-SGD-BF16, Kalamkar et al. 2020); see `rounding.joined`.
        statistics: For column shards: the rule's sums over the whole row, for each id, from `row_statistics` of all
            shards. None where the store holds whole rows.
        enabled: False: nothing changes, without a copy. It may be known late: the ids are sorted without it.
        implementation: Which one to use; None picks by platform and shape.

    Returns:
        Weights and state after the update.

    Raises:
        ValueError: A width or state that does not fit stores and rule, arrays of other shapes or dtypes, or an
            implementation that does not exist or cannot serve.
    """
    kernels = _checked(stores, ids, gradients, slots, optimizer, width, storage_rounding, implementation)
    if draws_bits(storage_rounding, stores.weights.dtype):
        ids.given_logical_rows()
    _check_statistics(statistics, ids, optimizer)
    if is_empty(ids.rows, ids.offsets):
        return stores
    return kernels.sparse_update(
        stores,
        ids,
        gradients,
        slots=slots,
        step=_number_of(step),
        seed=jnp.asarray(seed, jnp.uint32),
        optimizer=optimizer,
        width=width,
        storage_rounding=storage_rounding,
        statistics=statistics,
        enabled=jnp.asarray(enabled, jnp.bool),
    )


def row_statistics(
    stores: Stores,
    ids: Ids,
    gradients: Float[Array, "G w"],
    *,
    slots: Slots,
    step: ArrayLike,
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: Rounding = "nearest",
    implementation: Implementation | None = None,
) -> Float[Array, "n blocks k"]:
    """First pass of an update of column shards: what this shard adds to each row's statistics.

    The sums of blocks of 16 columns are kept apart: the shards' blocks, concatenated in column order and added with
    `row_optimizers.sum_blocks`, are bit for bit the statistics of the unsharded row, which `sparse_update` is then
    given. Arguments and errors are those of `sparse_update`, for a rule that declares statistics.

    Returns:
        For each id its row's partial sums: one for each block of 16 columns and each of the rule's k statistics.
    """
    kernels = _checked(stores, ids, gradients, slots, optimizer, width, storage_rounding, implementation)
    if is_empty(ids.rows, ids.offsets):
        blocks = max(1, width // STATISTICS_BLOCK)
        return jnp.zeros((ids.rows.size, blocks, len(optimizer.statistics)), jnp.float32)
    return kernels.row_statistics(
        stores,
        ids,
        gradients,
        slots=slots,
        step=_number_of(step),
        optimizer=optimizer,
        width=width,
        storage_rounding=storage_rounding,
    )


def _checked(
    stores: Stores,
    ids: Ids,
    gradients: Array,
    slots: Slots,
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: Rounding,
    implementation: Implementation | None,
) -> ModuleType:
    """Refuses a call that is wrong; else the module that serves it."""
    check_store(stores.weights, width)
    _check_state(stores, optimizer, storage_rounding)
    check_ids(ids.rows, ids.offsets, ids.weights)
    _check_gradients(ids, gradients, width)
    _check_slots(slots)
    return implementation_of(
        implementation,
        dtype=stores.weights.dtype,
        width=width,
        optimizer=optimizer,
        storage_rounding=storage_rounding,
        in_lines=all(is_in_lines(store) for store in jax.tree.leaves(stores)),
        largest_store=max(store.nbytes for store in jax.tree.leaves(stores)),
    )


def _number_of(step: ArrayLike) -> Int32[Array, ""]:
    if isinstance(step, int) and step < 1:
        raise ValueError(f"step is {step}; updates are counted from 1")
    return jnp.asarray(step, jnp.int32)


def _check_gradients(ids: Ids, gradients: Array, width: int) -> None:
    if ids.slots.shape != ids.rows.shape or ids.slots.dtype != jnp.int32:
        raise ValueError(
            f"{ids.rows.size} ids have {ids.slots.dtype} slots of shape {ids.slots.shape}; give int32, one each"
        )
    logical = ids.logical_rows
    if logical is not None and (
        logical.shape not in ((ids.rows.size, 1), (ids.rows.size, 2)) or logical.dtype != jnp.uint32
    ):
        raise ValueError(
            f"{ids.rows.size} ids have {logical.dtype} logical rows of shape {logical.shape}; give uint32, one or two "
            "words each"
        )
    wanted = (ids.offsets.size - 1, width)
    if gradients.shape != wanted or gradients.dtype != jnp.float32:
        raise ValueError(
            f"gradients are {gradients.dtype} of shape {gradients.shape}; give float32 of {wanted}: bags, stored width"
        )


def _check_slots(slots: Slots) -> None:
    shape = slots.first_row.shape
    for field in dataclasses.fields(slots):
        given = getattr(slots, field.name).shape
        if len(given) != 1 or given == (0,) or given != shape:
            raise ValueError(
                f"{field.name} of the slots has shape {given}, and first_row {shape}; give one number for each of at "
                "least one slot"
            )


def _check_statistics(statistics: Array | None, ids: Ids, optimizer: RowOptimizer) -> None:
    wanted = (ids.rows.size, len(optimizer.statistics))
    if statistics is not None and (statistics.shape != wanted or statistics.dtype != jnp.float32):
        raise ValueError(
            f"statistics are {statistics.dtype} of shape {statistics.shape}; give float32 of {wanted}: ids, the sums "
            f"that {optimizer.name} asks for"
        )


def _check_state(stores: Stores, optimizer: RowOptimizer, storage_rounding: Rounding) -> None:
    weights, element_state, row_state = stores.weights, stores.element_state, stores.row_state
    if storage_rounding == "split":
        if weights.dtype != jnp.bfloat16:
            raise ValueError(f"split weights have their high halves in bfloat16, but the store is {weights.dtype}")
        if not element_state or (element_state[-1].dtype, element_state[-1].shape) != (jnp.uint16, weights.shape):
            raise ValueError("split weights need a store of uint16, shaped like the weights, as the last element_state")
        element_state = element_state[:-1]
    given = (len(element_state), len(row_state))
    needed = (len(optimizer.element_state), len(optimizer.row_state))
    if given != needed:
        raise ValueError(
            f"{optimizer.name} keeps {needed[0]} elementwise and {needed[1]} row-wise states "
            f"({optimizer.element_state}, {optimizer.row_state}), but was given {given[0]} and {given[1]}"
        )
    for state in (*element_state, *row_state):
        if state.dtype != jnp.float32:
            raise ValueError(f"optimizer state is kept in float32, but was given as {state.dtype}")
    for name, state in zip(optimizer.element_state, element_state, strict=True):
        if state.size != weights.size:
            raise ValueError(
                f"state {name!r} has {state.size} elements, but the store it belongs to has {weights.size}"
            )
