"""Both operations in plain jax.numpy: the reference that every kernel is tested against, and the fallback.

Letters: n ids, G bags, w width of a row, R rows of the store seen as [-1, w].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels import rounding
from pallas_kernels.ids import Ids
from pallas_kernels.ordered_sums import by_gathers, segment_sums
from pallas_kernels.row_optimizers import RowHyperparameters, RowOptimizer, RowValues, sum_blocks, sum_columns
from pallas_kernels.scans import bags_of_ids, places_of
from pallas_kernels.slots import Slots
from pallas_kernels.stores import MOST_ROWS, Stores, named_rows, place_of_rows, rows_view

# A row's gradients are added one after the other in blocks of this many, counted from the row's first; then the
# blocks are added one after the other. A fixed cut lets a kernel share out a hot row and still add the same bits.
RUN_BLOCK = 128
# Float32 vectors of a row's width that an update holds for each id at its height: sums of blocks and of rows. Weighted
# contributions are a third.
VECTORS_PER_ID = 2
# Positions of a bag that one iteration of the pooling loop covers.
MAX_UNROLL = 8


def unable(**call: object) -> None:
    """Why a call cannot be served: every call can."""
    del call


def _get(array: Array, rows: Int32[Array, " n"], width: int) -> Float[Array, "n w"]:
    """Rows of a store; zeros for a row outside it, be it negative or beyond the end."""
    view = rows_view(array, width)
    return view.at[place_of_rows(view, rows)].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def pooled_lookup(
    store: Float[Array, "lines line"],
    rows: Int32[Array, " n"],
    offsets: Int32[Array, " G+1"],
    weights: Float[Array, " n"] | None,
    *,
    width: int,
    longest_bag: int | None,
) -> Float[Array, "G w"]:
    """See `pallas_kernels.pooled_lookup`."""
    num_ids, num_bags = rows.shape[0], offsets.shape[0] - 1
    if weights is not None:
        # A row that does not exist is 0, and 0 times infinity would be something.
        weights = jnp.where((rows >= 0) & (rows < named_rows(store, width)), weights, 0.0)

    def contribution(ids: Int32[Array, " k"] | slice) -> Float[Array, "k w"]:
        vectors = _get(store, rows[ids], width).astype(jnp.float32)
        # A product that is added where it is made may be rounded once or twice, as the compiler pleases.
        return vectors if weights is None else jax.lax.optimization_barrier(vectors * weights[ids][:, None])

    if longest_bag is not None:

        def add(position: int, pooled: Float[Array, "G w"]) -> Float[Array, "G w"]:
            ids = offsets[:-1] + position
            inside = (ids < offsets[1:])[:, None]
            return pooled + jnp.where(inside, contribution(jnp.minimum(ids, num_ids - 1)), 0)

        pooled = jnp.zeros((num_bags, width), jnp.float32)
        return jax.lax.fori_loop(0, longest_bag, add, pooled, unroll=min(longest_bag, MAX_UNROLL))
    return segment_sums(contribution, bags_of_ids(offsets, num_ids), num_bags)


class _TouchedRows(NamedTuple):
    """The distinct rows of a call, ascending, then padding whose row is beyond the store.

    Attributes:
        rows: Row in the store.
        slots: Slot that the row belongs to.
        first_ids: One id of the row: its first in canonical order.
        run_of_id: For each id in the order given, the place of its row in `rows`.
        gradients: Sum of the row's gradients.
    """

    rows: Int32[Array, " n"]
    slots: Int32[Array, " n"]
    first_ids: Int32[Array, " n"]
    run_of_id: Int32[Array, " n"]
    gradients: Float[Array, "n w"]


def _touched_rows(ids: Ids, gradients: Float[Array, "G w"], num_rows: int) -> _TouchedRows:
    """Sorts the ids by row, stably, and sums the gradients of each row in the order in which its ids were given."""
    num_ids = ids.rows.shape[0]
    number = jnp.arange(num_ids, dtype=jnp.int32)
    keys, bags = ids.sort_keys(num_rows)
    sorted_rows, order = jax.lax.sort((keys, number), num_keys=1, is_stable=True)
    starts = jnp.concatenate([jnp.ones(1, bool), sorted_rows[1:] != sorted_rows[:-1]])
    first_places, upto = places_of(starts)
    runs = upto - 1

    place_in_run = number - first_places[runs]
    cut = starts | (place_in_run % RUN_BLOCK == 0)
    # The rows of padding form the last run; how they are added is nobody's business.
    long_runs = jnp.any((place_in_run >= RUN_BLOCK) & (sorted_rows < num_rows))

    bags_in_order = bags[order]
    weights = None if ids.weights is None else ids.weights[order]

    # A function, so that XLA reads them where it adds them and writes them nowhere.
    def contributions(places: Int32[Array, " k"] | slice) -> Float[Array, "k w"]:
        of_ids = gradients.at[bags_in_order[places]].get(mode="fill", fill_value=0)
        # As in a lookup.
        return of_ids if weights is None else jax.lax.optimization_barrier(of_ids * weights[places][:, None])

    def add_blocks() -> Float[Array, "n w"]:
        block_places, upto_block = places_of(cut)
        sums = segment_sums(contributions, upto_block - 1, num_ids)
        # Those of padding are dropped.
        of_rows = jnp.where(sorted_rows < num_rows, runs, num_ids)
        runs_of_blocks = of_rows.at[block_places].get(mode="fill", fill_value=num_ids)
        return segment_sums(lambda places: sums[places], runs_of_blocks, num_ids, ids_of_vector=RUN_BLOCK)

    def add_runs() -> Float[Array, "n w"]:
        return segment_sums(contributions, runs, num_ids)

    # Gathers take long to compile: one way for both. The second pass is over few blocks then, or over none.
    sums = add_blocks() if by_gathers() else jax.lax.cond(long_runs, add_blocks, add_runs)
    first_ids = order.at[first_places].get(mode="fill", fill_value=0)
    return _TouchedRows(
        rows=sorted_rows.at[first_places].get(mode="fill", fill_value=num_rows),
        slots=ids.slots[first_ids],
        first_ids=first_ids,
        run_of_id=jnp.zeros(num_ids, jnp.int32).at[order].set(runs, unique_indices=True),
        gradients=sums,
    )


def _hyperparameters(slots: Slots, slot: Int32[Array, " n"], step: Int32[Array, ""]) -> RowHyperparameters:
    return RowHyperparameters(
        learning_rate=slots.learning_rate[slot][:, None],
        weight_decay=slots.weight_decay[slot][:, None],
        eps=slots.eps[slot][:, None],
        beta1=slots.beta1[slot][:, None],
        beta2=slots.beta2[slot][:, None],
        dim=slots.dim[slot][:, None],
        step=step.astype(jnp.float32),
    )


def _read(
    stores: Stores, touched: _TouchedRows, slots: Slots, width: int, storage_rounding: rounding.Rounding
) -> tuple[RowValues, Int32[Array, " n"]]:
    """Reads weights and state of the touched rows; also returns where their row-wise state lies."""
    slot = touched.slots
    scalars = slots.first_scalar[slot] + touched.rows - slots.first_row[slot]
    scalars = jnp.where(touched.rows < stores.num_rows(width), scalars, MOST_ROWS)

    def rows_of(array: Array) -> Array:
        return _get(array, touched.rows, width)

    element_state = stores.element_state
    if storage_rounding == "split":
        weights = rounding.joined(rows_of(stores.weights), rows_of(element_state[-1]))
        element_state = element_state[:-1]
    else:
        weights = rows_of(stores.weights).astype(jnp.float32)
    values = RowValues(
        weights=weights,
        element_state=tuple(rows_of(state) for state in element_state),
        row_state=tuple(_get(state, scalars, 1) for state in stores.row_state),
    )
    return values, scalars


def _sums_of_blocks(
    values: RowValues, touched: _TouchedRows, slots: Slots, step: Int32[Array, ""], optimizer: RowOptimizer
) -> tuple[Float[Array, "n blocks"], ...]:
    """Sums of each of a rule's summands over blocks of columns."""
    # A product that is added where it is made may be rounded once or twice, as the compiler pleases; shards and whole
    # rows are different programs and must agree. So summands are made first, then added; and since they share no
    # hyperparameter with the rule that is applied after them, they share no product either.
    hyper = _hyperparameters(jax.lax.optimization_barrier(slots), touched.slots, step)
    summands = jax.lax.optimization_barrier(optimizer.summands(values, touched.gradients, hyper))
    return tuple(sum_columns(x) for x in summands)


