"""The cost model's terms, computed by hand for small cases."""

import dataclasses

import numpy as np
import pytest

from sharding.cost import STAGES, CostSettings, DenseLoad, PlanCost, plan_cost
from sharding.errors import InputError
from sharding.load import FeatureLoad
from sharding.plan import (
    Placement,
    ShardingPlan,
    column_wise,
    data_parallel,
    one_device_plan,
    row_wise,
    table_row_wise,
    table_wise,
)
from sharding.tables import FeatureSpec, TableSpec
from sharding.topology import Topology, parse_topology

# Four devices; a byte takes a nanosecond in memory, ten inside a node and a hundred between nodes.
MACHINE: Topology = dataclasses.replace(
    parse_topology("h200:2x2"),
    hbm_bandwidth=1e9,
    inside_bandwidth=1e8,
    between_bandwidth=1e7,
    inside_latency=0.0,
    between_latency=0.0,
)
SETTINGS = CostSettings(bandwidth_efficiency=1.0, dense_efficiency=1.0)
TABLE = TableSpec(name="t", num_rows=1000, dim=32, optimizer="sgd")
ROWWISE = dataclasses.replace(TABLE, optimizer="rowwise_adagrad")
FEATURE = FeatureSpec(name="f", table="t")
BATCH = 64
IDS = 3.0
HBM, INSIDE, BETWEEN = 1e-9, 1e-8, 1e-7


def cost_of(
    placement: Placement, table: TableSpec = TABLE, settings: CostSettings = SETTINGS, **load: object
) -> PlanCost:
    plan = ShardingPlan(nodes=2, chips=2, placements=(placement,))
    known = FeatureLoad(feature="f", **{"pooling_factor": IDS, **load})  # pyright: ignore[reportArgumentType]  keywords
    return plan_cost(plan, [table], [FEATURE], MACHINE, batch_size=BATCH, loads=[known], settings=settings)


def stage(cost: PlanCost, name: str) -> float:
    return cost.seconds[STAGES.index(name)]


def test_table_wise_when_costed_then_ids_and_vectors_cross_each_link_by_their_share():
    cost = cost_of(table_wise(TABLE, 0))
    # 192 ids of 8 bytes come to one owner: a quarter from its neighbour, half from the other node.
    assert stage(cost, "ids inside") == pytest.approx(192 * 8 / 4 * INSIDE)
    assert stage(cost, "ids between") == pytest.approx(192 * 8 / 2 * BETWEEN)
    assert stage(cost, "forward inside") == pytest.approx(64 * 32 * 4 / 4 * INSIDE)
    assert stage(cost, "forward between") == pytest.approx(64 * 32 * 4 / 2 * BETWEEN)
    assert stage(cost, "backward between") == pytest.approx(stage(cost, "forward between"))
    assert stage(cost, "lookup") == pytest.approx((192 * 32 * 4 + 64 * 32 * 4) * HBM)


def test_ids_when_they_have_weights_then_each_carries_one():
    plain, weighted = (cost_of(table_wise(TABLE, 0), weighted=weighted) for weighted in (False, True))
    assert stage(weighted, "ids between") == pytest.approx(192 * (8 + 4) / 2 * BETWEEN)
    assert weighted.storage.ids > plain.storage.ids


def test_ids_when_they_are_not_pooled_then_each_place_of_a_sequence_is_a_vector():
    sequence = dataclasses.replace(FEATURE, pooling="none", max_ids=5)
    plan = ShardingPlan(nodes=2, chips=2, placements=(table_wise(TABLE, 0),))
    loads = [FeatureLoad(feature="f", pooling_factor=IDS)]
    cost = plan_cost(plan, [TABLE], [sequence], MACHINE, batch_size=BATCH, loads=loads, settings=SETTINGS)
    assert stage(cost, "forward between") == pytest.approx(5 * 64 * 32 * 4 / 2 * BETWEEN)
    assert stage(cost, "ids between") == pytest.approx(192 * 8 / 2 * BETWEEN)


def test_links_when_their_bandwidth_is_not_known_then_they_cost_nothing():
    plan = ShardingPlan(nodes=2, chips=2, placements=(table_wise(TABLE, 0),))
    machine = dataclasses.replace(MACHINE, inside_bandwidth=0.0)
    cost = plan_cost(plan, [TABLE], [FEATURE], machine, batch_size=BATCH)
    assert stage(cost, "forward inside") == 0.0 < stage(cost, "forward between")


