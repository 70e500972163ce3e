"""Searches in long arrays."""

import jax
import numpy as np
import pytest

from pallas_kernels.scans import counts_below


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("most", [1, 9, 10_000])
def test_counts_below_then_those_of_numpys_search(size: int, most: int) -> None:
    ascending = np.sort(np.random.default_rng(size).integers(0, most, size)).astype(np.int32)
    limits = np.array([0, 1, 2, 8, most, most + 1, 500, 5], np.int32)
    found = jax.jit(counts_below)(ascending, limits)
    np.testing.assert_array_equal(found, np.searchsorted(ascending, limits, side="left"))
