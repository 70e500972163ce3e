"""Running sums and maxima of long arrays, and searches in them, in two levels: within rows of 1024, and over the rows.

A compiler for TPUs takes half a minute for one running sum over a million numbers, and two seconds for this. Integers
only, so that the result is that of one level.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

_ROW = 1024


def cumsum(x: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """Running sum: ``out[i] = x[0] + ... + x[i]``."""
    return _scan(x, jax.lax.cumsum, jnp.add, 0)


def cummax(x: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """Running maximum: ``out[i] = max(x[0], ..., x[i])``."""
    return _scan(x, jax.lax.cummax, jnp.maximum, jnp.iinfo(jnp.int32).min)


def offsets_of(lengths: Int32[Array, " n"]) -> Int32[Array, " n+1"]:
    """Where each of consecutive ranges begins, and the end of the last: 0, then the running sum of their lengths."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), cumsum(lengths.astype(jnp.int32))])


def places_of(marks: Bool[Array, " n"]) -> tuple[Int32[Array, " n"], Int32[Array, " n"]]:
    """Where the true entries are.

    Args:
        marks: The entries.

    Returns:
        The place of each true entry, in order, then n for the rest; and for each entry how many true ones there are up
        to it, itself included.
    """
    size = marks.shape[0]
    count = cumsum(marks.astype(jnp.int32))
    index = jnp.arange(size, dtype=jnp.int32)
    # Each false entry gets a place of its own beyond the end: indices stay distinct.
    target = jnp.where(marks, count - 1, size + index)
    places = jnp.full(size, size, jnp.int32).at[target].set(index, mode="drop", unique_indices=True)
    return places, count


def next_marked(marks: Bool[Array, " n"]) -> Int32[Array, " n"]:
    """For each entry the place of the first true one from there on; n if there is none."""
    size = marks.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    return -cummax(jnp.where(marks, -index, -size)[::-1])[::-1]


def counts_below(ascending: Int32[Array, " n"], limits: Int32[Array, " k"]) -> Int32[Array, " k"]:
    """How many of ascending numbers are below each limit.

    As `jax.numpy.searchsorted`, which is a loop of some twenty steps, each of several small programs on an accelerator.
    """
    size = ascending.shape[0]
    rows = jnp.pad(ascending, (0, -size % _ROW if size else _ROW), constant_values=jnp.iinfo(jnp.int32).max)
    rows = rows.reshape(-1, _ROW)
    # The last row whose first number is below the limit; those before are so as a whole.
    last = jnp.maximum(jnp.sum(rows[None, :, 0] < limits[:, None], axis=1, dtype=jnp.int32) - 1, 0)
    return last * _ROW + jnp.sum(rows[last] < limits[:, None], axis=1, dtype=jnp.int32)


def bags_of_ids(offsets: Int32[Array, " G+1"], num_ids: int) -> Int32[Array, " n"]:
    """Bag of each id; G for the ids beyond the last bag (padding)."""
    starts = jnp.zeros(num_ids + 1, jnp.int32).at[offsets[1:]].add(1, indices_are_sorted=True, mode="drop")
    return cumsum(starts[:num_ids])


def _scan(x: Int32[Array, " n"], scan: Callable, combine: Callable, neutral: int) -> Int32[Array, " n"]:
    size = x.shape[0]
    if size <= _ROW:
        return scan(x)
    rows = jnp.pad(x, (0, -size % _ROW), constant_values=neutral).reshape(-1, _ROW)
    within = scan(rows, axis=1)
    before = jnp.concatenate([jnp.full(1, neutral, x.dtype), _scan(within[:-1, -1], scan, combine, neutral)])
    return combine(within, before[:, None]).reshape(-1)[:size]
