"""sparse_update on SparseCores: ids are sorted by row once; then every vector subcore updates the rows of its share.

Letters: n ids, G bags, w width of a row, S slots, C items of a chunk, U units of a block.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu_sc as plsc
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels import rounding
from pallas_kernels.ids import Ids
from pallas_kernels.mosaic_tpu.lines import LANES, RowShape, row_shape
from pallas_kernels.mosaic_tpu.units import whole_units
from pallas_kernels.row_optimizers import STATISTICS_BLOCK, RowOptimizer
from pallas_kernels.slots import Slots
from pallas_kernels.sparsecore.subcores import rows_within, subcore_mesh
from pallas_kernels.sparsecore.update_call import ShareCall, cuts_of
from pallas_kernels.sparsecore.update_kernel import update_shares
from pallas_kernels.sparsecore.work import Work, share_out
from pallas_kernels.stores import Stores
from pallas_kernels.target import current_target
from pallas_kernels.traced_rules import trace_rule

# Lines of gradients that one chunk gathers; twice as many, and of each store the lines of two blocks, fit into a
# subcore's memory.
_SEGMENTS_OF_CHUNK = 64
# An interpreted subcore takes several shares, so that what happens between shares is tested, too.
_SHARES_INTERPRETED = 3


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
    stochastic = rounding.draws_bits(storage_rounding, stores.weights.dtype)
    step_word, tables = step.astype(jnp.uint32), slots.table[ids.slots]
    refs = jax.tree.map(jax.new_ref, _on_lines(stores, row_shape(width)))
    _run(
        refs,
        ids,
        gradients,
        statistics,
        rounding.row_key(seed, step_word, tables, ids.given_logical_rows()) if stochastic else None,
        enabled,
        slots=slots,
        step=step,
        optimizer=optimizer,
        num_rows=stores.num_rows(width),
        storage_rounding=storage_rounding,
    )
    new = jax.tree.map(jax.freeze, refs)
    return jax.tree.map(lambda array, old: array.reshape(-1, old.shape[1])[: old.shape[0]], new, stores)


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
    num_ids, blocks = ids.rows.shape[0], max(1, width // STATISTICS_BLOCK)
    call, work, (lines,) = _run(
        _on_lines(stores, row_shape(width)),
        ids,
        gradients,
        None,
        None,
        jnp.bool(True),
        slots=slots,
        step=step,
        optimizer=optimizer,
        num_rows=stores.num_rows(width),
        storage_rounding=storage_rounding,
        only_statistics=True,
    )
    rank, place = work.unit_of_id
    lanes = (place * call.statistics_of_row)[:, None] + jnp.arange(call.statistics_of_row, dtype=jnp.int32)[None]
    of_ids = lines.at[jnp.maximum(rank, 0)[:, None], lanes].get(mode="promise_in_bounds")
    return jnp.swapaxes(of_ids.reshape(num_ids, -1, blocks), 1, 2)


def _on_lines(stores: Stores, shape: RowShape) -> Stores:
    """Weights and elementwise state in whole units of lines, row-wise state as [numbers]."""
    return Stores(
        weights=whole_units(stores.weights, shape),
        element_state=tuple(whole_units(state, shape) for state in stores.element_state),
        row_state=tuple(state.reshape(-1) for state in stores.row_state),
    )


def _run(
    stores: Stores,
    ids: Ids,
    gradients: Float[Array, "G w"],
    statistics: Float[Array, "n k"] | None,
    keys: UInt32[Array, " n"] | None,
    enabled: Bool[Array, ""],
    *,
    slots: Slots,
    step: Int32[Array, ""],
    optimizer: RowOptimizer,
    num_rows: int,
    storage_rounding: rounding.Rounding,
    only_statistics: bool = False,
) -> tuple[ShareCall, Work, Sequence[Array]]:
    """Runs the kernel; the stores, `_on_lines`, are references where it is to change them.

    Returns:
        What the kernel was told, and its outputs: the sums over rows of each unit, if they are asked for.
    """
    interpreted = current_target().interpreted
    shape, dtype = row_shape(gradients.shape[1]), stores.weights.dtype
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
        ids,
        gradients,
        statistics,
        slots,
        keys,
        enabled,
        num_rows=num_rows,
        cuts=[cut.units for cut in cuts],
        has_scalars=bool(stores.row_state),
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
    weights, states, low = stores.weights, stores.element_state[:num_states], stores.element_state[num_states:]
    of_cuts = [[weights, *states]] if dtype == jnp.float32 else [states, [weights, *low]][-len(cuts) :]
    operands = {
        "bounds": work.bounds,
        "words": work.words,
        "units": work.units,
        "sources": work.sources,
        "hyper": jnp.repeat(of_slots.reshape(-1), lanes),
        "stores": of_cuts,
        "scalars": stores.row_state,
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
