"""What the machine at hand really has and does: memory that is asked for, bandwidths and rates that are measured.

Several processes agree on every figure, so that each makes the same plan: all must call these functions.
"""

import dataclasses
import math
import os
import socket
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float64

from pallas_kernels.linear import linear
from sharding import topology
from sharding.mesh import BY_DEVICE, CHIP, NODE, make_mesh, sharding_on
from sharding.topology import Platform, Topology

# Files in which a container's memory limit is, by version of cgroups (kernel.org, admin-guide/cgroup-v2 and -v1).
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_REPEATS = 2
_ROUNDS = 4
# Of an array that is copied, of which an eighth is exchanged: on each accelerator; on all devices of a CPU together,
# which share its memory.
_TIMED_BYTES = {"cpu": 2**26, "gpu": 2**29, "tpu": 2**29}
_TIMED_SIDE = {"cpu": 512, "gpu": 8192, "tpu": 8192}


def topology_of(mesh: Mesh) -> Topology:
    """The topology of devices that are there.

    Their memory is what the devices say, and the host's what it says. The other figures are those of the preset of
    their kind; where there is none they are measured.

    Args:
        mesh: The devices, some of them of this process.

    Returns:
        The topology.
    """
    preset = topology.preset_of(mesh.devices.flat[0].device_kind, *mesh.devices.shape)
    return measure(mesh) if preset is None else _with_real_memory(preset, mesh)


