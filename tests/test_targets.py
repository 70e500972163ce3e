"""Every preset is a target of ahead-of-time compilation, on a machine that has neither GPU nor TPU.

Needs the extra `aot`: libtpu for TPUs, ptxas and libdevice for GPUs. Without them these tests fail; they never skip.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sharding import InputError, aot
from sharding.aot import target_mesh
from sharding.mesh import BY_DEVICE, CHIP, NODE, sharding_on
from sharding.topology import KINDS, kind_of, parse_topology, preset, tpu_slice

TARGETS = [
    "zionex:2x4",
    "a100-80:2x4",
    "h100:2x4",
    "h200:2x4",
    "b200:2x4",
    "v5p:2x4",
    "v5e:2x4",
    "v6e:4x4",
    "tpu7x:2x8",
]


pytestmark = pytest.mark.usefixtures("no_compilation_cache")


def exchange_local(x: jax.Array) -> jax.Array:
    return lax.psum(lax.all_to_all(x, CHIP, split_axis=0, concat_axis=0, tiled=True), NODE)


def test_targets_are_of_every_kind():
    assert {text.partition(":")[0] for text in TARGETS} == set(KINDS)


@pytest.mark.parametrize("text", TARGETS)
def test_target_when_a_program_is_compiled_for_it_then_each_axis_has_its_collective(text: str) -> None:
    topology = parse_topology(text)
    mesh = target_mesh(topology)
    assert mesh.devices.shape == (topology.nodes, topology.chips)
    assert {kind_of(device.device_kind) for device in mesh.devices.flat} == {topology.kind}
    exchange = jax.jit(
        jax.shard_map(exchange_local, mesh=mesh, in_specs=BY_DEVICE, out_specs=BY_DEVICE, check_vma=False)
    )
    x = jax.ShapeDtypeStruct((mesh.size * topology.chips * 128,), jnp.float32, sharding=sharding_on(mesh, BY_DEVICE))
    compiled = exchange.lower(x).compile()
    program, memory = compiled.as_text(), compiled.memory_analysis()
    assert program is not None
    assert memory is not None
    assert "all-to-all" in program
    assert "all-reduce" in program
    assert memory.argument_size_in_bytes == 4 * topology.chips * 128


@pytest.mark.parametrize("text", [*TARGETS, "zionex:16x8", "v5p:32x4", "v6e:32x8", "tpu7x:16x8"])
def test_target_when_a_node_fits_a_host_then_its_chips_are_on_one(text: str) -> None:
    mesh = target_mesh(parse_topology(text))
    hosts = [{device.process_index for device in node} for node in mesh.devices]
    # A v6e host is a square of 4 chips here.
    assert all(len(host) == (2 if text == "v6e:32x8" else 1) for host in hosts)
    assert len(set.union(*hosts)) == sum(map(len, hosts))


def test_target_when_a_tpu_node_is_larger_than_a_host_then_its_hosts_are_neighbours() -> None:
    for node in target_mesh(parse_topology("v6e:32x8")).devices:
        x, y = zip(*(device.coords[:2] for device in node), strict=True)
        assert {max(x) - min(x) + 1, max(y) - min(y) + 1} == {4, 2}


@pytest.mark.parametrize("text", ["v5p:2x4", "v6e:4x4", "tpu7x:2x8", "tpu7x:1x2", "v6e:1x2", "v5p:1x1"])
def test_target_of_tpus_then_its_slice_has_no_chip_to_spare(text: str) -> None:
    topology = parse_topology(text)
    devices_per_chip = 2 if topology.kind == "tpu7x" else 1
    assert math.prod(tpu_slice(topology)) * devices_per_chip == topology.num_devices == target_mesh(topology).size


def test_gpu_target_is_made_of_our_figures() -> None:
    topology = parse_topology("b200:1x8")
    text = aot.gpu_target(topology)
    assert f'name: "{preset("b200", 1, 1).device_kind}"' in text
    assert f"device_memory_size: {topology.hbm_bytes}" in text
    assert "memory_bandwidth: 7672320000000" in text
    assert "cuda_compute_capability { major: 10 minor: 0 }" in text


@pytest.mark.parametrize(("text", "module"), [("h200:1x8", "jax_plugins.xla_cuda13"), ("v6e:2x4", "libtpu")])
def test_target_when_its_compiler_is_not_installed_then_the_error_names_the_extra(text, module, monkeypatch) -> None:
    monkeypatch.setattr(aot, "_is_installed", lambda name: name != module)
    with pytest.raises(InputError) as error:
        target_mesh(parse_topology(text))
    assert str(error.value) == (
        f"compiling for {text} needs {module}, which is not installed: pip install 'dlrm_jax[aot]'"
    )


def test_compiler_that_no_package_has_is_not_installed() -> None:
    assert not aot._is_installed("no_such_package")
    assert not aot._is_installed("no_such_package.module")
