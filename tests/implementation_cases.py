"""Every implementation of the kernels, on the device that is here or in Pallas's interpret mode."""

import contextlib

import jax.numpy as jnp
import pytest

from pallas_kernels import ROW_OPTIMIZERS
from pallas_kernels.implementations import IMPLEMENTATIONS, implementation_of
from pallas_kernels.target import interpreting

# The devices that kernels are interpreted for.
DEVICE_KINDS = {"mosaic_gpu": "NVIDIA H200", "mosaic_tpu": "TPU v6 lite"}

# Interpreted, a kernel takes seconds a call: the files of their own have a quick selection.
each_implementation = pytest.mark.parametrize(
    "implementation",
    # The SparseCore's need a mesh of their own, even to be interpreted: tests/test_sparsecore.py.
    [
        pytest.param(name, marks=pytest.mark.slow) if name in DEVICE_KINDS else name
        for name in IMPLEMENTATIONS
        if name != "sparsecore"
    ],
)


def device_of(implementation: str) -> contextlib.AbstractContextManager[None]:
    """What a call of an implementation is traced in."""
    kind = DEVICE_KINDS.get(implementation)
    return contextlib.nullcontext() if kind is None else interpreting(kind)


def skip_unless_served(
    implementation: str, *, dtype=jnp.float32, width: int, rule: str | None = None, storage_rounding: str = "nearest"
) -> None:
    """Skips, with the implementation's own words, a case that it leaves to another."""
    with device_of(implementation):
        try:
            implementation_of(
                implementation,
                dtype=jnp.dtype(dtype),
                width=width,
                optimizer=None if rule is None else ROW_OPTIMIZERS[rule],
                storage_rounding=storage_rounding,
            )
        except ValueError as error:
            pytest.skip(str(error))
