"""What the compiled program sends, and between whom: row-wise sums are added inside a node before they leave it."""

import math
import re

import jax
import pytest

from sharding import FeatureSpec, KeyedJagged, ShardedTables, TableSpec, make_mesh
from sharding.mesh import CHIP, NODE
from sharding.plan import Placement, ShardingPlan, row_wise, table_row_wise

NODES, CHIPS = 2, 4
DIM, SAMPLES = 16, 4
KINDS = "reduce-scatter|all-to-all|all-gather|all-reduce|collective-permute"
TABLE = TableSpec(name="t", num_rows=64, dim=DIM, optimizer="sgd")


def collectives(placement: Placement, *, backward: bool) -> list[tuple[str, str, int]]:
    """Kind, mesh axis and elements of the result of each collective of vectors, in the order of the program."""
    plan = ShardingPlan(nodes=NODES, chips=CHIPS, placements=(placement,))
    features = [FeatureSpec(name="f", table="t", max_ids=2)]
    tables = ShardedTables([TABLE], features, plan=plan, mesh=make_mesh(NODES, CHIPS))
    batch = NODES * CHIPS * SAMPLES
    ids = tables.to_devices(KeyedJagged.from_bags({"f": [[1, 2]] * batch}))
    state, routed = tables.abstract_state(), jax.eval_shape(tables.route, ids)
    if backward:
        gradients = jax.eval_shape(tables.lookup, state, routed)
        call = jax.jit(lambda *given: tables.update(*given, step=1))
        text = call.lower(state, routed, gradients).compile().as_text()
    else:
        text = jax.jit(tables.lookup).lower(state, routed).compile().as_text()
    found = re.findall(rf"= (\(?f32\[.*?) ({KINDS})\(.*?replica_groups=mesh\[.*?\] {{'(\w+)'}}", text)
    return [(kind, axis, sum(map(_elements, re.findall(r"f32\[([\d,]*)\]", shapes)))) for shapes, kind, axis in found]


def _elements(shape: str) -> int:
    return math.prod(map(int, shape.split(",")))


def test_row_wise_sums_then_added_over_chips_first_so_that_a_node_sends_one_chip_th() -> None:
    found = collectives(row_wise(TABLE, returns="partial_sums"), backward=False)
    vectors = SAMPLES * DIM
    assert found == [
        ("reduce-scatter", CHIP, NODES * vectors),
        # Without the first step each of the chips would send all its node's vectors, four times as many.
        ("reduce-scatter", NODE, vectors),
    ]


def test_row_wise_gradients_then_gathered_between_nodes_once_and_spread_inside() -> None:
    found = collectives(row_wise(TABLE, returns="partial_sums"), backward=True)
    vectors = SAMPLES * DIM
    assert found == [
        ("all-gather", NODE, NODES * vectors),
        ("all-gather", CHIP, NODES * CHIPS * vectors),
    ]


@pytest.mark.parametrize("backward", [False, True])
def test_table_row_wise_vectors_then_only_sums_of_a_node_go_between_nodes(backward: bool) -> None:
    found = collectives(table_row_wise(TABLE, 1, returns="partial_sums"), backward=backward)
    vectors = SAMPLES * DIM
    between = ("all-to-all", NODE, NODES * vectors)
    inside = ("all-gather", CHIP, NODES * CHIPS * vectors) if backward else ("reduce-scatter", CHIP, NODES * vectors)
    assert found == ([between, inside] if backward else [inside, between])
