"""Tables, and plans that between them have every placement and return, for meshes of eight devices."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from sharding import FeatureSpec, KeyedJagged, TableSpec
from sharding.plan import (
    Placement,
    ShardingPlan,
    column_wise,
    data_parallel,
    grid,
    row_wise,
    table_row_wise,
    table_wise,
)

BATCH_SIZE = 16
# Rules with sums over whole rows, widths that are no stored width, a table of one row, tables that several features
# share, pooled and not, and tables of 16 bits, rounded and in two halves.
TABLES = (
    TableSpec(name="user", num_rows=50, dim=32, learning_rate=0.1, eps=1e-4),
    TableSpec(name="item", num_rows=300, dim=96, learning_rate=0.02, weight_decay=0.01),
    TableSpec(name="colour", num_rows=1, dim=3),
    TableSpec(name="tag", num_rows=9, dim=5, optimizer="adagrad", learning_rate=0.3),
    TableSpec(name="text", num_rows=20, dim=160, optimizer="adam", beta1=0.5, dtype="bfloat16", rounding="split"),
    TableSpec(name="shop", num_rows=21, dim=64, optimizer="lamb", weight_decay=0.1),
    TableSpec(name="city", num_rows=40, dim=48, optimizer="partial_rowwise_adam", learning_rate=0.1, dtype="float16"),
    TableSpec(name="hour", num_rows=24, dim=16, optimizer="sgd", dtype="bfloat16", rounding="stochastic"),
    TableSpec(name="fixed", num_rows=20, dim=16, frozen=True),
)
FEATURES = (
    FeatureSpec(name="history", table="user", pooling="none", max_ids=4),
    FeatureSpec(name="user_id", table="user", max_ids=1),
    FeatureSpec(name="friends", table="user", pooling="mean", max_ids=6),
    FeatureSpec(name="item_id", table="item"),
    FeatureSpec(name="colours", table="colour", pooling="mean", max_ids=4),
    FeatureSpec(name="tags", table="tag", max_ids=3),
    FeatureSpec(name="words", table="text", pooling="mean", max_ids=4),
    FeatureSpec(name="title", table="text", pooling="none", max_ids=2),
    FeatureSpec(name="shops", table="shop", max_ids=2),
    FeatureSpec(name="cities", table="city", pooling="mean", max_ids=2),
    FeatureSpec(name="hours", table="hour", max_ids=2),
    FeatureSpec(name="constants", table="fixed", max_ids=3),
)
UNBOUNDED = 5
CAPACITY = 800
BY_NAME = {table.name: table for table in TABLES}
NUM_ROWS = {feature.name: BY_NAME[feature.table].num_rows for feature in FEATURES}


MIXED = (
    "column_wise",
    "grid.rows",
    "data_parallel",
    "row_wise.rows",
    "table_wise",
    "grid.partial_sums",
    "table_row_wise.rows",
    "row_wise.partial_sums",
    "table_row_wise.partial_sums",
)


def plan_of(nodes: int, chips: int, name: str) -> ShardingPlan:
    """A plan by name.

    Args:
        nodes: Nodes of the mesh.
        chips: Chips of each.
        name: A kind of placement, which every table gets that can have it, the others being table-wise or
            data-parallel in turn; or "mixed": one table of each kind, other ones on other meshes.
    """
    devices = nodes * chips
    placements = []
    for number, table in enumerate(TABLES):
        wanted = name
        if name == "mixed":
            wanted = MIXED[(number + 4 * nodes) % len(MIXED)]
        placements.append(_placement(table, wanted, number, nodes, devices))
    return ShardingPlan(nodes=nodes, chips=chips, placements=tuple(placements))


def _placement(table: TableSpec, wanted: str, number: int, nodes: int, devices: int) -> Placement:
    kind, _, returns = wanted.partition(".")
    way = "rows" if returns == "rows" else "partial_sums"
    chips = devices // nodes
    slices = 2 if table.dim % 32 == 0 else 3 if table.dim == 48 else 1
    if kind == "column_wise" and 1 < slices <= devices:
        # The last columns on the first device, so that column order is not device order.
        return column_wise(table, [(number + 3 * (slices - 1 - i)) % devices for i in range(slices)])
    if kind == "grid" and 1 < slices <= nodes and table.num_rows >= chips:
        return grid(table, [(number + slices - 1 - i) % nodes for i in range(slices)], returns=way)
    if kind == "row_wise" and table.num_rows >= devices:
        return row_wise(table, returns=way)
    if kind in ("table_row_wise", "grid") and table.num_rows >= chips:
        return table_row_wise(table, number % nodes, returns=way)
    if kind == "data_parallel" or (kind != "table_wise" and number % 2):
        return data_parallel(table)
    return table_wise(table, (5 * number) % devices)


PLANS = (
    "table_wise",
    "column_wise",
    "row_wise.partial_sums",
    "row_wise.rows",
    "table_row_wise.partial_sums",
    "table_row_wise.rows",
    "grid.partial_sums",
    "grid.rows",
    "data_parallel",
    "mixed",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """A batch as lists: bags and weights by feature."""

    bags: Mapping[str, list[list[int]]]
    weights: Mapping[str, list[list[float]]]

    def jagged(self, *, weighted: bool = True) -> KeyedJagged:
        """The batch as `ShardedTables.to_devices` takes it."""
        return KeyedJagged.from_bags(self.bags, weights=self.weights if weighted else None, capacity=CAPACITY)


def samples_of(seed: int, *, fullness: float = 0.5, distinct: float = 1.0) -> Samples:
    """Random bags, weights and ids.

    Args:
        seed: Seed.
        fullness: Mean length of a bag, as a share of the longest.
        distinct: Share of each table's rows that ids are drawn from; 0: one row.
    """
    random = np.random.default_rng(seed)
    bags = {}
    for feature in FEATURES:
        ids = max(1, int(NUM_ROWS[feature.name] * distinct))
        lengths = random.binomial(feature.max_ids or UNBOUNDED, fullness, BATCH_SIZE)
        bags[feature.name] = [random.integers(0, ids, length).tolist() for length in lengths]
    # The samples of one device are empty.
    for samples in bags.values():
        samples[2] = samples[3] = []
    weights = {name: [random.uniform(0.5, 2.0, len(bag)).tolist() for bag in samples] for name, samples in bags.items()}
    return Samples(bags=bags, weights=weights)
