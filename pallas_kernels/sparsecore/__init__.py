"""Pallas on the SparseCores of TPUs v5p, v6e and 7x: lines gathered and scattered by indirect copies."""

import jax.numpy as jnp

from pallas_kernels.rounding import Rounding
from pallas_kernels.row_optimizers import RowOptimizer
from pallas_kernels.sparsecore.lookup import pooled_lookup
from pallas_kernels.sparsecore.update import row_statistics, sparse_update

__all__ = ["pooled_lookup", "row_statistics", "sparse_update", "unable"]

# Lanes of a vector subcore, by JAX's name of the device: a row has to fill a vector.
_LANES = {"TPU v5": 8, "TPU v5p": 8, "TPU v6 lite": 8, "TPU v6e": 8, "TPU7x": 16}
# What the memory of a vector subcore holds.
_WIDEST_ROW = 512


def unable(
    *,
    device_kind: str,
    dtype: jnp.dtype,
    width: int,
    optimizer: RowOptimizer | None = None,
    storage_rounding: Rounding = "nearest",
) -> str | None:
    """Why a call cannot be served, in one sentence; None if it can.

    Args:
        device_kind: JAX's name of the device.
        dtype: Storage dtype.
        width: Stored width of a row.
        optimizer: The rule of an update; None for a lookup.
        storage_rounding: How an update is rounded.
    """
    del optimizer, storage_rounding  # Every rule is served, and every rounding.
    if device_kind not in _LANES:
        return f"{device_kind} has no SparseCores that are served; {', '.join(_LANES)} have"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"stores of {jnp.dtype(dtype)} are not served; float32 and bfloat16 are"
    if not _LANES[device_kind] <= width <= _WIDEST_ROW:
        return f"rows of {width} elements are not served: {_LANES[device_kind]} to {_WIDEST_ROW} are"
    return None
