"""Topology: the figures of a machine that plans are made for. Presets by name, each figure with its source.

Figures are peaks, as vendors state them; `sharding.measure` gives those of the machine at hand.
"""

import dataclasses
import math
import re
from typing import Literal

import jax.numpy as jnp

from sharding import torus
from sharding.errors import InputError

Platform = Literal["cpu", "gpu", "tpu"]
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A machine: NODE times CHIP JAX devices and what joins them. Bandwidths in bytes per second, 0 if not known.

    Attributes:
        name: What it is called, such as "h200:16x8".
        platform: What JAX calls the platform of the devices.
        device_kind: What JAX calls the devices, such as "NVIDIA H200".
        nodes: Size of NODE.
        chips: Size of CHIP.
        hbm_bytes: Memory of a device; a CPU device's share of the host's.
        hbm_bandwidth: Reads and writes of it together.
        host_memory_bytes: Host memory of a node.
        host_memory_bandwidth: The same of it.
        ssd_bytes: Solid-state storage of a node; 0 if there is none.
        ssd_bandwidth: Reads of it.
        inside_bandwidth: What a device sends to the others of its node while all of them exchange equal parts.
        between_bandwidth: What a device sends to other nodes while all of them exchange equal parts.
        inside_latency: Seconds that a collective over CHIP takes however little it carries.
        between_latency: The same over NODE.
        float32_flops: Peak rate of float32 matrix products at JAX's default precision, which is TF32 on a GPU and one
            bfloat16 pass on a TPU.
        bfloat16_flops: Peak rate of bfloat16 matrix products.
    """

    name: str
    platform: Platform
    device_kind: str
    nodes: int
    chips: int
    hbm_bytes: int
    hbm_bandwidth: float
    host_memory_bytes: int
    host_memory_bandwidth: float
    ssd_bytes: int
    ssd_bandwidth: float
    inside_bandwidth: float
    between_bandwidth: float
    inside_latency: float
    between_latency: float
    float32_flops: float
    bfloat16_flops: float

    @property
    def num_devices(self) -> int:
        """Devices of the machine."""
        return self.nodes * self.chips

    @property
    def kind(self) -> str:
        """Kind of its devices: the first part of its name."""
        return self.name.partition(":")[0]

    def peak_flops(self, dtype: str) -> float:
        """Peak rate of matrix products in a dtype: two bytes wide or four."""
        return self.bfloat16_flops if jnp.dtype(dtype).itemsize == 2 else self.float32_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Gpu:
    """A node of 8 GPUs, and the network that joins nodes: figures of a GPU but for host and storage."""

    device_kind: str
    hbm_bytes: int
    hbm_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    host_memory_bytes: int
    host_memory_bandwidth: float
    ssd_bytes: int = 0
    ssd_bandwidth: float = 0.0
    float32_flops: float
    bfloat16_flops: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tpu:
    """A chip, and its share of a host. `dimensions` of the torus, `pod_chips` in the largest slice."""

    device_kinds: tuple[str, ...]
    devices_per_chip: int
    dimensions: int
    pod_chips: int
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    host_memory_bytes: int
    flops: float


GPUS_PER_NODE = 8

# One step of NCCL's ring with its Simple protocol, which all-to-alls use: 8.4 us, and 3.4 us over NVLink or 9.6 us over
# a network (NVIDIA/nccl, src/graph/tuning.cc at 01afd20a: baseLat, hwLat).
_NVLINK_LATENCY = 11.8e-6
_NETWORK_LATENCY = 18.0e-6
# Eight drives of 3.84 TB (DGX H100, H200 and B200 user guides; "up to 30 TB", DGX A100's), at most what PCIe 4.0 x4
# carries to each: 16 GT/s x 4 lanes x 128/130.
_DGX_SSD = {"ssd_bytes": 8 * 3_840_000_000_000, "ssd_bandwidth": 8 * 7.877e9}
# Memory that CUDA reports, and its bandwidth by clock and bus width: the table of platform.md. "The paper" is Mudigere
# et al., ISCA 2022. Rates of matrix products are without sparsity.
_GPUS: dict[str, _Gpu] = {
    "zionex": _Gpu(
        device_kind="NVIDIA A100-SXM4-40GB",
        hbm_bytes=42_331_013_120,
        hbm_bandwidth=1.5552e12,  # a node: 12.4 TB/s (the paper)
        nvlink_bandwidth=300e9,  # 600 GB/s in both directions (A100 data sheet)
        network_bandwidth=25e9,  # 200 Gb/s RoCE for each GPU (the paper)
        host_memory_bytes=1_500_000_000_000,  # the paper, as is its bandwidth; no SSD
        host_memory_bandwidth=320e9,
        float32_flops=156e12,  # TF32 and BF16: A100 data sheet
        bfloat16_flops=312e12,
    ),
    "a100-80": _Gpu(
        device_kind="NVIDIA A100-SXM4-80GB",
        hbm_bytes=85_100_068_864,
        hbm_bandwidth=2.03904e12,
        nvlink_bandwidth=300e9,  # 600 GB/s in both directions (A100 data sheet)
        network_bandwidth=25e9,  # eight ConnectX of 200 Gb/s (DGX A100 data sheet)
        host_memory_bytes=2_000_000_000_000,  # DGX A100 data sheet (640 GB model)
        host_memory_bandwidth=409.6e9,  # two EPYC 7742 of 204.8 GB/s (AMD's data sheet)
        **_DGX_SSD,
        float32_flops=156e12,  # TF32 and BF16: A100 data sheet
        bfloat16_flops=312e12,
    ),
    "h100": _Gpu(
        device_kind="NVIDIA H100 80GB HBM3",
        hbm_bytes=84_942_979_072,
        hbm_bandwidth=3.35232e12,
        nvlink_bandwidth=450e9,  # 900 GB/s in both directions (H100 data sheet)
        network_bandwidth=50e9,  # eight ConnectX-7 of 400 Gb/s (DGX H100 user guide)
        host_memory_bytes=2_000_000_000_000,  # DGX H100 user guide
        host_memory_bandwidth=614.4e9,  # two Xeon 8480C, each with 8 channels of DDR5-4800 (Intel's data sheet)
        **_DGX_SSD,
        float32_flops=494.5e12,  # TF32 and BF16, half of what the H100 data sheet states with sparsity
        bfloat16_flops=989.5e12,
    ),
    "h200": _Gpu(
        device_kind="NVIDIA H200",
        hbm_bytes=151_397_597_184,
        hbm_bandwidth=4.8e12,  # also the H200 data sheet
        nvlink_bandwidth=450e9,  # 900 GB/s in both directions (H200 data sheet)
        network_bandwidth=50e9,  # eight ConnectX-7 of 400 Gb/s (DGX H200 user guide)
        host_memory_bytes=2_000_000_000_000,  # DGX H200 user guide
        host_memory_bandwidth=614.4e9,  # two Xeon 8480C, each with 8 channels of DDR5-4800 (Intel's data sheet)
        **_DGX_SSD,
        float32_flops=494.5e12,  # TF32 and BF16, half of what the H200 data sheet states with sparsity
        bfloat16_flops=989.5e12,
    ),
    "b200": _Gpu(
        device_kind="NVIDIA B200",
        hbm_bytes=191_514_411_008,
        hbm_bandwidth=7.67232e12,
        nvlink_bandwidth=900e9,  # 1.8 TB/s in both directions (HGX B200 data sheet)
        network_bandwidth=50e9,  # eight ConnectX-7 of 400 Gb/s (DGX B200 user guide)
        host_memory_bytes=2_000_000_000_000,  # DGX B200 user guide
        host_memory_bandwidth=716.8e9,  # two Xeon 8570, each with 8 channels of DDR5-5600 (Intel's data sheet)
        **_DGX_SSD,
        float32_flops=1.1e15,  # TF32 and BF16, half of what the HGX B200 data sheet states with sparsity
        bfloat16_flops=2.25e15,
    ),
}
# All but v5e, `device_kinds` (what libtpu calls them) and the largest slices: the table of
# docs.cloud.google.com/tpu/docs/tpu7x, which compares three. Links: half of its bidirectional bandwidth over the
# links of a chip (4 in a torus of two dimensions, 6 in one of three). Host memory: a quarter of a 4-chip VM's. Its
# bandwidth and storage are not stated.
_TPUS: dict[str, _Tpu] = {
    "v5p": _Tpu(
        device_kinds=("TPU v5", "TPU v5p"),
        devices_per_chip=1,
        dimensions=3,
        pod_chips=6144,  # the largest job (docs.cloud.google.com/tpu/docs/v5p)
        hbm_bytes=95 * GIB,
        hbm_bandwidth=2.765e12,
        link_bandwidth=1200e9 / 2 / 6,
        host_memory_bytes=448_000_000_000 // 4,
        flops=459e12,
    ),
    "v5e": _Tpu(  # docs.cloud.google.com/tpu/docs/v5e
        device_kinds=("TPU v5 lite", "TPU v5e"),
        devices_per_chip=1,
        dimensions=2,
        pod_chips=256,
        hbm_bytes=16 * GIB,
        hbm_bandwidth=819e9,
        link_bandwidth=400e9 / 2 / 4,
        host_memory_bytes=384_000_000_000 // 8,  # of a VM of 8 chips
        flops=197e12,
    ),
    "v6e": _Tpu(
        device_kinds=("TPU v6 lite", "TPU v6e"),
        devices_per_chip=1,
        dimensions=2,
        pod_chips=256,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1.638e12,
        link_bandwidth=800e9 / 2 / 4,
        host_memory_bytes=720_000_000_000 // 4,
        flops=918e12,
    ),
    "tpu7x": _Tpu(
        device_kinds=("TPU7x",),
        devices_per_chip=2,
        dimensions=3,
        pod_chips=9216,
        hbm_bytes=192 * GIB,
        hbm_bandwidth=7.38e12,
        link_bandwidth=1200e9 / 2 / 6,
        host_memory_bytes=960_000_000_000 // 4,
        flops=2307e12,
    ),
}
KINDS = (*_GPUS, *_TPUS)


def parse_topology(text: str) -> Topology:
    """The preset that a text names.

    Args:
        text: ``KIND:NxC``, NODE times CHIP in JAX devices: "h200:16x8".

    Returns:
        Its figures.

    Raises:
        InputError: Not of that form, an unknown kind, or devices that do not come together so.
    """
    match = re.fullmatch(r"([\w-]+):(\d+)x(\d+)", text.strip())
    if match is None:
        raise InputError(
            f"topology {text!r} is not KIND:NxC (NODE times CHIP in JAX devices): write such as h200:16x8; kinds are "
            f"{', '.join(KINDS)}"
        )
    return preset(match[1], int(match[2]), int(match[3]))


def preset(kind: str, nodes: int, chips: int) -> Topology:
    """The figures of so many devices of a kind.

    Args:
        kind: One of `KINDS`.
        nodes: Size of NODE.
        chips: Size of CHIP.

    Returns:
        Their figures.

    Raises:
        InputError: An unknown kind, or devices that do not come together so.
    """
    name = f"{kind}:{nodes}x{chips}"
    if kind not in KINDS:
        raise InputError(f"topology {name!r}: there is no kind {kind!r}; use one of {', '.join(KINDS)}")
    if nodes < 1 or chips < 1:
        raise InputError(f"topology {name!r} has no devices: make nodes and chips at least 1")
    return _gpu_topology(name, nodes, chips) if kind in _GPUS else _tpu_topology(name, nodes, chips)


def kind_of(device_kind: str) -> str | None:
    """The kind of what JAX calls a device (`device.device_kind`); None if there is no preset of it."""
    for kind, gpu in _GPUS.items():
        if gpu.device_kind == device_kind:
            return kind
    return next((kind for kind, tpu in _TPUS.items() if device_kind in tpu.device_kinds), None)


def preset_of(device_kind: str, nodes: int, chips: int) -> Topology | None:
    """The figures of so many of what JAX calls such a device.

    Args:
        device_kind: ``device.device_kind``.
        nodes: Size of NODE.
        chips: Size of CHIP.

    Returns:
        Their figures; None for a kind that is not known, or a number in which such devices do not come together.
    """
    kind = kind_of(device_kind)
    try:
        return None if kind is None else preset(kind, nodes, chips)
    except InputError:
        return None  # Such as 2 TPUs of a host, or 16 GPUs that NVLink joins.


def tpu_slice(topology: Topology) -> tuple[int, ...]:
    """Sides, in chips, of the slice that holds a preset's TPUs.

    Raises:
        InputError: There is no such slice.
    """
    tpu = _TPUS[topology.kind]
    return _slice_of(topology.name, tpu, topology.num_devices)


def _gpu_topology(name: str, nodes: int, chips: int) -> Topology:
    gpu = _GPUS[name.partition(":")[0]]
    if chips > GPUS_PER_NODE:
        raise InputError(
            f"topology {name!r}: NVLink joins {GPUS_PER_NODE} GPUs of a node, so {chips} chips are not in one fast "
            f"domain: use more nodes of at most {GPUS_PER_NODE} chips"
        )
    share = chips / GPUS_PER_NODE
    return Topology(
        name=name,
        platform="gpu",
        device_kind=gpu.device_kind,
        nodes=nodes,
        chips=chips,
        hbm_bytes=gpu.hbm_bytes,
        hbm_bandwidth=gpu.hbm_bandwidth,
        host_memory_bytes=int(gpu.host_memory_bytes * share),
        host_memory_bandwidth=gpu.host_memory_bandwidth * share,
        ssd_bytes=int(gpu.ssd_bytes * share),
        ssd_bandwidth=gpu.ssd_bandwidth * share,
        inside_bandwidth=gpu.nvlink_bandwidth,
        between_bandwidth=gpu.network_bandwidth,
        inside_latency=_NVLINK_LATENCY,
        between_latency=_NETWORK_LATENCY,
        float32_flops=gpu.float32_flops,
        bfloat16_flops=gpu.bfloat16_flops,
    )


def _tpu_topology(name: str, nodes: int, chips: int) -> Topology:
    tpu = _TPUS[name.partition(":")[0]]
    whole = _slice_of(name, tpu, nodes * chips)
    rings = torus.has_wraparound(whole)
    # A node is a part of the slice, without rings unless it is all of it.
    part = torus.slice_shape(-(-chips // tpu.devices_per_chip), tpu.dimensions) or whole
    part_rings = rings if part == whole else (False,) * len(part)
    # Parts are devices: what goes to the other device of a chip counts as sent, too.
    in_node = torus.all_to_all_bandwidth(part, part_rings, tpu.link_bandwidth, num_parts=chips)
    between_nodes = torus.all_to_all_bandwidth(whole, rings, tpu.link_bandwidth, num_parts=nodes)
    return Topology(
        name=name,
        platform="tpu",
        device_kind=tpu.device_kinds[0],
        nodes=nodes,
        chips=chips,
        hbm_bytes=tpu.hbm_bytes // tpu.devices_per_chip,
        hbm_bandwidth=tpu.hbm_bandwidth / tpu.devices_per_chip,
        host_memory_bytes=tpu.host_memory_bytes * chips // tpu.devices_per_chip,
        host_memory_bandwidth=0.0,
        ssd_bytes=0,
        ssd_bandwidth=0.0,
        inside_bandwidth=in_node / tpu.devices_per_chip,
        between_bandwidth=between_nodes / tpu.devices_per_chip,
        inside_latency=torus.longest_path_seconds(part, part_rings),
        between_latency=torus.longest_path_seconds(whole, rings),
        float32_flops=tpu.flops / tpu.devices_per_chip,
        bfloat16_flops=tpu.flops / tpu.devices_per_chip,
    )


def _slice_of(name: str, tpu: _Tpu, num_devices: int) -> tuple[int, ...]:
    num_chips = math.ceil(num_devices / tpu.devices_per_chip)
    shape = torus.slice_shape(num_chips, tpu.dimensions)
    if shape is None or num_chips > tpu.pod_chips or (num_devices > 1 and num_devices % tpu.devices_per_chip):
        multiples = " or a multiple of 64" if tpu.dimensions == 3 else ""
        raise InputError(
            f"topology {name!r}: {num_devices} devices ({tpu.devices_per_chip} a chip) are not a slice: use a power of "
            f"two of chips{multiples}, up to {tpu.pod_chips}"
        )
    return shape
