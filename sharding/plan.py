"""ShardingPlan: where each table lives."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

from jax.sharding import Mesh

from sharding.errors import InputError
from sharding.tables import TableSpec

PlacementKind = Literal["table_wise"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one table lives.

    Attributes:
        table: Name of the table.
        kind: "table_wise": the whole table on one device.
        device: Number of that device in the mesh, node by node.
    """

    table: str
    kind: PlacementKind = "table_wise"
    device: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingPlan:
    """Placements of all tables on a mesh of ``nodes`` times ``chips`` devices."""

    nodes: int
    chips: int
    placements: tuple[Placement, ...]

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.nodes * self.chips


def one_device_plan(tables: Sequence[TableSpec]) -> ShardingPlan:
    """The plan that puts everything on a mesh of one device."""
    return ShardingPlan(nodes=1, chips=1, placements=tuple(Placement(table=table.name) for table in tables))


def check_plan(plan: ShardingPlan, tables: Sequence[TableSpec], mesh: Mesh) -> None:
    """Raises InputError unless the plan places exactly these tables on this mesh.

    Args:
        plan: The plan.
        tables: The tables.
        mesh: The mesh.
    """
    placed, needed = sorted(p.table for p in plan.placements), sorted(t.name for t in tables)
    if placed != needed:
        odd = sorted(set(placed) ^ set(needed)) or placed
        raise InputError(
            f"the plan places {len(placed)} tables, the model has {len(needed)}; they differ in {odd[0]!r}"
        )
    if (plan.nodes, plan.chips) != tuple(mesh.devices.shape):
        raise InputError(
            f"the plan is for a mesh of {plan.nodes} x {plan.chips}, but the mesh is "
            f"{' x '.join(map(str, mesh.devices.shape))}: make a plan for this mesh"
        )
    for placement in plan.placements:
        if placement.kind not in get_args(PlacementKind):
            raise InputError(
                f"table {placement.table!r}: placement {placement.kind!r} is not one of "
                f"{', '.join(get_args(PlacementKind))}"
            )
        if not 0 <= placement.device < plan.num_devices:
            raise InputError(
                f"table {placement.table!r} is placed on device {placement.device}, but the mesh has devices 0 to "
                f"{plan.num_devices - 1}"
            )
    if plan.num_devices != 1:
        raise InputError(
            f"the plan is for {plan.num_devices} devices, but this version keeps tables on one: use a 1 x 1 mesh"
        )
