"""in_order: which of two things a program does first, where its exchanges run beside its arithmetic."""

import jax
from jax.sharding import Mesh

from sharding.mesh import is_of_hosts


def in_order[T](values: T, mesh: Mesh) -> T:
    """Values that are the same, but whoever uses one of them waits until all are there: an optimization barrier.

    For order alone, never for results. On hosts it is left out: there a device does one thing after another whatever
    the order, and values that are kept apart are written to memory and read back, a tenth of a small model's step.

    Args:
        values: A tree of arrays.
        mesh: The mesh of the program.
    """
    return values if is_of_hosts(mesh) else jax.lax.optimization_barrier(values)
