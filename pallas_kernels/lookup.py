"""pooled_lookup: the rows of each bag, weighted and summed, over all tables of a width in one call."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.implementations import Implementation, implementation_of

LINE_BYTES = 512


def pooled_lookup(
    store: Float[Array, "lines line"],
    rows: Int32[Array, " n"],
    offsets: Int32[Array, " G+1"],
    weights: Float[Array, " n"] | None = None,
    *,
    width: int,
    longest_bag: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "G w"]:
    """Looks rows up and pools them: ``out[g] = sum_i weights[i] * store_row[rows[i]]`` over ids i of bag g.

    The sum runs in float32 and in the order of the ids. An empty bag gives zeros. Unpooled lookup is the same call
    with bags of at most one id.

    Args:
        store: Line store, 512 bytes a line, seen as ``[-1, width]``. Lines of another length will do, but fewer
            implementations can serve them.
        rows: Row of each id in that view, bag after bag. A row outside the store contributes nothing.
        offsets: Ids of bag g are those from ``offsets[g]`` up to ``offsets[g + 1]``; ids from ``offsets[-1]`` on are
            padding. Non-decreasing, ``offsets[0] = 0``.
        weights: One weight for each id, or None for 1.
        width: Stored width of a row, in elements: 8, 16, 32, 64, 128 or a multiple of 128.
        longest_bag: No bag has more ids: the caller's promise, worth making where most bags are about that long, since
            an implementation may then loop over positions instead of ids. None promises nothing.
        implementation: Which one to use; None picks by platform and shape.

    Returns:
        One pooled row for each bag, float32.

    Raises:
        ValueError: A width that the store cannot hold, arrays of other shapes or dtypes, or an implementation that does
            not exist or cannot serve.
    """
    check_store(store, width)
    check_ids(rows, offsets, weights)
    chosen = implementation_of(
        implementation, dtype=store.dtype, width=width, in_lines=is_in_lines(store), largest_store=store.nbytes
    )
    if is_empty(rows, offsets):
        return jnp.zeros((offsets.size - 1, width), jnp.float32)
    return chosen.pooled_lookup(store, rows, offsets, weights, width=width, longest_bag=longest_bag)


def is_in_lines(store: Array) -> bool:
    """Whether a store is one of lines of `LINE_BYTES`.

    Args:
        store: Weights or state.
    """
    return store.shape[1:] == (LINE_BYTES // store.dtype.itemsize,)


def is_empty(rows: Array, offsets: Array) -> bool:
    """Whether there are no ids or no bags.

    Args:
        rows: Row of each id.
        offsets: Bags.
    """
    return not rows.size or offsets.size == 1


def check_ids(rows: Array, offsets: Array, weights: Array | None) -> None:
    """Raises ValueError unless there are ids and bags in int32, and one float32 weight for each id, or none.

    Args:
        rows: Row of each id.
        offsets: Bags.
        weights: Weights.
    """
    if rows.ndim != 1 or rows.dtype != jnp.int32:
        raise ValueError(f"rows are {rows.dtype} of shape {rows.shape}; give int32, one for each id")
    if offsets.ndim != 1 or offsets.size == 0 or offsets.dtype != jnp.int32:
        raise ValueError(f"offsets are {offsets.dtype} of shape {offsets.shape}; give int32, one more than bags")
    if weights is not None and (weights.shape != rows.shape or weights.dtype != jnp.float32):
        raise ValueError(
            f"{rows.size} ids have {weights.dtype} weights of shape {weights.shape}; give float32, one each"
        )


def check_store(store: Float[Array, "lines line"], width: int) -> None:
    """Raises ValueError unless rows of this width lie in the store.

    Args:
        store: Line store.
        width: Stored width of a row.
    """
    if width not in (8, 16, 32, 64) and (width < 128 or width % 128):
        raise ValueError(f"width {width} is not stored: rows are padded to 8, 16, 32, 64, 128 or a multiple of 128")
    if store.ndim != 2:
        raise ValueError(f"a store of shape {store.shape} has no lines; give [lines, elements of a line]")
    if store.size % width:
        raise ValueError(f"a store of {store.size} elements is no whole number of rows of width {width}")
    if store.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"a store of {store.dtype} is not supported; use float32, bfloat16 or float16")
