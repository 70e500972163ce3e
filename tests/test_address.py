"""Where ids go, before they leave."""

import jax
import numpy as np

from sharding import FeatureSpec, KeyedJagged, ShardedTables, TableSpec, make_mesh
from sharding.address import ByOwner
from sharding.plan import ShardingPlan, row_wise

NODES, CHIPS = 2, 4
ROWS = 50


def asked_of(small: TableSpec, beside: list[TableSpec]) -> ByOwner:
    """The rows that devices ask for of a small table, whose rows travel by id, in a store with others."""
    # The last table lies last in the store.
    tables = [*beside, small]
    features = [FeatureSpec(name=table.name, table=table.name, max_ids=3) for table in tables]
    plan = ShardingPlan(
        nodes=NODES,
        chips=CHIPS,
        placements=tuple(row_wise(table, returns="rows") for table in tables),
    )
    sharded = ShardedTables(tables, features, plan=plan, mesh=make_mesh(NODES, CHIPS))
    random = np.random.default_rng(0)
    bags = [random.integers(0, ROWS, random.integers(0, 4)).tolist() for _ in range(4 * NODES * CHIPS)]
    ids = KeyedJagged.from_bags({table.name: bags if table is small else [[]] * len(bags) for table in tables})
    (group,) = jax.jit(sharded.address)(sharded.to_devices(ids)).groups
    assert group.asked is not None
    return jax.tree.map(np.asarray, group.asked)


def test_distinct_rows_when_owner_and_row_are_too_large_for_one_number_then_sorted_as_where_they_are_not() -> None:
    small, tiny = TableSpec(name="small", num_rows=ROWS, dim=8), TableSpec(name="other", num_rows=8, dim=8)
    huge = TableSpec(name="other", num_rows=2**31 - 8, dim=8)
    expected, found = asked_of(small, [tiny]), asked_of(small, [huge])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    owners = expected.owners.reshape(NODES * CHIPS, -1)
    assert (np.diff(owners, axis=1) >= 0).all()
    assert 0 < (owners < NODES * CHIPS).sum() < owners.size
