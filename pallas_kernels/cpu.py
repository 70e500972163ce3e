"""Both operations, and what goes with them on hosts, in C++: handlers of XLA's foreign function interface.

Those of layers are called by `cpu_layers`.

The sources lie in `cpu/`; `cpu/build.py` compiles them when the package is built. Threads are those of XLA's own pool.
Each result is the same for every number of threads: a bag or a row is added up in the order that `xla` states, by one
thread or in the stated blocks, and each row has one writer.

Beside `xla` the same bits, with one exception: XLA's CPU compiler fuses a product with the sum it goes into, or not, as
each program's shapes suggest, so each step of a rule's arithmetic may differ in its last bit, and a difference of
nearly equal numbers by more. Here it is always fused where the rule has the form ``a * b + c``; `cpu/optimizers.h` says
where.

Letters: n ids, G bags, w width of a row, S slots.
"""

import ctypes
import functools
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32

from pallas_kernels import rounding
from pallas_kernels.ids import Ids
from pallas_kernels.row_optimizers import ROW_OPTIMIZERS, STATISTICS_BLOCK, RowOptimizer
from pallas_kernels.slots import Slots
from pallas_kernels.stores import Stores
from pallas_kernels.varying import vary_alike
from pallas_kernels.xla import RUN_BLOCK

