"""sparse_update: the optimizer applied once to each row that a batch touches, in place."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int32, UInt32

from pallas_kernels.implementations import Implementation, implementation_of
from pallas_kernels.lookup import check_ids, check_store
from pallas_kernels.rounding import Rounding
from pallas_kernels.row_optimizers import RowOptimizer
from pallas_kernels.slots import Slots


def sparse_update(
    store: Float[Array, "lines line"],
    element_state: tuple[Float[Array, "state_lines line"], ...],
    row_state: tuple[Float[Array, "scalar_lines line"], ...],
    rows: Int32[Array, " n"],
    slots_of_ids: Int32[Array, " n"],
    offsets: Int32[Array, " G+1"],
    gradients: Float[Array, "G w"],
    weights: Float[Array, " n"] | None = None,
    *,
    logical_rows: UInt32[Array, "n words"],
    slots: Slots,
    step: ArrayLike,
    seed: ArrayLike,
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: Rounding = "nearest",
    statistics: Float[Array, "n k"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[
    Float[Array, "lines line"],
    tuple[Float[Array, "state_lines line"], ...],
    tuple[Float[Array, "scalar_lines line"], ...],
]:
    """Updates every row that an id of the batch names, once, by the sum of the gradients of all its occurrences.

    For a row r: ``g = sum_i weights[i] * gradients[bag of i]`` over the ids i with ``rows[i] = r``, added in the order
    of the ids (in blocks of `xla.RUN_BLOCK` counted from the row's first id, then block after block); then
    ``optimizer.apply`` in float32; then rounding to the store's dtype. Rows that no id names keep their bits. Donate
    stores and state, or XLA copies them whole.

    Args:
        store: Line store of weights, seen as ``[-1, width]``.
        element_state: One store of float32 for each of the optimizer's elementwise states, with as many elements as
            ``store``. With split weights, after them, one of uint16: the low halves.
        row_state: One store of float32 for each of its row-wise states, see `Slots.first_scalar`. That it has a number
            for every row is the caller's promise.
        rows: Row of each id, in canonical order (feature, sample, position in the bag). A row outside the store is
            ignored.
        slots_of_ids: Slot of each id. Equal rows have equal slots.
        offsets: Bags, as in `pooled_lookup`.
        gradients: Gradient of the loss with respect to each pooled row.
        weights: One weight for each id, or None for 1.
        logical_rows: Row of the table that each id names, as one or two 32-bit words, low word first: with the step
            and the seed it determines the random bits of rounding.
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
        implementation: Which one to use; None picks by platform and shape.

    Returns:
        Weights, elementwise and row-wise state after the update.

    Raises:
        ValueError: A width or state that does not fit store and rule, arrays of other shapes or dtypes, or an
            implementation that does not exist.
    """
    check_store(store, width)
    _check_state(store, element_state, row_state, optimizer, storage_rounding)
    check_ids(rows, offsets, weights)
    _check_gradients(rows, slots_of_ids, offsets, gradients, width)
    chosen = implementation_of(
        implementation, dtype=store.dtype, width=width, optimizer=optimizer, storage_rounding=storage_rounding
    )
    return chosen.sparse_update(
        store,
        element_state,
        row_state,
        rows,
        slots_of_ids,
        offsets,
        gradients,
        weights,
        logical_rows=logical_rows,
        slots=slots,
        step=_number_of(step),
        seed=jnp.asarray(seed, jnp.uint32),
        optimizer=optimizer,
        width=width,
        storage_rounding=storage_rounding,
        statistics=statistics,
    )


def row_statistics(
    store: Float[Array, "lines line"],
    element_state: tuple[Float[Array, "state_lines line"], ...],
    row_state: tuple[Float[Array, "scalar_lines line"], ...],
    rows: Int32[Array, " n"],
    slots_of_ids: Int32[Array, " n"],
    offsets: Int32[Array, " G+1"],
    gradients: Float[Array, "G w"],
    weights: Float[Array, " n"] | None = None,
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
    given.

    Args:
        store: As in `sparse_update`, like every other argument.
        element_state: As there.
        row_state: As there.
        rows: As there.
        slots_of_ids: As there.
        offsets: As there.
        gradients: As there.
        weights: As there.
        slots: As there.
        step: As there.
        optimizer: A rule that declares statistics.
        width: As there.
        storage_rounding: As there.
        implementation: As there.

    Returns:
        For each id its row's partial sums: one for each block of 16 columns and each of the rule's k statistics.

    Raises:
        ValueError: As in `sparse_update`.
    """
    check_store(store, width)
    _check_state(store, element_state, row_state, optimizer, storage_rounding)
    check_ids(rows, offsets, weights)
    _check_gradients(rows, slots_of_ids, offsets, gradients, width)
    chosen = implementation_of(
        implementation, dtype=store.dtype, width=width, optimizer=optimizer, storage_rounding=storage_rounding
    )
    return chosen.row_statistics(
        store,
        element_state,
        row_state,
        rows,
        slots_of_ids,
        offsets,
        gradients,
        weights,
        slots=slots,
        step=_number_of(step),
        optimizer=optimizer,
        width=width,
        storage_rounding=storage_rounding,
    )


def _number_of(step: ArrayLike) -> Int32[Array, ""]:
    if isinstance(step, int) and step < 1:
        raise ValueError(f"step is {step}; updates are counted from 1")
    return jnp.asarray(step, jnp.int32)


def _check_gradients(rows: Array, slots_of_ids: Array, offsets: Array, gradients: Array, width: int) -> None:
    if slots_of_ids.shape != rows.shape or slots_of_ids.dtype != jnp.int32:
        raise ValueError(
            f"{rows.size} ids have {slots_of_ids.dtype} slots of shape {slots_of_ids.shape}; give int32, one each"
        )
    wanted = (offsets.size - 1, width)
    if gradients.shape != wanted or gradients.dtype != jnp.float32:
        raise ValueError(
            f"gradients are {gradients.dtype} of shape {gradients.shape}; give float32 of {wanted}: bags, stored width"
        )


def _check_state(
    store: Float[Array, "lines line"],
    element_state: tuple[Float[Array, "state_lines line"], ...],
    row_state: tuple[Float[Array, "scalar_lines line"], ...],
    optimizer: RowOptimizer,
    storage_rounding: Rounding,
) -> None:
    if storage_rounding == "split":
        if store.dtype != jnp.bfloat16:
            raise ValueError(f"split weights have their high halves in bfloat16, but the store is {store.dtype}")
        if not element_state or (element_state[-1].dtype, element_state[-1].shape) != (jnp.uint16, store.shape):
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
        if state.size != store.size:
            raise ValueError(f"state {name!r} has {state.size} elements, but the store it belongs to has {store.size}")
