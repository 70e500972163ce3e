"""Targets of ahead-of-time compilation: meshes of accelerators that this machine does not have.

Needs the extra `aot`: libtpu for TPUs; a CUDA plugin, ptxas and libdevice for GPUs. The environment must say so before
JAX is imported: ``JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1``. What is compiled
for a target cannot be read back from JAX's compilation cache: turn the cache off.
"""

import dataclasses
import importlib.util
from collections.abc import Sequence

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from sharding.errors import InputError
from sharding.mesh import make_mesh
from sharding.topology import Topology, tpu_slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cores:
    """What XLA's GPU compiler asks of a GPU, in the words of its GpuTargetConfigProto; bytes, and GHz."""

    cuda_compute_capability: tuple[int, int]
    core_count: int
    fpus_per_core: int
    l2_cache_size: int
    clock_rate_ghz: float
    shared_memory_per_core: int
    shared_memory_per_block_optin: int


_A100 = _Cores(
    cuda_compute_capability=(8, 0),
    core_count=108,
    fpus_per_core=64,
    l2_cache_size=41_943_040,
    clock_rate_ghz=1.41,
    shared_memory_per_core=167_936,
    shared_memory_per_block_optin=166_912,
)
_H100 = _Cores(
    cuda_compute_capability=(9, 0),
    core_count=132,
    fpus_per_core=128,
    l2_cache_size=52_428_800,
    clock_rate_ghz=1.98,
    shared_memory_per_core=233_472,
    shared_memory_per_block_optin=232_448,
)
_B200 = _Cores(
    cuda_compute_capability=(10, 0),
    core_count=148,
    fpus_per_core=128,
    l2_cache_size=132_644_864,
    clock_rate_ghz=1.965,
    shared_memory_per_core=233_472,
    shared_memory_per_block_optin=232_448,
)
# As CUDA reports them (platform.md, "Compiling for accelerators without having them").
_CORES = {"zionex": _A100, "a100-80": _A100, "h100": _H100, "h200": _H100, "b200": _B200}
# The fields that are the same for all, from the same place.
_TARGET = """
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
gpu_device_info {{
  name: "{name}"
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores.core_count}
  fpus_per_core: {cores.fpus_per_core}
  memory_bandwidth: {hbm_bandwidth}
  device_memory_size: {hbm_bytes}
  l2_cache_size: {cores.l2_cache_size}
  clock_rate_ghz: {cores.clock_rate_ghz}
  shared_memory_per_core: {cores.shared_memory_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {cores.shared_memory_per_block_optin}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
"""
_COMPILERS = {"gpu": ("jax_plugins.xla_cuda13", "nvidia.cu13"), "tpu": ("libtpu",)}


def target_mesh(topology: Topology) -> Mesh:
    """A mesh of devices that this machine does not have, to lower and compile programs for.

    Nothing can be put on it: give programs shapes (`jax.ShapeDtypeStruct`) with shardings on the mesh.

    Args:
        topology: A preset, from `parse_topology`.

    Returns:
        The mesh of its NODE times CHIP devices; chips of a node are on one host, or on neighbouring ones.

    Raises:
        InputError: The compilers for it are not installed, or the environment hides them.
    """
    missing = [name for name in _COMPILERS[topology.platform] if not _is_installed(name)]
    if missing:
        raise InputError(
            f"compiling for {topology.name} needs {missing[0]}, which is not installed: pip install 'dlrm_jax[aot]'"
        )
    devices = _gpus(topology) if topology.platform == "gpu" else _tpus(topology)
    return make_mesh(topology.nodes, topology.chips, devices)


def gpu_target(topology: Topology) -> str:
    """XLA's GpuTargetConfigProto of a preset's GPU, as text."""
    cores = _CORES[topology.kind]
    major, minor = cores.cuda_compute_capability
    return _TARGET.format(
        name=topology.device_kind,
        cores=cores,
        major=major,
        minor=minor,
        hbm_bandwidth=int(topology.hbm_bandwidth),
        hbm_bytes=topology.hbm_bytes,
    )


def _gpus(topology: Topology) -> Sequence[jax.Device]:
    hosts = f"1x{topology.nodes}x{topology.chips}"
    try:
        return topologies.get_topology_desc(
            topology.name, "cuda", target_config=gpu_target(topology), topology=hosts
        ).devices
    except NotImplementedError as error:  # JAX looked for GPUs, found none and dropped the plugin.
        raise InputError(
            f"compiling for {topology.name}: JAX has no CUDA compiler in this process ({error}); start it with "
            "JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment"
        ) from error


def _tpus(topology: Topology) -> Sequence[jax.Device]:
    sides = "x".join(map(str, tpu_slice(topology)))
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.kind}:{sides}").devices


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Its parent package is not there.
        return False
