"""The ids of an update, sorted by row; and the gradients of a row, added in the order of its ids.

A *run* is the ids of one row. Its gradients are added in blocks of `xla.RUN_BLOCK` ids counted from its first, and
then the blocks are added. Most runs are one block, which the program that updates the row adds itself. The blocks of
longer runs are added before, each by a program of its own, so that a row that half of the batch names holds up nobody.

Letters: n ids, G bags, w width of a row, C pieces of RUN_BLOCK ids of the sorted ids.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.ids import Ids
from pallas_kernels.mosaic_gpu.rows import row_layout, run_kernel, store, unfused, wait_for_warps
from pallas_kernels.scans import places_of
from pallas_kernels.xla import RUN_BLOCK


class Runs(NamedTuple):
    """The distinct rows of a call, ascending, and their ids.

    Attributes:
        count: Number of runs; entries of the other arrays beyond it mean nothing.
        rows: Row of each run.
        slots: Its slot.
        first_ids: Its first id in canonical order.
        starts: Where it starts among the sorted ids; it ends where the next one starts.
        run_of_id: Run of each id in canonical order; `count` or more for an id that names no row.
        blocks: First and last place of each block of a long run, see `place_of_block`; -1 and -1 where there is none.
    """

    count: Int32[Array, " 1"]
    rows: Int32[Array, " n"]
    slots: Int32[Array, " n"]
    first_ids: Int32[Array, " n"]
    starts: Int32[Array, " n+1"]
    run_of_id: Int32[Array, " n"]
    blocks: tuple[Int32[Array, " 2C"], Int32[Array, " 2C"]]


class SortedGradients(NamedTuple):
    """Where the gradient of each of the sorted ids is.

    Attributes:
        bags: Bag of each sorted id.
        weights: Its weight, or None for 1.
        gradients: Gradients of the bags.
        zero: See `rows.opaque_zero`.
    """

    bags: Int32[Array, " n"]
    weights: Float[Array, " n"] | None
    gradients: Float[Array, "G w"]
    zero: Int32[Array, " 1"]


class SortedId(NamedTuple):
    """What leads to the gradient of one id.

    Attributes:
        bag: Its bag.
        weight: Its weight, or None for 1.
    """

    bag: Int32[Array, ""]
    weight: Float[Array, ""] | None


def sort_ids(
    ids: Ids, gradients: Float[Array, "G w"], zero: Int32[Array, " 1"], *, num_rows: int
) -> tuple[Runs, SortedGradients]:
    """Sorts the ids by row, stably."""
    num_ids, num_bags = ids.rows.shape[0], gradients.shape[0]
    number = jnp.arange(num_ids, dtype=jnp.int32)
    keys, bags = ids.sort_keys(num_rows)
    sorted_rows, order = lax.sort((keys, number), num_keys=1, is_stable=True)
    first = jnp.concatenate([jnp.ones(1, bool), sorted_rows[1:] != sorted_rows[:-1]])
    places, upto = places_of(first)
    run_of_place = upto - 1
    starts = jnp.concatenate([places, jnp.full(1, num_ids, jnp.int32)])
    first_ids = order.at[places].get(mode="fill", fill_value=0)
    runs = Runs(
        count=jnp.sum(first & (sorted_rows < num_rows), dtype=jnp.int32)[None],
        rows=sorted_rows.at[places].get(mode="fill", fill_value=0),
        slots=ids.slots[first_ids],
        first_ids=first_ids,
        starts=starts,
        run_of_id=jnp.zeros(num_ids, jnp.int32).at[order].set(run_of_place, unique_indices=True),
        blocks=_blocks_of_long_runs(sorted_rows < num_rows, starts[run_of_place], starts[run_of_place + 1]),
    )
    # The bag of an id beyond the last bag is never asked for its gradient, but may be loaded.
    sorted_bags = jnp.minimum(bags[order], num_bags - 1)
    return runs, SortedGradients(sorted_bags, None if ids.weights is None else ids.weights[order], gradients, zero)


def place_of_block(start: Int32[Array, "..."], is_first: Any) -> Int32[Array, "..."]:
    """Where the sum of a block is kept that starts at a place among the sorted ids.

    Among RUN_BLOCK neighbouring ids at most one block starts a long run and at most one continues one.
    """
    return start // RUN_BLOCK * 2 + jnp.where(is_first, 1, 0)


def _blocks_of_long_runs(
    valid: Array, start_of_run: Int32[Array, " n"], end_of_run: Int32[Array, " n"]
) -> tuple[Int32[Array, " 2C"], Int32[Array, " 2C"]]:
    """`Runs.blocks`, from the start and the end of the run at each place."""
    num_ids = valid.shape[0]
    place = jnp.arange(num_ids, dtype=jnp.int32)
    within = place - start_of_run
    starts_block = valid & (end_of_run - start_of_run > RUN_BLOCK) & (within % RUN_BLOCK == 0)
    last = jnp.minimum(place + RUN_BLOCK, end_of_run) - 1

    def gathered(values: Int32[Array, " n"], is_first: bool) -> Int32[Array, " C"]:
        kept = jnp.where(starts_block & ((within == 0) == is_first), values, -1)
        return jnp.pad(kept, (0, -num_ids % RUN_BLOCK), constant_values=-1).reshape(-1, RUN_BLOCK).max(axis=1)

    starts, ends = (jnp.stack([gathered(x, False), gathered(x, True)], axis=1).reshape(-1) for x in (place, last))
    return starts, ends


def sum_blocks_of_long_runs(runs: Runs, ids: SortedGradients) -> Float[Array, "2C w"]:
    """Sums of the blocks of long runs, where `place_of_block` says; anything elsewhere."""
    num_blocks, width = runs.blocks[0].shape[0], ids.gradients.shape[1]
    return run_kernel(
        _sum_block,
        (runs.blocks, ids),
        jax.ShapeDtypeStruct((num_blocks, width), jnp.float32),
        grid={"block": num_blocks},
        name="sum_blocks_of_long_runs",
    )


def _sum_block(operands: tuple, sums: Any) -> None:
    (starts, ends), ids = operands
    block = lax.axis_index("block")
    start = starts[block]

    @pl.when(start >= 0)
    def _() -> None:
        columns = sums.shape[1]
        nothing = plgpu.layout_cast(jnp.zeros(columns, jnp.float32), row_layout(columns))
        zero = ids.zero[0]
        total = add_in_order(
            nothing,
            start,
            ends[block] + 1,
            functools.partial(sorted_id, ids),
            lambda one: weighted(gradient_of_bag(ids, one.bag), one.weight, zero),
        )
        store(sums.at[block], total)


def sorted_id(ids: Any, place: Int32[Array, ""]) -> SortedId:
    """In a kernel: one of the sorted ids."""
    return SortedId(ids.bags[place], None if ids.weights is None else ids.weights[place])


def gradient_of_bag(ids: Any, bag: Int32[Array, ""]) -> Float[Array, " w"]:
    """In a kernel: the gradient of a bag, loaded."""
    return plgpu.load(ids.gradients.at[bag], layout=row_layout(ids.gradients.shape[1]), optimized=False)


def weighted(gradient: Float[Array, " w"], weight: Float[Array, ""] | None, zero: Int32[Array, ""]) -> Array:
    """In a kernel: the gradient of an id from that of its bag. See `rows.unfused`."""
    return gradient if weight is None else unfused(gradient * weight, zero)


def add_in_order[Name](
    total: Float[Array, " w"],
    start: Int32[Array, ""],
    stop: Int32[Array, ""],
    name_of: Callable[[Int32[Array, ""]], Name],
    vector_of: Callable[[Name], Float[Array, " w"]],
    *,
    in_flight: int = 4,
) -> Float[Array, " w"]:
    """In a kernel: ``total`` plus the vectors of the numbers from `start` to ``stop - 1``, added in that order.

    Args:
        total: What they are added to. Never -0.
        start: The first number.
        stop: The number after the last.
        name_of: What names the vector of a number; loaded one step ahead.
        vector_of: The vector of a name.
        in_flight: Vectors that are loaded at a time.
    """
    nothing = jnp.zeros_like(total)

    def names(first: Int32[Array, ""]) -> list[Name]:
        return [name_of(jnp.minimum(first + k, stop - 1)) for k in range(in_flight)]

    def step(carry: tuple) -> tuple:
        first, here, total = carry
        vectors = [vector_of(name) for name in here]
        following = names(first + in_flight)
        # No load moves beyond this; else the compiler moves these to where the next step waits for them.
        wait_for_warps()
        for k, vector in enumerate(vectors):
            # A sum that began with +0 is never -0, so that adding +0 changes nothing.
            inside = jnp.broadcast_to(first + k < stop, total.shape)
            total = total + lax.select(inside, vector, nothing)
        return first + in_flight, following, total

    return lax.while_loop(lambda carry: carry[0] < stop, step, (start, names(start), total))[2]