def test_row_wise_when_costed_then_a_nodes_share_of_the_partial_sums_crosses_between_nodes():
    cost = cost_of(row_wise(TABLE, returns="partial_sums"))
    vectors = 64 * 32 * 4
    assert stage(cost, "forward inside") == pytest.approx(vectors / 2 * INSIDE)
    assert stage(cost, "forward between") == pytest.approx(vectors / 2 / 2 * BETWEEN)
    # Each owner gets a quarter of the ids, and of the distinct rows.
    assert stage(cost, "ids between") == pytest.approx(192 / 4 * 8 / 2 * BETWEEN)
    assert stage(cost, "update") == pytest.approx(stage(cost_of(table_wise(TABLE, 0)), "update") / 4)


def test_table_row_wise_when_costed_then_it_holds_half_of_the_ids_on_each_chip():
    cost = cost_of(table_row_wise(TABLE, 1, returns="partial_sums"))
    assert stage(cost, "ids between") == pytest.approx(192 / 2 * 8 / 2 * BETWEEN)
    lookups = cost.device_seconds[STAGES.index("lookup")]
    assert lookups[0] == lookups[1] == 0.0
    assert lookups[2] == lookups[3] == pytest.approx(stage(cost, "lookup"))


def test_rows_return_when_bags_repeat_rows_then_each_row_travels_once_to_each_sender():
    small = dataclasses.replace(TABLE, num_rows=4)
    cost = cost_of(row_wise(small, returns="rows"), small)
    # 48 ids of one sender hit all 4 rows, so each owner sends its one row to 4 senders.
    assert stage(cost, "forward between") == pytest.approx(4 * 32 * 4 / 2 * BETWEEN, rel=1e-3)
    assert stage(cost, "backward between") == pytest.approx(48 * 32 * 4 / 2 * BETWEEN)
    # Beside its 48 ids, each owner is told which 4 rows to send. It reads and sends them; 16 samples pool 48 at home.
    assert stage(cost, "ids between") == pytest.approx((48 * 8 + 4 * 4) / 2 * BETWEEN)
    assert stage(cost, "lookup") == pytest.approx((2 * 4 + 48 + 16) * 32 * 4 * HBM)


def test_rows_return_when_ids_are_skewed_then_the_room_for_them_travels_all_the_same():
    # 48 ids of one sender, a quarter of them for each owner.
    skewed = cost_of(row_wise(TABLE, returns="rows"), coverage=((1, 0.9), (1000, 1.0)))
    assert stage(skewed, "forward between") == pytest.approx(48 * 32 * 4 / 2 * BETWEEN)


def test_data_parallel_when_stored_then_memory_has_the_gradients_of_all_devices_twice():
    vectors = cost_of(data_parallel(TABLE)).storage.vectors
    frozen = cost_of(data_parallel(TABLE), dataclasses.replace(TABLE, frozen=True)).storage.vectors
    assert vectors - frozen == 2 * BATCH * 32 * 4


CODED = dataclasses.replace(SETTINGS, forward_codec="float16", backward_codec="int8")
# A scale of two bytes beside 32 numbers.
FORWARD, BACKWARD, FLOATS = 2 * 32 + 2, 32 + 2, 32 * 4


@pytest.mark.parametrize("returns", ["table_wise", "row_wise", "table_row_wise"])
def test_codes_when_vectors_travel_as_those_then_links_carry_their_bytes_and_memory_both(returns: str):
    placement = {
        "table_wise": table_wise(TABLE, 0),
        "row_wise": row_wise(TABLE, returns="partial_sums"),
        "table_row_wise": table_row_wise(TABLE, 1, returns="partial_sums"),
    }[returns]
    plain, coded = cost_of(placement), cost_of(placement, settings=CODED)
    for link in ("inside", "between"):
        assert stage(coded, f"forward {link}") == pytest.approx(stage(plain, f"forward {link}") * FORWARD / FLOATS)
        assert stage(coded, f"backward {link}") == pytest.approx(stage(plain, f"backward {link}") * BACKWARD / FLOATS)
        assert stage(coded, f"ids {link}") == stage(plain, f"ids {link}")
    # Written at one end and read at the other: once each in both forms.
    assert stage(coded, "lookup") - stage(plain, "lookup") == pytest.approx(64 * 2 * (FLOATS + FORWARD) * HBM)
    assert stage(coded, "update") - stage(plain, "update") == pytest.approx(64 * 2 * (FLOATS + BACKWARD) * HBM)
    # The exchange's buffer is that of the wider codes.
    assert plain.storage.vectors - coded.storage.vectors == 64 * (FLOATS - FORWARD)


