"""The sum of a tree of gradients over all devices, on request in half the bytes.

Of bfloat16, a reduction is two hops of codes and float32 sums: inside each node, then between nodes, each device adding
its own part of the numbers; then the sums are gathered, between nodes first. A device sends as much as a ring
all-reduce of bfloat16 would, but only what travels is rounded, never a sum on the way.

Error feedback: what rounding took from a device's numbers, or from the sums that it adds up, it adds to its next
gradients. So the sum over steps of what arrives differs from the true one by what is owed at the end, not by as many
roundings as steps. Source: Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019.

Letters: W = N * C devices, N nodes, C chips of a node, P numbers of the tree, S of them to each device.
"""

import itertools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from sharding.codec import decode, encode
from sharding.mesh import AXES, CHIP, NODE

# Numbers of an array that is added up by itself, and of a row of those that are not.
_LARGE = 2**16
_LANES = 128

AllReduce = Literal["float32", "bfloat16", "bfloat16_feedback"]


def all_reduce_local[Tree](
    gradients: Tree, how: AllReduce, residual: Float[Array, "1 P"] | None
) -> tuple[Tree, Float[Array, "1 P"] | None]:
    """Adds the gradients of all devices; to be called inside `jax.shard_map`.

    Args:
        gradients: This device's, float32.
        how: How they travel. With "_feedback", what rounding loses is not lost.
        residual: With feedback, what this device owes from earlier sums; zeros at first.

    Returns:
        The sums, the same bits on every device, and what it owes now.

    Raises:
        ValueError: No such way, or a residual where there is no feedback, or none where there is.
    """
    if how not in get_args(AllReduce):
        raise ValueError(f"all_reduce {how!r} does not exist; use one of {', '.join(get_args(AllReduce))}")
    if (residual is not None) != (how == "bfloat16_feedback"):
        raise ValueError(
            f"all_reduce {how!r} with{'out' if residual is None else ''} a residual: only feedback has one"
        )
    if how == "float32":
        return _sum(gradients), residual
    flat, unravel = ravel_pytree(gradients)
    owed = flat if residual is None else flat + residual[0]
    if jax.lax.axis_size(AXES) == 1:
        # Nothing travels, so nothing is rounded, and what was owed on more devices is paid.
        return unravel(owed), None if residual is None else jnp.zeros_like(residual)
    chips, nodes = jax.lax.axis_size(CHIP), jax.lax.axis_size(NODE)
    own = jnp.pad(owed, (0, -flat.size % (chips * nodes)))
    # By the chip that adds them up, then by the node.
    of_node, lost = _add(own.reshape(chips, -1), CHIP)
    of_all, lost_inside = _add(of_node.reshape(nodes, -1), NODE)
    codes = encode(of_all, "bfloat16")
    lost_here = of_all - decode(codes, "bfloat16")
    everyones = jax.lax.all_gather(jax.lax.all_gather(codes, NODE), CHIP)
    sums = decode(everyones, "bfloat16").reshape(-1)[: flat.size]
    if residual is None:
        return unravel(sums), None
    # The errors of sums are owed by whoever added them, in the place of what it added.
    lost_inside = lost_inside.at[jax.lax.axis_index(NODE)].add(lost_here)
    lost = lost.at[jax.lax.axis_index(CHIP)].add(lost_inside.reshape(-1))
    return unravel(sums), lost.reshape(-1)[None, : flat.size]


def _sum[Tree](gradients: Tree) -> Tree:
    """Adds each number up, small arrays side by side in one: TPUs do not add them beside arithmetic by themselves."""
    if jax.lax.axis_size(AXES) == 1:
        return gradients
    leaves, tree = jax.tree.flatten(gradients)
    large = [leaf.size >= _LARGE for leaf in leaves]
    flat, apart = ravel_pytree([leaf for leaf, is_large in zip(leaves, large, strict=True) if not is_large])
    joined = jnp.pad(flat, (0, -flat.size % _LANES)).reshape(-1, _LANES)
    *sums, joined = jax.lax.psum([*itertools.compress(leaves, large), joined], AXES)
    of_large, of_small = iter(sums), iter(apart(joined.reshape(-1)[: flat.size]))
    return jax.tree.unflatten(tree, [next(of_large if is_large else of_small) for is_large in large])


def _add(parts: Float[Array, "M S"], axis: str) -> tuple[Float[Array, " S"], Float[Array, "M S"]]:
    """Adds what the devices of an axis have for this one, in their order; and what rounding took from its parts."""
    if parts.shape[0] == 1:
        return parts[0], jnp.zeros_like(parts)
    codes = encode(parts, "bfloat16")
    come = jax.lax.all_to_all(codes, axis, split_axis=0, concat_axis=0, tiled=True)
    return jnp.sum(decode(come, "bfloat16"), axis=0), parts - decode(codes, "bfloat16")
