"""The norm of all numbers of a tree, by the kernel of hosts and by the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.norm import _reference, norm

# Pieces are of 32,768 numbers, of which 32 are added up at a time.
SHAPES = [(0,), (1,), (31,), (3, 33), (32_768,), (5, 32_769)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_then_that_of_float64(dtype: jnp.dtype) -> None:
    random = np.random.default_rng(0)
    tree = {str(shape): jnp.asarray(random.normal(size=shape), dtype) for shape in SHAPES}
    expected = np.sqrt(sum((np.asarray(array, np.float64) ** 2).sum() for array in tree.values()))
    for implementation in (norm, lambda tree: _reference(jax.tree.leaves(tree))):
        np.testing.assert_allclose(jax.jit(implementation)(tree), expected, rtol=1e-6)


def test_norm_of_both_dtypes_when_sums_are_exact_then_equals_the_reference() -> None:
    tree = [jnp.full((70_000,), 2.0, jnp.bfloat16), jnp.full((3,), 4.0, jnp.float32)]
    assert norm(tree) == _reference(tree) == np.sqrt(np.float32(280_048))


def test_norm_of_no_arrays_then_zero() -> None:
    assert norm({}) == 0.0


@pytest.mark.parametrize(("value", "expected"), [(np.nan, np.nan), (np.inf, np.inf), (3e38, np.inf)])
@pytest.mark.parametrize("at", [0, 40_000, 69_999])
def test_norm_when_a_number_is_not_finite_or_huge_then_neither_is_the_norm(
    value: float, expected: float, at: int
) -> None:
    array = jnp.ones((70_000,)).at[at].set(value)
    np.testing.assert_equal(np.asarray(norm([array])), np.float32(expected))


def test_norm_of_another_dtype_then_an_error_says_which_there_are() -> None:
    with pytest.raises(ValueError, match="given int32; give arrays in float32 or bfloat16"):
        norm([jnp.ones(3), jnp.ones(3, jnp.int32)])


def test_norm_under_vmap_then_one_of_each() -> None:
    np.testing.assert_array_equal(jax.vmap(norm)(jnp.asarray([[3.0, 4.0], [6.0, 8.0]])), [5.0, 10.0])