def test_codes_when_rows_travel_by_id_then_they_are_sent_only_where_they_are_smaller_than_what_is_stored():
    rows = row_wise(TABLE, returns="rows")
    plain, coded = cost_of(rows), cost_of(rows, settings=CODED)
    assert stage(coded, "forward between") == pytest.approx(stage(plain, "forward between") * FORWARD / FLOATS)
    assert stage(coded, "backward between") == pytest.approx(stage(plain, "backward between") * BACKWARD / FLOATS)
    half = dataclasses.replace(TABLE, dtype="float16")
    plain, coded = cost_of(rows, half), cost_of(rows, half, settings=CODED)
    for name in ("forward between", "lookup"):
        assert stage(coded, name) == stage(plain, name)


def test_codes_when_data_parallel_then_gathered_gradients_are_those():
    plain, coded = cost_of(data_parallel(TABLE)), cost_of(data_parallel(TABLE), settings=CODED)
    assert stage(coded, "backward inside") == pytest.approx(stage(plain, "backward inside") * BACKWARD / FLOATS)
    assert stage(coded, "lookup") == stage(plain, "lookup")


def test_codes_when_there_is_one_device_then_nothing_is_coded():
    machine = dataclasses.replace(MACHINE, nodes=1, chips=1)
    plain, coded = (
        plan_cost(one_device_plan([TABLE]), [TABLE], [FEATURE], machine, batch_size=BATCH, settings=settings)
        for settings in (SETTINGS, CODED)
    )
    assert coded == plain


def test_data_parallel_when_costed_then_no_vectors_travel_forward_and_every_device_updates_every_id():
    cost = cost_of(data_parallel(TABLE))
    assert stage(cost, "forward inside") == stage(cost, "forward between") == 0.0
    assert stage(cost, "ids between") == pytest.approx(48 * 8 * 1 * BETWEEN)
    assert stage(cost, "backward inside") == pytest.approx(16 * 32 * 4 * 2 * INSIDE)
    assert stage(cost, "lookup") == pytest.approx((48 + 16) * 32 * 4 * HBM)
    assert stage(cost, "update") == pytest.approx(stage(cost_of(table_wise(TABLE, 0)), "update"))


def test_update_when_costed_then_each_id_is_sorted_and_each_distinct_row_read_and_written():
    rows = 1000 * (1 - (1 - 1 / 1000) ** 192)
    expected = 192 * (64 + 32 * 4) + rows * 2 * 32 * 4
    assert stage(cost_of(table_wise(TABLE, 0)), "update") == pytest.approx(expected * HBM)
    frozen = dataclasses.replace(TABLE, frozen=True)
    cost = cost_of(table_wise(frozen, 0), frozen)
    assert stage(cost, "update") == stage(cost, "backward between") == 0.0


def test_column_wise_when_the_rule_needs_whole_rows_then_statistics_travel_both_ways():
    cost = cost_of(column_wise(ROWWISE, [0, 1]), ROWWISE)
    # One number a block of 16 columns out, one back.
    assert stage(cost, "statistics between") == pytest.approx(192 * (1 + 1) * 4 / 2 * BETWEEN)
    assert stage(cost_of(column_wise(TABLE, [0, 1])), "statistics between") == 0.0
    assert stage(cost_of(table_wise(ROWWISE, 0), ROWWISE), "statistics between") == 0.0
    lamb = dataclasses.replace(TABLE, optimizer="lamb")
    assert stage(cost_of(column_wise(lamb, [0, 1]), lamb), "statistics between") == pytest.approx(
        2 * stage(cost, "statistics between")
    )