_HANDLERS = (
    *("pooled_lookup", "sparse_update", "row_statistics", "offsets_of", "bags_of_ids"),
    *("dot_interaction", "dot_interaction_grad", "norm", "zeros"),
)
# Where matrices are multiplied.
_PRODUCT_HANDLERS = ("product", "parameter_gradients", "cross_sum", "cross_grads")
# How many numbers in bfloat16 have one of a dtype as their sum.
PARTS = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float32): 3}
_STORE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def _build_module() -> ModuleType:
    """`cpu/build.py`, by its path: the folder is no package, so that a build can run the file without JAX."""
    path = Path(__file__).resolve().parent / "cpu" / "build.py"
    spec = importlib.util.spec_from_file_location("pallas_kernels_cpu_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _missing() -> str | None:
    """Loads the library and names its handlers to XLA, once; else the reason why it cannot serve, logged once."""
    reason = _load()
    if reason is not None:
        logging.getLogger(__name__).warning("no cpu kernels, `xla` serves instead: %s", reason)
    return reason


def _load() -> str | None:
    build = _build_module()
    if not build.LIBRARY.exists():
        return "their library was not built: with a C++ compiler on the path, install the package again"
    try:
        library = ctypes.CDLL(str(build.LIBRARY))
    except OSError as error:
        return f"their library does not load: {error}"
    library.dlrm_sources.restype = ctypes.c_char_p
    if library.dlrm_sources().decode() != build.source_digest():
        return f"their library is older than its sources: run {build.__file__}, or install the package again"
    if not library.dlrm_runs_here():
        return "this processor lacks AVX2, FMA or BMI2"
    for name in (*_HANDLERS, *(_PRODUCT_HANDLERS if library.dlrm_parts_of_products() else ())):
        handler = jax.ffi.pycapsule(getattr(library, f"dlrm_{name}"))
        jax.ffi.register_ffi_target(f"dlrm_{name}", handler, platform="cpu")
    return None


def available() -> bool:
    """Whether the library was built, and loads on this machine."""
    return _missing() is None


@functools.cache
def multiplies(dtype: jnp.dtype) -> bool:
    """Whether `cpu_layers` multiplies matrices of a dtype here: bfloat16 where the processor does, float32 with AMX.

    A float32 is the sum of three numbers in bfloat16, and a product that of six of theirs, at the accuracy of float32.
    By AVX-512 those six would take three times as long as one in float32.
    """
    if dtype not in PARTS or not available():
        return False
    return PARTS[dtype] <= ctypes.CDLL(str(_build_module().LIBRARY)).dlrm_parts_of_products()


def unable(
    *,
    dtype: jnp.dtype,
    width: int,
    optimizer: RowOptimizer | None = None,
    storage_rounding: rounding.Rounding = "nearest",
    device_kind: str | None = None,
) -> str | None:
    """Why these kernels cannot serve a call, in a sentence; None if they can.

    Args:
        dtype: Of the line store.
        width: Stored width of a row.
        optimizer: The rule of an update; None for a lookup.
        storage_rounding: How an update is rounded.
        device_kind: Not asked: one library serves every host of an architecture.
    """
    del device_kind
    if (missing := _missing()) is not None:
        return missing
    if dtype not in _STORE_DTYPES:
        return f"a store of {dtype} is not supported"
    if width not in (8, 16, 32, 64) and (width < 128 or width % 128):
        return f"a width of {width} is not 8, 16, 32, 64 or a multiple of 128"
    if optimizer is not None and ROW_OPTIMIZERS.get(optimizer.name) is not optimizer:
        return f"the rule {optimizer.name!r} is not one of {tuple(ROW_OPTIMIZERS)}"
    if storage_rounding == "split" and dtype != jnp.bfloat16:
        return f"split storage keeps the high halves of float32 as bfloat16, not {dtype}"
    return None


def call(name: str, results, **settings: Any) -> Callable[..., Any]:
    """`jax.ffi.ffi_call` of one of our handlers, which XLA must know by then."""
    if (missing := _missing()) is not None:
        raise RuntimeError(f"no cpu kernels: {missing}")
    handler = jax.ffi.ffi_call(f"dlrm_{name}", results, **settings)
    return lambda *arrays, **attributes: vary_alike(handler(*arrays, **attributes), arrays)


def or_empty(array: Array | None, shape: tuple[int, ...]) -> Array:
    """How the handlers are told that an array is absent: one without elements, of this shape."""
    return jnp.zeros(shape, jnp.float32) if array is None else array


def pooled_lookup(
    store: Float[Array, "lines line"],
    rows: Int32[Array, " n"],
    offsets: Int32[Array, " G+1"],
    weights: Float[Array, " n"] | None,
    *,
    width: int,
    longest_bag: int | None,
) -> Float[Array, "G w"]:
    """See `pallas_kernels.pooled_lookup`. The longest bag does not matter here."""
    del longest_bag
    result = jax.ShapeDtypeStruct((offsets.shape[0] - 1, width), jnp.float32)
    return call("pooled_lookup", result)(store, rows, offsets, or_empty(weights, (0,)))


def _batch(
    ids: Ids, gradients: Float[Array, "G w"], slots: Slots, step: Int32[Array, ""], seed: UInt32[Array, ""]
) -> tuple[Array, ...]:
    """The arguments that both passes of an update share, per-slot arrays packed as the handlers read them."""
    # Computed here, once for each slot, by the same power function as in `xla`.
    corrections = (1.0 - jnp.power(beta, step.astype(jnp.float32)) for beta in (slots.beta1, slots.beta2))
    scalars = (slots.learning_rate, slots.weight_decay, slots.eps, slots.beta1, slots.beta2, slots.dim)
    keys = rounding.fold(rounding.fold(rounding.mix(seed), step.astype(jnp.uint32)), slots.table)
    return (
        ids.rows,
        ids.slots,
        ids.offsets,
        gradients,
        or_empty(ids.weights, (0,)),
        jnp.stack((slots.first_row, slots.first_scalar), axis=1),
        jnp.stack((keys, slots.first_column), axis=1),
        jnp.stack((*scalars, *corrections), axis=1),
    )


def _scratch(num_ids: int, width: int) -> jax.ShapeDtypeStruct:
    """Memory that an update needs: bounded by the ids, whatever their rows. See `sort_ids` and `for_each_row`."""
    sorting = 5 * num_ids + 512 * min(64, num_ids // 1024 + 1) + 1024
    # Blocks of long runs, of which each may end with one that is not full.
    block_sums = (num_ids // RUN_BLOCK + num_ids // (16 * RUN_BLOCK)) * width
    return jax.ShapeDtypeStruct((sorting + block_sums + 1024,), jnp.uint32)


def row_statistics(
    stores: Stores,
    ids: Ids,
    gradients: Float[Array, "G w"],
    *,
    slots: Slots,
    step: Int32[Array, ""],
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: rounding.Rounding,
) -> Float[Array, "n blocks k"]:
    """See `pallas_kernels.row_statistics`. Ids that name no row of the store get zeros."""
    num_ids = ids.rows.shape[0]
    shape = (num_ids, max(1, width // STATISTICS_BLOCK), len(optimizer.statistics))
    batch = _batch(ids, gradients, slots, step, jnp.uint32(0))
    results = (_scratch(num_ids, width), jax.ShapeDtypeStruct(shape, jnp.float32))
    _, statistics = call("row_statistics", results)(
        *batch, *jax.tree.leaves(stores), rule=optimizer.name, rounding=storage_rounding
    )
    return statistics


def sparse_update(
    stores: Stores,
    ids: Ids,
    gradients: Float[Array, "G w"],
    *,
    slots: Slots,
    step: Int32[Array, ""],
    seed: UInt32[Array, ""],
    optimizer: RowOptimizer,
    width: int,
    storage_rounding: rounding.Rounding,
    statistics: Float[Array, "n k"] | None,
    enabled: Bool[Array, ""],
) -> Stores:
    """See `pallas_kernels.sparse_update`."""
    num_ids = ids.rows.shape[0]
    logical_rows = jnp.zeros((0, 1), jnp.uint32) if ids.logical_rows is None else ids.logical_rows
    given = logical_rows, or_empty(statistics, (0, 0)), enabled
    arguments = (*_batch(ids, gradients, slots, step, seed), *given)
    arrays, tree = jax.tree.flatten(stores)
    _, *updated = call(
        "sparse_update",
        (_scratch(num_ids, width), *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)),
        input_output_aliases={len(arguments) + i: 1 + i for i in range(len(arrays))},
    )(*arguments, *arrays, rule=optimizer.name, rounding=storage_rounding)
    return jax.tree.unflatten(tree, updated)


def offsets_of(lengths: Int32[Array, " G"]) -> Int32[Array, " G+1"]:
    """See `pallas_kernels.bags.offsets_of`."""
    return call("offsets_of", jax.ShapeDtypeStruct((lengths.shape[0] + 1,), jnp.int32))(lengths)


def bags_of_ids(offsets: Int32[Array, " G+1"], *, num_ids: int) -> Int32[Array, " n"]:
    """See `pallas_kernels.bags.bags_of_ids`."""
    return call("bags_of_ids", jax.ShapeDtypeStruct((num_ids,), jnp.int32))(offsets)


def zeros(*, shape: tuple[int, ...], dtype: jnp.dtype) -> Shaped[Array, "..."]:
    """See `pallas_kernels.zeros.zeros`."""
    # Two of one shape are two arrays: as results of equal calls XLA would make one, and copy it.
    return call("zeros", jax.ShapeDtypeStruct(shape, dtype), has_side_effect=True)()
