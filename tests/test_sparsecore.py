"""sparsecore: sums against numpy by one interpreted subcore, and programs for TPUs that are not here."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import NOWHERE, NUM_BAGS, NUM_IDS, NUM_ROWS, Ids, lines_of, pooled, table_of

from pallas_kernels import ROW_OPTIMIZERS, sparsecore
from pallas_kernels.target import interpreting

KIND = "TPU v6 lite"
SLICES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
NUM_LINES = 3 * 2**18
# What a program needs beside the table: for these batches less than this, for a copy of the table far more.
SMALL = NUM_LINES * 512 // 8


@pytest.fixture
def racing() -> Iterator[None]:
    """The slow interpreter, which knows when two copies touch the same bytes; SparseCores ask which device it is."""
    device = AbstractDevice(device_kind=KIND, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("chip",), axis_types=(AxisType.Auto,), abstract_device=device)
    how = pltpu.InterpretParams(detect_races=True)
    with interpreting(KIND), jax.sharding.use_abstract_mesh(mesh), pltpu.force_tpu_interpret_mode(how):
        yield


@pytest.mark.parametrize(
    ("width", "weighted"),
    [(16, True), pytest.param(384, False, marks=pytest.mark.slow), pytest.param(128, True, marks=pytest.mark.slow)],
)
def test_lookup_then_equals_numpys_float32_sum_in_the_order_of_ids(racing: None, width: int, weighted: bool) -> None:
    del racing
    random = np.random.default_rng(0)
    rows = np.where(random.random(NUM_IDS) < 0.1, random.choice(NOWHERE, NUM_IDS), random.integers(0, NUM_ROWS))
    ids = Ids(
        rows=rows.astype(np.int32),
        offsets=np.sort(np.concatenate([[0], random.integers(0, NUM_IDS - 5, NUM_BAGS)])).astype(np.int32),
        weights=random.normal(size=NUM_IDS).astype(np.float32),
    )
    weights = ids.weights if weighted else None
    look_up = functools.partial(sparsecore.pooled_lookup, width=width, longest_bag=None)
    result = jax.jit(look_up)(lines_of(table_of(width)), ids.rows, ids.offsets, weights)
    np.testing.assert_array_equal(result, pooled(table_of(width), ids, weights, np.float32))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({}, None),
        ({"device_kind": "TPU v5 lite"}, "has no SparseCores"),
        ({"device_kind": "TPU7x", "width": 8}, "16 to 512"),
        ({"dtype": jnp.bfloat16}, "bfloat16 are not served"),
        ({"optimizer": ROW_OPTIMIZERS["sgd"]}, "updates are not served"),
    ],
)
def test_unable_then_says_why(call: dict, reason: str | None) -> None:
    said = sparsecore.unable(**({"device_kind": KIND, "dtype": jnp.float32, "width": 64} | call))
    assert (said is None) == (reason is None)
    assert (reason or "") in (said or "")


@pytest.fixture
def no_compilation_cache() -> Iterator[None]:
    """What was compiled for a device that is not here can be written to the cache, but never be read from it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize("width", [16, 128, 384])
@pytest.mark.usefixtures("no_compilation_cache")
def test_lookup_for_a_tpu_then_no_copy_of_the_table(kind: str, width: int) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[kind]).devices
    mesh = Mesh(np.array(devices[:1]), ("chip",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())

    def look_up(store, rows, offsets, weights):
        return sparsecore.pooled_lookup(store, rows, offsets, weights, width=width, longest_bag=None)

    shapes = [((NUM_LINES, 128), jnp.float32), ((4096,), jnp.int32), ((513,), jnp.int32), ((4096,), jnp.float32)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere) for shape, dtype in shapes]
    mapped = jax.shard_map(look_up, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    assert jax.jit(mapped).lower(*arrays).compile().memory_analysis().temp_size_in_bytes < SMALL
