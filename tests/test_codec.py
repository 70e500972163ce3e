"""Codecs hold what their table of errors says, and tables that exchange codes stay within it."""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from placement_cases import BY_NAME, FEATURES, TABLES, Samples, plan_of, samples_of

from sharding import Embeddings, InputError, ShardedTables, TableState, make_mesh, returns
from sharding.codec import Codec, code_bytes, decode, encode
from sharding.mesh import BY_DEVICE

LOSSY: tuple[Codec, ...] = ("float16", "bfloat16", "float8", "int8")
WIDTH = 16
# Shares of a number and of the largest of its vector: the table in sharding/codec.py.
ERRORS = {
    "float16": (2.0**-11, 2.0**-40),
    "bfloat16": (2.0**-8, 0.0),
    "float8": (2.0**-4, 2.0**-18),
    "int8": (0.0, (1 + 2.0**-7) / 254),
}
SMALLEST_NORMAL, LARGEST = 2.0**-126, float(np.finfo(np.float32).max)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
extremes = st.sampled_from(
    [0.0, -0.0, 1e-45, -SMALLEST_NORMAL, 6e-8, 65504.0, 65520.0, 448.0, 464.0, LARGEST, -LARGEST]
)
# Vectors of one magnitude, of all magnitudes at once, and of the ends of formats.
vectors = st.one_of(
    arrays.arrays(np.float32, (4, WIDTH), elements=st.one_of(floats, extremes)),
    st.builds(
        lambda seed, exponent: (
            np.random.default_rng(seed).normal(size=(4, WIDTH)).astype(np.float32) * np.float32(2.0**exponent)
        ),
        st.integers(0, 2**32 - 1),
        st.integers(-126, 125),
    ),
)


@functools.cache
def round_trip(codec: Codec):
    return jax.jit(lambda given: decode(encode(given, codec), codec))


def bound(given: np.ndarray, codec: Codec) -> np.ndarray:
    exact = np.abs(given.astype(np.float64))
    of_number, of_largest = ERRORS[codec]
    return of_number * exact + of_largest * exact.max(axis=-1, keepdims=True) + SMALLEST_NORMAL


@pytest.mark.parametrize("codec", LOSSY)
@settings(max_examples=200, deadline=None)
@given(given_vectors=vectors)
def test_finite_vectors_when_sent_then_the_error_of_each_number_is_within_the_stated_bound(
    codec: Codec, given_vectors: np.ndarray
) -> None:
    found = np.asarray(round_trip(codec)(given_vectors))
    assert np.isfinite(found).all()
    error = np.abs(found.astype(np.float64) - given_vectors.astype(np.float64))
    assert (error <= bound(given_vectors, codec)).all()
    assert (found[given_vectors == 0] == 0).all()


