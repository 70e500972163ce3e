"""Which plan a model is placed by, and in how many chunks its batches train."""

import math

from jax.sharding import Mesh

from dlrm_jax.config import Config, make_specs
from dlrm_jax.data.card import DatasetCard
from dlrm_jax.planning import check_memory_of_plan, planning_input
from sharding.chunks import best_chunks
from sharding.errors import InputError
from sharding.measure import memory_alone, topology_of
from sharding.mesh import is_of_hosts
from sharding.plan import ShardingPlan, one_device_plan
from sharding.planner import usable_memory
from sharding.topology import preset_of

# Of accelerators whose figures are not known. To measure them would make a number that changes from run to run.
_CHUNKS_OF_UNKNOWN = 4


def choose_plan(config: Config, card: DatasetCard, mesh: Mesh) -> ShardingPlan:
    """The plan that the config names; else, on several devices, the planner's for the machine at hand.

    All processes of the mesh must call it, because they ask the machine together.

    Args:
        config: The experiment.
        card: The dataset.
        mesh: Devices.

    Returns:
        The plan.

    Raises:
        InputError: The named plan cannot be read, or the tables do not fit into the devices' memory.
    """
    if config.plan is not None:
        return ShardingPlan.load(config.plan)
    if mesh.devices.size == 1:
        return one_device_plan(make_specs(config.embedding, card)[0])
    return planning_input(config, card, mesh.devices.size).make_plan(topology_of(mesh)).plan


def check_memory(config: Config, card: DatasetCard, plan: ShardingPlan, mesh: Mesh) -> None:
    """Refuses to train what devices have no room for. Of plans for several that it makes itself, the planner does.

    Args:
        config: The experiment.
        card: The dataset.
        plan: Where its tables live.
        mesh: Devices.

    Raises:
        InputError: The tables and what a step needs beside them do not fit.
    """
    if mesh.devices.size > 1 and config.plan is None:
        return
    known, topology = planning_input(config, card, mesh.devices.size), memory_alone(mesh)
    if mesh.devices.size == 1:
        known.make_plan(topology)
    else:
        check_memory_of_plan(known.cost(plan, topology).storage, usable_memory(topology), topology.name)


def check_chunks(config: Config, num_devices: int) -> None:
    """Raises InputError if the config's number of chunks does not divide the samples of a device.

    Args:
        config: The experiment.
        num_devices: Devices that share a batch.
    """
    given, samples = config.train.chunks, config.data.batch_size // num_devices
    if given is not None and samples % given:
        raise InputError(
            f"train.chunks is {given}, which does not divide the {samples} samples of a device (data.batch_size "
            f"{config.data.batch_size} over {num_devices} devices): use a divisor, or leave it out"
        )


def choose_chunks(config: Config, card: DatasetCard, plan: ShardingPlan, mesh: Mesh) -> int:
    """The number of chunks of a batch: the config's; else the cost model's for the kind of devices.

    It is the same in every run. Hosts take one, since XLA's exchanges there let nothing else run.

    Args:
        config: The experiment.
        card: The dataset.
        plan: Where its tables live.
        mesh: Devices.

    Raises:
        InputError: The config's number does not divide the samples of a device.
    """
    check_chunks(config, mesh.devices.size)
    if config.train.chunks is not None:
        return config.train.chunks
    if mesh.devices.size == 1 or is_of_hosts(mesh):
        return 1
    topology = preset_of(mesh.devices.flat[0].device_kind, *mesh.devices.shape)
    if topology is None:
        return math.gcd(_CHUNKS_OF_UNKNOWN, config.data.batch_size // mesh.devices.size)
    known = planning_input(config, card, mesh.devices.size)
    return best_chunks(known.layout(plan), known.features, known.step(topology))
