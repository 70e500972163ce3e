"""sparse_update and row_statistics as Pallas Mosaic GPU kernels (Hopper and later): what the kernel is given.

Letters: n ids, G bags, w width of a row, k statistics.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels import rounding
from pallas_kernels.ids import Ids
from pallas_kernels.mosaic_gpu.rows import opaque_zero
from pallas_kernels.mosaic_gpu.runs import SortedId, sort_ids, sum_blocks_of_long_runs
from pallas_kernels.mosaic_gpu.update_kernel import Operands, UpdateKernel
from pallas_kernels.row_optimizers import STATISTICS_BLOCK, RowOptimizer
from pallas_kernels.slots import Slots
from pallas_kernels.stores import Stores


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
    kernel = UpdateKernel.of(optimizer, stores.weights.dtype, width, storage_rounding)
    refs, num_rows = jax.tree.map(jax.new_ref, _by_row(stores, width)), stores.num_rows(width)
    operands = _operands(kernel, refs, ids, gradients, slots, step, num_rows=num_rows)
    runs = operands.runs._replace(count=jnp.where(enabled, operands.runs.count, 0))
    operands, first_ids = operands._replace(runs=runs), runs.first_ids
    if statistics is not None:
        operands = operands._replace(statistics=statistics[first_ids])
    if kernel.is_stochastic:
        tables = slots.table[operands.runs.slots]
        keys = rounding.row_key(seed, step.astype(jnp.uint32), tables, ids.given_logical_rows()[first_ids])
        operands = operands._replace(keys=keys)
    kernel.run(operands, (), name=f"sparse_update_{optimizer.name}")
    new = jax.tree.map(jax.freeze, operands.stores)
    return jax.tree.map(lambda array, old: array.reshape(old.shape), new, stores)


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
    kernel = UpdateKernel.of(optimizer, stores.weights.dtype, width, storage_rounding)
    num_ids, blocks = ids.rows.shape[0], width // min(STATISTICS_BLOCK, width)
    by_row, num_rows = _by_row(stores, width), stores.num_rows(width)
    operands = _operands(kernel, by_row, ids, gradients, slots, step, num_rows=num_rows)
    shape = (num_ids, kernel.rule.num_statistics, blocks)
    sums = kernel.run(operands, jax.ShapeDtypeStruct(shape, jnp.float32), name=f"row_statistics_{optimizer.name}")
    runs = operands.runs.run_of_id
    return jnp.where((runs < operands.runs.count)[:, None, None], jnp.swapaxes(sums[runs], 1, 2), 0)


def _by_row(stores: Stores, width: int) -> Stores:
    """Weights and elementwise state as [rows, width], row-wise state as [numbers]."""
    return Stores(
        weights=stores.weights.reshape(-1, width),
        element_state=tuple(state.reshape(-1, width) for state in stores.element_state),
        row_state=tuple(state.reshape(-1) for state in stores.row_state),
    )


def _operands(
    kernel: UpdateKernel,
    stores: Stores,
    ids: Ids,
    gradients: Float[Array, "G w"],
    slots: Slots,
    step: Int32[Array, ""],
    *,
    num_rows: int,
) -> Operands:
    runs, sorted_ids = sort_ids(ids, gradients, opaque_zero(ids.rows), num_rows=num_rows)
    # Of each run, so that a program need not look up what it has just looked up.
    starts = jnp.minimum(runs.starts[:-1], ids.rows.shape[0] - 1)
    numbers = runs.rows - slots.first_row[runs.slots] + slots.first_scalar[runs.slots]
    return Operands(
        stores=stores,
        runs=runs,
        ids=sorted_ids,
        lengths=runs.starts[1:] - runs.starts[:-1],
        first_ids=SortedId(
            bag=sorted_ids.bags[starts], weight=None if sorted_ids.weights is None else sorted_ids.weights[starts]
        ),
        numbers=numbers if stores.row_state else None,
        first_columns=lax.bitcast_convert_type(slots.first_column, jnp.int32),
        block_sums=sum_blocks_of_long_runs(runs, sorted_ids),
        scalars=kernel.rule.scalars_of_slots(slots, step.astype(jnp.float32)),
    )
