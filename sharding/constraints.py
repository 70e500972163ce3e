"""Constraints: what a user wants of the placement of some tables, and what that leaves the planner."""

import dataclasses
from collections.abc import Sequence
from typing import get_args

from sharding.errors import InputError
from sharding.plan import PlacementKind, Returns
from sharding.tables import TableSpec
from sharding.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint:
    """What a user wants of some tables.

    Attributes:
        tables: Names of the tables.
        kinds: The kinds of placement that are allowed; None for all.
        forbidden: The kinds that are not.
        devices: The devices that hold it: one (table-wise), or one a column slice (column-wise). One table only, unless
            it is one device.
        nodes: The nodes that do: one (table-row-wise), or one a column slice (grid).
        returns: The only return that is allowed for spread rows; None for both.
        together: Whether the tables are to be on one device, whichever.
    """

    tables: tuple[str, ...]
    kinds: tuple[PlacementKind, ...] | None = None
    forbidden: tuple[PlacementKind, ...] = ()
    devices: tuple[int, ...] | None = None
    nodes: tuple[int, ...] | None = None
    returns: Returns | None = None
    together: bool = False


@dataclasses.dataclass(kw_only=True)
class Allowed:
    """What the constraints on one table leave."""

    kinds: set[PlacementKind] | None = None
    forbidden: set[PlacementKind] = dataclasses.field(default_factory=set)
    devices: tuple[int, ...] | None = None
    nodes: tuple[int, ...] | None = None
    returns: Returns | None = None

    def allows(self, kind: PlacementKind, num_slices: int, returns: Returns | None) -> bool:
        """Whether the table may be placed so."""
        if (self.kinds is not None and kind not in self.kinds) or kind in self.forbidden:
            return False
        if self.returns is not None and returns is not None and returns != self.returns:
            return False
        if self.devices is not None:
            return kind in ("table_wise", "column_wise") and num_slices == len(self.devices)
        if self.nodes is not None:
            return kind in ("table_row_wise", "grid") and num_slices == len(self.nodes)
        return True


def allowed_of(
    tables: Sequence[TableSpec], constraints: Sequence[Constraint], topology: Topology
) -> dict[str, Allowed]:
    """What all constraints together leave of each table, by name.

    Args:
        tables: The tables.
        constraints: What users want.
        topology: The machine.

    Raises:
        InputError: A constraint names what does not exist, or two contradict each other.
    """
    allowed = {table.name: Allowed() for table in tables}
    for constraint in constraints:
        for name in constraint.tables:
            if name not in allowed:
                raise InputError(f"a constraint names table {name!r}, which does not exist: {list(allowed)[:20]}")
        if not constraint.tables:
            raise InputError("a constraint names no table: name those that it is for, or leave it out")
        for kind in (*(constraint.kinds or ()), *constraint.forbidden):
            if kind not in get_args(PlacementKind):
                raise InputError(
                    f"a constraint on table {constraint.tables[0]!r} names kind {kind!r}; the kinds are "
                    f"{', '.join(get_args(PlacementKind))}"
                )
        if constraint.returns not in (None, *get_args(Returns)):
            raise InputError(
                f"a constraint on table {constraint.tables[0]!r} names returns {constraint.returns!r}; they are "
                f"{', '.join(get_args(Returns))}, or None for both"
            )
        for word, owners, limit in (
            ("devices", constraint.devices, topology.nodes * topology.chips),
            ("nodes", constraint.nodes, topology.nodes),
        ):
            wrong = [owner for owner in owners or () if not 0 <= owner < limit]
            if wrong:
                raise InputError(
                    f"table {constraint.tables[0]!r} is pinned to {word.removesuffix('s')} {wrong[0]}, but "
                    f"{topology.nodes} x {topology.chips} has {word} 0 to {limit - 1}"
                )
            if owners is not None and (not owners or len(set(owners)) < len(owners)):
                raise InputError(f"table {constraint.tables[0]!r} is pinned to {word} {owners}; name each of them once")
        for name in constraint.tables:
            mine = allowed[name]
            kinds: set[PlacementKind] | None = set(constraint.kinds) if constraint.kinds is not None else None
            if constraint.together:
                only: set[PlacementKind] = {"table_wise"}
                kinds = only if kinds is None else kinds & only
            if kinds is not None:
                mine.kinds = kinds if mine.kinds is None else mine.kinds & kinds
            mine.forbidden |= set(constraint.forbidden)
            for field in ("devices", "nodes", "returns"):
                wanted, before = getattr(constraint, field), getattr(mine, field)
                if wanted is not None and before is not None and wanted != before:
                    raise InputError(f"table {name!r} is asked to have {field} {before} and {wanted}: keep one of them")
                setattr(mine, field, before if wanted is None else wanted)
            if mine.devices is not None and mine.nodes is not None:
                raise InputError(
                    f"table {name!r} is pinned to devices {mine.devices}, and spread over nodes {mine.nodes}: keep one"
                )
    for names in together_sets(constraints):
        pinned = {name: devices for name in names if (devices := allowed[name].devices) is not None}
        if len(set(pinned.values())) > 1:
            (one, first), (other, second) = sorted(pinned.items(), key=lambda item: item[1])[:: len(pinned) - 1]
            raise InputError(
                f"tables {one!r} and {other!r} are to be together, but are pinned to devices {first} and {second}: pin "
                "one of them, or both to the same"
            )
    return allowed


def together_sets(constraints: Sequence[Constraint]) -> tuple[tuple[str, ...], ...]:
    """Names of tables that must be on one device; sets that share one are one."""
    joined: list[set[str]] = []
    for members in (set(each.tables) for each in constraints if each.together):
        touching = [other for other in joined if other & members]
        joined = [other for other in joined if not other & members]
        joined.append(members.union(*touching))
    return tuple(tuple(sorted(members)) for members in joined)
