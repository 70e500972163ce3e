"""Every implementation of the kernels, on the device that is here or in Pallas's interpret mode."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import ROW_OPTIMIZERS
from pallas_kernels.implementations import IMPLEMENTATIONS, implementation_of
from pallas_kernels.target import interpreting

# The devices that kernels are interpreted for, unless their platform is JAX's default: JAX_PLATFORMS=cuda,cpu.
DEVICE_KINDS = {"mosaic_gpu": "NVIDIA H200", "mosaic_tpu": "TPU v6 lite", "sparsecore": "TPU v6 lite"}
PLATFORMS = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu", "sparsecore": "tpu"}

# Interpreted, a kernel takes seconds a call: the files of their own have a quick selection.
each_implementation = pytest.mark.parametrize(
    "implementation",
    [pytest.param(name, marks=pytest.mark.slow) if name in DEVICE_KINDS else name for name in IMPLEMENTATIONS],
)


@contextlib.contextmanager
def device_of(implementation: str) -> Iterator[None]:
    """What a call of an implementation is traced in."""
    kind = DEVICE_KINDS.get(implementation)
    with contextlib.ExitStack() as stack:
        if kind is not None and PLATFORMS[implementation] != jax.default_backend():
            stack.enter_context(interpreting(kind))
            if implementation == "sparsecore":
                stack.enter_context(sparsecores_of(kind))
        yield


def sparsecores_of(kind: str) -> contextlib.AbstractContextManager[None]:
    """A mesh of one device of a kind: SparseCores ask what they are, even to be interpreted."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("chip",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def skip_unless_served(
    implementation: str,
    *,
    dtype=jnp.float32,
    width: int,
    rule: str | None = None,
    storage_rounding: str = "nearest",
    largest_store: int = 0,
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
                largest_store=largest_store,
            )
        except ValueError as error:
            pytest.skip(str(error))
