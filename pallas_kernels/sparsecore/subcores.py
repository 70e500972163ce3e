"""The vector subcores of a device: their mesh, which of them one is, and how many lines fit into its memory."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu_sc as plsc
from jaxtyping import Array, Int32

from pallas_kernels.mosaic_tpu.lines import RowShape
from pallas_kernels.target import current_target


def subcore_mesh() -> plsc.VectorSubcoreMesh:
    """All vector subcores of a device; one where kernels are interpreted."""
    make_mesh = functools.partial(plsc.VectorSubcoreMesh, core_axis_name="core", subcore_axis_name="subcore")
    return make_mesh(num_cores=1, num_subcores=1) if current_target().interpreted else make_mesh()


def this_subcore(workers: int, subcores: int) -> Int32[Array, ""]:
    """The number of the subcore that the code is traced for.

    Args:
        workers: Vector subcores of the device.
        subcores: Vector subcores of a core.
    """
    if workers == 1:  # Of one subcore the interpreter knows no axes.
        return jnp.int32(0)
    return jax.lax.axis_index("core") * subcores + jax.lax.axis_index("subcore")


def rows_within(segments: int, shape: RowShape) -> int:
    """The largest power of two of rows that touch at most so many segments."""
    return 2 ** ((segments // shape.segments_per_row).bit_length() - 1)