def measure(mesh: Mesh | None = None) -> Topology:
    """Measures the machine at hand, with all devices at work at once.

    Memory bandwidth is that of a copy; flops those of square matrix products; link bandwidth and latency those of a
    large and a small all-to-all over each axis (over an axis of one device nothing travels, at the memory's bandwidth).
    Solid-state storage is not looked for.

    Args:
        mesh: Its devices; unless given, one node for each process.

    Returns:
        What it reaches: somewhat less than a vendor's peaks.
    """
    if mesh is None:
        processes = jax.process_count()
        mesh = make_mesh(processes, jax.device_count() // processes)
    nodes, chips = mesh.devices.shape
    device = mesh.devices.flat[0]
    num_bytes, side = _TIMED_BYTES[device.platform], _TIMED_SIDE[device.platform]
    if device.platform == "cpu":
        num_bytes //= min(mesh.size, jax.local_device_count())
    hbm_bandwidth = 2 * num_bytes / _seconds(_copy_local, mesh, (num_bytes // 4,), jnp.float32)
    figures = {"hbm_bandwidth": hbm_bandwidth}
    for where, size, exchange in (("inside", chips, _exchange_chips_local), ("between", nodes, _exchange_nodes_local)):
        bandwidth, latency = hbm_bandwidth, 0.0
        if size > 1:
            words = num_bytes // 32 // size * size
            latency = _seconds(exchange, mesh, (size,), jnp.float32)
            seconds = _seconds(exchange, mesh, (words,), jnp.float32)
            # On a busy machine the small exchange can take as long as the large one.
            bandwidth = 4 * words * (size - 1) / size / max(seconds - latency, 0.1 * seconds)
        figures |= {f"{where}_bandwidth": bandwidth, f"{where}_latency": latency}
    for name, dtype in (("float32_flops", jnp.float32), ("bfloat16_flops", jnp.bfloat16)):
        figures[name] = 2 * side**3 / _seconds(_product_local, mesh, (side, side), dtype)
    return _of_figures(mesh, dict(zip(figures, _agreed(list(figures.values())), strict=True)))


def memory_alone(mesh: Mesh) -> Topology:
    """The topology of devices whose speed does not matter, such as where there is only one place for tables.

    Args:
        mesh: The devices, some of them of this process.

    Returns:
        The topology; all bandwidths and rates are 1.
    """
    figures = {"inside_latency": 0.0, "between_latency": 0.0}
    for name in ("hbm_bandwidth", "inside_bandwidth", "between_bandwidth", "float32_flops", "bfloat16_flops"):
        figures[name] = 1.0
    return _of_figures(mesh, figures)


def _of_figures(mesh: Mesh, figures: dict[str, float]) -> Topology:
    """The topology of a mesh, with its real memory."""
    nodes, chips = mesh.devices.shape
    device = mesh.devices.flat[0]
    platform: Platform = device.platform
    alone = Topology(
        name=f"{device.device_kind}:{nodes}x{chips}",
        platform=platform,
        device_kind=device.device_kind,
        nodes=nodes,
        chips=chips,
        hbm_bytes=0,
        host_memory_bytes=0,
        # On a CPU it is the same memory.
        host_memory_bandwidth=figures["hbm_bandwidth"] * chips if platform == "cpu" else 0.0,
        ssd_bytes=0,
        ssd_bandwidth=0.0,
        **figures,
    )
    return _with_real_memory(alone, mesh)


def device_memory_bytes(device: jax.Device, sharers: int = 1) -> int:
    """Memory that a device of this process can give to arrays.

    Args:
        device: The device.
        sharers: Devices in use on this host, which share its memory if they have none of their own, as CPUs.

    Returns:
        What its allocator may take; where it does not say, its share of this host's memory.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return host_memory_bytes() // sharers if limit is None else int(limit)


def host_memory_bytes() -> int:
    """Memory of this host, or of the container that this process runs in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    texts = [Path(path).read_text().strip() for path in _MEMORY_LIMITS if Path(path).is_file()]
    return min([physical, *(int(text) for text in texts if text.isdecimal())])


def _with_real_memory(figures: Topology, mesh: Mesh) -> Topology:
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    processes = _processes_on_this_host()
    memory = min((device_memory_bytes(device, len(local) * processes) for device in local), default=math.inf)
    nodes_here = max(1, len(local) * processes // figures.chips)
    memory, host = _agreed([memory, host_memory_bytes() / nodes_here], of_processes=np.min)
    return dataclasses.replace(figures, hbm_bytes=int(memory), host_memory_bytes=int(host))


def _processes_on_this_host() -> int:
    name = float(zlib.crc32(socket.gethostname().encode()))
    return int(np.sum(_of_all_processes([name]) == name))


def _agreed(figures: list[float], of_processes: Callable[..., np.ndarray] = np.median) -> list[float]:
    """Of each figure one value on all processes."""
    return [float(figure) for figure in of_processes(_of_all_processes(figures), axis=0)]


def _of_all_processes(figures: list[float]) -> Float64[np.ndarray, "processes figures"]:
    # As bits: JAX would round float64 to float32, and a memory up.
    bits = multihost_utils.process_allgather(np.array(figures, np.float64).view(np.uint32))
    return np.ascontiguousarray(bits, np.uint32).reshape(-1, 2 * len(figures)).view(np.float64)


def _seconds(work: Callable[[Array], Array], mesh: Mesh, shape: tuple[int, ...], dtype: DTypeLike) -> float:
    """The shortest of some times that the work takes on every device's own array of that shape."""
    first, *rest = shape
    sharding = sharding_on(mesh, BY_DEVICE)
    # Products of matrices of this value have it again, so nothing overflows.
    start = jax.jit(lambda: jnp.full((mesh.size * first, *rest), 1 / first, dtype), out_shardings=sharding)()

    def several_local(x: Array) -> Array:
        # In one program, which does not wait for the host or ask it for fresh memory each time.
        return lax.fori_loop(0, _ROUNDS, lambda _, y: work(y), x)

    program = jax.jit(jax.shard_map(several_local, mesh=mesh, in_specs=BY_DEVICE, out_specs=BY_DEVICE))
    times = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        program(start).block_until_ready()
        times.append(time.perf_counter() - begin)
    # The first includes compilation.
    return min(times[1:]) / _ROUNDS


def _copy_local(x: Array) -> Array:
    return x + 1


def _product_local(x: Array) -> Array:
    # As in dense layers, which hosts do not leave to XLA.
    return linear(x, x.astype(jnp.float32), None, False).astype(x.dtype)


def _exchange_chips_local(x: Array) -> Array:
    return lax.all_to_all(x, CHIP, split_axis=0, concat_axis=0, tiled=True)


def _exchange_nodes_local(x: Array) -> Array:
    return lax.all_to_all(x, NODE, split_axis=0, concat_axis=0, tiled=True)
