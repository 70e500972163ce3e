"""Pallas on the TensorCore of TPUs, v4 and later: lines copied by their ids between HBM and VMEM."""

import jax.numpy as jnp

from pallas_kernels.mosaic_tpu.lookup import pooled_lookup
from pallas_kernels.mosaic_tpu.update import row_statistics, sparse_update
from pallas_kernels.rounding import Rounding
from pallas_kernels.row_optimizers import RowOptimizer

__all__ = ["pooled_lookup", "row_statistics", "sparse_update", "unable"]

# What VMEM holds: several buffers of as many rows as are in flight.
_WIDEST_ROW = 1024


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
    if device_kind.startswith(("TPU v2", "TPU v3")):
        return f"{device_kind} is too old: TPU v4 and later are served"
    if dtype == jnp.float16:
        return "Mosaic for TPUs takes no arrays of float16; bfloat16 is served"
    if width > _WIDEST_ROW:
        return f"rows of {width} elements are too wide: at most {_WIDEST_ROW}"
    if optimizer is not None and storage_rounding == "split":
        return "split weights are not served"
    return None
