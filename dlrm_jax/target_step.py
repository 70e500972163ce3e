"""The training step, compiled ahead of time for devices that this machine need not have."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from dlrm_jax.config import Config, OrderBy
from dlrm_jax.data.assemble import IdCapacity
from dlrm_jax.data.card import DatasetCard
from dlrm_jax.pipelined_step import abstract_routed, make_pipelined_step
from dlrm_jax.recommender import Recommender
from dlrm_jax.train_state import abstract_train_state, make_dense_optimizer
from dlrm_jax.train_step import make_no_metrics, make_train_step
from sharding.compiler_options import compiler_options, options_to_look_at
from sharding.cost_settings import CostSettings
from sharding.plan import ShardingPlan
from sharding.program import parse_program
from sharding.scheduling import can_schedule, scheduling_options
from sharding.timeline import Timeline, estimate_timeline
from sharding.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceBytes:
    """Bytes that XLA gives a program on one device.

    Attributes:
        arguments: Arguments: the state, metrics, the batch and, if pipelined, its routed ids and the next batch's ids.
        outputs: Results.
        reused: Results that take the place of arguments.
        temporary: Everything between.
    """

    arguments: int
    outputs: int
    reused: int
    temporary: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.outputs - self.reused + self.temporary


def lower_train_step(config: Config, card: DatasetCard, plan: ShardingPlan, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the step that training would run, pipelined as the config says, with room for the ids of ordinary batches.

    Allocates nothing.

    Args:
        config: The experiment.
        card: Its dataset.
        plan: Where its tables live.
        mesh: The devices, such as those of `sharding.aot.target_mesh`.

    Raises:
        InputError: They do not fit each other.
    """
    recommender = Recommender(config, card, mesh=mesh, plan=plan)
    optimizer = make_dense_optimizer(config.dense_optimizer, config.schedule)
    devices, metrics = mesh.devices.size, jax.eval_shape(make_no_metrics(mesh))
    samples = config.data.batch_size // devices
    columns = recommender.card.sparse
    capacities = recommender.tables.expected_capacities(
        samples,
        IdCapacity(columns, samples).value,
        {column.name: column.mean_pooling_factor if column.bag else 1.0 for column in columns},
    )
    batch = recommender.abstract_batch(
        config.data.batch_size,
        capacities.ids * devices,
        weighted=any(column.weights is not None for column in columns),
    )
    state = abstract_train_state(recommender, optimizer)
    if config.train.pipeline == "none":
        return make_train_step(recommender, optimizer).lower(state, metrics, batch, capacities=capacities)
    routed = abstract_routed(recommender, batch.ids, capacities)
    step = make_pipelined_step(recommender, optimizer)
    return step.lower(state, metrics, batch, routed, batch.ids, capacities=capacities)


def compile_for_target(
    lowered: jax.stages.Lowered, topology: Topology, *, order_by: OrderBy = "estimates"
) -> jax.stages.Compiled:
    """Compiles a program that is to be looked at, not run: memory and schedule are those that running it would have.

    Args:
        lowered: The program.
        topology: What it is for.
        order_by: As `train.order_by` of a config.
    """
    options = compiler_options(topology.platform, topology.device_kind) | options_to_look_at(topology.platform)
    compiled = lowered.compile(compiler_options=options or None)
    if order_by == "estimates" and can_schedule(topology):
        compiled = lowered.compile(compiler_options=options | scheduling_options(compiled, topology))
    return compiled


def step_timeline(compiled: jax.stages.Compiled, topology: Topology, settings: CostSettings) -> Timeline:
    """How a compiled step is estimated to run.

    Args:
        compiled: The step.
        topology: What it is for.
        settings: Efficiencies.
    """
    return estimate_timeline(parse_program(compiled.as_text() or ""), topology, settings)


def device_bytes(compiled: jax.stages.Compiled) -> DeviceBytes:
    """Bytes of a compiled program on one device."""
    memory: Any = compiled.memory_analysis()
    return DeviceBytes(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        reused=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
    )
