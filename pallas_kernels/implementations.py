"""Implementations: which there are, and which one serves a call."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import cpu
from pallas_kernels.rounding import Rounding
from pallas_kernels.row_optimizers import RowOptimizer
from pallas_kernels.target import Target, current_target

Implementation = Literal["cpu", "mosaic_gpu", "mosaic_tpu", "sparsecore", "xla"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
# The first that can serve is taken; xla always can.
_OF_PLATFORM: dict[str, tuple[Implementation, ...]] = {
    "cpu": ("cpu", "xla"),
    "gpu": ("mosaic_gpu", "xla"),
    "tpu": ("mosaic_tpu", "sparsecore", "xla"),
}
_OF_LINES: tuple[Implementation, ...] = ("mosaic_tpu", "sparsecore")
# "SparseCore only supports 16 GiB of HBM per tensor" (libtpu 0.0.50).
_MOST_BYTES: dict[Implementation, int] = {"sparsecore": 2**34}


def implementation_of(
    name: str | None,
    *,
    dtype: jnp.dtype,
    width: int,
    optimizer: RowOptimizer | None = None,
    storage_rounding: Rounding = "nearest",
    in_lines: bool = True,
    largest_store: int = 0,
    target: Target | None = None,
) -> ModuleType:
    """The module that serves a call, with `xla`'s signatures.

    Args:
        name: The caller's choice; None for the best that can serve on this platform.
        dtype: Storage dtype.
        width: Stored width of a row.
        optimizer: The rule of an update; None for a lookup.
        storage_rounding: How an update is rounded.
        in_lines: Whether all stores are of lines of 512 bytes, which kernels for TPUs ask for.
        largest_store: Bytes of the largest store, of weights or of state, on one device; 0 if it is not known yet.
        target: The device; the one that this is traced for unless given.

    Raises:
        ValueError: The implementation does not exist, or cannot serve this call here: the message says why.
    """
    if name not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation {name!r} does not exist; there are {', '.join(IMPLEMENTATIONS)}, or None")
    target = target or current_target()
    here = _OF_PLATFORM.get(target.platform, ("xla",))
    for candidate in here if name is None else (name,):
        if candidate not in here:
            raise ValueError(
                f"implementation {candidate!r} is none for {target.platform}; use {', '.join(here)}, or None"
            )
        module = importlib.import_module(f"pallas_kernels.{candidate}")
        reason = module.unable(
            device_kind=target.device_kind,
            dtype=dtype,
            width=width,
            optimizer=optimizer,
            storage_rounding=storage_rounding,
        )
        if candidate in _OF_LINES and not in_lines:
            reason = "the store has no lines of 512 bytes"
        if largest_store > _MOST_BYTES.get(candidate, largest_store):
            reason = f"a store of {largest_store} bytes is too large: at most {_MOST_BYTES[candidate]}"
        if reason is None:
            return module
        if name is not None:
            raise ValueError(f"implementation {name!r} cannot serve this call: {reason}; use another, or None")
    raise AssertionError("xla serves every call")


def on_hosts(native: Callable, reference: Callable, *arrays: Any) -> Any:
    """Calls one of the `cpu` kernels in programs for hosts, where those were built, else its reference in `jax.numpy`.

    For what only `cpu` has a kernel of, since XLA's programs for other platforms are as good.

    Args:
        native: The kernel.
        reference: The same function for any platform.
        *arrays: The arguments of both, trees of arrays.

    Returns:
        What the one called returns.
    """
    if not cpu.available():
        return reference(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=native, default=reference)


def on_hosts_that_multiply(native: Callable, reference: Callable, x: Any, *others: Any) -> Any:
    """As `on_hosts`, for what there is a kernel of only where `cpu.multiplies` the dtype.

    Args:
        native: The kernel.
        reference: The same function for any platform and dtype.
        x: The first argument of both, whose dtype counts.
        *others: Their other arguments, trees of arrays.

    Returns:
        What the one called returns.
    """
    if not cpu.multiplies(x.dtype):
        return reference(x, *others)
    return on_hosts(native, reference, x, *others)
