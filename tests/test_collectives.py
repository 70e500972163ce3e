"""What the compiled program sends, and between whom: row-wise sums are added inside a node before they leave it."""

import math
import re

import jax
import pytest

from sharding import FeatureSpec, KeyedJagged, ShardedTables, TableSpec, make_mesh
from sharding.codec import Codec, code_bytes
from sharding.mesh import CHIP, NODE
from sharding.plan import Placement, ShardingPlan, data_parallel, row_wise, table_row_wise, table_wise

NODES, CHIPS = 2, 4
DIM, SAMPLES = 16, 4
KINDS = "reduce-scatter|all-to-all|all-gather|all-reduce|collective-permute"
TABLE = TableSpec(name="t", num_rows=64, dim=DIM, optimizer="sgd")


def collectives(
    placement: Placement, *, backward: bool, codec: Codec = "float32", word: str = "f32"
) -> list[tuple[str, str, int]]:
    """Kind, mesh axes and elements of the result of each collective of vectors, in the order of the program.

    Args:
        placement: The table's.
        backward: Whether of the update, rather than of the lookup.
        codec: How vectors travel, in both directions.
        word: XLA's name for the dtype that is to travel. Nothing of another one may.
    """
    plan = ShardingPlan(nodes=NODES, chips=CHIPS, placements=(placement,))
    features = [FeatureSpec(name="f", table="t", max_ids=2)]
    mesh = make_mesh(NODES, CHIPS)
    tables = ShardedTables([TABLE], features, plan=plan, mesh=mesh, forward_codec=codec, backward_codec=codec)
    batch = NODES * CHIPS * SAMPLES
    ids = tables.to_devices(KeyedJagged.from_bags({"f": [[1, 2]] * batch}))
    state, routed = tables.abstract_state(), jax.eval_shape(tables.route, ids)
    if backward:
        gradients = jax.eval_shape(tables.lookup, state, routed)
        call = jax.jit(lambda *given: tables.update(*given, step=1))
        text = call.lower(state, routed, gradients).compile().as_text()
    else:
        text = jax.jit(tables.lookup).lower(state, routed).compile().as_text()
    assert text
    found = re.findall(rf"= (\(?\w+\[.*?) ({KINDS})\(.*?replica_groups=mesh\[.*?\] {{(.*?)}}", text)
    assert all(set(re.findall(r"(\w+)\[", shapes)) == {word} for shapes, _, _ in found)
    return [
        (kind, axes.replace("'", ""), sum(map(_elements, re.findall(rf"{word}\[([\d,]*)\]", shapes))))
        for shapes, kind, axes in found
    ]


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


WORDS: dict[Codec, tuple[str, int]] = {
    "float16": ("u16", DIM + 1),
    "bfloat16": ("u16", DIM),
    "float8": ("u8", DIM + 2),
    "int8": ("u8", DIM + 2),
}
DEVICES = NODES * CHIPS
# Vectors that a device receives in each exchange, with its own.
ROUTES: dict[str, tuple[Placement, list[tuple[str, str, int]], list[tuple[str, str, int]]]] = {
    "table_wise": (
        table_wise(TABLE, 3),
        [("all-to-all", f"{NODE},{CHIP}", DEVICES * SAMPLES)],
        [("all-to-all", f"{NODE},{CHIP}", DEVICES * SAMPLES)],
    ),
    "row_wise": (
        row_wise(TABLE, returns="partial_sums"),
        [("all-to-all", CHIP, DEVICES * SAMPLES), ("all-to-all", NODE, NODES * SAMPLES)],
        [("all-gather", NODE, NODES * SAMPLES), ("all-gather", CHIP, DEVICES * SAMPLES)],
    ),
    "table_row_wise": (
        table_row_wise(TABLE, 1, returns="partial_sums"),
        [("all-to-all", CHIP, DEVICES * SAMPLES), ("all-to-all", NODE, NODES * SAMPLES)],
        [("all-to-all", NODE, NODES * SAMPLES), ("all-gather", CHIP, DEVICES * SAMPLES)],
    ),
    "rows_by_id": (
        row_wise(TABLE, returns="rows"),
        # Room for the most ids that a device may ask one owner for.
        [("all-to-all", f"{NODE},{CHIP}", DEVICES * SAMPLES * 2)],
        [("all-to-all", f"{NODE},{CHIP}", DEVICES * SAMPLES * 2)],
    ),
    "data_parallel": (data_parallel(TABLE), [], [("all-gather", f"{NODE},{CHIP}", DEVICES * SAMPLES)]),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "codec", ["bfloat16", "int8", *(pytest.param(codec, marks=pytest.mark.slow) for codec in ("float16", "float8"))]
)
@pytest.mark.parametrize("route", ROUTES)
def test_vectors_when_they_travel_as_codes_then_the_program_sends_unsigned_integers_and_nothing_else(
    route: str, codec: Codec, backward: bool
) -> None:
    placement, *ways = ROUTES[route]
    word, words = WORDS[codec]
    assert words * {"u8": 1, "u16": 2}[word] == code_bytes(codec, DIM)
    found = collectives(placement, backward=backward, codec=codec, word=word)
    assert found == [(kind, axes, vectors * words) for kind, axes, vectors in ways[backward]]


def test_ids_that_have_arrived_when_put_in_order_then_nothing_travels() -> None:
    plan = ShardingPlan(nodes=NODES, chips=CHIPS, placements=(row_wise(TABLE, returns="rows"),))
    tables = ShardedTables([TABLE], [FeatureSpec(name="f", table="t")], plan=plan, mesh=make_mesh(NODES, CHIPS))
    ids = tables.to_devices(KeyedJagged.from_bags({"f": [[1, 2]] * NODES * CHIPS * SAMPLES}))
    delivering = jax.jit(lambda ids: tables.deliver(tables.address(ids)))
    accepting = jax.jit(tables.accept).lower(delivering(ids)).compile().as_text()
    assert re.search(KINDS, delivering.lower(ids).compile().as_text() or "")
    # A short exchange there would wait behind a long one that is under way.
    assert accepting
    assert not re.search(KINDS, accepting)
