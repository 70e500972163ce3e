"""The counter hash behaves like independent fair bits, and stochastic rounding is unbiased."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rounding

# Statistics are of fixed seeds, so a test passes always or never; the limits are 5 standard deviations.
SIGMAS = 5.0
F16_MAX = 65504.0


def row_keys(rows: np.ndarray, *, seed: int = 7, step: int = 3, table: int = 11) -> np.ndarray:
    words = jnp.asarray(rows.astype(np.uint32))[:, None]
    return np.asarray(
        rounding.row_key(jnp.uint32(seed), jnp.uint32(step), jnp.full(len(rows), table, jnp.uint32), words)
    )


def bits_of(num_rows: int, num_columns: int, **words: int) -> np.ndarray:
    keys = jnp.asarray(row_keys(np.arange(num_rows), **words))
    return np.asarray(rounding.column_bits(keys[:, None], jnp.arange(num_columns, dtype=jnp.uint32)[None]))


def ones_by_bit(words: np.ndarray) -> np.ndarray:
    return ((words.reshape(-1, 1) >> np.arange(32, dtype=np.uint32)) & 1).mean(axis=0)


@pytest.mark.parametrize("flipped_bit", range(0, 32, 5))
def test_mix_when_one_input_bit_flips_then_every_output_bit_flips_half_the_time(flipped_bit: int) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 40_000, np.uint32)
    flips = np.asarray(
        rounding.mix(jnp.asarray(words)) ^ rounding.mix(jnp.asarray(words ^ np.uint32(1 << flipped_bit)))
    )
    # lowbias32 is not perfect: its own bias is up to 0.6%.
    assert np.abs(ones_by_bit(flips) - 0.5).max() < 0.006 + SIGMAS * 0.5 / np.sqrt(len(words))


def test_mix_on_a_range_then_no_two_words_collide() -> None:
    words = jnp.arange(2**18, dtype=jnp.uint32)
    assert len(np.unique(np.asarray(rounding.mix(words)))) == 2**18


def test_keys_of_one_tables_rows_then_all_differ() -> None:
    assert len(np.unique(row_keys(np.arange(2**18)))) == 2**18


def test_bits_of_consecutive_rows_and_columns_then_uniform() -> None:
    bits = bits_of(4096, 16)
    assert np.abs(ones_by_bit(bits) - 0.5).max() < SIGMAS * 0.5 / np.sqrt(bits.size)
    counts = np.bincount(bits.reshape(-1) >> 24, minlength=256)
    expected = bits.size / 256
    # Chi-squared of 255 degrees of freedom: mean 255, variance 510.
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < SIGMAS * np.sqrt(510)


@pytest.mark.parametrize("changed", [{"seed": 8}, {"step": 4}, {"table": 12}])
def test_bits_when_one_word_of_the_counter_changes_then_independent(changed: dict[str, int]) -> None:
    one, other = bits_of(4096, 16), bits_of(4096, 16, **changed)
    assert np.abs(ones_by_bit(one ^ other) - 0.5).max() < SIGMAS * 0.5 / np.sqrt(one.size)


def test_bits_of_neighbouring_rows_and_columns_then_independent() -> None:
    bits = bits_of(4097, 17)
    for one, other in ((bits[1:, :16], bits[:-1, :16]), (bits[:4096, 1:], bits[:4096, :-1])):
        assert np.abs(ones_by_bit(one ^ other) - 0.5).max() < SIGMAS * 0.5 / np.sqrt(one.size)


def test_a_key_of_two_words_when_the_high_word_is_zero_then_equals_that_of_one() -> None:
    seed, step, table = jnp.uint32(1), jnp.uint32(2), jnp.full(3, 3, jnp.uint32)
    low = jnp.array([[0], [5], [2**32 - 1]], jnp.uint32)
    one = rounding.row_key(seed, step, table, low)
    with_zero = rounding.row_key(seed, step, table, jnp.pad(low, ((0, 0), (0, 1))))
    with_high = rounding.row_key(seed, step, table, jnp.pad(low, ((0, 0), (0, 1)), constant_values=1))
    np.testing.assert_array_equal(one, with_zero)
    assert (np.asarray(one) != np.asarray(with_high)).all()


def test_uniform_then_in_the_half_open_unit_interval() -> None:
    values = np.asarray(rounding.uniform(jnp.array([0, 255, 256, 2**31, 2**32 - 1], jnp.uint32)))
    np.testing.assert_array_equal(values, [0, 0, 2.0**-24, 0.5, 1 - 2.0**-24])


def rounded(values: np.ndarray, dtype: jnp.dtype, bits: np.ndarray) -> np.ndarray:
    x = jnp.asarray(values, jnp.float32)
    return np.asarray(rounding.stochastic_round(x, jnp.asarray(bits, jnp.uint32), dtype)).astype(np.float64)


def neighbours(values: np.ndarray, dtype: jnp.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The largest number of the dtype that is at most, and the smallest that is at least, each value."""
    nearest = np.asarray(jnp.asarray(values, jnp.float32).astype(dtype))
    infinity = np.array(np.inf, nearest.dtype)
    exact, wanted = nearest.astype(np.float64), values.astype(np.float64)
    below = np.where(exact > wanted, np.nextafter(nearest, -infinity).astype(np.float64), exact)
    above = np.where(exact < wanted, np.nextafter(nearest, infinity).astype(np.float64), exact)
    return below, above


