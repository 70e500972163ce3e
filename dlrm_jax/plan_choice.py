"""Which plan a model is placed by."""

from jax.sharding import Mesh

from dlrm_jax.config import Config, make_specs
from dlrm_jax.data.card import DatasetCard
from dlrm_jax.planning import planning_input
from sharding.measure import topology_of
from sharding.plan import ShardingPlan, one_device_plan
from sharding.planner import default_plan


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
    known = planning_input(config, card, mesh.devices.size)
    return default_plan(
        known.tables,
        known.features,
        topology_of(mesh),
        batch_size=known.batch_size,
        loads=known.loads,
        dense=known.dense,
        settings=known.settings,
    )