@pytest.mark.parametrize("codec", LOSSY)
@settings(max_examples=50, deadline=None)
@given(given_vectors=vectors, bad=arrays.arrays(np.bool_, (4, WIDTH)), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_numbers_that_are_not_finite_when_sent_then_they_alone_arrive_as_nan(
    codec: Codec, given_vectors: np.ndarray, bad: np.ndarray, value: float
) -> None:
    found = np.asarray(round_trip(codec)(np.where(bad, np.float32(value), given_vectors)))
    others = np.where(bad, np.float32(0), given_vectors)
    np.testing.assert_array_equal(np.isnan(found), bad)
    error = np.abs(np.where(bad, 0, found).astype(np.float64) - others.astype(np.float64))
    assert (error <= bound(others, codec)).all()


@pytest.mark.parametrize("codec", get_args(Codec))
def test_codes_when_counted_then_code_bytes_says_their_size_and_all_zeros_are_zeros(codec: Codec) -> None:
    codes = encode(jnp.ones((2, 3, WIDTH)), codec)
    assert codes.nbytes == 6 * code_bytes(codec, WIDTH)
    assert codes.shape[:2] == (2, 3)
    np.testing.assert_array_equal(decode(jnp.zeros_like(codes), codec), np.zeros((2, 3, WIDTH), np.float32))


def test_rows_of_float16_when_sent_as_float16_then_they_arrive_exactly() -> None:
    rows = np.random.default_rng(0).normal(size=(100, WIDTH)).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(round_trip("float16")(rows), rows)
    # Smaller than float16 can be, as gradients of a mean are.
    np.testing.assert_array_equal(round_trip("float16")(rows * np.float32(2.0**-40)), rows * np.float32(2.0**-40))


@pytest.mark.parametrize("which", ["forward_codec", "backward_codec"])
def test_codec_when_there_is_none_of_that_name_then_an_error_names_those_there_are(which: str) -> None:
    codecs: dict[str, Any] = {which: "fp16"}
    with pytest.raises(InputError, match=f"{which} 'fp16' does not exist; use one of float32, float16, bfloat16"):
        ShardedTables(TABLES, FEATURES, **codecs)


@pytest.mark.parametrize(("nodes", "chips"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_every_return_on_any_mesh_when_codes_hold_the_numbers_exactly_then_the_bits_of_float32(
    nodes: int, chips: int
) -> None:
    """Small integers and their sums are exact in float16, so that only a vector in a wrong place could differ."""
    devices, samples = nodes * chips, 3
    mesh = make_mesh(nodes, chips)

    def there_and_back_local(owned: list[jax.Array], codec: Codec) -> list[list[jax.Array]]:
        owned = [vectors[0] for vectors in owned]
        whole = returns.bring_home_table_wise(owned, codec)
        rows = returns.bring_home_row_wise(owned, nodes, codec)
        node_rows = returns.bring_home_table_row_wise(owned, nodes, codec)
        results = [
            whole,
            rows,
            node_rows,
            returns.send_back_table_wise(whole, devices, codec),
            returns.send_back_row_wise(rows, codec),
            returns.send_back_table_row_wise(node_rows, nodes, codec),
            returns.send_everywhere(rows, codec),
        ]
        return [[array[None] for array in of_return] for of_return in results]

    def there_and_back(codec: Codec) -> list[list[np.ndarray]]:
        local = functools.partial(there_and_back_local, codec=codec)
        program = jax.shard_map(local, mesh=mesh, in_specs=BY_DEVICE, out_specs=BY_DEVICE, check_vma=False)
        return jax.device_get(jax.jit(program)(given_vectors))

    random = np.random.default_rng(2)
    shapes = [(devices, devices, samples, vectors, width) for vectors, width in ((2, 8), (1, 32))]
    given_vectors = [random.integers(-9, 10, shape).astype(np.float32) for shape in shapes]
    jax.tree.map(np.testing.assert_array_equal, there_and_back("float16"), there_and_back("float32"))


@pytest.mark.parametrize(("nodes", "chips"), [(1, 2), (2, 1)])
def test_partial_sums_when_one_hop_leads_nowhere_then_each_is_written_once_and_their_sum_never(
    nodes: int, chips: int
) -> None:
    def home_local(owned: jax.Array) -> list[jax.Array]:
        row_wise = returns.bring_home_row_wise([owned[0]], nodes, "int8")
        of_node = returns.bring_home_table_row_wise([owned[0]], nodes, "int8")
        return [array[None] for array in (*row_wise, *of_node)]

    mesh = make_mesh(nodes, chips)
    program = jax.shard_map(home_local, mesh=mesh, in_specs=BY_DEVICE, out_specs=BY_DEVICE, check_vma=False)
    owned = np.random.default_rng(4).normal(size=(2, 2, 3, 1, WIDTH)).astype(np.float32)
    row_wise, of_node = jax.device_get(jax.jit(program)(owned))
    # By owner, by whose samples they are.
    read = np.asarray(round_trip("int8")(owned))
    np.testing.assert_array_equal(row_wise, read[0] + read[1])
    np.testing.assert_array_equal(of_node, row_wise if chips == 2 else np.concatenate(list(read), axis=2))


# SGD is linear in the gradients, so that their errors can be followed; and sums of powers of two are exact.
LINEAR = tuple(
    dataclasses.replace(
        table, optimizer="sgd", dtype="float32", rounding="nearest", weight_decay=0.0, learning_rate=0.5, frozen=False
    )
    for table in TABLES
)
SUMMED = tuple(
    dataclasses.replace(feature, pooling="sum") if feature.pooling == "mean" else feature for feature in FEATURES
)
PAIRS = [
    ("int8", "float8"),
    pytest.param("float16", "bfloat16", marks=pytest.mark.slow),
    pytest.param("bfloat16", "float16", marks=pytest.mark.slow),
    pytest.param("float8", "int8", marks=pytest.mark.slow),
]


@functools.cache
def tables_of(forward: Codec, backward: Codec, *, linear: bool) -> ShardedTables:
    return ShardedTables(
        LINEAR if linear else TABLES,
        FEATURES if linear else SUMMED,
        seed=3,
        plan=plan_of(2, 4, "mixed"),
        mesh=make_mesh(2, 4),
        forward_codec=forward,
        backward_codec=backward,
    )


def one_update(
    tables: ShardedTables, samples: Samples, gradients: Embeddings, weighted: bool
) -> tuple[Embeddings, TableState]:
    state = tables.init()
    routed = tables.route(tables.to_devices(samples.jagged(weighted=weighted)))
    embeddings = tables.lookup(state, routed)
    return embeddings, tables.update(state, routed, gradients, step=1)


def random_gradients(tables: ShardedTables, samples: Samples, values: np.ndarray | None = None) -> Embeddings:
    """Normal gradients, or random ones of certain values."""
    routed = jax.eval_shape(tables.route, tables.to_devices(samples.jagged()))
    leaves, structure = jax.tree.flatten(jax.eval_shape(tables.lookup, tables.abstract_state(), routed))
    random = np.random.default_rng(7)
    drawn = [
        random.normal(size=leaf.shape) if values is None else random.choice(values, size=leaf.shape) for leaf in leaves
    ]
    return jax.tree.unflatten(structure, [of_leaf.astype(np.float32) for of_leaf in drawn])


def shares(samples: Samples, feature: str, pooling: str) -> list[list[float]]:
    """What the row of each id of each bag is multiplied by."""
    weights = samples.weights[feature]
    return [[w / sum(bag) if pooling == "mean" else w for w in bag] for bag in weights]


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_lookup_and_update_on_eight_devices_when_codes_travel_then_within_their_error_of_float32(
    forward: Codec, backward: Codec
) -> None:
    samples = samples_of(5)
    # On one device nothing travels, and programs compile sooner.
    plain, coded = ShardedTables(LINEAR, FEATURES, seed=3), tables_of(forward, backward, linear=True)
    gradients = random_gradients(plain, samples)
    expected, expected_state = one_update(plain, samples, gradients, weighted=True)
    found, found_state = one_update(coded, samples, gradients, weighted=True)
    # Every error is at most a share of the largest number of its vector, which partial sums have, too.
    of_forward, of_backward = (sum(ERRORS[codec]) for codec in (forward, backward))
    rounding = 1e-6
    update_error = {table.name: np.zeros(table.num_rows) for table in TABLES}
    for feature in FEATURES:
        of_bags = shares(samples, feature.name, feature.pooling)
        rows = plain.read_rows(plain.init(), feature.table, range(BY_NAME[feature.table].num_rows))
        largest = np.abs(rows).max()
        hops = 2 if coded.plan.placement(feature.table).returns == "partial_sums" else 1
        most = max(max(bag, default=0.0) if feature.pooling == "none" else sum(bag) for bag in of_bags)
        # The second hop writes sums that have the error of the first.
        tolerance = most * largest * ((1 + of_forward) ** hops - 1) + rounding
        difference = np.abs(np.asarray(found[feature.name]) - np.asarray(expected[feature.name])).max()
        assert difference <= tolerance, feature.name
        gradient = np.abs(np.asarray(gradients[feature.name]))
        for sample, (bag, of_bag) in enumerate(zip(samples.bags[feature.name], of_bags, strict=True)):
            for position, (row, share) in enumerate(zip(bag, of_bag, strict=True)):
                of_sample = gradient[sample, position] if feature.pooling == "none" else gradient[sample]
                update_error[feature.table][row] += share * of_sample.max() * of_backward
    changed = 0
    for table in LINEAR:
        before, after = (
            tables.read_rows(state, table.name, range(table.num_rows))
            for tables, state in ((plain, expected_state), (coded, found_state))
        )
        difference = np.abs(after - before)
        # Values that were looked up are not what is updated, so that forward codes do not matter here.
        assert (difference <= table.learning_rate * update_error[table.name][:, None] + rounding).all(), table.name
        changed += int(difference.max() > rounding)
    # Each table's gradients travelled as codes.
    assert changed == len(TABLES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "values"),
    [
        ("float16", [0.0, 1.0, -2.0, 0.25]),
        ("bfloat16", [0.0, 1.0, -2.0, 0.25]),
        ("float8", [0.0, 1.0, -2.0, 0.25]),
        ("int8", [0.0, 127.0, -127.0]),
    ],
)
def test_update_when_codes_hold_the_gradients_exactly_then_every_rule_gives_the_bits_of_float32(
    codec: Codec, values: list[float]
) -> None:
    samples = samples_of(6)
    plain, coded = tables_of("float32", "float32", linear=False), tables_of("float32", codec, linear=False)
    gradients = random_gradients(plain, samples, np.array(values))
    _, expected = one_update(plain, samples, gradients, weighted=True)
    _, found = one_update(coded, samples, gradients, weighted=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
