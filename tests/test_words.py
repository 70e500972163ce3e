"""Whole numbers of 64 bits as two words of 32."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding import words
from sharding.jagged import words_of_ids

NUMBERS = st.lists(st.integers(0, 2**63 - 1), min_size=4, max_size=4)
DIVISORS = st.lists(st.integers(1, words.MAX_DIVISOR), min_size=4, max_size=4)


def as_words(numbers: list[int]) -> jnp.ndarray:
    return jnp.asarray(words_of_ids(np.array(numbers, np.int64)))


def as_numbers(pairs: jnp.ndarray) -> list[int]:
    return [int(low) + (int(high) << 32) for low, high in np.asarray(pairs)]


@settings(max_examples=30, deadline=None)
@given(numbers=NUMBERS)
def test_ids_made_into_words_then_constants_agree_and_nothing_is_lost(numbers: list[int]) -> None:
    assert as_numbers(as_words(numbers)) == numbers
    np.testing.assert_array_equal(words.constant_words(np.array(numbers, np.int64)), as_words(numbers))


@settings(max_examples=30, deadline=None)
@given(numbers=NUMBERS, divisors=DIVISORS)
def test_division_then_that_of_python_and_multiplying_undoes_it(numbers: list[int], divisors: list[int]) -> None:
    given_divisors = jnp.array(np.array(divisors, np.uint32))
    quotient, remainder = words.divide(as_words(numbers), given_divisors)
    assert as_numbers(quotient) == [n // d for n, d in zip(numbers, divisors, strict=True)]
    assert np.asarray(remainder).tolist() == [n % d for n, d in zip(numbers, divisors, strict=True)]
    small = [n % 2**31 for n in numbers]
    product = words.multiply_add(jnp.array(np.array(small, np.uint32)), given_divisors, remainder)
    assert as_numbers(product) == [n * d + int(r) for n, d, r in zip(small, divisors, remainder, strict=True)]


@settings(max_examples=30, deadline=None)
@given(left=NUMBERS, right=NUMBERS)
def test_comparison_then_that_of_python(left: list[int], right: list[int]) -> None:
    right[0] = left[0]
    expected = [a < b for a, b in zip(left, right, strict=True)]
    assert np.asarray(words.less(as_words(left), as_words(right))).tolist() == expected