VALUES = {
    "bfloat16": [1.0001, -1.0039, 3.14159, -1e-3, 1e30, 2.5e-30, 0.99999994, -255.7],
    # The last four are subnormal in float16, whose smallest normal number is 6.1e-5.
    "float16": [1.0001, -1.0003, 3.14159, -1e-3, 60001.0, -0.99999994, 6e-5, -3.1e-5, 2e-7, 1e-8],
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_then_gives_a_neighbour_and_the_value_on_average(dtype) -> None:
    values = np.array(VALUES[dtype.dtype.name], np.float32)
    draws = 100_000
    bits = np.random.default_rng(1).integers(0, 2**32, (draws, len(values)), np.uint32)
    results = rounded(np.broadcast_to(values, bits.shape), dtype, bits)
    below, above = neighbours(values, dtype)
    assert ((results == below) | (results == above)).all()
    assert (below < above).all()
    fraction = (values.astype(np.float64) - below) / (above - below)
    deviation = np.sqrt(fraction * (1 - fraction) / draws)
    # The bits' own grain: 2**-16 of bfloat16's spacing, 2**-24 of float16's.
    assert (np.abs((results == above).mean(axis=0) - fraction) <= SIGMAS * deviation + 2.0**-16).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [0, 1, 2**16 - 1, 2**31, 2**32 - 1])
def test_stochastic_rounding_of_what_the_dtype_holds_then_unchanged(dtype, bits: int) -> None:
    words = np.arange(2**16, dtype=np.uint16)
    exact = np.asarray(jnp.asarray(words.view(np.float16) if dtype == jnp.float16 else words.view(jnp.bfloat16)))
    values = exact.astype(np.float32)
    # A bfloat16 is subnormal where float32 is, and XLA may take such a float32 for 0.
    values = values[np.isfinite(values) & ((values == 0) | (np.abs(values) >= np.finfo(np.float32).tiny))]
    np.testing.assert_array_equal(rounded(values, dtype, np.full(values.shape, bits)), values)


def test_stochastic_rounding_to_float16_when_too_large_then_saturates() -> None:
    values = np.array([65504.0, 65519.0, 65520.0, 1e6, -1e30, np.finfo(np.float32).max], np.float32)
    for bits in (0, 2**32 - 1):
        np.testing.assert_array_equal(
            rounded(values, jnp.float16, np.full(values.shape, bits)), np.sign(values) * F16_MAX
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_stochastic_rounding_of_infinities_and_nan_then_they_stay(dtype, bits: int) -> None:
    # The first and the last NaN of each sign: those lose all that makes them one, or carry into the sign.
    words = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32)
    values = np.concatenate([np.array([np.inf, -np.inf, np.nan, -np.nan], np.float32), words.view(np.float32)])
    np.testing.assert_array_equal(rounded(values, dtype, np.full(8, bits)), values)


def test_stochastic_rounding_to_float32_then_refused() -> None:
    with pytest.raises(ValueError, match="stochastic rounding to float32 is not defined; use bfloat16 or float16"):
        rounding.stochastic_round(jnp.ones((1, 1)), jnp.zeros((1, 1), jnp.uint32), jnp.dtype(jnp.float32))
