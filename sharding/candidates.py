"""Candidates: the ways in which each table could be placed, owners aside, with what each costs.

Letters: W devices, L devices that hold one slice (1, the chips of a node, or all), Q of `SPREAD`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float

from pallas_kernels.row_optimizers import STATISTICS_BLOCK
from sharding.constraints import Allowed, Constraint, allowed_of, together_sets
from sharding.cost import Step, statistics_of
from sharding.cost_settings import CUT_IDS, DISTINCT, IDS, SENT_ROWS, STAGES, VECTORS
from sharding.errors import InputError
from sharding.layout import Family, Shard, store_name, stored_width
from sharding.plan import Placement, PlacementKind, Returns, Slice
from sharding.storage import GroupBuffers, bytes_per_row
from sharding.tables import FeatureSpec, TableSpec

# The quantities that depend on the owner, so that their maximum over devices counts.
SPREAD = (IDS, VECTORS, DISTINCT, SENT_ROWS, CUT_IDS)
_MAX_SLICES = 8
_TPU_LANES = 128
# A replica of a table costs every device's memory: worth a thought for small tables only.
REPLICA_SHARE = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A way to place a table.

    Attributes:
        table: Number of the table.
        kind: Kind of placement.
        num_slices: Column slices.
        returns: How vectors of spread rows come home.
        group: Number of the group (store, width, family).
        store: Number of the store.
        span: Devices that hold one slice.
        profile: Seconds that one slice adds to each of its devices, by quantity.
        fixed: Seconds that it adds to every device.
        owner_bytes: Bytes of one slice on each of its devices.
        fixed_bytes: Bytes that it adds to every device's buffers.
        owners: The devices or nodes that a user pinned it to; None for any.
        has_second_pass: Whether its rows are cut and its rule needs them whole.
    """

    table: int
    kind: PlacementKind
    num_slices: int
    returns: Returns | None
    group: int
    store: int
    span: int
    profile: Float[np.ndarray, "Q L"]
    fixed: float
    owner_bytes: int
    fixed_bytes: float
    owners: tuple[int, ...] | None
    has_second_pass: bool

    @cached_property
    def seconds(self) -> float:
        """Seconds that it adds to all devices together, `fixed` aside."""
        return float(self.profile.sum()) * self.num_slices

    @cached_property
    def total_bytes(self) -> int:
        """Bytes on all devices together."""
        return self.owner_bytes * self.span * self.num_slices


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupKey:
    """What candidates of one group have in common."""

    store: str
    width: int
    family: Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffers:
    """Bytes that a step needs beside the stores, as they follow from the maxima of groups and quantities.

    What the updates of replicas hold in their turn is left out. A quantity that costs nothing, as settings may say,
    has no maximum in seconds and counts for nothing here.

    Attributes:
        constant: Bytes under any plan.
        together: Bytes for a second of each maximum.
        in_turn: The same, of which only the largest product counts; see `sharding.storage.GroupBuffers`.
    """

    constant: float
    together: Float[np.ndarray, "groups Q"]
    in_turn: Float[np.ndarray, "groups Q"]

    def bytes_of(self, most: Float[np.ndarray, "groups Q"]) -> float:
        """Bytes that follow from maxima in seconds; `Candidate.fixed_bytes` come on top."""
        return self.constant + float((self.together * most).sum() + (self.in_turn * most).max(initial=0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """Every table's candidates.

    Attributes:
        tables: The tables.
        groups: The groups that candidates name.
        stores: The stores that they name.
        of_table: Candidates of each table; empty where constraints and memory leave none.
        together: Sets of tables (numbers) that must be on one device.
        vector_seconds: Seconds of one vector a sample, of each group.
        exchange_seconds: Seconds that one exchange takes to start.
        buffers: Bytes beside the stores.
    """

    tables: tuple[TableSpec, ...]
    groups: tuple[GroupKey, ...]
    stores: tuple[str, ...]
    of_table: tuple[tuple[Candidate, ...], ...]
    together: tuple[tuple[int, ...], ...]
    vector_seconds: tuple[float, ...]
    exchange_seconds: float
    buffers: Buffers

    @cached_property
    def bundled(self) -> frozenset[int]:
        """Tables that must be on one device with others."""
        return frozenset(table for tables in self.together for table in tables)

    def without_buffers(self) -> "Choices":
        """The same for steps that need nothing but the stores."""
        none = 0.0 * self.buffers.together
        return dataclasses.replace(self, buffers=Buffers(constant=0.0, together=none, in_turn=none))

    def up_to_width(self, width: int) -> "Choices":
        """Those of stored widths up to a limit; all of a table that has no such."""
        narrow = tuple(
            tuple(c for c in candidates if self.groups[c.group].width <= width) or candidates
            for candidates in self.of_table
        )
        return dataclasses.replace(self, of_table=narrow)

    def without_family(self, family: Family) -> "Choices":
        """Those whose vectors come home in another way; all of a table that has no such."""
        others = tuple(
            tuple(c for c in candidates if self.groups[c.group].family != family) or candidates
            for candidates in self.of_table
        )
        return dataclasses.replace(self, of_table=others)


def _slice_counts(table: TableSpec, most: int, multiple: int) -> list[int]:
    return [count for count in range(2, most + 1) if table.dim % count == 0 and table.dim // count % multiple == 0]


def _ways(
    table: TableSpec, allowed: Allowed, step: Step, replica_bytes: float
) -> Iterator[tuple[PlacementKind, int, Returns | None]]:
    nodes, chips = step.topology.nodes, step.topology.chips
    pinned = allowed.devices or allowed.nodes or ()
    most = max(_MAX_SLICES, len(pinned))
    # A TPU pads rows to its lanes, so that narrow slices save nothing there.
    narrow = step.topology.platform != "tpu" or pinned
    multiple = STATISTICS_BLOCK if narrow else _TPU_LANES
    ways: list[tuple[PlacementKind, int, Returns | None]] = [("table_wise", 1, None)]
    ways.extend(("column_wise", count, None) for count in _slice_counts(table, min(most, nodes * chips), multiple))
    returns: tuple[Returns, ...] = ("partial_sums", "rows")
    if table.num_rows >= nodes * chips:
        ways.extend(("row_wise", 1, back) for back in returns)
    # On one node, row-wise is the same; with one chip a node, table-wise is.
    asked = bool(allowed.nodes or (allowed.kinds and allowed.kinds & {"table_row_wise", "grid"}))
    if table.num_rows >= chips and (asked or (nodes > 1 and chips > 1)):
        ways.extend(("table_row_wise", 1, back) for back in returns)
        ways.extend(
            ("grid", count, back) for count in _slice_counts(table, min(most, nodes), multiple) for back in returns
        )
    named = allowed.kinds is not None and "data_parallel" in allowed.kinds
    row = bytes_per_row(table, stored_width(table.dim))
    if named or table.num_rows * row <= replica_bytes:
        ways.append(("data_parallel", 1, None))
    return (way for way in ways if allowed.allows(*way))


def _family(kind: PlacementKind, returns: Returns | None) -> Family:
    if kind == "data_parallel":
        return "local"
    if kind in ("table_wise", "column_wise"):
        return "table_wise"
    if returns == "rows":
        return "rows_by_id"
    return "row_wise" if kind == "row_wise" else "table_row_wise"


def make_choices(
    tables: Sequence[TableSpec],
    features: Sequence[FeatureSpec],
    step: Step,
    constraints: Sequence[Constraint],
    memory: float,
    *,
    replica_bytes: float | None = None,
) -> Choices:
    """The candidates of every table.

    Table-wise; column-wise and grid in 2 to 8 equal slices of a multiple of 16 columns; row-wise, table-row-wise and
    grid with both returns; data-parallel for small tables.

    Args:
        tables: The tables.
        features: The features.
        step: What a step asks of the machine.
        constraints: What users want.
        memory: Bytes of a device that stores and buffers may take; candidates whose stores need more are left out.
        replica_bytes: Bytes of the largest table that may be data-parallel unless users ask for it; 2 % of ``memory``
            unless given.

    Raises:
        InputError: A constraint names what does not exist, or leaves a table no kind of placement.
    """
    topology = step.topology
    devices = topology.nodes * topology.chips
    allowed = allowed_of(tables, constraints, topology)
    features_of: dict[str, list[FeatureSpec]] = {}
    for feature in features:
        features_of.setdefault(feature.table, []).append(feature)
    weights = _stage_weights(step)
    groups: dict[GroupKey, int] = {}
    stores: dict[str, int] = {}
    rates: list[np.ndarray] = []
    buffers: list[GroupBuffers] = []
    of_table = []
    for number, table in enumerate(tables):
        mine = allowed[table.name]
        ways = list(_ways(table, mine, step, memory * REPLICA_SHARE if replica_bytes is None else replica_bytes))
        if not ways:
            raise InputError(
                f"the constraints on table {table.name!r} ({table.num_rows} rows, {table.dim} columns) leave no "
                f"placement on {topology.nodes} x {topology.chips} devices: row_wise needs {devices} rows or more, "
                f"table_row_wise and grid {topology.chips}; slices of column_wise and grid need a multiple of "
                f"{STATISTICS_BLOCK} columns each: allow another kind, or pin it to fewer or more"
            )
        store = stores.setdefault(store_name(table), len(stores))
        quantities: dict[tuple[Family, int, bool], tuple[np.ndarray, np.ndarray]] = {}
        found = []
        for kind, num_slices, returns in ways:
            family = _family(kind, returns)
            columns = table.dim // num_slices
            width = stored_width(columns)
            key = GroupKey(store=store_name(table), width=width, family=family)
            if key not in groups:
                groups[key] = len(groups)
                rates.append(weights @ step.group_rates(table, width, family))
                buffers.append(step.group_buffers(table, width, family))
            span = {"table_wise": 1, "column_wise": 1, "table_row_wise": topology.chips, "grid": topology.chips}.get(
                kind, devices
            )
            cut = num_slices > 1
            if (family, span, cut) not in quantities:
                shard = Shard(
                    table=table,
                    first_column=0,
                    num_columns=columns,
                    first_device=0,
                    num_owners=span,
                    replicated=kind == "data_parallel",
                )
                parts = [step.lookup_quantities(feature, shard, family) for feature in features_of[table.name]]
                at_owners = np.sum([part[0] for part in parts], axis=0)
                quantities[family, span, cut] = at_owners, np.sum([part[1] for part in parts], axis=0)
            at_owners, at_home = quantities[family, span, cut]
            rate = rates[groups[key]]
            rows = table.num_rows if kind == "data_parallel" else -(-table.num_rows // span)
            row_bytes = bytes_per_row(table, width)
            found.append(
                Candidate(
                    table=number,
                    kind=kind,
                    num_slices=num_slices,
                    returns=returns,
                    group=groups[key],
                    store=store,
                    span=span,
                    profile=at_owners[list(SPREAD)] * rate[list(SPREAD), None],
                    fixed=float(rate @ at_home) * num_slices,
                    owner_bytes=rows * row_bytes,
                    fixed_bytes=float(buffers[groups[key]].together @ at_home) * num_slices,
                    owners=mine.devices or mine.nodes,
                    has_second_pass=cut and statistics_of(table) > 0,
                )
            )
        of_table.append(tuple(candidate for candidate in found if candidate.owner_bytes <= memory))
    by_name = {table.name: number for number, table in enumerate(tables)}
    return Choices(
        tables=tuple(tables),
        groups=tuple(groups),
        stores=tuple(stores),
        of_table=tuple(of_table),
        together=tuple(tuple(sorted(by_name[name] for name in names)) for names in together_sets(constraints)),
        vector_seconds=tuple(float(rate[VECTORS]) for rate in rates),
        exchange_seconds=step.exchange_latency(),
        buffers=Buffers(
            constant=sum(step.buffers_at_home({table.name: table for table in tables}, features)),
            together=_per_second([each.together for each in buffers], rates),
            in_turn=_per_second([each.in_turn for each in buffers], rates),
        ),
    )


def _per_second(sizes: Sequence[np.ndarray], rates: Sequence[np.ndarray]) -> Float[np.ndarray, "groups Q"]:
    """Bytes for a second of each quantity, from bytes and seconds for one of it."""
    spread = list(SPREAD)
    size, rate = np.array(sizes)[:, spread], np.array(rates)[:, spread]
    return np.divide(size, rate, out=np.zeros_like(size), where=rate > 0)


def _stage_weights(step: Step) -> Float[np.ndarray, " T"]:
    """What a second of each stage counts for in the search: of exchanges, the share that cannot be hidden."""
    computing = ("lookup", "update", "dense")
    return np.array([1.0 if stage in computing else 1.0 - step.settings.overlap for stage in STAGES])


def at_stages(step: Step) -> float:
    """Seconds of what is the same for every plan, as the search counts them."""
    return float(_stage_weights(step) @ step.fixed_seconds())


def to_placement(candidate: Candidate, table: TableSpec, owners: Sequence[int]) -> Placement:
    """The placement that a candidate becomes with owners: devices or nodes, one a slice; none for all devices."""
    columns = table.dim // candidate.num_slices
    return Placement(
        table=table.name,
        kind=candidate.kind,
        slices=tuple(
            Slice(first_column=i * columns, num_columns=columns, owner=owners[i] if owners else None)
            for i in range(candidate.num_slices)
        ),
        returns=candidate.returns,
    )
