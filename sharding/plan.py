"""ShardingPlan: where each table lives. Frozen, checked, and JSON on disk."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pallas_kernels.row_optimizers import STATISTICS_BLOCK
from sharding.errors import InputError
from sharding.mesh import NODE
from sharding.tables import TableSpec

PlacementKind = Literal["table_wise", "column_wise", "row_wise", "table_row_wise", "grid", "data_parallel"]
Returns = Literal["partial_sums", "rows"]

# What a slice's owner is, by kind; None: the whole mesh.
_OWNER = {"table_wise": "device", "column_wise": "device", "table_row_wise": NODE, "grid": NODE}
_SLICED = ("column_wise", "grid")
_ROWS_SPREAD = ("row_wise", "table_row_wise", "grid")
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """Neighbouring columns of a table, and who holds them.

    Attributes:
        first_column: First column.
        num_columns: Number of columns.
        owner: Number of the device (table- and column-wise) or of the node (table-row-wise, grid); None: all devices.
    """

    first_column: int
    num_columns: int
    owner: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one table lives.

    Attributes:
        table: Name of the table.
        kind: "table_wise": on one device. "column_wise": column slices, each on one device. "row_wise": row r on device
            r mod W. "table_row_wise": on one node, row r on its chip r mod C. "grid": column slices, each
            table-row-wise. "data_parallel": a replica on every device.
        slices: The table's columns, in order; several for "column_wise" and "grid", all equally wide.
        returns: How vectors of spread rows come home. "partial_sums": pooled by each owner, and added on the way;
            "rows": distinct rows travel and are pooled at home, bit for bit as on one device. None for other kinds.
    """

    table: str
    kind: PlacementKind
    slices: tuple[Slice, ...]
    returns: Returns | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingPlan:
    """Placements of all tables on a mesh of ``nodes`` times ``chips`` devices; devices are numbered node by node."""

    nodes: int
    chips: int
    placements: tuple[Placement, ...]

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.nodes * self.chips

    def placement(self, table: str) -> Placement:
        """The placement of a table.

        Raises:
            KeyError: The plan does not place it.
        """
        for placement in self.placements:
            if placement.table == table:
                return placement
        raise KeyError(table)

    def to_json(self) -> str:
        """The plan as text, a table a line."""
        lines = [json.dumps(_placement_to_json(placement)) for placement in self.placements]
        head = f'{{"format": {_FORMAT}, "nodes": {self.nodes}, "chips": {self.chips}, "placements": ['
        return head + "\n  " + ",\n  ".join(lines) + "\n]}\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a file."""
        Path(path).write_text(self.to_json())

    @classmethod
    def from_json(cls, text: str, *, source: str = "plan") -> "ShardingPlan":
        """Reads what `to_json` wrote.

        Args:
            text: The text.
            source: What to call it in errors, such as the file's name.

        Raises:
            InputError: The text is not a plan.
        """
        try:
            tree = json.loads(text)
            if tree["format"] != _FORMAT:
                raise ValueError(f"its format is {tree['format']}, this version reads {_FORMAT}")
            _check_keys(tree, ("format", "nodes", "chips", "placements"))
            placements = tuple(_placement_from_json(entry) for entry in tree["placements"])
            return cls(nodes=_whole(tree, "nodes"), chips=_whole(tree, "chips"), placements=placements)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{source}: is not a sharding plan ({what}); make one with scripts/plan.py") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ShardingPlan":
        """Reads a plan from a file.

        Raises:
            InputError: There is no such file, or it is not a plan.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); make a plan with scripts/plan.py") from error
        return cls.from_json(text, source=str(path))


def _placement_to_json(placement: Placement) -> dict[str, Any]:
    entry: dict[str, Any] = {"table": placement.table, "kind": placement.kind}
    if placement.returns is not None:
        entry["returns"] = placement.returns
    owner = _OWNER.get(placement.kind)
    entry["slices"] = [
        {"columns": [piece.first_column, piece.first_column + piece.num_columns]}
        | ({} if owner is None else {owner: piece.owner})
        for piece in placement.slices
    ]
    return entry


def _placement_from_json(entry: dict[str, Any]) -> Placement:
    where, kinds = f"table {entry['table']!r}: ", get_args(PlacementKind)
    if entry["kind"] not in kinds:
        raise ValueError(f"{where}placement {entry['kind']!r} is not one of {', '.join(kinds)}")
    owner = _OWNER.get(entry["kind"])
    _check_keys(entry, ("table", "kind", "returns", "slices"), where)
    slices = []
    for piece in entry["slices"]:
        _check_keys(piece, ("columns",) if owner is None else ("columns", owner), where)
        first, stop = piece["columns"]
        if type(first) is not int or type(stop) is not int:
            raise ValueError(f"{where}columns {piece['columns']} are not two whole numbers")
        held_by = None if owner is None else _whole(piece, owner)
        slices.append(Slice(first_column=first, num_columns=stop - first, owner=held_by))
    return Placement(table=str(entry["table"]), kind=entry["kind"], slices=tuple(slices), returns=entry.get("returns"))


def _check_keys(tree: dict[str, Any], known: Sequence[str], where: str = "") -> None:
    odd = [key for key in tree if key not in known]
    if odd:
        raise ValueError(f"{where}there is no {odd[0]!r} here, only {', '.join(known)}")


def _whole(tree: dict[str, Any], name: str) -> int:
    value = tree[name]
    if type(value) is not int:
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return value


def table_wise(table: TableSpec, device: int) -> Placement:
    """The whole table on one device."""
    return Placement(table=table.name, kind="table_wise", slices=(_all_columns(table, device),))


def column_wise(table: TableSpec, devices: Sequence[int]) -> Placement:
    """Equal column slices, one on each of the devices.

    Raises:
        InputError: The columns do not divide.
    """
    return Placement(table=table.name, kind="column_wise", slices=_equal_slices(table, devices))


def row_wise(table: TableSpec, *, returns: Returns) -> Placement:
    """Rows spread over all devices."""
    return Placement(table=table.name, kind="row_wise", slices=(_all_columns(table, None),), returns=returns)


def table_row_wise(table: TableSpec, node: int, *, returns: Returns) -> Placement:
    """Rows spread over the chips of one node."""
    return Placement(table=table.name, kind="table_row_wise", slices=(_all_columns(table, node),), returns=returns)


def grid(table: TableSpec, nodes: Sequence[int], *, returns: Returns) -> Placement:
    """Equal column slices, each spread by rows over the chips of one of the nodes.

    Raises:
        InputError: The columns do not divide.
    """
    return Placement(table=table.name, kind="grid", slices=_equal_slices(table, nodes), returns=returns)


def data_parallel(table: TableSpec) -> Placement:
    """A replica on every device."""
    return Placement(table=table.name, kind="data_parallel", slices=(_all_columns(table, None),))


def _all_columns(table: TableSpec, owner: int | None) -> Slice:
    return Slice(first_column=0, num_columns=table.dim, owner=owner)


def _equal_slices(table: TableSpec, owners: Sequence[int]) -> tuple[Slice, ...]:
    width, rest = divmod(table.dim, len(owners))
    if rest or (len(owners) > 1 and width % STATISTICS_BLOCK):
        raise InputError(_indivisible(table, len(owners)))
    return tuple(Slice(first_column=i * width, num_columns=width, owner=owner) for i, owner in enumerate(owners))


def _indivisible(table: TableSpec, count: int) -> str:
    possible = [
        n for n in range(1, table.dim + 1) if table.dim % n == 0 and (n == 1 or table.dim // n % STATISTICS_BLOCK == 0)
    ]
    return (
        f"table {table.name!r}: its {table.dim} columns do not divide into {count} equal slices of a multiple of "
        f"{STATISTICS_BLOCK}: use one of {possible} slices"
    )


def one_device_plan(tables: Sequence[TableSpec]) -> ShardingPlan:
    """The plan that puts everything on a mesh of one device."""
    return ShardingPlan(nodes=1, chips=1, placements=tuple(table_wise(table, 0) for table in tables))


def check_plan(plan: ShardingPlan, tables: Sequence[TableSpec], nodes: int, chips: int) -> None:
    """Raises InputError unless the plan places each column of exactly these tables once, on a mesh of this shape.

    Args:
        plan: The plan.
        tables: The tables.
        nodes: Nodes of the mesh.
        chips: Chips of each.
    """
    if (plan.nodes, plan.chips) != (nodes, chips):
        raise InputError(
            f"the plan is for a mesh of {plan.nodes} x {plan.chips}, but the mesh is {nodes} x {chips}: make it "
            f"{plan.nodes} x {plan.chips} (--mesh.nodes, --mesh.chips or --topology), make a plan for this mesh with "
            "scripts/plan.py, or leave --plan out"
        )
    by_name = {table.name: table for table in tables}
    fix = "make a plan for this model with scripts/plan.py, or leave --plan out"
    placed: set[str] = set()
    for placement in plan.placements:
        if placement.table not in by_name:
            raise InputError(
                f"the plan places table {placement.table!r}, which the model does not have; it has "
                f"{list(by_name)[:20]}: {fix}"
            )
        if placement.table in placed:
            raise InputError(f"the plan places table {placement.table!r} twice (an overlap): keep one of the two")
        placed.add(placement.table)
        _check_placement(placement, by_name[placement.table], plan)
    missing = [name for name in by_name if name not in placed]
    if missing:
        raise InputError(
            f"the plan has no place for {len(missing)} of the model's {len(by_name)} tables, first {missing[0]!r}: "
            f"{fix}"
        )


def _check_placement(placement: Placement, table: TableSpec, plan: ShardingPlan) -> None:
    where = f"table {placement.table!r}"
    if placement.kind not in get_args(PlacementKind):
        raise InputError(f"{where}: placement {placement.kind!r} is not one of {', '.join(get_args(PlacementKind))}")
    allowed = get_args(Returns) if placement.kind in _ROWS_SPREAD else (None,)
    if placement.returns not in allowed:
        raise InputError(
            f"{where}: a {placement.kind} placement returns {placement.returns!r}, but must return "
            f"{' or '.join(map(repr, allowed))}"
        )
    _check_columns(placement, table, where)
    owner = _OWNER.get(placement.kind)
    limit = {"device": plan.num_devices, NODE: plan.nodes, None: 0}[owner]
    for piece in placement.slices:
        if owner is None and piece.owner is not None:
            raise InputError(
                f"{where}: a {placement.kind} placement is on all devices, but names {piece.owner}: leave it out"
            )
        if owner is not None and (piece.owner is None or not 0 <= piece.owner < limit):
            raise InputError(
                f"{where} is placed on {owner} {piece.owner}, but a mesh of {plan.nodes} x {plan.chips} has {owner}s 0 "
                f"to {limit - 1}: give one of these"
            )
    owners = [piece.owner for piece in placement.slices]
    if len(set(owners)) < len(owners):
        raise InputError(f"{where}: two of its slices are on the same {owner}; join them, or give each its own")
    shards = {"row_wise": plan.num_devices, "table_row_wise": plan.chips, "grid": plan.chips}.get(placement.kind, 1)
    if table.num_rows < shards:
        raise InputError(
            f"{where} has {table.num_rows} rows, {placement.kind} over {shards} devices needs at least {shards}: place "
            "it table_wise or data_parallel"
        )


def _check_columns(placement: Placement, table: TableSpec, where: str) -> None:
    if not placement.slices:
        raise InputError(f"{where} has no slice of columns: give one, of columns 0 to {table.dim - 1}")
    if len(placement.slices) > 1 and placement.kind not in _SLICED:
        raise InputError(
            f"{where}: a {placement.kind} placement has one slice, but {len(placement.slices)} are given: join them, "
            f"or make it {' or '.join(_SLICED)}"
        )
    end = 0
    for piece in placement.slices:
        if piece.first_column != end:
            what = "an overlap" if piece.first_column < end else "a gap"
            raise InputError(
                f"{where}: a slice begins at column {piece.first_column}, the one before ends at {end}: the plan has "
                f"{what}; slices must follow each other from column 0 to {table.dim - 1}"
            )
        end += piece.num_columns
    if end != table.dim:
        what = "a gap" if end < table.dim else "columns that do not exist"
        raise InputError(
            f"{where}: its slices end at column {end}, its last column is {table.dim - 1}: the plan has {what}; slices "
            "must follow each other to the last column"
        )
    widths = {piece.num_columns for piece in placement.slices}
    if len(placement.slices) > 1 and (len(widths) > 1 or widths.pop() % STATISTICS_BLOCK):
        raise InputError(_indivisible(table, len(placement.slices)))