def row_statistics(
    stores: Stores,
    ids: Ids,
    gradients: Float[Array, "G w"],
    *,
    slots: Slots,
    step: Int32[Array, ""],
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: rounding.Rounding,
) -> Float[Array, "n blocks k"]:
    """See `pallas_kernels.row_statistics`."""
    touched = _touched_rows(ids, gradients, stores.num_rows(width))
    values, _ = _read(stores, touched, slots, width, storage_rounding)
    sums = jnp.stack(_sums_of_blocks(values, touched, slots, step, optimizer), axis=-1)
    return sums[touched.run_of_id]


def sparse_update(
    stores: Stores,
    ids: Ids,
    gradients: Float[Array, "G w"],
    *,
    slots: Slots,
    step: Int32[Array, ""],
    seed: UInt32[Array, ""],
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: rounding.Rounding,
    statistics: Float[Array, "n k"] | None,
    enabled: Bool[Array, ""],
) -> Stores:
    """See `pallas_kernels.sparse_update`."""
    dtype = stores.weights.dtype
    touched = _touched_rows(ids, gradients, stores.num_rows(width))
    touched = touched._replace(rows=jnp.where(enabled, touched.rows, stores.num_rows(width)))
    old, scalars = _read(stores, touched, slots, width, storage_rounding)
    hyper = _hyperparameters(slots, touched.slots, step)
    if statistics is None:
        sums = tuple(sum_blocks(blocks) for blocks in _sums_of_blocks(old, touched, slots, step, optimizer))
    else:
        given = statistics[touched.first_ids]
        sums = tuple(given[:, k : k + 1] for k in range(given.shape[1]))
    new = optimizer.apply(old, touched.gradients, hyper, jax.lax.optimization_barrier(sums))

    new_weights, new_state = new.weights, new.element_state
    if storage_rounding == "split":
        new_weights, low = rounding.halves(new_weights)
        new_state = (*new_state, low)
    elif rounding.draws_bits(storage_rounding, dtype):
        keys = rounding.row_key(
            seed, step.astype(jnp.uint32), slots.table[touched.slots], ids.given_logical_rows()[touched.first_ids]
        )
        columns = slots.first_column[touched.slots][:, None] + jnp.arange(width, dtype=jnp.uint32)[None]
        bits = rounding.column_bits(keys[:, None], columns)
        new_weights = rounding.stochastic_round(new_weights, bits, dtype)

    # Reading must be over before writing begins: else XLA for GPUs fuses the two and copies each store to part them.
    new_weights, new_state, new_scalars, places, scalars = jax.lax.optimization_barrier(
        (new_weights, new_state, new.row_state, touched.rows, scalars)
    )

    def write(array: Array, places: Int32[Array, " n"], values: Array) -> Array:
        view = rows_view(array, values.shape[1])
        at_places, values = view.at[place_of_rows(view, places)], values.astype(array.dtype)
        written = at_places.set(values, mode="drop", indices_are_sorted=True, wrap_negative_indices=False)
        return written.reshape(array.shape)

    return Stores(
        weights=write(stores.weights, places, new_weights),
        element_state=tuple(write(a, places, v) for a, v in zip(stores.element_state, new_state, strict=True)),
        row_state=tuple(write(a, scalars, v) for a, v in zip(stores.row_state, new_scalars, strict=True)),
    )
