"""Topologies: what presets say, what the machine at hand says, and how devices fill a mesh."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sharding import InputError, make_mesh, measure, topology, torus
from sharding.mesh import AXES
from sharding.topology import KINDS, Topology, parse_topology

GB = 10**9
# Smallest mesh of each kind that has two nodes.
TWO_NODES = {kind: f"{kind}:2x{8 if kind == 'tpu7x' else 4}" for kind in KINDS}


def test_topology_when_named_then_it_has_that_many_nodes_and_chips():
    parsed = parse_topology("h200:16x8")
    assert (parsed.name, parsed.kind, parsed.platform) == ("h200:16x8", "h200", "gpu")
    assert (parsed.nodes, parsed.chips, parsed.num_devices) == (16, 8, 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h200", "topology 'h200' is not KIND:NxC (NODE times CHIP in JAX devices): write such as h200:16x8"),
        ("h200:8", "is not KIND:NxC"),
        ("h200:-1x8", "is not KIND:NxC"),
        ("", "is not KIND:NxC"),
        ("h300:1x8", "there is no kind 'h300'; use one of zionex, a100-80, h100, h200, b200, v5p, v5e, v6e, tpu7x"),
        ("h200:0x8", "has no devices: make nodes and chips at least 1"),
        ("h200:1x16", "NVLink joins 8 GPUs of a node, so 16 chips are not in one fast domain"),
        ("v6e:3x4", "12 devices (1 a chip) are not a slice: use a power of two of chips, up to 256"),
        ("v6e:128x4", "512 devices (1 a chip) are not a slice"),
        ("v5p:3x4", "use a power of two of chips or a multiple of 64, up to 6144"),
        ("tpu7x:1x3", "3 devices (2 a chip) are not a slice"),
    ],
)
def test_topology_when_it_cannot_be_then_one_line_says_what_can(text, message):
    with pytest.raises(InputError) as error:
        parse_topology(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_preset_when_looked_at_then_nearer_memory_is_smaller_and_faster(kind):
    preset = parse_topology(TWO_NODES[kind])
    assert 15 * GB < preset.hbm_bytes < 200 * GB
    assert preset.hbm_bytes < preset.host_memory_bytes
    assert preset.hbm_bandwidth > preset.inside_bandwidth >= preset.between_bandwidth > 10 * GB
    assert 0 < preset.inside_latency <= preset.between_latency < 1e-3
    assert preset.hbm_bandwidth * preset.chips > preset.host_memory_bandwidth
    assert preset.ssd_bandwidth <= preset.host_memory_bandwidth
    assert 3e13 < preset.float32_flops <= preset.bfloat16_flops < 3e15
    assert preset.peak_flops("bfloat16") == preset.peak_flops("float16") == preset.bfloat16_flops
    assert preset.peak_flops("float32") == preset.float32_flops


def test_preset_when_a_node_is_cut_in_two_then_the_machine_has_the_same_host_and_storage():
    whole, halves = parse_topology("h200:1x8"), parse_topology("h200:2x4")
    assert halves.host_memory_bytes * 2 == whole.host_memory_bytes
    assert halves.ssd_bytes * 2 == whole.ssd_bytes
    assert halves.hbm_bytes == whole.hbm_bytes


def test_zionex_node_has_the_figures_of_the_paper():
    node = parse_topology("zionex:16x8")
    assert node.hbm_bandwidth * 8 == pytest.approx(12.4e12, rel=0.01)
    assert node.between_bandwidth * 8 == pytest.approx(200e9)
    assert (node.host_memory_bytes, node.host_memory_bandwidth) == (1500 * GB, 320e9)


def test_tpu7x_device_has_half_of_a_chip():
    device, chip = parse_topology("tpu7x:1x8"), parse_topology("v5p:1x4")
    assert device.bfloat16_flops == 2307e12 / 2
    assert device.hbm_bytes == 192 * 2**30 // 2
    assert device.hbm_bandwidth == 7.38e12 / 2
    # Four chips are a host.
    assert device.host_memory_bytes == 960 * GB
    # Both chips have the same links, and here as many chips. Of what a device exchanges an eighth is its own, of what
    # a chip of one device exchanges a quarter.
    assert device.inside_bandwidth == pytest.approx(chip.inside_bandwidth / 2 * (7 / 8) / (3 / 4))


@pytest.mark.parametrize("kind", ["v5p", "v6e", "tpu7x"])
def test_an_all_to_all_on_the_same_tpus_when_called_one_node_or_a_node_each_then_it_takes_as_long(kind):
    node, nodes = parse_topology(f"{kind}:1x8"), parse_topology(f"{kind}:8x1")
    assert node.inside_bandwidth == pytest.approx(nodes.between_bandwidth)
    assert node.inside_latency == nodes.between_latency > nodes.inside_latency


@pytest.mark.parametrize(
    ("num_chips", "dimensions", "shape"),
    [
        (1, 2, (1, 1)),
        (8, 2, (2, 4)),
        (16, 2, (4, 4)),
        (256, 2, (16, 16)),
        (12, 2, None),
        (1, 3, (1, 1, 1)),
        (4, 3, (2, 2, 1)),
        (8, 3, (2, 2, 2)),
        (32, 3, (2, 4, 4)),
        (192, 3, (4, 4, 12)),
        (6144, 3, (16, 16, 24)),
        (12, 3, None),
        (0, 3, None),
    ],
)
def test_slice_when_of_so_many_chips_then_it_has_the_sides_that_the_vendor_sells(num_chips, dimensions, shape):
    assert torus.slice_shape(num_chips, dimensions) == shape


def test_all_to_all_of_a_whole_v6e_pod_fills_the_bisection_bandwidth_that_the_vendor_states():
    # 3.2 TB/s (docs.cloud.google.com/tpu/docs/v6e) count each way once. Half of what a chip sends crosses the middle.
    rings = torus.has_wraparound((16, 16))
    sent = torus.all_to_all_bandwidth((16, 16), rings, 100e9, num_parts=256) * 256 / 255
    assert sent * 128 / 2 == pytest.approx(3.2e12)


def test_all_to_all_of_two_by_two_chips_uses_both_links_of_each():
    # A quarter of what a chip exchanges is its own; one quarter goes to each neighbour, and one over two links.
    sent = torus.all_to_all_bandwidth((2, 2), (False, False), 100e9, num_parts=4)
    assert sent == pytest.approx(2 * 100e9 * 3 / 4)


@pytest.fixture(scope="module")
def here() -> Topology:
    return measure.topology_of(make_mesh(2, 2))


def test_topology_of_cpu_devices_is_measured(here):
    assert (here.name, here.platform, here.nodes, here.chips) == ("cpu:2x2", "cpu", 2, 2)
    unknown = {"ssd_bytes", "ssd_bandwidth"}
    figures = {name: value for name, value in dataclasses.asdict(here).items() if isinstance(value, int | float)}
    assert {name for name, value in figures.items() if value <= 0} == unknown
    assert all(np.isfinite(value) for value in figures.values())


def test_topology_of_cpu_devices_then_they_share_the_memory_of_the_host(here):
    assert here.hbm_bytes == measure.host_memory_bytes() // 4
    assert here.host_memory_bytes == measure.host_memory_bytes() // 2


def test_host_memory_when_a_container_has_less_then_it_is_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_MEMORY_LIMITS", (str(tmp_path / "max"), str(tmp_path / "absent")))
    (tmp_path / "max").write_text("max\n")
    unlimited = measure.host_memory_bytes()
    (tmp_path / "max").write_text("1048576\n")
    assert measure.host_memory_bytes() == 2**20 < unlimited


def fake_mesh(nodes: int, chips: int, *, device_kind: str, bytes_limit: int) -> SimpleNamespace:
    def device(number: int) -> SimpleNamespace:
        return SimpleNamespace(
            id=number,
            process_index=0,
            device_kind=device_kind,
            memory_stats=lambda: {"bytes_limit": bytes_limit + number},
        )

    devices = np.empty((nodes, chips), object)
    devices.flat[:] = [device(number) for number in range(nodes * chips)]
    return SimpleNamespace(devices=devices)


@pytest.mark.parametrize(
    ("device_kind", "kind"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "zionex"),
        ("TPU v6 lite", "v6e"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
    ],
)
def test_topology_of_devices_of_a_known_kind_then_memory_is_what_they_say_and_the_rest_is_the_preset(device_kind, kind):
    found = measure.topology_of(fake_mesh(1, 4, device_kind=device_kind, bytes_limit=12345))  # pyright: ignore[reportArgumentType]  # a mesh of accelerators cannot be made here
    preset = parse_topology(f"{kind}:1x4")
    assert found.hbm_bytes == 12345
    assert found.host_memory_bytes == measure.host_memory_bytes()
    assert found == dataclasses.replace(preset, hbm_bytes=found.hbm_bytes, host_memory_bytes=found.host_memory_bytes)


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA H200 NVL", "NVIDIA H100 PCIe", "TPU v4"])
def test_kind_of_a_device_without_a_preset_is_none(device_kind):
    assert topology.kind_of(device_kind) is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeDevice:
    id: int
    process_index: int
    slice_index: int | None
    platform: str = "tpu"


def devices_of(*sizes: int, slices: tuple[int, ...] = ()) -> list[jax.Device]:
    """Devices of processes of these sizes, in slices of so many processes; in an order that no mesh should follow."""
    slice_of = [number for number, count in enumerate(slices) for _ in range(count)] or [None] * len(sizes)
    devices = [
        FakeDevice(id=1000 * process + number, process_index=process, slice_index=slice_of[process])
        for process, size in enumerate(sizes)
        for number in range(size)
    ]
    return devices[::-1]  # pyright: ignore[reportReturnType]  # stand-ins for devices of many processes


def processes_of_nodes(nodes: int, chips: int, devices: list[jax.Device]) -> list[list[int]]:
    return [[device.process_index for device in node] for node in make_mesh(nodes, chips, devices).devices]


@pytest.mark.parametrize(
    ("nodes", "chips", "processes", "expected"),
    [
        (2, 4, (4, 4), [[0, 0, 0, 0], [1, 1, 1, 1]]),
        (4, 2, (4, 4), [[0, 0], [0, 0], [1, 1], [1, 1]]),
        # A node of two processes.
        (1, 4, (2, 2), [[0, 0, 1, 1]]),
        # One device of each process is left over, so that no node is on both.
        (2, 2, (3, 3), [[0, 0], [1, 1]]),
        # More devices than needed: every process takes part.
        (2, 2, (4, 4), [[0, 0], [1, 1]]),
        (3, 2, (2, 8), [[0, 0], [1, 1], [1, 1]]),
        # Sizes do not allow it.
        (2, 3, (2, 2, 2), [[0, 0, 1], [1, 2, 2]]),
    ],
)
def test_mesh_when_filled_then_a_node_lies_in_one_process_wherever_sizes_allow(nodes, chips, processes, expected):
    assert processes_of_nodes(nodes, chips, devices_of(*processes)) == expected


def test_mesh_when_nodes_are_larger_than_processes_then_they_lie_in_one_slice():
    # Slices of three and two processes, each with two devices.
    devices = devices_of(2, 2, 2, 2, 2, slices=(3, 2))
    assert processes_of_nodes(2, 4, devices) == [[0, 0, 1, 1], [3, 3, 4, 4]]


def test_mesh_when_devices_come_in_any_order_then_each_process_has_them_by_number():
    mesh = make_mesh(2, 4, jax.devices()[::-1])
    assert mesh.axis_names == AXES
    assert mesh.devices.flatten().tolist() == jax.devices()


def test_mesh_when_there_are_too_few_devices_then_the_error_says_how_many_there_are():
    with pytest.raises(InputError, match=r"a mesh of 2 x 8 needs 16 devices, but JAX sees 8 \(cpu\)") as raised:
        make_mesh(2, 8)
    assert str(raised.value).endswith('or jax.config.update("jax_num_cpu_devices", 16) before anything else')
