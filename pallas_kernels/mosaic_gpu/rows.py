"""How Mosaic GPU kernels hold rows in registers, and how they are launched.

A *program* is a warpgroup: 128 lanes in four warps. Registers hold multiples of 128 numbers, so a narrow row is held
several times over, by several warps or by several parts of a warp: its copies are loaded by one instruction from the
same addresses, so that memory is asked for the row alone and not for the line it lies on.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.target import current_target

LANES, _LANES_OF_WARP, _WARPS = 128, 32, 4
# Programs of a launch, where there is work for as many: about what 132 processors of an H100 hold at once.
FULL_GRID = 2048
_LONGEST_OTHER_AXIS = 65_535
# Columns of a row that one program holds: four numbers a lane.
MAX_COLUMNS = 512


def columns_of_program(width: int) -> int:
    """Columns that one program holds of a row: all, or the largest divisor that is a multiple of 128 up to 512."""
    if width <= MAX_COLUMNS:
        return width
    return max(columns for columns in range(LANES, MAX_COLUMNS + 1, LANES) if width % columns == 0)


def row_layout(columns: int) -> Any:
    """How the registers of a warpgroup hold a row: a `plgpu.Layout` with its parameters."""
    if columns % LANES == 0:
        return plgpu.Layout.WG_STRIDED((columns,), vec_size=1)
    if columns > _LANES_OF_WARP:  # Tiled dimensions: warps that differ, lanes, 1 number a lane.
        warps = columns // _LANES_OF_WARP
        return plgpu.Layout.TILED(
            plgpu.Tiling(((columns,), (_LANES_OF_WARP,), (1,))),
            warp_dims=(plgpu.Replicated(_WARPS // warps), -3),
            lane_dims=(-2,),
            vector_dim=-1,
        )
    copies = _LANES_OF_WARP // columns
    return plgpu.Layout.TILED(
        plgpu.Tiling(((columns,), (1,))),
        warp_dims=(plgpu.Replicated(_WARPS),),
        lane_dims=(-2,) if copies == 1 else (plgpu.Replicated(copies), -2),
        vector_dim=-1,
    )


def opaque_zero(after: Array) -> Int32[Array, " 1"]:
    """A zero that no compiler knows to be one; see `unfused`."""
    return lax.optimization_barrier((jnp.zeros(1, jnp.int32), after))[0]


def unfused(product: Float[Array, "..."], zero: Int32[Array, ""]) -> Float[Array, "..."]:
    """A product that is rounded before it is added: ptxas fuses what it sees to be a product and a sum.

    Args:
        product: The product.
        zero: 0, loaded from memory.

    Returns:
        The same number, by a detour over integers.
    """
    return lax.bitcast_convert_type(lax.bitcast_convert_type(product, jnp.int32) ^ zero, jnp.float32)


def store(reference: Any, values: Array) -> None:
    """In a kernel: writes a vector."""
    if hasattr(plgpu, "store"):
        plgpu.store(reference, values, optimized=False)
    else:  # Before jax 0.12.
        reference[...] = values


def wait_for_warps() -> None:
    """In a kernel: the warps of a program wait for each other, and see what the others wrote.

    Needed before a warp reads what another wrote, and before it overwrites what another may not have read yet. The
    interpreter, which has no warps, does not see where one is missing.
    """
    if not current_target().interpreted:
        plgpu.inline_mgpu()(lambda context: mosaic.warpgroup_barrier())()


def sum_blocks_of_columns(scratch: Any, other_scratch: Any, size: int, block: int) -> Any:
    """In a kernel: sums blocks of neighbouring numbers and leaves each sum where the block began.

    As the balanced tree of `row_optimizers.sum_columns`, two levels at a time. What is added is read from memory,
    hence never fused with the product that it was.

    Args:
        scratch: Reference to shared memory that holds the numbers, with a block of room beyond them.
        other_scratch: Another like it.
        size: How many numbers, a multiple of 128.
        block: Length of a block, a power of two.

    Returns:
        The one of the two that holds the sums.
    """
    source, target = scratch, other_scratch
    while block > 1:
        shifts = (0, 1) if block == 2 else (0, block // 2, block // 4, block // 4 + block // 2)
        wait_for_warps()
        parts = [
            plgpu.load(source.at[pl.ds(shift, size)], layout=row_layout(size), optimized=False) for shift in shifts
        ]
        pairs = [low + high for low, high in zip(parts[::2], parts[1::2], strict=True)]
        store(target.at[pl.ds(0, size)], functools.reduce(operator.add, pairs))
        source, target, block = target, source, block // len(shifts)
    wait_for_warps()
    return source


def run_kernel(
    body: Callable[..., None],
    operands: Any,
    out_type: Any,
    *,
    grid: Mapping[str, int],
    name: str,
    scratch_types: Sequence[Any] = (),
) -> Any:
    """Launches a kernel, or interprets it and looks for races where `target.interpreting` says so.

    Args:
        body: The kernel, called with a tree of references to the operands, then references to outputs and scratch.
        operands: A tree of arrays, or of references to arrays that the kernel changes in place.
        out_type: Types of the outputs.
        grid: Programs along each named axis. The last may be long; all others together are CUDA's y and z, of at most
            65,535 each.
        name: Name of the kernel.
        scratch_types: Types of the scratch in shared memory.

    Returns:
        The outputs.
    """
    # Where CUDA refuses a launch, the process aborts.
    assert max(tuple(grid.values())[:-1], default=1) <= _LONGEST_OTHER_AXIS, grid
    leaves, tree = jax.tree.flatten(operands)

    def kernel(*refs: Any) -> None:
        body(jax.tree.unflatten(tree, refs[: len(leaves)]), *refs[len(leaves) :])

    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(
            # Warps wait for each other where `wait_for_warps` says, and not around each store.
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=True,
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if current_target().interpreted else None,
        kernel_name=name,
    )(*leaves)
