"""sparse_update on a TensorCore: ids are sorted by row once; then one kernel sums, applies the rule and writes back.

Letters: n ids, G bags, w width of a row, S slots, C ids of a chunk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels import rounding
from pallas_kernels.ids import Ids
from pallas_kernels.mosaic_tpu.lines import (
    LANES,
    interpreted,
    pad_columns,
    pad_to,
    round_up,
    row_shape,
)
from pallas_kernels.mosaic_tpu.sorted_ids import SortedIds, sort_ids
from pallas_kernels.mosaic_tpu.units import BUFFERS, units_of_rows, units_of_scalars, whole_units
from pallas_kernels.mosaic_tpu.update_kernel import Call, update_chunk
from pallas_kernels.row_optimizers import STATISTICS_BLOCK, RowOptimizer
from pallas_kernels.scans import next_marked
from pallas_kernels.slots import Slots
from pallas_kernels.stores import Stores

# Segments of one chunk's rows.
_SEGMENTS_OF_CHUNK = 256
_LONGEST_CHUNK = 256
# Vector registers that one value of a strip of rows takes.
_SEGMENTS_OF_STRIP = 32


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
    longest_chunk: int = _LONGEST_CHUNK,
) -> Stores:
    """See `pallas_kernels.sparse_update`; ``longest_chunk`` bounds the ids of one grid step, for tests."""
    draws = rounding.draws_bits(storage_rounding, stores.weights.dtype)
    words_of_id = list(ids.given_logical_rows().T) if draws else []
    call = _call(stores, ids, optimizer, width, longest_chunk)._replace(
        statistics=0 if statistics is None else statistics.shape[1],
        key_words=len(words_of_id),
    )
    words = {f"word {number}": word for number, word in enumerate(words_of_id)}
    sorted_ids = sort_ids(ids, statistics, words, num_rows=call.num_rows, num_slots=slots.table.shape[0])
    sorted_ids = sorted_ids._replace(
        rows=jnp.where(enabled, sorted_ids.rows, call.num_rows), count=jnp.where(enabled, sorted_ids.count, 0)
    )
    step_key = rounding.fold(rounding.mix(seed), step.astype(jnp.uint32))
    written = _run(call, sorted_ids, gradients, stores, slots, step, rounding.fold(step_key, slots.table))
    new = jax.tree.unflatten(jax.tree.structure(stores), written)
    return dataclasses.replace(new, weights=new.weights[: stores.weights.shape[0]])


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
    longest_chunk: int = _LONGEST_CHUNK,
) -> Float[Array, "n blocks k"]:
    """See `pallas_kernels.row_statistics`; ``longest_chunk`` as above."""
    del storage_rounding
    num_ids, blocks = ids.rows.shape[0], max(1, width // STATISTICS_BLOCK)
    call = _call(stores, ids, optimizer, width, longest_chunk)._replace(only_statistics=True)
    sorted_ids = sort_ids(ids, None, num_rows=call.num_rows, num_slots=slots.table.shape[0])
    sums = _run(call, sorted_ids, gradients, stores, slots, step, jnp.zeros_like(slots.table))[0]
    # The sums of a row stand where its last id is, in the sorted order.
    is_last = jnp.append(sorted_ids.rows[:-1] != sorted_ids.rows[1:], True)
    last_of_id = jnp.zeros(num_ids, jnp.int32).at[sorted_ids.order].set(next_marked(is_last), unique_indices=True)
    of_ids = sums[:, : blocks * len(optimizer.statistics)].at[last_of_id].get(mode="promise_in_bounds")
    return jnp.swapaxes(of_ids.reshape(num_ids, len(optimizer.statistics), blocks), 1, 2)


def _call(stores: Stores, ids: Ids, optimizer: RowOptimizer, width: int, longest_chunk: int) -> Call:
    shape = row_shape(width)
    chunk = min(longest_chunk, max(32, _SEGMENTS_OF_CHUNK // shape.segments_per_row), round_up(ids.rows.shape[0], 32))
    strip = max(8, _SEGMENTS_OF_STRIP // shape.segments_per_row // 8 * 8)
    num_states, num_scalars, dtype = len(stores.element_state), len(stores.row_state), stores.weights.dtype
    if dtype == jnp.float32:
        units = [units_of_rows(shape, dtype, 1 + num_states)]
    else:
        units = [units_of_rows(shape, dtype, 1)]
        units += [units_of_rows(shape, jnp.dtype(jnp.float32), num_states)] if num_states else []
    units += [units_of_scalars(num_scalars)] if num_scalars else []
    strip = min(strip, chunk)
    return Call(
        shape=shape,
        chunk=round_up(chunk, strip),
        strip=strip,
        num_rows=stores.num_rows(width),
        optimizer=optimizer,
        units=tuple(units),
        num_states=num_states,
        num_scalars=num_scalars,
        weighted=ids.weights is not None,
    )


def _in_chunks(ids: SortedIds, call: Call) -> dict[str, Int32[Array, "chunks 1 C"]]:
    """Rows and fields of the ids, in chunks."""
    # One chunk more: the chunk after the last is looked at, too.
    chunks = -(-ids.rows.shape[0] // call.chunk) + 1
    fill = {"row": call.num_rows}
    return {
        name: pad_to(x, chunks * call.chunk, fill.get(name, 0)).reshape(chunks, 1, call.chunk)
        for name, x in {"row": ids.rows, **ids.fields}.items()
    }


def _run(
    call: Call,
    ids: SortedIds,
    gradients: Float[Array, "G w"],
    stores: Stores,
    slots: Slots,
    step: Int32[Array, ""],
    slot_keys: UInt32[Array, " S"],
) -> tuple[Array, ...]:
    shape, chunk, streams = call.shape, call.chunk, _in_chunks(ids, call)
    arrays = tuple(jax.tree.leaves(dataclasses.replace(stores, weights=whole_units(stores.weights, shape))))
    num_chunks = streams["row"].shape[0] - 1
    here = pl.BlockSpec((1, 1, chunk), lambda c: (c, 0, 0), memory_space=pltpu.SMEM)
    after = pl.BlockSpec((1, 1, chunk), lambda c: (c + 1, 0, 0), memory_space=pltpu.SMEM)
    smem, vmem = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.VMEM)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    lines = pad_columns(gradients.astype(jnp.float32), shape.padded_width).reshape(-1, LANES)
    hyper = (slots.learning_rate, slots.weight_decay, slots.eps, slots.beta1, slots.beta2, slots.dim)
    slot_numbers = {
        "scalar": slots.first_scalar - slots.first_row,
        "key": slot_keys,
        "column": slots.first_column,
    }
    next_names = ("row", "bag", "slot")
    operands = [
        ids.count[None],
        step.astype(jnp.float32)[None],
        slot_numbers,
        pad_columns(jnp.stack(hyper, axis=1), LANES),
        streams,
        {name: streams[name] for name in next_names},
        lines,
        arrays,
    ]
    in_specs = [
        smem,
        smem,
        dict.fromkeys(slot_numbers, smem),
        vmem,
        dict.fromkeys(streams, here),
        dict.fromkeys(next_names, after),
        hbm,
        (hbm,) * len(arrays),
    ]
    if call.only_statistics:
        out_specs = [pl.BlockSpec((chunk, LANES), lambda c: (c, 0))]
        out_shape = [jax.ShapeDtypeStruct((num_chunks * chunk, LANES), jnp.float32)]
        aliases = {}
    else:
        out_specs = [hbm] * len(arrays)
        out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        first = len(jax.tree.leaves(operands)) - len(arrays)
        aliases = {first + i: i for i in range(len(arrays))}
    written = pl.pallas_call(
        functools.partial(update_chunk, call),
        grid=(num_chunks,),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[_scratch(call)],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpreted(),
        name="row_statistics" if call.only_statistics else "sparse_update",
    )(*operands)
    return tuple(written)


def _scratch(call: Call) -> dict:
    shape, chunk, num_units = call.shape, call.chunk, len(call.units)
    rows_of_chunk = pltpu.VMEM((chunk * shape.segments_per_row, LANES), jnp.float32)
    line_of_id = pltpu.VMEM((chunk, LANES), jnp.float32)
    words_of_id = pltpu.VMEM((chunk, LANES), jnp.uint32)
    stochastic = call.key_words > 0
    return {
        "units": [[units.buffer(chunk) for _ in range(units.num_stores)] for units in call.units],
        "gradients": pltpu.VMEM((2 * chunk * shape.segments_per_row, LANES), jnp.float32),
        "block": pltpu.VMEM((shape.segments_per_row, LANES), jnp.float32),
        "total": pltpu.VMEM((shape.segments_per_row, LANES), jnp.float32),
        "sums": rows_of_chunk,
        "rows": [rows_of_chunk] * (1 + call.num_states),
        "scalars": [line_of_id] * call.num_scalars,
        "hyper": line_of_id,
        "summands": pltpu.VMEM((call.strip * shape.segments_per_row, LANES), jnp.float32),
        "statistics": [line_of_id] * call.statistics,
        "keys": [words_of_id] * stochastic,
        "columns": [words_of_id] * stochastic,
        # Where the unit of each id of two chunks lies; the unit fetched last; the place of the next id in its run;
        # copies under way.
        "slots": [pltpu.SMEM((2 * chunk,), jnp.int32)] * num_units,
        "last_unit": pltpu.SMEM((num_units,), jnp.int32),
        "place": pltpu.SMEM((1,), jnp.int32),
        "num_reads": pltpu.SMEM((2,), jnp.int32),
        "num_writes": pltpu.SMEM((BUFFERS,), jnp.int32),
        "reads": pltpu.SemaphoreType.DMA((2,)),
        "writes": pltpu.SemaphoreType.DMA((BUFFERS,)),
    }
