"""ShardedTables on one device against plain numpy tables."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_tables import BagWeights, PlainTables

from pallas_kernels import Stores
from pallas_kernels.implementations import Implementation
from sharding import Embeddings, FeatureSpec, Initializer, KeyedJagged, ShardedTables, TableSpec, TableState

BATCH_SIZE, CAPACITY = 8, 400
UNBOUNDED = 5

# Every dtype, most rules and stored widths; tables of one row; dims that are no stored width; one store with
# several widths; a table that three features share, pooled and unpooled.
TABLES = (
    TableSpec(name="user", num_rows=50, dim=16, learning_rate=0.1, eps=1e-4),
    TableSpec(name="item", num_rows=300, dim=16, learning_rate=0.02, weight_decay=0.01),
    TableSpec(name="colour", num_rows=1, dim=3),
    TableSpec(name="tag", num_rows=9, dim=5, optimizer="adagrad", learning_rate=0.3),
    TableSpec(name="text", num_rows=10, dim=300, optimizer="adam", beta1=0.5),
    TableSpec(name="shop", num_rows=21, dim=24, optimizer="lamb", weight_decay=0.1),
    TableSpec(name="hour", num_rows=24, dim=8, optimizer="sgd", dtype="bfloat16"),
    TableSpec(name="city", num_rows=40, dim=40, optimizer="adagrad", dtype="float16", learning_rate=0.1),
    TableSpec(name="fixed", num_rows=20, dim=16, frozen=True),
)
FEATURES = (
    FeatureSpec(name="history", table="user", pooling="none", max_ids=4),
    FeatureSpec(name="user_id", table="user", max_ids=1),
    FeatureSpec(name="friends", table="user", pooling="mean", max_ids=6),
    FeatureSpec(name="item_id", table="item"),
    FeatureSpec(name="colours", table="colour", pooling="mean"),
    FeatureSpec(name="tags", table="tag", max_ids=3),
    FeatureSpec(name="words", table="text", pooling="mean", max_ids=4),
    FeatureSpec(name="title", table="text", pooling="none", max_ids=2),
    FeatureSpec(name="shops", table="shop", max_ids=2),
    FeatureSpec(name="hours", table="hour", max_ids=2),
    FeatureSpec(name="cities", table="city", pooling="mean", max_ids=2),
    FeatureSpec(name="constants", table="fixed", max_ids=3),
)
NUM_ROWS = {feature.name: next(t.num_rows for t in TABLES if t.name == feature.table) for feature in FEATURES}
# Not the order of the specifications; a feature that nobody declared is among them.
ORDER = ("tags", "ignored", *(feature.name for feature in reversed(FEATURES) if feature.name != "tags"))
# float32 against float64; 16-bit tables round each update by half a unit in the last place.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}

TABLES_ON_ONE_DEVICE = ShardedTables(TABLES, FEATURES, seed=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    bags: Mapping[str, list[list[int]]]
    weights: BagWeights

    def jagged(self, *, weighted: bool = True) -> KeyedJagged:
        bags = {name: self.bags[name] for name in ORDER}
        return KeyedJagged.from_bags(bags, weights=self.weights if weighted else None, capacity=CAPACITY)


def samples_of(seed: int, *, fullness: float = 0.5, distinct: float = 1.0) -> Samples:
    random = np.random.default_rng(seed)
    bags: dict[str, list[list[int]]] = {"ignored": [[12345]] * BATCH_SIZE}
    for feature in FEATURES:
        longest = feature.max_ids or UNBOUNDED
        ids = max(1, int(NUM_ROWS[feature.name] * distinct))
        bags[feature.name] = [
            random.integers(0, ids, random.binomial(longest, fullness)).tolist() for _ in range(BATCH_SIZE)
        ]
    # One feature is left without weights, and one bag's weights add up to nothing.
    weights = {
        name: [random.uniform(0.5, 2.0, len(bag)).tolist() for bag in samples]
        for name, samples in bags.items()
        if name != "words"
    }
    bags["friends"][0], weights["friends"][0] = [1, 2], [1.0, -1.0]
    return Samples(bags=bags, weights=weights)


samples = st.builds(
    samples_of,
    st.integers(0, 2**32 - 1),
    fullness=st.sampled_from([0.0, 0.3, 1.0]),
    distinct=st.sampled_from([0.0, 0.2, 1.0]),
)


def all_rows(tables: ShardedTables, state: TableState) -> dict[str, np.ndarray]:
    return {t.name: tables.read_rows(state, t.name, range(t.num_rows)) for t in tables.tables}


def bits(state: TableState) -> list[np.ndarray]:
    return [np.asarray(a).view(np.uint16 if a.dtype.itemsize == 2 else np.uint32) for a in jax.tree.leaves(state)]


def weights_of(state: TableState) -> TableState:
    return {name: Stores(weights=stores.weights) for name, stores in state.items()}


def assert_same_bits(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def plain_copy(state: TableState) -> PlainTables:
    return PlainTables(TABLES, FEATURES, all_rows(TABLES_ON_ONE_DEVICE, state))


def a_loss(embeddings: Embeddings, targets: Embeddings) -> jax.Array:
    terms = jax.tree.map(lambda x, y: jnp.sum(jnp.square(x - y)), embeddings, targets)
    return jnp.sum(jnp.stack(jax.tree.leaves(terms)))


gradient_of_loss = jax.jit(jax.grad(a_loss))


def gradients_of(embeddings: Embeddings, *, seed: int = 0) -> Embeddings:
    """Gradients of a loss whose targets are noise."""
    random = np.random.default_rng(seed)
    targets = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), embeddings)
    return gradient_of_loss(embeddings, targets)


@pytest.mark.parametrize("weighted", [False, True])
@settings(deadline=None, max_examples=6)
@given(batch=samples)
def test_lookup_then_equals_plain_tables(weighted: bool, batch: Samples) -> None:
    tables = TABLES_ON_ONE_DEVICE
    state = tables.init()
    routed = tables.route(batch.jagged(weighted=weighted))
    embeddings = tables.lookup(state, routed)
    assert routed.invalid == 0
    for name, expected in plain_copy(state).lookup(batch.bags, batch.weights if weighted else None).items():
        assert embeddings[name].dtype == np.float32
        np.testing.assert_allclose(embeddings[name], expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=4)
@given(batches=st.lists(samples, min_size=3, max_size=3))
def test_training_by_the_gradient_of_a_loss_then_equals_plain_tables(batches: list[Samples]) -> None:
    tables = TABLES_ON_ONE_DEVICE
    state = tables.init()
    plain = plain_copy(state)
    for step, batch in enumerate(batches, start=1):
        routed = tables.route(batch.jagged())
        embeddings = tables.lookup(state, routed)
        gradients = gradients_of(embeddings, seed=step)
        scale = 1.0 / step
        state = tables.update(state, routed, gradients, step=step, learning_rate_scale=scale)
        by_name = {name: np.asarray(gradients[name]) for name in NUM_ROWS}
        plain.update(batch.bags, by_name, batch.weights, step=step, learning_rate_scale=scale)
        for table in TABLES:
            rows = tables.read_rows(state, table.name, range(table.num_rows))
            tolerance = TOLERANCE[table.dtype]
            np.testing.assert_allclose(rows.astype(np.float64), plain.rows[table.name], rtol=tolerance, atol=tolerance)
            kept = tables.read_optimizer_state(state, table.name, range(table.num_rows))
            for values, expected in zip(kept.values(), plain.state.get(table.name, []), strict=True):
                # The gradient is of order 1 and enters squared.
                np.testing.assert_allclose(values, expected, rtol=20 * tolerance, atol=tolerance)


def a_step(state: TableState, batch: Samples, **options) -> TableState:
    tables = TABLES_ON_ONE_DEVICE
    routed = tables.route(batch.jagged())
    embeddings = tables.lookup(state, routed)
    return tables.update(state, routed, gradients_of(embeddings), **{"step": 1, **options})


def test_an_update_that_is_not_enabled_then_every_bit_stays() -> None:
    state = TABLES_ON_ONE_DEVICE.init()
    before = bits(state)
    assert_same_bits(bits(a_step(state, samples_of(0), enabled=False)), before)


def test_an_update_with_learning_rates_scaled_to_zero_then_weights_stay_and_state_moves() -> None:
    state = TABLES_ON_ONE_DEVICE.init()
    before, weights_before = bits(state), bits(weights_of(state))
    after = a_step(state, samples_of(0), learning_rate_scale=0.0)
    assert_same_bits(bits(weights_of(after)), weights_before)
    assert any((a != b).any() for a, b in zip(bits(after), before, strict=True))


def test_a_frozen_table_then_keeps_its_rows_and_has_no_optimizer_state() -> None:
    tables = TABLES_ON_ONE_DEVICE
    state = tables.init()
    before = tables.read_rows(state, "fixed", range(20))
    after = a_step(state, samples_of(0, fullness=1.0))
    np.testing.assert_array_equal(tables.read_rows(after, "fixed", range(20)), before)
    assert tables.read_optimizer_state(after, "fixed", range(20)) == {}
    assert after["float32.frozen"].element_state == after["float32.frozen"].row_state == ()


def test_state_of_16_bit_tables_then_float32_with_as_many_elements() -> None:
    stores = TABLES_ON_ONE_DEVICE.abstract_state(sharded=False)["float16.adagrad"]
    (moment,) = stores.element_state
    assert moment.dtype == np.float32
    assert moment.shape == (2 * stores.weights.shape[0], 128)


def test_routing_of_features_in_their_own_order_then_the_same_as_in_any_other() -> None:
    tables = ShardedTables(TABLES[:2], FEATURES[:4])
    batch = samples_of(5, fullness=0.8)
    routed = []
    for names in (tables.feature_order, tuple(reversed(tables.feature_order))):
        bags, weights = {name: batch.bags[name] for name in names}, {name: batch.weights[name] for name in names}
        routed.append(tables.route(KeyedJagged.from_bags(bags, weights=weights, capacity=CAPACITY)))
    one, other = (r.groups[0].owned for r in routed)
    num_ids = int(one.offsets[-1])
    np.testing.assert_array_equal(one.offsets, other.offsets)
    for field in ("rows", "weights", "slots"):
        np.testing.assert_array_equal(getattr(one, field)[:num_ids], getattr(other, field)[:num_ids])


def test_room_for_more_ids_then_not_a_bit_changes() -> None:
    tables = ShardedTables(TABLES[:2], FEATURES[:4])
    bags = {name: values for name, values in samples_of(5).bags.items() if name in tables.feature_order}
    results = []
    for capacity in (120, 400):
        state = tables.init()
        routed = tables.route(KeyedJagged.from_bags(bags, capacity=capacity))
        embeddings = tables.lookup(state, routed)
        state = tables.update(state, routed, gradients_of(embeddings), step=1)
        results.append([*bits(state), *(np.asarray(leaf) for leaf in jax.tree.leaves(embeddings))])
    assert_same_bits(*results)


@pytest.mark.parametrize("invalid", [-1, -(2**31), 50, 2**31 - 1])
@pytest.mark.parametrize("feature", ["user_id", "friends", "history"])
def test_ids_outside_the_table_then_counted_and_without_effect(feature: str, invalid: int) -> None:
    batch = samples_of(1)
    bags = dict(batch.bags)
    bags[feature] = [[invalid], *bags[feature][1:]]
    without = {**bags, feature: [[], *bags[feature][1:]]}
    results = []
    for ids, count in ((bags, 1), (without, 0)):
        tables = TABLES_ON_ONE_DEVICE
        state = tables.init()
        routed = tables.route(Samples(bags=ids, weights={}).jagged())
        assert routed.invalid == count
        embeddings = tables.lookup(state, routed)
        state = tables.update(state, routed, gradients_of(embeddings), step=1)
        results.append([*bits(state), *(np.asarray(leaf) for leaf in jax.tree.leaves(embeddings))])
    assert_same_bits(*results)


@pytest.mark.parametrize(("feature", "longest"), [("user_id", 1), ("history", 4)])
def test_a_bag_longer_than_max_ids_then_counted_and_its_group_left_out(feature: str, longest: int) -> None:
    tables = TABLES_ON_ONE_DEVICE
    bags = dict(samples_of(1, fullness=1.0).bags)
    bags[feature] = [[3] * (longest + 2), *bags[feature][1:]]
    state = tables.init()
    before = all_rows(tables, state)
    routed = tables.route(Samples(bags=bags, weights={}).jagged())
    assert routed.invalid == 2
    embeddings = tables.lookup(state, routed)
    for name in ("user_id", "friends", "history", "item_id"):
        assert not np.asarray(embeddings[name]).any()
    assert np.asarray(embeddings["tags"]).any()
    after = all_rows(tables, tables.update(state, routed, gradients_of(embeddings), step=1))
    np.testing.assert_array_equal(after["user"], before["user"])
    np.testing.assert_array_equal(after["item"], before["item"])
    assert (after["tag"] != before["tag"]).any()


@pytest.mark.parametrize(
    ("lengths", "invalid", "needed"),
    [([[3, 3]], 0, 6), ([[4, -1]], 2, 3), ([[2**31 - 1, 2**31 - 1, 3]], 0, 2**31 - 1)],
)
def test_lengths_that_do_not_fit_the_values_then_reported_and_without_effect(
    lengths: list[list[int]], invalid: int, needed: int
) -> None:
    tables = ShardedTables([TABLES[1]], [FeatureSpec(name="item_id", table="item", max_ids=3)])
    ids = KeyedJagged(values=np.arange(4, dtype=np.int32), lengths=np.array(lengths, np.int32), features=("item_id",))
    routed = tables.route(ids)
    assert routed.invalid == invalid
    assert routed.needs[0] == needed
    assert bool(routed.overflow) == (needed > 4)
    assert (np.diff(routed.groups[0].owned.offsets) >= 0).all()
    assert not np.asarray(tables.lookup(tables.init(), routed)["item_id"]).any()


@pytest.mark.parametrize(("batch_size", "capacity"), [(0, 0), (0, 3), (2, 0)])
def test_an_empty_batch_then_nothing_happens(batch_size: int, capacity: int) -> None:
    tables = ShardedTables(TABLES[:2], FEATURES[:4])
    state = tables.init()
    before = bits(state)
    for names in (tables.feature_order, tables.feature_order[::-1]):
        ids = KeyedJagged(
            values=np.zeros(capacity, np.int32),
            lengths=np.zeros((4, batch_size), np.int32),
            weights=np.zeros(capacity, np.float32),
            features=names,
        )
        routed = tables.route(ids)
        embeddings = tables.lookup(state, routed)
        assert routed.invalid == 0
        assert embeddings["user_id"].shape == (batch_size, 16)
        assert embeddings["history"].shape == (batch_size, 4, 16)
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(embeddings))
        state = tables.update(state, routed, embeddings, step=1)
        assert_same_bits(bits(state), before)


def test_rows_written_then_read_back_and_no_other_row_changes() -> None:
    tables = TABLES_ON_ONE_DEVICE
    state = tables.init()
    before = {name: rows.copy() for name, rows in all_rows(tables, state).items()}
    for name, first in (("text", 3), ("city", 0), ("colour", 0)):
        spec = next(table for table in TABLES if table.name == name)
        values = np.random.default_rng(0).normal(size=(spec.num_rows - first, spec.dim)).astype(np.float32)
        state = tables.write_rows(state, name, first, values)
        before[name][first:] = values
    for name, rows in all_rows(tables, state).items():
        np.testing.assert_array_equal(rows, before[name])


def test_embeddings_when_asked_for_an_unknown_feature_then_an_error_names_those_there_are_which_can_be_listed() -> None:
    tables = ShardedTables(TABLES[:2], FEATURES[:4])
    shapes = jax.eval_shape(tables.init)
    embeddings = jax.eval_shape(tables.lookup, shapes, jax.eval_shape(tables.route, samples_of(0).jagged()))
    with pytest.raises(KeyError, match=r"no feature 'colour'; there are .*user_id"):
        embeddings["colour"]
    assert set(embeddings) == {feature.name for feature in FEATURES[:4]}
    assert len(embeddings) == 4


def test_tables_inside_a_callers_jit_then_the_same_rows_as_outside() -> None:
    tables = ShardedTables(
        [TableSpec(name="t", num_rows=30, dim=16, initializer=Initializer(kind="normal"))],
        [FeatureSpec(name="f", table="t")],
    )
    ids = KeyedJagged.from_bags({"f": [[1, 2], [2], []]})

    def step(state: TableState, ids: KeyedJagged) -> TableState:
        routed = tables.route(ids)
        return tables.update(state, routed, tables.lookup(state, routed), step=1)

    inside, outside = jax.jit(step)(tables.init(), ids), step(tables.init(), ids)
    # Another program may contract a product and a sum into one rounding: jaxlib 0.11.2 does, in one element.
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-7)


@pytest.mark.parametrize("kernels", [None, "xla"])
def test_tables_where_jax_has_64_bits_then_the_same_bits(kernels: Implementation | None) -> None:
    spec = TableSpec(name="t", num_rows=30, dim=16, dtype="bfloat16", rounding="split", optimizer="lamb")
    features = [FeatureSpec(name="f", table="t", pooling="mean"), FeatureSpec(name="g", table="t", max_ids=2)]
    tables = ShardedTables([spec], features, kernels=kernels)
    ids = KeyedJagged.from_bags({"f": [[1, 2], [2], []], "g": [[3], [29, 1], [5]]})

    def trained() -> list[np.ndarray]:
        state, routed = tables.init(), tables.route(ids)
        state = tables.write_rows(state, "t", 3, np.ones((2, 16)))
        embeddings = tables.lookup(state, routed)
        state = tables.update(state, routed, gradients_of(embeddings), step=1)
        return [*bits(state), *(np.asarray(leaf) for leaf in jax.tree.leaves(embeddings))]

    expected = trained()
    # A caller who has 64 bits has them promoted, too.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        assert_same_bits(trained(), expected)
