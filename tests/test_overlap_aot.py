"""Exchanges run beside arithmetic in programs compiled for accelerators that are not here; and how much is hidden.

Needs the extra `aot`, as tests/test_aot.py.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import Array

from configs import CONFIGS
from dlrm_jax.config import MeshConfig
from dlrm_jax.planning import planning_input
from dlrm_jax.target_step import compile_for_target, lower_train_step, step_timeline
from sharding import FeatureSpec, KeyedJagged, ShardedTables
from sharding.aot import target_mesh
from sharding.compiler_options import compiler_options
from sharding.cost_settings import CostSettings
from sharding.mesh import AXES, BY_DEVICE, BY_DEVICE_SECOND, CHIP, NODE, REPLICATED, sharding_on
from sharding.plan import ShardingPlan, row_wise, table_wise
from sharding.returns import bring_home_table_row_wise
from sharding.tables import TableSpec
from sharding.timeline import Timeline
from sharding.timeline_report import summary
from sharding.topology import KINDS, parse_topology

BATCH_SIZE, DIM, WIDTH = 8192, 128, 1024
LONGEST_BAG = 4


pytestmark = pytest.mark.usefixtures("no_compilation_cache")


def lookup_beside_products(target: str) -> Timeline:
    """A lookup and matrix products that do not need it, compiled for a target.

    One table is on one device, so that its vectors come home by an all-to-all; the other's rows are on all devices, and
    come home as sums.
    """
    topology = parse_topology(target)
    mesh = target_mesh(topology)
    whole, spread = (TableSpec(name=name, num_rows=100_000, dim=DIM, optimizer="sgd") for name in ("whole", "spread"))
    placements = (table_wise(whole, 3), row_wise(spread, returns="partial_sums"))
    tables = ShardedTables(
        [whole, spread],
        [FeatureSpec(name=table.name, table=table.name, max_ids=LONGEST_BAG) for table in (whole, spread)],
        plan=ShardingPlan(nodes=topology.nodes, chips=topology.chips, placements=placements),
        mesh=mesh,
    )

    def shaped(shape: tuple[int, ...], dtype: str, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_on(mesh, spec))

    ids = KeyedJagged(
        values=shaped((2 * LONGEST_BAG * BATCH_SIZE,), "int32", BY_DEVICE),
        lengths=shaped((2, BATCH_SIZE), "int32", BY_DEVICE_SECOND),
        features=tables.feature_order,
        parts=tables.num_devices,
    )

    def step(state, routed, x: Array, weights: Array):
        for _ in range(8):
            x = jnp.tanh(x @ weights)
        return tables.lookup(state, routed), x

    lowered = jax.jit(step).lower(
        tables.abstract_state(),
        jax.eval_shape(tables.route, ids),
        shaped((8 * BATCH_SIZE, WIDTH), "float32", BY_DEVICE),
        shaped((WIDTH, WIDTH), "float32", REPLICATED),
    )
    return step_timeline(compile_for_target(lowered, topology), topology, CostSettings())


VECTORS = BATCH_SIZE * DIM * 4
TARGETS = [
    "h200:1x8",
    "zionex:2x8",
    "v6e:2x4",
    *(pytest.param(target, marks=pytest.mark.slow) for target in ("v5p:2x4", "v5e:2x4", "tpu7x:2x4")),
]


@pytest.mark.parametrize("target", TARGETS)
def test_vectors_on_their_way_home_then_arithmetic_goes_on_beside_them(target: str) -> None:
    found = lookup_beside_products(target)
    topology = parse_topology(target)
    nodes, chips, devices = topology.nodes, topology.chips, topology.num_devices
    hops = {
        (AXES if nodes > 1 else (CHIP,)): VECTORS * (devices - 1) / devices,
        # Sums are added inside nodes first.
        (CHIP, "sums"): VECTORS * (chips - 1) / chips,
        (NODE, "sums"): VECTORS / chips * (nodes - 1) / nodes,
    }
    sent = {}
    for one in found.exchanges:
        collective = one.collective
        if collective.kind == "all-to-all":
            sent[collective.axes] = collective.wire_bytes
        else:
            # An all-reduce would send each byte twice.
            assert collective.kind == "reduce-scatter"
            sent[(*collective.axes, "sums")] = collective.wire_bytes
    assert sent == {way: size for way, size in hops.items() if size}
    # Eight products of a device's part of the samples.
    assert found.work.flops == 8 * 2 * (8 * BATCH_SIZE / devices) * WIDTH**2
    # A v5e has no SparseCores, to run reduce-scatters there.
    synchronous = {one.collective.kind for one in found.exchanges if not one.asynchronous}
    assert synchronous <= ({"reduce-scatter"} if topology.kind == "v5e" else set())
    assert found.hidden_share > (0.5 if topology.kind == "v5e" else 0.8)


@pytest.mark.parametrize("samples", [1024, 16384])
def test_partial_sums_then_a_tpu_adds_them_by_reduce_scatter_however_many(samples: int) -> None:
    topology = parse_topology("v6e:2x4")
    mesh = target_mesh(topology)
    bring_home = partial(bring_home_table_row_wise, nodes=topology.nodes, codec="float32")
    step = jax.shard_map(
        lambda sums: bring_home([jnp.tanh(sums)])[0],
        mesh=mesh,
        in_specs=BY_DEVICE,
        out_specs=BY_DEVICE,
        check_vma=False,
    )
    shape = (topology.num_devices**2, samples, 1, DIM)
    sums = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding_on(mesh, BY_DEVICE))
    found = step_timeline(compile_for_target(jax.jit(step).lower(sums), topology), topology, CostSettings())
    # An all-reduce would send each byte twice.
    assert [one.collective.kind for one in found.exchanges] == ["reduce-scatter", "all-to-all"]


@pytest.mark.parametrize("kind", KINDS)
def test_compiler_options_then_every_kind_of_accelerator_has_some(kind: str) -> None:
    topology = parse_topology(f"{kind}:1x8" if kind != "v5p" else "v5p:1x4")
    assert compiler_options(topology.platform, topology.device_kind)


def test_compiler_options_of_a_cpu_then_none_is_about_exchanges() -> None:
    assert set(compiler_options("cpu", "cpu")) == {"xla_cpu_experimental_ynn_fusion_type"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "least"),
    [
        ("h200:1x8", 0.95),
        # Exchanges take long beside what is computed: docs/overlap.md has the bounds.
        ("h200:16x8", 0.7),
        ("zionex:16x8", 0.85),
        # Their compiler takes no figures of others.
        ("v6e:2x4", 0.65),
        ("v5p:2x4", 0.6),
        ("tpu7x:2x4", 0.5),
    ],
)
def test_dcnv2_mlperf_then_so_much_of_its_exchanges_is_hidden(target: str, least: float) -> None:
    topology = parse_topology(target)
    config = CONFIGS["dcnv2_mlperf"]()
    config = dataclasses.replace(config, mesh=MeshConfig(nodes=topology.nodes, chips=topology.chips))
    assert config.stated is not None
    known = planning_input(config, config.stated, topology.num_devices)
    plan = known.make_plan(topology).plan
    compiled = compile_for_target(lower_train_step(config, config.stated, plan, target_mesh(topology)), topology)
    found = step_timeline(compiled, topology, known.settings)
    # The products of the planner's estimate; what the program has on top is the update of the dense part.
    assert found.work.flops == pytest.approx(
        known.dense.flops_per_sample * known.batch_size / topology.num_devices, rel=0.02
    )
    exchanges = [exchange for exchange in found.exchanges if exchange.collective.wire_bytes > 1e6]
    assert {exchange.collective.kind for exchange in exchanges} >= {"all-to-all", "all-reduce"}
    print(summary(found, known.batch_size))
    assert found.hidden_share >= least
