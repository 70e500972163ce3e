"""The mesh: two axes, NODE and CHIP, and how devices fill them. The only place that spells the axes' names."""

from collections.abc import Sequence
from itertools import groupby

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

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

    A node is filled from one process where processes have as many devices, else from one slice, so that CHIP stays
    inside the fast domain; nodes are spread evenly over the processes. Where neither is possible, devices follow each
    other by slice, process and number.

    Args:
        nodes: Size of NODE, the slow domain.
        chips: Size of CHIP, the fast domain.
        devices: Devices to choose from, in any order; JAX's own unless given.

    Returns:
        The mesh, both axes of type Auto (as `jax.shard_map` wants them).

    Raises:
        InputError: There are fewer devices than that.
    """
    available = list(jax.devices() if devices is None else devices)
    needed = nodes * chips
    if nodes < 1 or chips < 1:
        raise InputError(f"a mesh of {nodes} x {chips} has no device: make nodes and chips at least 1")
    if needed > len(available):
        platform = available[0].platform
        of_host = (
            f', or jax.config.update("jax_num_cpu_devices", {needed}) before anything else' if platform == "cpu" else ""
        )
        raise InputError(
            f"a mesh of {nodes} x {chips} needs {needed} devices, but JAX sees {len(available)} ({platform}): make "
            f"nodes * chips at most {len(available)}{of_host}"
        )
    filled = np.empty(needed, object)
    filled[:] = _in_order(available, nodes, chips)
    return Mesh(filled.reshape(nodes, chips), AXES, axis_types=(AxisType.Auto,) * 2)


def _in_order(devices: Sequence[jax.Device], nodes: int, chips: int) -> list[jax.Device]:
    ordered = sorted(devices, key=lambda device: (*_process(device), device.id))
    for domain in (_process, _slice):
        domains = [list(members) for _, members in groupby(ordered, key=domain)]
        rooms = [len(members) // chips for members in domains]
        if sum(rooms) >= nodes:
            counts = _even_counts(rooms, nodes)
            chosen = (members[: count * chips] for members, count in zip(domains, counts, strict=True))
            return [device for members in chosen for device in members]
    return ordered[: nodes * chips]


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _process(device: jax.Device) -> tuple[int, int]:
    return _slice(device), device.process_index


def _even_counts(rooms: Sequence[int], total: int) -> list[int]:
    """Deals ``total`` out to places with limited room, as evenly as the rooms allow."""
    counts = [0] * len(rooms)
    while sum(counts) < total:
        emptiest = min((i for i in range(len(rooms)) if counts[i] < rooms[i]), key=lambda i: counts[i])
        counts[emptiest] += 1
    return counts


def check_mesh(mesh: Mesh) -> None:
    """Raises InputError unless the mesh has the axes NODE and CHIP, in this order."""
    if mesh.axis_names != AXES:
        raise InputError(f"the mesh has axes {mesh.axis_names}, but tables need {AXES}: make it with make_mesh")


def is_of_hosts(mesh: Mesh) -> bool:
    """Whether its devices are parts of hosts, whose exchanges are work of the same cores."""
    return mesh.devices.flat[0].platform == "cpu"


def sharding_on(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """The sharding that a spec means on a mesh."""
    return NamedSharding(mesh, spec)


def device_number() -> Int32[Array, ""]:
    """Number of this device, node by node; to be called inside `jax.shard_map`."""
    return jax.lax.axis_index(AXES)
