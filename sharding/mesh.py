"""The mesh: two axes, NODE and CHIP, and how devices fill them. The only place that spells the axes' names."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.errors import InputError

NODE = "node"
CHIP = "chip"
AXES = (NODE, CHIP)

# One part for each device along the first axis, or along the second; and the same everywhere.
BY_DEVICE = PartitionSpec(AXES)
BY_DEVICE_SECOND = PartitionSpec(None, AXES)
REPLICATED = PartitionSpec()


def make_mesh(nodes: int = 1, chips: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of ``nodes`` times ``chips`` devices.

    Args:
        nodes: Size of NODE, the slow domain.
        chips: Size of CHIP, the fast domain.
        devices: Devices to fill it with, node by node; JAX's own unless given.

    Returns:
        The mesh, both axes of type Auto (as `jax.shard_map` wants them).

    Raises:
        InputError: There are fewer devices than that.
    """
    available = list(jax.devices() if devices is None else devices)
    needed = nodes * chips
    if nodes < 1 or chips < 1 or needed > len(available):
        raise InputError(
            f"a mesh of {nodes} x {chips} needs {needed} devices, but JAX sees {len(available)} "
            f"({available[0].platform}): make nodes * chips at most {len(available)}"
        )
    return Mesh(np.array(available[:needed]).reshape(nodes, chips), AXES, axis_types=(AxisType.Auto,) * 2)


def sharding_on(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """The sharding that a spec means on a mesh."""
    return NamedSharding(mesh, spec)
