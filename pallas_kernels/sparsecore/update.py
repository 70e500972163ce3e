"""sparse_update on SparseCores: ids are sorted by row once; then every vector subcore updates the rows of its share.

Letters: n ids, G bags, w width of a row, S slots, C items of a chunk, U units of a block.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu_sc as plsc
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels import rounding
from pallas_kernels.mosaic_tpu.lines import LANES, pad_to, round_up, row_shape
from pallas_kernels.row_optimizers import STATISTICS_BLOCK, RowOptimizer
from pallas_kernels.slots import Slots
from pallas_kernels.sparsecore.subcores import rows_within, subcore_mesh
from pallas_kernels.sparsecore.update_call import ShareCall, cuts_of
from pallas_kernels.sparsecore.update_kernel import update_shares
from pallas_kernels.sparsecore.work import Work, share_out
from pallas_kernels.target import current_target
from pallas_kernels.traced_rules import trace_rule

# Lines of gradients that one chunk gathers; twice as many, and of each store the lines of two blocks, fit into a
# subcore's memory.
_SEGMENTS_OF_CHUNK = 64
# An interpreted subcore takes several shares, so that what happens between shares is tested, too.
_SHARES_INTERPRETED = 3


def sparse_update(
    store: Float[Array, "lines line"],
    element_state: tuple[Float[Array, "state_lines line"], ...],
    row_state: tuple[Float[Array, "scalar_lines line"], ...],
    rows: Int32[Array, " n"],
    slots_of_ids: Int32[Array, " n"],
    offsets: Int32[Array, " G+1"],
    gradients: Float[Array, "G w"],
    weights: Float[Array, " n"] | None,
    *,
    logical_rows: UInt32[Array, "n words"],
    slots: Slots,
    step: Int32[Array, ""],
    seed: UInt32[Array, ""],
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: rounding.Rounding,
    statistics: Float[Array, "n k"] | None,
) -> tuple[
    Float[Array, "lines line"],
    tuple[Float[Array, "state_lines line"], ...],
    tuple[Float[Array, "scalar_lines line"], ...],
]:
    """See `pallas_kernels.sparse_update`."""
    if rows.shape[0] == 0 or gradients.shape[0] == 0:
        return store, element_state, row_state
    stochastic = storage_rounding == "stochastic" and store.dtype != jnp.float32
    step_word, tables = step.astype(jnp.uint32), slots.table[slots_of_ids]
    elements = [jax.new_ref(_whole_pairs(x)) for x in (store, *element_state)]
    scalars = [jax.new_ref(x.reshape(-1)) for x in row_state]
    _run(
        elements,
        scalars,
        (rows, slots_of_ids, offsets, gradients, weights),
        statistics,
        rounding.row_key(seed, step_word, tables, logical_rows) if stochastic else None,
        slots=slots,
        step=step,
        optimizer=optimizer,
        num_rows=_num_rows(store, width),
        storage_rounding=storage_rounding,
    )
    olds = (store, *element_state)
    new_store, *new_state = (jax.freeze(x)[: old.shape[0]] for x, old in zip(elements, olds, strict=True))
    new_scalars = (jax.freeze(x).reshape(old.shape) for x, old in zip(scalars, row_state, strict=True))
    return new_store, tuple(new_state), tuple(new_scalars)


def row_statistics(
    store: Float[Array, "lines line"],
    element_state: tuple[Float[Array, "state_lines line"], ...],
    row_state: tuple[Float[Array, "scalar_lines line"], ...],
    rows: Int32[Array, " n"],
    slots_of_ids: Int32[Array, " n"],
    offsets: Int32[Array, " G+1"],
    gradients: Float[Array, "G w"],
    weights: Float[Array, " n"] | None,
    *,
    slots: Slots,
    step: Int32[Array, ""],
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: rounding.Rounding = "nearest",
) -> Float[Array, "n blocks k"]:
    """See `pallas_kernels.row_statistics`."""
    num_ids, blocks = rows.shape[0], max(1, width // STATISTICS_BLOCK)
    if num_ids == 0 or gradients.shape[0] == 0:
        num_statistics = trace_rule(optimizer, width).num_statistics
        return jnp.zeros((num_ids, blocks, num_statistics), jnp.float32)
    call, work, (lines,) = _run(
        [_whole_pairs(x) for x in (store, *element_state)],
        [x.reshape(-1) for x in row_state],
        (rows, slots_of_ids, offsets, gradients, weights),
        None,
        None,
        slots=slots,
        step=step,
        optimizer=optimizer,
        num_rows=_num_rows(store, width),
        storage_rounding=storage_rounding,
        only_statistics=True,
    )
    rank, place = work.unit_of_id
    lanes = (place * call.statistics_of_row)[:, None] + jnp.arange(call.statistics_of_row, dtype=jnp.int32)[None]
    of_ids = lines.at[jnp.maximum(rank, 0)[:, None], lanes].get(mode="promise_in_bounds")
    return jnp.swapaxes(of_ids.reshape(num_ids, -1, blocks), 1, 2)


def _num_rows(store: Float[Array, "lines line"], width: int) -> int:
    """Rows that an int32 can name, the largest int32 left out: that is nobody's row."""
    return min(store.size // width, jnp.iinfo(jnp.int32).max)


def _whole_pairs(store: Array) -> Array:
    """The store; one of 16 bits with an odd number of lines is copied, with one more line: keep the number even."""
    return store if store.dtype.itemsize == 4 else pad_to(store, round_up(store.shape[0], 2))


def _run(
    elements: list[Any],
    scalars: list[Any],
    ids: tuple[Array, Array, Array, Float[Array, "G w"], Array | None],
    statistics: Float[Array, "n k"] | None,
    keys: UInt32[Array, " n"] | None,
    *,
    slots: Slots,
    step: Int32[Array, ""],
    optimizer: RowOptimizer,
    num_rows: int,
    storage_rounding: rounding.Rounding,
    only_statistics: bool = False,
) -> tuple[ShareCall, Work, Sequence[Array]]:
    """Runs the kernel; the stores are references where it is to change them.

    Returns:
        What the kernel was told, and its outputs: the sums over rows of each unit, if they are asked for.
    """
    width, interpreted = ids[3].shape[1], current_target().interpreted
    shape, dtype = row_shape(width), elements[0].dtype
    mesh = subcore_mesh()
    lanes = plsc.get_sparse_core_info().num_lanes
    rule = trace_rule(optimizer, lanes, scalar=(lanes,))
    of_slots = rule.scalars_of_slots(slots, step.astype(jnp.float32))
    num_states = len(optimizer.element_state)
    split = dtype != jnp.float32 and storage_rounding == "split"
    cuts = cuts_of(shape, dtype, num_states=num_states, split=split, only_statistics=only_statistics)
    chunk = rows_within(_SEGMENTS_OF_CHUNK, shape)
    shares = _SHARES_INTERPRETED if interpreted else mesh.size
    work, fields = share_out(
        *ids,
        statistics,
        slots,
        keys,
        num_rows=num_rows,
        cuts=[cut.units for cut in cuts],
        has_scalars=bool(scalars),
        chunk=chunk,
        shares=shares,
    )
    call = ShareCall(
        shape=shape,
        rule=rule,
        rounding=storage_rounding,
        lanes=lanes,
        chunk=chunk,
        cuts=cuts,
        fields=fields,
        scalars_of_slot=of_slots.shape[1],
        workers=mesh.size,
        subcores=mesh.num_subcores,
        shares=shares,
        only_statistics=only_statistics,
        interpreted=interpreted,
    )
    # The weights, with what is cut like them; before them, of a store of 16 bits, the states.
    states, low = elements[1 : 1 + num_states], elements[1 + num_states :]
    of_cuts = [[elements[0], *states]] if dtype == jnp.float32 else [states, [elements[0], *low]][-len(cuts) :]
    operands = {
        "bounds": work.bounds,
        "words": work.words,
        "units": work.units,
        "sources": work.sources,
        "hyper": jnp.repeat(of_slots.reshape(-1), lanes),
        "stores": of_cuts,
        "scalars": scalars,
    }
    scratch, out_type = call.scratch(), ()
    if only_statistics:
        out_type = (jax.ShapeDtypeStruct((work.units[0].shape[0], LANES), jnp.float32),)
    operand_leaves, operand_tree = jax.tree.flatten(operands)
    scratch_leaves, scratch_tree = jax.tree.flatten(scratch)

    def body(*refs: jax.Ref) -> None:
        inputs, outputs = refs[: len(operand_leaves)], refs[len(operand_leaves) : len(refs) - len(scratch_leaves)]
        given = jax.tree.unflatten(operand_tree, inputs)
        given |= {"statistics": outputs[0]} if outputs else {}
        held = jax.tree.unflatten(scratch_tree, refs[len(refs) - len(scratch_leaves) :])
        update_shares(call, given, held)

    name = "row_statistics_on_sparsecore" if only_statistics else "sparse_update_on_sparsecore"
    kernel = pl.kernel(body, out_type, mesh=mesh, scratch_types=scratch_leaves, name=name, interpret=interpreted)
    outputs: Any = kernel(*operand_leaves)  # pyright: ignore[reportCallIssue]  # It takes `body` for given later.
    return call, work, outputs
