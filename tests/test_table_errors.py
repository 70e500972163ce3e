"""What ShardedTables refuses, each in one line that names the thing, its value and the limit."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import (
    FeatureSpec,
    Initializer,
    InputError,
    KeyedJagged,
    ShardedTables,
    ShardingPlan,
    TableSpec,
    make_mesh,
)
from sharding.jagged import for_devices
from sharding.plan import data_parallel, table_wise

TABLE = TableSpec(name="t", num_rows=10, dim=4)
FEATURE = FeatureSpec(name="f", table="t")


def assert_refused(message: str, call, *arguments, **options) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": 0}, f"table 't' has 0 rows; the limit is 1 to {2**63 - 1}"),
        ({"num_rows": 2**63}, f"table 't' has {2**63} rows; the limit is 1 to {2**63 - 1}"),
        ({"dim": 0}, "table 't' has dim 0; the limit is 1 to 8192"),
        ({"dim": 8193}, "table 't' has dim 8193; the limit is 1 to 8192"),
        ({"optimizer": "momentum"}, "table 't': optimizer 'momentum' does not exist; there are ['sgd', 'adagrad',"),
        ({"dtype": "float64"}, "table 't': dtype 'float64' is not one of float32, bfloat16, float16"),
        ({"rounding": "up"}, "table 't': rounding 'up' is not one of nearest, stochastic, split"),
        (
            {"rounding": "split"},
            "table 't': rounding split keeps the high halves of weights in bfloat16, but the dtype is",
        ),
        ({"initializer": Initializer(kind="ones")}, "table 't': initializer 'ones' is not one of uniform, normal,"),
        ({"initializer": Initializer(scale=np.inf)}, "table 't': the initializer's scale is inf; it must be finite"),
        (
            {"dtype": "float16", "initializer": Initializer(kind="constant", scale=-7e4)},
            "table 't': the initializer's scale is -70000.0; it must be finite in float16, so at most 65504.0",
        ),
        ({"learning_rate": -0.1}, "table 't': learning_rate is -0.1; it must be at least 0.0"),
        ({"learning_rate": np.nan}, "table 't': learning_rate is nan; it must be at least 0.0"),
        ({"learning_rate": 1e39}, "table 't': learning_rate is 1e+39; it must be at least 0.0 and at most 3e+38"),
        ({"weight_decay": -1.0}, "table 't': weight_decay is -1.0; it must be at least 0.0"),
        ({"eps": 0.0}, "table 't': eps is 0.0; it must be at least 1e-30"),
        ({"beta1": 1.0}, "table 't': beta1 is 1.0; it must be at least 0.0 and at most 0.9999"),
        ({"beta2": 1 - 1e-9}, "table 't': beta2 is 0.999999999; it must be at least 0.0 and at most 0.9999"),
        ({"learning_rate": "0.1"}, "table 't': learning_rate is '0.1'; it must be at least 0.0"),
        ({"initializer": "normal"}, "table 't': initializer is 'normal'; give an Initializer, such as Initializer()"),
        ({"beta2": -0.5}, "table 't': beta2 is -0.5; it must be at least 0.0"),
        (
            {"num_rows": 2**31 - 1, "name": "u"},
            "table 'u' ends at row 2147483663 of width 8 in the store 'float32.rowwise_adagrad' of one device, and 32 "
            "bits name 2147483647: spread its rows over more devices, or use larger dims or fewer rows",
        ),
        ({"num_rows": 1.5}, "table 't': num_rows is 1.5, but must be a whole number"),
        ({"dim": 2.0}, "table 't': dim is 2.0, but must be a whole number"),
        (
            {"num_rows": 2**62},
            f"table 't' ends at row {2**62} of width 8 in the store 'float32.rowwise_adagrad' of one",
        ),
        (
            {"num_rows": 2**31 - 65, "name": "u", "dim": 16},
            "the row-wise state of table 'u' ends at number 2147483711 in the store 'float32.rowwise_adagrad' of one "
            "device, and 32 bits name 2147483647: spread its rows over more devices, or use an optimizer without",
        ),
    ],
)
def test_a_table_that_cannot_be_then_refused(changes: dict, message: str) -> None:
    table = dataclasses.replace(TABLE, **changes)
    features = [FEATURE, FeatureSpec(name="g", table="u")] if table.name == "u" else [FEATURE]
    assert_refused(message, ShardedTables, [TABLE, table] if table.name == "u" else [table], features)


@pytest.mark.parametrize(
    ("tables", "features", "message"),
    [
        ([TABLE, TABLE], [FEATURE], "table 't' is declared twice; names must differ"),
        ([TABLE], [FEATURE, FEATURE], "feature 'f' is declared twice; names must differ"),
        ([TABLE], [], "no feature is declared; an embedding layer needs at least one"),
        (
            [TABLE],
            [dataclasses.replace(FEATURE, table="x")],
            "feature 'f' is mapped to table 'x'; tables: ['t']",
        ),
        (
            [TABLE],
            [dataclasses.replace(FEATURE, pooling="max")],
            "feature 'f': pooling 'max' is not one of sum, mean, none",
        ),
        (
            [TABLE],
            [dataclasses.replace(FEATURE, pooling="none")],
            "feature 'f' is unpooled, so max_ids must say how long a sequence can be",
        ),
        ([TABLE], [dataclasses.replace(FEATURE, max_ids=0)], "feature 'f' has max_ids 0; the limit is 1 to"),
        ([TABLE], [dataclasses.replace(FEATURE, pooling="none", max_ids=-3)], "feature 'f' has max_ids -3"),
        (
            [TABLE],
            [dataclasses.replace(FEATURE, max_ids=2.5)],
            "feature 'f': max_ids is 2.5, but must be a whole number",
        ),
        (
            [TABLE, dataclasses.replace(TABLE, name="u")],
            [FEATURE],
            "table 'u' is used by no feature; leave it out or map a feature to it",
        ),
    ],
)
def test_specifications_that_contradict_each_other_then_refused(tables, features, message: str) -> None:
    assert_refused(message, ShardedTables, tables, features)


def test_several_devices_without_a_plan_then_refused() -> None:
    message = "a mesh of 2 devices needs a plan: make one, as sharding.planner.make_plan(...).plan"
    assert_refused(message, ShardedTables, [TABLE], [FEATURE], mesh=make_mesh(1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "plan.json"}, "the plan is a str: give a ShardingPlan, such as make_plan(...).plan"),
        ({"kernels": "cuda"}, "kernels 'cuda' do not exist; use one of cpu, mosaic_gpu,"),
        (
            {"mesh": jax.make_mesh((1, 1), ("data", "model"))},
            "the mesh has axes ('data', 'model'), but tables need ('node', 'chip'): make it with make_mesh",
        ),
    ],
)
def test_settings_that_cannot_be_then_refused(options: dict, message: str) -> None:
    assert_refused(message, ShardedTables, [TABLE], [FEATURE], **options)


def test_a_batch_that_does_not_divide_over_the_devices_then_refused() -> None:
    plan = ShardingPlan(nodes=1, chips=2, placements=(data_parallel(TABLE),))
    tables = ShardedTables([TABLE], [FEATURE], plan=plan, mesh=make_mesh(1, 2))
    ids = jagged(lengths=np.ones((1, 3), np.int32))
    of_two = dataclasses.replace(ids, parts=2)
    assert_refused("3 samples with room for 4 ids do not divide over 2 devices", tables.route, of_two)
    assert_refused("3 samples do not divide over 2 devices", tables.to_devices, ids)
    odd = dataclasses.replace(jagged(values=np.zeros(5, np.int32)), parts=2)
    assert_refused("4 samples with room for 5 ids do not divide over 2 devices", tables.route, odd)


def test_a_batch_of_nothing_on_several_devices_when_jax_would_die_of_it_then_refused(monkeypatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    plan = ShardingPlan(nodes=1, chips=2, placements=(data_parallel(TABLE),))
    tables = ShardedTables([TABLE], [FEATURE], plan=plan, mesh=make_mesh(1, 2))
    ids = tables.to_devices(jagged(lengths=np.zeros((1, 0), np.int32)))
    assert_refused("0 samples with room for 8 ids: arrays without elements end jax", tables.route, ids)


def test_a_batch_that_is_not_laid_out_for_the_devices_then_refused() -> None:
    plan = ShardingPlan(nodes=1, chips=2, placements=(data_parallel(TABLE),))
    tables = ShardedTables([TABLE], [FEATURE], plan=plan, mesh=make_mesh(1, 2))
    assert_refused("the batch is laid out for 1 devices, but there are 2: give it to", tables.route, jagged())
    ids = tables.to_devices(jagged())
    assert_refused("the batch is laid out for 2 devices already", tables.to_devices, ids)
    assert_refused("laid out for 2 devices, but there are 1", ShardedTables([TABLE], [FEATURE]).route, ids)


@pytest.mark.parametrize(("nodes", "chips"), [(1, 10_000), (0, 1), (1, 0)])
def test_a_mesh_of_devices_that_are_not_there_then_refused(nodes: int, chips: int) -> None:
    what = f"needs {nodes * chips} devices" if nodes * chips else "has no device: make nodes and chips at least 1"
    assert_refused(f"a mesh of {nodes} x {chips} {what}", make_mesh, nodes, chips)


def jagged(**changes) -> KeyedJagged:
    ids = KeyedJagged(values=np.zeros(4, np.int32), lengths=np.ones((1, 4), np.int32), features=("f",))
    return dataclasses.replace(ids, **changes)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (jagged(features=("g",)), "the batch has no ids of feature 'f'; it has ('g',)"),
        (jagged(values=np.array([2**31] * 4)), "ids and lengths are int64 and int32, which JAX would narrow silently"),
        (jagged(lengths=np.ones((1, 4), np.int64)), "ids and lengths are int32 and int64"),
        (jagged(lengths=np.ones((2, 2), np.int32)), "ids of 1 features have values (4,) and lengths (2, 2): give"),
        (jagged(lengths=np.ones(4, np.int32)), "ids of 1 features have values (4,) and lengths (4,): give [capacity]"),
        (jagged(weights=np.ones(3, np.float32)), "(4,) ids have (3,) weights; give one weight for each id"),
        (jagged(weights=np.ones(4, np.int32)), "weights are int32; give float32"),
        (jagged(features=("f", "f"), lengths=np.ones((2, 2), np.int32)), "a feature is named twice in ('f', 'f')"),
    ],
)
def test_a_batch_that_does_not_fit_then_refused(ids: KeyedJagged, message: str) -> None:
    assert_refused(message, ShardedTables([TABLE], [FEATURE]).route, ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (jagged(lengths=np.full((1, 4), 2, np.int32)), "lengths add up to 8 ids, but values has 4"),
        (
            jagged(lengths=np.array([[1, 1, -1, 1]], np.int32)),
            "a bag has -1 ids; lengths are counts, so give 0 or more",
        ),
        (jagged(weights=np.ones(4, np.float16)), "weights are float16; give float32"),
    ],
)
def test_a_batch_whose_parts_do_not_fit_each_other_then_no_device_gets_it(ids: KeyedJagged, message: str) -> None:
    assert_refused(message, ShardedTables([TABLE], [FEATURE]).to_devices, ids)


@pytest.mark.parametrize("capacity", [-1, 2.5])
def test_room_that_cannot_be_then_refused(capacity: float) -> None:
    message = f"capacity is {capacity}; it is the room for one device's ids, so give 0 or more"
    assert_refused(message, ShardedTables([TABLE], [FEATURE]).to_devices, jagged(), capacity)


def test_plain_objects_where_ours_are_wanted_then_one_line_says_which() -> None:
    tables = ShardedTables([TABLE], [FEATURE])
    state, routed = tables.init(), tables.route(tables.to_devices(jagged()))
    plain = {"f": tables.lookup(state, routed)["f"]}
    specs = ({"t": TABLE}, [FEATURE]), ([TABLE], {"f": FEATURE})
    assert_refused("table 't' is of type str; give TableSpec", ShardedTables, *specs[0])
    assert_refused("feature 'f' is of type str; give FeatureSpec", ShardedTables, *specs[1])
    for call in (tables.to_devices, tables.route, tables.address):
        assert_refused("the batch of ids is of type dict; give KeyedJagged", call, {"f": [[1]]})
    assert_refused("capacities is of type dict; give Capacities", tables.route, jagged(), {"f": 4})
    assert_refused("what was routed is of type dict; give Routed", tables.lookup, state, {"f": [[1]]})
    assert_refused("gradients is of type dict; give Embeddings", tables.send_back, routed, plain)
    assert_refused("gradients is of type dict; give Embeddings", tables.update, state, routed, plain, step=1)


@pytest.mark.parametrize(
    ("samples", "ids", "message"),
    [
        (8, 2**31, f"8 samples with room for {2**31} ids are {2**31} ids on a device, but 32 bits number {2**31 - 1}"),
        (2**31, 8, f"{2**31} samples with room for 8 ids are {2**31} bags on a device, but 32 bits number"),
    ],
)
def test_a_batch_that_32_bits_do_not_number_then_refused(samples: int, ids: int, message: str) -> None:
    values, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((ids,), (1, samples)))
    abstract = KeyedJagged(values=values, lengths=lengths, features=("f",))
    assert_refused(message, jax.eval_shape, ShardedTables([TABLE], [FEATURE]).route, abstract)


def test_a_batch_whose_bags_32_bits_do_not_number_at_an_owner_then_refused() -> None:
    # At home half as many.
    plan = ShardingPlan(nodes=1, chips=2, placements=(table_wise(TABLE, 0),))
    tables = ShardedTables([TABLE], [FEATURE], plan=plan, mesh=make_mesh(1, 2))
    values, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8,), (1, 2**31)))
    abstract = KeyedJagged(values=values, lengths=lengths, features=("f",), parts=2)
    message = f"{2**31} samples with room for 8 ids are {2**31} bags on a device, but 32 bits number"
    assert_refused(message, jax.eval_shape, tables.route, abstract)


def test_more_ids_of_one_device_than_32_bits_number_then_refused() -> None:
    # Of no memory: one element again and again.
    values = np.broadcast_to(np.int32(1), (2**31,))
    ids = jagged(values=values, lengths=np.array([[2**30, 2**30, 0, 0]], np.int32))
    message = f"a device has {2**31} ids of the batch, but 32 bits number {2**31 - 1}: use fewer samples"
    assert_refused(message, for_devices, ids, 2, 8)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax 0.11 dies of arrays without elements")
def test_a_batch_without_samples_then_each_device_has_none() -> None:
    plan = ShardingPlan(nodes=1, chips=2, placements=(data_parallel(TABLE),))
    tables = ShardedTables([TABLE], [FEATURE], plan=plan, mesh=make_mesh(1, 2))
    ids = tables.to_devices(jagged(lengths=np.zeros((1, 0), np.int32)), 2)
    assert tables.lookup(tables.init(), tables.route(ids))["f"].shape == (0, 4)


def test_an_update_whose_step_or_gradients_cannot_be_then_refused() -> None:
    tables = ShardedTables([TABLE], [FEATURE])
    state, routed = tables.init(), tables.route(tables.to_devices(jagged()))
    gradients = tables.lookup(state, routed)
    for step in (0, 0.5, 1.5, np.int64(0), np.array(0)):
        assert_refused(
            f"step is {step}; updates are counted from 1", tables.update, state, routed, gradients, step=step
        )
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients)
    assert_refused("gradients of embeddings are bfloat16;", tables.update, state, routed, low, step=1)


def test_rows_to_write_from_a_row_that_is_no_whole_number_then_refused() -> None:
    tables = ShardedTables([TABLE], [FEATURE])
    message = "the first row to write of table 't' is 1.5, but must be a whole number"
    assert_refused(message, tables.write_rows, tables.init(), "t", 1.5, np.zeros((1, 4)))


def test_expected_ids_of_a_feature_that_are_missing_then_refused() -> None:
    plan = ShardingPlan(nodes=1, chips=2, placements=(table_wise(TABLE, 0),))
    tables = ShardedTables([TABLE], [FEATURE], plan=plan, mesh=make_mesh(1, 2))
    assert_refused("mean_ids has no feature 'f'; it has ['g']", tables.expected_capacities, 2, 4, {"g": 1.0})


@pytest.mark.parametrize(
    ("bags", "options", "message"),
    [
        ({"f": [[], [2**70]]}, {}, f"feature 'f', sample 1: id {2**70} does not fit into 64 bits"),
        ({"f": [[1], 2]}, {}, "feature 'f', sample 1: 2 is not a list of ids; give each sample one, []"),
        ({"f": [None]}, {}, "feature 'f', sample 0: None is not a list of ids"),
        ({"f": [[1.5]]}, {}, "feature 'f', sample 0: id 1.5 is not an integer; ids are row numbers"),
        ({"f": [["a"]]}, {}, "feature 'f', sample 0: id 'a' is not an integer"),
        ({"f": [[1]], "g": [[1], [2]]}, {}, "features have different numbers of samples: {'f': 1, 'g': 2}"),
        ({"f": [[1, 2]]}, {"capacity": 1}, "2 ids do not fit into capacity 1; raise it or leave it out"),
        ({"f": [[1, 2]]}, {"weights": {"f": [[1.0]]}}, "feature 'f', sample 0: 2 ids but 1 weights"),
        ({"f": [[], [1]]}, {"weights": {"f": [[], []]}}, "feature 'f', sample 1: 1 ids but 0 weights"),
        ({"f": [[]]}, {"weights": {"f": [[], []]}}, "feature 'f' has ids of 1 samples, but weights of 2: give"),
        ({"f": [[], [1]]}, {"weights": {"f": [[]]}}, "feature 'f' has ids of 2 samples, but weights of 1: give"),
        ({"f": [[1]]}, {"weights": {"f": [[None]]}}, "feature 'f', sample 0: weight None is not a finite number"),
        ({"f": [[1]]}, {"weights": {"f": [[np.nan]]}}, "feature 'f', sample 0: weight nan is not a finite number"),
        ({"f": [[1]]}, {"weights": {"g": [[1.0]]}}, "weights are given for features without ids: ['g']"),
    ],
)
def test_bags_that_make_no_batch_then_refused(bags: dict, options: dict, message: str) -> None:
    assert_refused(message, KeyedJagged.from_bags, bags, **options)


def test_bags_at_the_limits_of_32_bits_then_taken() -> None:
    ids = KeyedJagged.from_bags({"f": [[2**31 - 1, -(2**31)], []]}, weights={"f": [[1, 2], []]}, capacity=3)
    np.testing.assert_array_equal(ids.values, np.array([2**31 - 1, -(2**31), 0], np.int32))
    np.testing.assert_array_equal(ids.lengths, [[2, 0]])
    np.testing.assert_array_equal(ids.weights, np.array([1, 2, 0], np.float32))


def test_bags_beyond_the_limits_of_32_bits_then_taken_as_two_words() -> None:
    ids = KeyedJagged.from_bags({"f": [[2**33 + 5, -1]]})
    np.testing.assert_array_equal(ids.values, np.array([[5, 2], [2**32 - 1, 2**32 - 1]], np.uint32))
    assert_refused("no table has more than 2**31 - 1 rows", ShardedTables([TABLE], [FEATURE]).route, ids)


def test_rows_that_a_table_does_not_have_then_refused() -> None:
    tables = ShardedTables([TABLE], [FEATURE])
    state = tables.init()
    for read in (tables.read_rows, tables.read_optimizer_state):
        assert_refused("no table 'u'; tables: ['t']", read, state, "u", [0])
        assert_refused("row 10 is outside table 't', whose rows are 0 to 9", read, state, "t", [3, 10])
        assert_refused("row -1 is outside table 't', whose rows are 0 to 9", read, state, "t", [-1])
        assert_refused("rows of table 't' are given as bool of shape (10,); give", read, state, "t", np.arange(10) < 3)
        assert_refused("rows of table 't' are given as float64 of shape (1,)", read, state, "t", [1.9])
        assert_refused("rows of table 't' are given as int64 of shape ()", read, state, "t", 3)
        assert_refused("rows of table 't' are given as object of shape ()", read, state, "t", slice(3))
    for name, first, shape, message in (
        ("u", 0, (1, 4), "no table 'u'; tables: ['t']"),
        ("t", 0, (1, 5), "rows of shape (1, 5) do not fit table 't'; its rows have dim 4"),
        ("t", 0, (4,), "rows of shape (4,) do not fit table 't'"),
        ("t", 9, (2, 4), "rows 9 to 10 are not all in table 't', whose rows are 0 to 9"),
        ("t", -1, (2, 4), "rows -1 to 0 are not all in table 't'"),
    ):
        assert_refused(message, tables.write_rows, state, name, first, np.zeros(shape))
