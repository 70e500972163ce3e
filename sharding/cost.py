"""Cost of a plan: seconds of a training step by stage, from bytes over bandwidth. `sharding.storage` counts memory.

All devices run the same program on arrays of the same shapes, so an exchange or a kernel call takes as long as the
fullest device needs: what counts is the sum over exchanges and calls of the maximum over devices ("padded"). The
model is linear: in each group of the layout each device has seven quantities, a stage's seconds are rates times them.

Letters: W devices, B samples of the global batch, Q quantities, T stages.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pallas_kernels.row_optimizers import STATISTICS_BLOCK
from pallas_kernels.target import Target
from sharding.codec import Codec, code_bytes
from sharding.cost_settings import (
    CUT_IDS,
    DISTINCT,
    HOME_IDS,
    HOME_VECTORS,
    IDS,
    QUANTITIES,
    SENT_ROWS,
    STAGES,
    VECTORS,
    CostSettings,
    DenseLoad,
)
from sharding.layout import Family, Group, Layout, Shard, make_layout
from sharding.load import FeatureLoad, loads_by_feature
from sharding.plan import ShardingPlan, check_plan
from sharding.storage import GroupBuffers, Storage, buffers_at_home, buffers_of_group, bytes_per_row, storage_of
from sharding.tables import FeatureSpec, TableSpec
from sharding.topology import Topology

# Row at the owner and bag, int32 each; the weight comes on top.
_RECORD_BYTES = 8
_FLOAT_BYTES = 4
# A radix sort of 32-bit keys with 32-bit values: four passes that read and write both.
_SORT_BYTES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What one training step asks of the machine, plan aside.

    Attributes:
        topology: The machine.
        batch_size: Samples of the global batch.
        loads: Load of every feature, by name.
        dense: The dense part.
        settings: Terms of the cost.
    """

    topology: Topology
    batch_size: int
    loads: dict[str, FeatureLoad]
    dense: DenseLoad = dataclasses.field(default_factory=DenseLoad)
    settings: CostSettings = dataclasses.field(default_factory=CostSettings)

    @property
    def weighted(self) -> bool:
        """Whether ids travel with weights: all do if any feature has them."""
        return any(load.weighted for load in self.loads.values())

    @property
    def samples_per_device(self) -> int:
        """Samples of one device, rounded up."""
        return -(-self.batch_size // self.topology.num_devices)

    @property
    def record_bytes(self) -> int:
        """Bytes of one id on its way."""
        return _RECORD_BYTES + _FLOAT_BYTES * self.weighted

    def group_rates(self, table: TableSpec, width: int, family: Family) -> Float[np.ndarray, "T Q"]:
        """Seconds of each stage for one of each quantity.

        Args:
            table: Any table of the group.
            width: Stored width.
            family: How vectors come home.
        """
        nodes, chips = self.topology.nodes, self.topology.chips
        devices = nodes * chips
        batch, home_batch = self.batch_size, self.batch_size / devices
        row = width * jnp.dtype(table.dtype).itemsize
        vector = width * _FLOAT_BYTES
        sent = code_bytes(self.settings.forward_codec, width)
        sent_back = code_bytes(self.settings.backward_codec, width)
        # Bytes; divided by bandwidths at the end.
        rates = np.zeros((len(STAGES), len(QUANTITIES)))

        def travels(trip: str, quantity: int, size: float, shares: tuple[float, float]) -> None:
            for link, share in zip(("inside", "between"), shares, strict=True):
                rates[STAGES.index(f"{trip} {link}"), quantity] += size * share

        def coding(codec: Codec) -> int:
            # Vectors are read and codes written, and the reverse at the other end.
            return 0 if codec == "float32" or devices == 1 else 2 * (vector + code_bytes(codec, width))

        # Shares of a buffer that cross a link inside a node, and one between nodes.
        all_to_all = ((chips - 1) / devices, (devices - chips) / devices)
        # Of all devices' vectors; over CHIP first, so that a node's share of them is all that crosses.
        scatter = ((chips - 1) / chips, (nodes - 1) / nodes / chips)
        gather = ((chips - 1.0) * nodes, nodes - 1.0)
        lookup, update = STAGES.index("lookup"), STAGES.index("update")
        rule = table.rule
        match family:
            case "local":
                rates[lookup, HOME_IDS] += row
                rates[lookup, HOME_VECTORS] += home_batch * vector
                if rule is not None:
                    travels("ids", HOME_IDS, self.record_bytes, gather)
                    travels("backward", HOME_VECTORS, home_batch * sent_back, gather)
                    rates[update, HOME_VECTORS] += batch * coding(self.settings.backward_codec)
            case "rows_by_id":
                travels("ids", IDS, self.record_bytes, all_to_all)
                travels("ids", SENT_ROWS, _FLOAT_BYTES, all_to_all)
                travels("forward", SENT_ROWS, min(row, sent), all_to_all)
                # Read and sent by the owner; then pooled at home.
                rates[lookup, SENT_ROWS] += 2 * row + (coding(self.settings.forward_codec) if sent < row else 0)
                rates[lookup, HOME_IDS] += row
                rates[lookup, HOME_VECTORS] += home_batch * vector
                if rule is not None:
                    travels("backward", IDS, sent_back, all_to_all)
                    rates[update, IDS] += coding(self.settings.backward_codec)
            case _:
                vectors_travel = all_to_all if family == "table_wise" else scatter
                travels("ids", IDS, self.record_bytes, all_to_all)
                rates[lookup, IDS] += row
                rates[lookup, VECTORS] += batch * (vector + coding(self.settings.forward_codec))
                travels("forward", VECTORS, batch * sent, vectors_travel)
                if rule is not None:
                    travels("backward", VECTORS, batch * sent_back, vectors_travel)
                    rates[update, VECTORS] += batch * coding(self.settings.backward_codec)
        if rule is not None:
            if family == "local":
                rates[update, HOME_IDS] += devices * (_SORT_BYTES + vector)
            else:
                rates[update, IDS] += _SORT_BYTES + vector
            rates[update, DISTINCT] += 2 * bytes_per_row(table, width)
            # To the sender one number a block of columns, back their sum.
            numbers = statistics_of(table) * (width / STATISTICS_BLOCK + 1)
            travels("statistics", CUT_IDS, numbers * _FLOAT_BYTES, all_to_all)
        return rates * self._seconds_per_byte()[:, None] * self.settings.multipliers()[:, None]

    def _seconds_per_byte(self) -> Float[np.ndarray, " T"]:
        # A bandwidth that is not known costs nothing.
        bandwidths = {"inside": self.topology.inside_bandwidth, "between": self.topology.between_bandwidth}
        per_stage = [bandwidths.get(stage.split()[-1], self.topology.hbm_bandwidth) or np.inf for stage in STAGES]
        return 1.0 / (np.array(per_stage) * self.settings.bandwidth_efficiency)

    def group_buffers(self, table: TableSpec, width: int, family: Family, *, largest_store: int = 0) -> GroupBuffers:
        """Bytes of a group's buffers for one of each quantity.

        Args:
            table: Any table of the group.
            width: Stored width.
            family: How vectors come home.
            largest_store: Bytes of the largest array of its store on a device; 0 if there is no plan yet.
        """
        topology, settings = self.topology, self.settings
        return buffers_of_group(
            table,
            width,
            family,
            num_devices=topology.num_devices,
            samples_per_device=self.samples_per_device,
            weighted=self.weighted,
            codecs=(settings.forward_codec, settings.backward_codec),
            target=Target(platform=topology.platform, device_kind=topology.device_kind),
            largest_store=largest_store,
        )

    def buffers_at_home(self, tables: Mapping[str, TableSpec], features: Sequence[FeatureSpec]) -> tuple[float, float]:
        """Bytes of a device's own ids, and of its vectors and their gradients: the same under every plan."""
        return buffers_at_home(
            ids=self.samples_per_device * sum(self.loads[feature.name].pooling_factor for feature in features),
            elements=self.samples_per_device * sum(vectors_of(f) * tables[f.table].dim for f in features),
            weighted=self.weighted,
        )

    def fixed_seconds(self) -> Float[np.ndarray, " T"]:
        """Seconds of the dense part, by stage. Its all-reduce adds inside nodes first and gathers there last."""
        nodes, chips = self.topology.nodes, self.topology.chips
        size = self.dense.parameters * self.dense.gradient_bytes
        seconds = np.zeros(len(STAGES))
        seconds[STAGES.index("all-reduce inside")] = 2 * size * (chips - 1) / chips
        seconds[STAGES.index("all-reduce between")] = 2 * size / chips * (nodes - 1) / nodes
        seconds *= self._seconds_per_byte()
        flops = self.dense.flops_per_sample * self.batch_size / (nodes * chips)
        peak = self.topology.peak_flops(self.dense.dtype)
        seconds[STAGES.index("dense")] = flops / (peak * self.settings.dense_efficiency) if peak else 0.0
        return seconds * self.settings.multipliers()

    def exchange_latency(self) -> float:
        """Seconds that one exchange takes to start."""
        topology = self.topology
        inside = topology.inside_latency * (topology.chips > 1)
        between = topology.between_latency * (topology.nodes > 1)
        return (inside + between) * self.settings.latency

    def latency_seconds(self, groups: Sequence[tuple[Family, bool]]) -> float:
        """Seconds that the exchanges of a step take to start.

        Args:
            groups: Family of each group of the plan, and whether it holds column slices with a second pass.
        """
        families = {family for family, _ in groups}
        # Ids out; each family's vectors out and back; data-parallel: ids and gradients.
        exchanges = bool(families - {"local"}) + 2 * len(families) + 2 * any(cut for _, cut in groups)
        return (exchanges + 2 * bool(self.dense.parameters)) * self.exchange_latency()

    def lookup_quantities(
        self, feature: FeatureSpec, shard: Shard, family: Family
    ) -> tuple[Float[np.ndarray, "Q owners"], Float[np.ndarray, " Q"]]:
        """Quantities of one feature in one shard: of each owner, and of every device for its own samples."""
        load, devices = self.loads[feature.name], self.topology.nodes * self.topology.chips
        at_owners = np.zeros((len(QUANTITIES), shard.num_owners))
        at_home = np.zeros(len(QUANTITIES))
        ids = load.pooling_factor * self.batch_size
        vectors = vectors_of(feature)
        rows = shard.table.num_rows
        spread = shard.row_stride
        at_owners[DISTINCT] = load.distinct(rows, ids) / spread
        if family in ("local", "rows_by_id"):
            at_home[HOME_IDS] = ids / devices
            at_home[HOME_VECTORS] = vectors
        if family == "local":
            return at_owners, at_home
        at_owners[IDS] = ids * load.owner_shares(shard.num_owners)
        if family == "rows_by_id":
            # The room for them travels, which no knowledge of hot rows makes smaller (`sharding.capacities`).
            at_owners[SENT_ROWS] = devices * min(rows, ids / devices) / spread
        else:
            at_owners[VECTORS] = vectors
        if is_cut(shard) and statistics_of(shard.table):
            at_owners[CUT_IDS] = at_owners[IDS]
        return at_owners, at_home


def vectors_of(feature: FeatureSpec) -> int:
    """Vectors of a feature in each sample."""
    return (feature.max_ids or 0) if feature.pooling == "none" else 1


def statistics_of(table: TableSpec) -> int:
    """Numbers that a table's rule needs of a whole row."""
    return len(table.rule.statistics) if table.rule else 0


def is_cut(shard: Shard) -> bool:
    """Whether it holds a part of its table's columns."""
    return shard.num_columns < shard.table.dim


def group_quantities(step: Step, group: Group) -> Float[np.ndarray, "Q W"]:
    """Quantities of every device in a group."""
    total = np.zeros((len(QUANTITIES), group.num_devices))
    for lookup in group.lookups:
        at_owners, at_home = step.lookup_quantities(lookup.feature, lookup.shard, group.family)
        total[:, lookup.shard.owners] += at_owners
        total += at_home[:, None]
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCost:
    """What a training step costs.

    Attributes:
        seconds: Seconds of each of `STAGES`, padded: each exchange and call lasts as long as the fullest device needs.
        device_seconds: Seconds of each stage that each device would need alone, [T][W].
        hidden_seconds: Seconds of exchanges that hide behind the dense part.
        storage: Bytes of a device.
    """

    seconds: tuple[float, ...]
    device_seconds: tuple[tuple[float, ...], ...]
    hidden_seconds: float
    storage: Storage

    @property
    def total_seconds(self) -> float:
        """Seconds of a step, padded, less what is hidden."""
        return sum(self.seconds) - self.hidden_seconds

    @property
    def unpadded_seconds(self) -> tuple[float, ...]:
        """Seconds that each device would need alone."""
        return tuple(np.sum(self.device_seconds, axis=0).tolist())

    @property
    def padding(self) -> float:
        """Share of the padded seconds that the mean device waits or computes on padding."""
        padded = sum(self.seconds)
        return 1.0 - float(np.mean(self.unpadded_seconds)) / padded if padded else 0.0

    @property
    def share_of_slowest(self) -> tuple[float, ...]:
        """Each device's seconds alone, as a share of the slowest device's."""
        slowest = max(self.unpadded_seconds)
        return tuple(seconds / slowest if slowest else 1.0 for seconds in self.unpadded_seconds)


def hidden_seconds(seconds: Float[np.ndarray, " T"], overlap: float) -> float:
    """Seconds of exchanges that hide behind the dense part: at most its length."""
    exchanges = [i for i, stage in enumerate(STAGES) if stage not in ("lookup", "update", "dense")]
    return min(overlap * float(seconds[exchanges].sum()), float(seconds[STAGES.index("dense")]))


def cost_of_layout(layout: Layout, features: Sequence[FeatureSpec], step: Step) -> PlanCost:
    """The cost of a plan that is laid out."""
    padded = step.fixed_seconds()
    alone = np.tile(padded[:, None], layout.num_devices)
    tables = {shard.table.name: shard.table for store in layout.stores for shard in store.shards}
    fullest, buffers = [], []
    for group in layout.groups:
        quantities = group_quantities(step, group)
        rates = step.group_rates(group.table, group.width, group.family)
        fullest.append(quantities.max(axis=1))
        largest_store = layout.store_of(group).largest_array
        buffers.append(step.group_buffers(group.table, group.width, group.family, largest_store=largest_store))
        padded += rates @ fullest[-1]
        alone += rates @ quantities
    if layout.num_devices > 1:
        latency = step.latency_seconds([(group.family, group.adds_statistics) for group in layout.groups])
        padded[STAGES.index("latency")] += latency
        alone[STAGES.index("latency")] += latency
    return PlanCost(
        seconds=tuple(padded.tolist()),
        device_seconds=tuple(map(tuple, alone.tolist())),
        hidden_seconds=hidden_seconds(padded, step.settings.overlap),
        storage=storage_of(
            layout,
            fullest,
            buffers,
            at_home=step.buffers_at_home(tables, features),
            dense_bytes=step.dense.memory_bytes,
        ),
    )


def plan_cost(
    plan: ShardingPlan,
    tables: Sequence[TableSpec],
    features: Sequence[FeatureSpec],
    topology: Topology,
    *,
    batch_size: int,
    loads: Sequence[FeatureLoad] = (),
    dense: DenseLoad | None = None,
    settings: CostSettings | None = None,
) -> PlanCost:
    """Seconds of a training step and bytes of a device under a plan.

    Args:
        plan: The plan.
        tables: The tables.
        features: The features.
        topology: The machine; of as many nodes and chips as the plan.
        batch_size: Samples of the global batch.
        loads: What is known of the features' ids; see `loads_by_feature` for those left out.
        dense: The dense part; nothing unless given.
        settings: Terms of the cost.

    Raises:
        InputError: The plan is not one for these tables and this machine.
    """
    check_plan(plan, tables, topology.nodes, topology.chips)
    step = Step(
        topology=topology,
        batch_size=batch_size,
        loads=loads_by_feature(features, loads),
        dense=dense or DenseLoad(),
        settings=settings or CostSettings(),
    )
    return cost_of_layout(make_layout(tables, features, plan), features, step)
