"""How rows begin: a function of seed, table, row and column, whatever stands beside the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rounding
from sharding import FeatureSpec, Initializer, InputError, ShardedTables, ShardingPlan, TableSpec
from sharding.checkpoint import load_initial_values
from sharding.initial import initial_lines
from sharding.layout import make_layout
from sharding.plan import row_wise
from sharding.tables import InitializerKind, StorageDtype


def table(name: str, *, num_rows: int = 1000, dim: int = 16, **fields) -> TableSpec:
    return TableSpec(name=name, num_rows=num_rows, dim=dim, **fields)


def tables_of(*specs: TableSpec, seed: int = 0) -> ShardedTables:
    return ShardedTables(specs, [FeatureSpec(name=f"f_{spec.name}", table=spec.name) for spec in specs], seed=seed)


def first_rows(name: str, *specs: TableSpec, seed: int = 0) -> np.ndarray:
    tables = tables_of(*specs, seed=seed)
    num_rows = next(spec.num_rows for spec in specs if spec.name == name)
    return tables.read_rows(tables.init(), name, range(num_rows))


def test_uniform_rows_then_spread_evenly_over_their_range() -> None:
    rows = first_rows("t", table("t", num_rows=4000))
    limit = 1 / np.sqrt(4000)
    assert rows.min() >= -limit
    assert rows.max() < limit
    counts, _ = np.histogram(rows, bins=64, range=(-limit, limit))
    expected = rows.size / 64
    # Chi-squared of 63 degrees of freedom: mean 63, variance 126; 5 standard deviations.
    assert abs(((counts - expected) ** 2 / expected).sum() - 63) < 5 * np.sqrt(126)


def test_normal_rows_then_have_the_moments_of_a_normal_distribution() -> None:
    rows = first_rows("t", table("t", num_rows=4000, initializer=Initializer(kind="normal", scale=0.5))) / 0.5
    deviation = 5 / np.sqrt(rows.size)
    assert abs(rows.mean()) < deviation
    assert abs((rows**2).mean() - 1) < deviation * np.sqrt(2)
    assert abs((rows**3).mean()) < deviation * np.sqrt(15)
    assert abs((rows**4).mean() - 3) < deviation * np.sqrt(96)
    assert np.isfinite(rows).all()


@pytest.mark.parametrize(("scale", "value"), [(None, 0.0), (-1.5, -1.5)])
def test_constant_rows_then_that_constant(scale: float | None, value: float) -> None:
    rows = first_rows("t", table("t", initializer=Initializer(kind="constant", scale=scale)))
    np.testing.assert_array_equal(rows, np.full_like(rows, value))


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_whatever_tables_stand_beside_then_the_same_bits(kind: InitializerKind, dtype: StorageDtype) -> None:
    mine = table("t", num_rows=77, dim=13, dtype=dtype, initializer=Initializer(kind=kind))
    alone = first_rows("t", mine)
    others = (
        table("same_width", num_rows=5, dim=16, dtype=dtype),
        table("normal", num_rows=300, dim=9, dtype=dtype, initializer=Initializer(kind="normal")),
        table("constant", num_rows=2, dim=16, dtype=dtype, initializer=Initializer(kind="constant", scale=3.0)),
        table("wide", num_rows=3, dim=300, dtype=dtype),
        table("narrow", num_rows=9, dim=1, dtype=dtype),
    )
    for specs in ((*others, mine), (mine, *others), (others[3], mine, others[0])):
        np.testing.assert_array_equal(first_rows("t", *specs), alone)


def test_rows_of_a_larger_table_then_begin_with_those_of_a_smaller_one() -> None:
    scale = Initializer(scale=1.0)
    small = first_rows("t", table("t", num_rows=100, dim=8, initializer=scale))
    large = first_rows("t", table("t", num_rows=900, dim=20, initializer=scale))
    np.testing.assert_array_equal(large[:100, :8], small)


def test_rows_when_seed_or_name_changes_then_differ_everywhere() -> None:
    rows = first_rows("t", table("t"))
    for other in (first_rows("t", table("t"), seed=1), first_rows("u", table("u"))):
        assert (rows != other).mean() > 0.99
        # Uniform on [-s, s): the correlation of independent ones is within 5 / sqrt(n) of 0.
        assert abs(np.corrcoef(rows.reshape(-1), other.reshape(-1))[0, 1]) < 5 / np.sqrt(rows.size)


def test_no_two_rows_of_a_table_then_begin_alike() -> None:
    rows = first_rows("t", table("t", num_rows=5000, dim=4))
    assert len(np.unique(rows, axis=0)) == 5000


def test_optimizer_state_and_padding_then_begin_as_zeros() -> None:
    tables = tables_of(table("t", num_rows=10, dim=5, optimizer="partial_rowwise_adam"), table("u", dim=130))
    state = tables.init()
    for leaf in jax.tree.leaves([(stores.element_state, stores.row_state) for stores in state.values()]):
        assert not np.asarray(leaf).any()
    store = np.asarray(state["float32.partial_rowwise_adam"].weights).reshape(-1, 8)
    assert store[:10, :5].all()
    assert not store[:10, 5:].any()
    assert not store[10:].any()


def test_a_table_with_a_file_then_begins_with_its_rows(tmp_path, monkeypatch) -> None:
    # Several blocks: 3 rows of 5 columns of 4 bytes each.
    monkeypatch.setattr("sharding.checkpoint.INITIAL_VALUES_BYTES", 60)
    values = np.random.default_rng(0).normal(size=(10, 5)).astype(np.float64)
    np.save(tmp_path / "rows.npy", values)
    specs = [table("t", num_rows=10, dim=5, initial_values=tmp_path / "rows.npy"), table("u")]
    tables = tables_of(*specs)
    state = load_initial_values(tables, tables.init())
    np.testing.assert_array_equal(tables.read_rows(state, "t", range(10)), values.astype(np.float32))
    np.testing.assert_array_equal(tables.read_rows(state, "u", range(1000)), first_rows("u", *specs))


def with_nan() -> np.ndarray:
    values = np.ones((10, 5), np.float32)
    values[7, 2] = np.nan
    return values


def with_large() -> np.ndarray:
    values = np.ones((10, 5), np.float32)
    values[4, 4] = 7e4
    return values


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (np.ones((9, 5)), "float32", r"initial values of table 't' have shape \(9, 5\); the table is \[10, 5\]"),
        (np.ones(50), "float32", r"have shape \(50,\); the table is \[10, 5\]"),
        (np.full((10, 5), "x"), "float32", "are <U1; give numbers, such as float32"),
        (np.ones((10, 5), complex), "float32", "are complex128; give numbers"),
        (with_nan(), "float32", "are not finite in row 7 as float32; give finite numbers"),
        (with_nan(), "bfloat16", "are not finite in row 7 as bfloat16"),
        (with_large(), "float16", "are not finite in row 4 as float16"),
        (np.array([{}]), "float32", r"cannot be read \(.*\); give a \.npy file"),
    ],
)
def test_a_file_of_initial_values_that_does_not_fit_then_refused(tmp_path, values, dtype, message) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, values, allow_pickle=True)
    tables = tables_of(table("t", num_rows=10, dim=5, dtype=dtype, initial_values=path))
    with pytest.raises(InputError, match=message) as error:
        load_initial_values(tables, tables.init())
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"not numpy"])
def test_a_file_of_initial_values_that_is_no_array_then_refused(tmp_path, content: bytes | None) -> None:
    path = tmp_path / "rows.npy"
    if content is not None:
        path.write_bytes(content)
    tables = tables_of(table("t", num_rows=10, dim=5, initial_values=path))
    with pytest.raises(InputError, match=r"cannot be read \(.*\); give a \.npy file"):
        load_initial_values(tables, tables.init())


def test_a_file_of_several_arrays_then_refused(tmp_path) -> None:
    path = tmp_path / "rows.npz"
    np.savez(path, a=np.ones((10, 5)))
    tables = tables_of(table("t", num_rows=10, dim=5, initial_values=path))
    with pytest.raises(InputError, match=r"are several arrays; give a \.npy file of one"):
        load_initial_values(tables, tables.init())


def test_rows_beyond_32_bits_then_made_from_both_words_of_their_number() -> None:
    big = table("t", num_rows=2**33 + 5, dim=8, initializer=Initializer(scale=1.0))
    plan = ShardingPlan(nodes=1, chips=8, placements=(row_wise(big, returns="rows"),))
    (store,) = make_layout([big], [FeatureSpec(name="f", table="t")], plan).stores
    device, num_lines = 3, 4
    first_line = store.lines_per_device - num_lines
    lines = jax.jit(initial_lines, static_argnums=(0, 4))(
        store, jnp.uint32(7), jnp.int32(device), jnp.int32(first_line), num_lines
    )
    local = np.arange(first_line * 16, store.lines_per_device * 16)
    row = local * 8 + device
    words = jnp.asarray(np.stack([row & 0xFFFFFFFF, row >> 32], axis=-1).astype(np.uint32))
    keys = rounding.row_key(jnp.uint32(7), jnp.uint32(0), jnp.uint32(big.stable_id), words)
    bits = rounding.column_bits(keys[:, None], jnp.arange(8, dtype=jnp.uint32)[None, :])
    expected = np.where((row < big.num_rows)[:, None], 2 * np.asarray(rounding.uniform(bits)) - 1, 0)
    assert (row >= 2**32).any()
    assert (row < big.num_rows).any()
    np.testing.assert_array_equal(np.asarray(lines).reshape(-1, 8), expected)
