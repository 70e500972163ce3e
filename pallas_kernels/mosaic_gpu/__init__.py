"""Both operations for Hopper GPUs and later, in Pallas Mosaic GPU."""

import re

import jax.numpy as jnp

from pallas_kernels.mosaic_gpu.lookup import pooled_lookup
from pallas_kernels.mosaic_gpu.rows import MAX_COLUMNS
from pallas_kernels.mosaic_gpu.update import row_statistics, sparse_update
from pallas_kernels.rounding import Rounding
from pallas_kernels.row_optimizers import RowOptimizer

__all__ = ["pooled_lookup", "row_statistics", "sparse_update", "unable"]

# Compute capability 9.0 and later, as JAX names them: H100, H200, H20, GH200; B200, GB200 and so on.
_HOPPER_AND_LATER = re.compile(r"\bG?[HB]\d{2,3}\b")


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
    if not _HOPPER_AND_LATER.search(device_kind):
        return f"Mosaic GPU kernels need an H100 or later, and this is {device_kind}"
    if optimizer is None:
        return None
    if width > MAX_COLUMNS:
        return f"a row of {width} columns does not fit into the registers of one warpgroup with its state"
    return None
