"""vary_alike: arrays inside `jax.shard_map`, which checks over which axes of the mesh each may differ."""

from typing import Any

import jax


def vary_alike(tree: Any, *others: Any) -> Any:
    """Casts arrays to vary over each axis over which one of them does, or one of others.

    Without it a function fails there that JAX cannot look into: one whose derivative is written out, since the gradient
    of an argument must vary over no more axes than the argument (the gradient of this cast is the sum over the
    devices), and a call of a kernel, whose results JAX takes to be the same on all devices.

    Args:
        tree: A tree of arrays.
        *others: Further trees of arrays.

    Returns:
        The first tree; outside of `jax.shard_map`, and in one with `check_vma=False`, as it is.
    """
    axes = frozenset[str]().union(*(_axes(array) for array in jax.tree.leaves((tree, others))))
    return jax.tree.map(lambda array: jax.lax.pcast(array, tuple(sorted(axes - _axes(array))), to="varying"), tree)


def _axes(array: Any) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying
