"""Sums of segments, each added up in the order of its ids, on any platform.

XLA adds up segments by a scatter. On GPUs that is one of float atomics, which add in any order and, depending on
jaxlib, one after the other where many ids name one row. There the sums here are gathers alone.

Letters: n ids, S segments, w width of a vector.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.scans import offsets_of
from pallas_kernels.target import current_target

# Positions of segments are added range by range, each twice as long as the one before, as long as that leaves many
# segments out; then by a loop that ends where the longest segment does.
_MOST_LEFT_OUT = 32
# Most positions that one program adds. More is quicker to run and slower to compile.
_STEP = 4


def by_gathers() -> bool:
    """Whether the sums of the program that is traced are gathers: on GPUs."""
    return current_target().platform == "gpu"


def segment_sums(
    vectors: Callable[[Int32[Array, " k"] | slice], Float[Array, "k w"]],
    segments: Int32[Array, " n"],
    num_segments: int,
    *,
    ids_of_vector: int = 1,
) -> Float[Array, "S w"]:
    """Sums of consecutive segments: ``out[s] = vectors[i] + vectors[i + 1] + ...`` over the ids of segment s.

    Args:
        vectors: The vectors of some ids, given an index into the n: numbers, or the slice of all.
        segments: Segment of each id, ascending; ids of segments from S on are dropped.
        num_segments: S.
        ids_of_vector: The caller's promise that every vector of a segment but the last stands for so many of the n.
    """
    if not by_gathers():
        return jax.ops.segment_sum(vectors(slice(None)), segments, num_segments, indices_are_sorted=True)
    lengths = jnp.zeros(num_segments, jnp.int32).at[segments].add(1, indices_are_sorted=True, mode="drop")
    return _sums_by_gathers(vectors, offsets_of(lengths)[:-1], lengths, segments.shape[0], ids_of_vector)


def _sums_by_gathers(
    vectors: Callable[[Int32[Array, " k"]], Float[Array, "k w"]],
    starts: Int32[Array, " S"],
    lengths: Int32[Array, " S"],
    num_ids: int,
    ids_of_vector: int,
) -> Float[Array, "S w"]:
    """First the first vector of each segment; then the next ones of those that have more, which are ever fewer.

    With k ids a vector, at most n / (p k + 1) segments have more than p vectors. Sorted by length, they come first.
    """
    numbers = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    falling, order = jax.lax.sort((-lengths, numbers), num_keys=1, is_stable=True)

    def vectors_at(position: Int32[Array, ""] | int, first: Array, length: Array) -> Float[Array, "k w"]:
        inside = position < length
        # All that have no more read the same vector, which is in the cache.
        return jnp.where(inside[:, None], vectors(jnp.where(inside, first + position, 0)), 0)

    def with_more(sums: Float[Array, "S w"], begin: int, end: Int32[Array, ""] | int, step: int) -> Float[Array, "S w"]:
        """Adds the vectors of positions from `begin` up to `end` to the sums of segments that have so many."""
        some = order[: num_ids // (begin * ids_of_vector + 1)]
        first, length = starts[some], lengths[some]

        def add(number: Int32[Array, ""] | int, head: Float[Array, "k w"]) -> Float[Array, "k w"]:
            for position in range(step):
                head = head + vectors_at(begin + number * step + position, first, length)
            return head

        head = jax.lax.fori_loop(0, (end - begin + step - 1) // step, add, sums[some])
        return sums.at[some].set(head, unique_indices=True)

    sums, begin = vectors_at(0, starts, lengths), 1
    while begin * ids_of_vector < _MOST_LEFT_OUT:
        sums, begin = with_more(sums, begin, 2 * begin, min(begin, _STEP)), 2 * begin
    return with_more(sums, begin, jnp.maximum(-falling[0], begin), _STEP)