@pytest.mark.parametrize(
    ("placement", "parameters", "exchanges"),
    [
        # Ids; vectors out, and gradients back.
        (table_wise(ROWWISE, 0), 0, 1 + 2),
        # Ids and gradients of those who have no vectors sent.
        (data_parallel(ROWWISE), 0, 2),
        # Statistics there and back.
        (column_wise(ROWWISE, [0, 1]), 0, 1 + 2 + 2),
        # The all-reduce of the dense part: its sums, and what is gathered of them.
        (table_wise(ROWWISE, 0), 1000, 1 + 2 + 2),
    ],
    ids=["table_wise", "data_parallel", "column_wise", "dense part"],
)
def test_exchanges_when_links_take_time_to_start_then_each_takes_that_of_the_links_there_are(
    placement: Placement, parameters: int, exchanges: int
):
    machine = dataclasses.replace(MACHINE, inside_latency=1.0, between_latency=10.0)
    for nodes, chips, seconds in ((2, 2, 11.0), (1, 4, 1.0), (4, 1, 10.0)):
        cost = plan_cost(
            ShardingPlan(nodes=nodes, chips=chips, placements=(placement,)),
            [ROWWISE],
            [FEATURE],
            dataclasses.replace(machine, nodes=nodes, chips=chips),
            batch_size=BATCH,
            dense=DenseLoad(parameters=parameters),
            settings=dataclasses.replace(SETTINGS, latency=0.5),
        )
        assert stage(cost, "latency") == exchanges * seconds / 2


@pytest.mark.parametrize("term", ["ids", "lookup", "forward", "backward", "update"])
def test_term_when_switched_off_then_only_its_stages_vanish(term: str):
    whole = cost_of(table_wise(TABLE, 0))
    without = cost_of(table_wise(TABLE, 0), settings=dataclasses.replace(SETTINGS, **{term: 0.0}))
    for name, before, after in zip(STAGES, whole.seconds, without.seconds, strict=True):
        assert after == (0.0 if name.split()[0] == term else before)


def test_hot_row_when_spread_by_rows_then_its_owner_decides_the_padded_cost():
    even = cost_of(row_wise(TABLE, returns="partial_sums"))
    skewed = cost_of(row_wise(TABLE, returns="partial_sums"), top=((6, 0.5),), coverage=((1, 0.5), (1000, 1.0)))
    # Row 6 is on device 2, which gets half of all ids and a quarter of the rest.
    assert stage(skewed, "ids between") == pytest.approx(stage(even, "ids between") * (0.5 + 0.5 / 4) * 4)
    assert int(np.argmax(skewed.device_seconds[STAGES.index("ids between")])) == 2
    # Fewer distinct rows are touched.
    assert stage(skewed, "update") < 2.5 * stage(even, "update")
    assert skewed.padding > even.padding == pytest.approx(0.0)


def test_distinct_rows_when_coverage_is_known_then_hot_rows_count_once():
    load = FeatureLoad(feature="f", coverage=((1, 0.9), (1001, 1.0)))
    assert load.distinct(10_000, 1000.0) == pytest.approx(1 + 1000 * (1 - np.exp(-0.1)), rel=1e-3)
    assert FeatureLoad(feature="f").distinct(10, 1e6) == pytest.approx(10)
    assert FeatureLoad(feature="f").distinct(10**9, 5.0) == pytest.approx(5.0)


def test_dense_part_when_given_then_its_all_reduce_and_arithmetic_are_counted_and_hide_exchanges():
    plan = ShardingPlan(nodes=2, chips=2, placements=(table_wise(TABLE, 0),))
    machine = dataclasses.replace(MACHINE, float32_flops=1e9)
    dense = DenseLoad(parameters=1000, flops_per_sample=100.0)
    cost = plan_cost(plan, [TABLE], [FEATURE], machine, batch_size=BATCH, dense=dense, settings=SETTINGS)
    assert stage(cost, "all-reduce inside") == pytest.approx(2 * 4000 / 2 * INSIDE)
    assert stage(cost, "all-reduce between") == pytest.approx(2 * 4000 / 2 / 2 * BETWEEN)
    assert stage(cost, "dense") == pytest.approx(16 * 100 / 1e9)
    overlapping = dataclasses.replace(SETTINGS, overlap=1.0)
    hidden = plan_cost(plan, [TABLE], [FEATURE], machine, batch_size=BATCH, dense=dense, settings=overlapping)
    assert hidden.total_seconds == pytest.approx(cost.total_seconds - stage(cost, "dense"))
    slow, half = dataclasses.replace(machine, float32_flops=1e3), dataclasses.replace(SETTINGS, overlap=0.5)
    hidden = plan_cost(plan, [TABLE], [FEATURE], slow, batch_size=BATCH, dense=dense, settings=half)
    exchanges = [stage(hidden, name) for name in STAGES if name.endswith((" inside", " between"))]
    assert hidden.hidden_seconds == pytest.approx(sum(exchanges) / 2)


def test_dense_gradients_when_they_travel_in_two_bytes_then_links_carry_half():
    plan = ShardingPlan(nodes=2, chips=2, placements=(table_wise(TABLE, 0),))
    plain, half = (
        plan_cost(
            plan,
            [TABLE],
            [FEATURE],
            MACHINE,
            batch_size=BATCH,
            dense=DenseLoad(parameters=1000, gradient_bytes=num_bytes),
        )
        for num_bytes in (4, 2)
    )
    for link in ("inside", "between"):
        assert stage(half, f"all-reduce {link}") == pytest.approx(stage(plain, f"all-reduce {link}") / 2)


def test_update_of_split_weights_then_both_halves_are_read_and_written():
    split = dataclasses.replace(TABLE, dtype="bfloat16", rounding="split")
    nearest = dataclasses.replace(split, rounding="nearest")
    of_split, of_nearest = (cost_of(table_wise(table, 0), table) for table in (split, nearest))
    distinct = FeatureLoad(feature="f", pooling_factor=IDS).distinct(1000, 192)
    more = stage(of_split, "update") - stage(of_nearest, "update")
    assert more == pytest.approx(distinct * 2 * 32 * 2 * HBM)


def test_padding_when_one_device_has_everything_then_the_others_wait():
    cost = cost_of(table_wise(TABLE, 0))
    assert cost.padding == pytest.approx(0.75)
    assert cost.share_of_slowest == (1.0, 0.0, 0.0, 0.0)


def test_stores_when_counted_then_they_are_the_layouts():
    table = dataclasses.replace(TABLE, optimizer="adam", dtype="bfloat16", num_rows=10)
    storage = cost_of(table_wise(table, 3), table).storage
    # 10 rows of 64 bytes are two lines of 512.
    assert storage.weights == 1024
    assert storage.element_state == 2 * 2 * 1024
    assert storage.row_state == 0
    assert storage.weights_alone == (0, 0, 0, 10 * 32 * (2 + 8))
    rowwise = dataclasses.replace(table, optimizer="rowwise_adagrad")
    assert cost_of(table_wise(rowwise, 3), rowwise).storage.row_state == 512


def test_one_device_when_costed_then_nothing_travels():
    machine = dataclasses.replace(MACHINE, nodes=1, chips=1)
    cost = plan_cost(one_device_plan([TABLE]), [TABLE], [FEATURE], machine, batch_size=BATCH, settings=SETTINGS)
    travelling = [
        seconds for name, seconds in zip(STAGES, cost.seconds, strict=True) if "inside" in name or "between" in name
    ]
    assert travelling == [0.0] * len(travelling)
    assert cost.total_seconds > 0


def test_load_when_its_feature_does_not_exist_then_an_error_names_those_there_are():
    plan = ShardingPlan(nodes=2, chips=2, placements=(table_wise(TABLE, 0),))
    with pytest.raises(InputError, match="is given for feature 'g'; the features are"):
        plan_cost(plan, [TABLE], [FEATURE], MACHINE, batch_size=BATCH, loads=[FeatureLoad(feature="g")])


def test_load_when_impossible_then_an_error_says_what_is_allowed():
    with pytest.raises(InputError, match="pooling_factor is -1"):
        FeatureLoad(feature="f", pooling_factor=-1)
    with pytest.raises(InputError, match="must rise"):
        FeatureLoad(feature="f", coverage=((10, 0.9), (1, 1.0)))
    with pytest.raises(InputError, match="at most 1"):
        FeatureLoad(feature="f", top=((0, 0.9), (1, 0.9)))


def test_rows_of_an_update_when_a_kernel_adds_them_up_then_hardly_any_are_stored():
    wide = dataclasses.replace(TABLE, dim=128, optimizer="rowwise_adagrad")

    def rows_on(machine: str) -> int:
        plan = ShardingPlan(nodes=2, chips=2, placements=(table_wise(wide, 0),))
        known = FeatureLoad(feature="f", pooling_factor=IDS)
        return plan_cost(plan, [wide], [FEATURE], parse_topology(machine), batch_size=BATCH, loads=[known]).storage.rows

    # An A100 has XLA's program alone: two vectors an id. On an H200 each 128 ids of a row can leave a sum.
    assert rows_on("zionex:2x2") == int(1.25 * 192 * 128 * 4 * 2)
    assert rows_on("h200:2x2") == int(1.25 * 192 * 4)
