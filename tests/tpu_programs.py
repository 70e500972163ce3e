"""Programs of the kernels for one TPU that is not here, and the shapes that they are given."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from update_cases import slots_of

from pallas_kernels import ROW_OPTIMIZERS, Ids, Slots, Stores

# One chip of each generation: a slice that holds it, and the lines of its table.
SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
NUM_LINES = 3 * 2**18
TABLE_BYTES = NUM_LINES * 512
# What a program needs beside tables: for these batches less than this, for a copy of a table far more.
SMALL = TABLE_BYTES // 8
NUM_IDS, NUM_BAGS = 4096, 512


def compiled_for(kind: str, function: Callable, shapes: tuple, donated: tuple[int, ...] = ()) -> Any:
    """The bytes of a program for one chip that is not here."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[kind]).devices
    mesh = Mesh(np.array(devices[:1]), ("chip",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped, donate_argnums=donated).lower(*shapes).compile().memory_analysis()


def shape_of(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled_lookup(kernels: ModuleType, kind: str, width: int, dtype) -> Any:
    """The bytes of a lookup with weights."""

    def look_up(store, rows, offsets, weights):
        return kernels.pooled_lookup(store, rows, offsets, weights, width=width, longest_bag=None)

    store = shape_of(NUM_LINES, 512 // jnp.dtype(dtype).itemsize, dtype=dtype)
    ids, offsets = shape_of(NUM_IDS, dtype=jnp.int32), shape_of(NUM_BAGS + 1, dtype=jnp.int32)
    return compiled_for(kind, look_up, (store, ids, offsets, shape_of(NUM_IDS)))


def update_shapes(
    rule: str, width: int, dtype=jnp.float32, *, split: bool = False, weighted: bool = True
) -> tuple[Stores, Ids, jax.ShapeDtypeStruct, Slots]:
    """Stores, ids, gradients and slots of an update; of split weights, both halves."""
    optimizer = ROW_OPTIMIZERS[rule]
    store = shape_of(NUM_LINES, 512 // jnp.dtype(dtype).itemsize, dtype=dtype)
    num_lines = store.size // 128
    stores = Stores(
        weights=store,
        element_state=(shape_of(num_lines, 128),) * len(optimizer.element_state)
        + (shape_of(*store.shape, dtype=jnp.uint16),) * split,
        # No multiple of the 8 lines that a TPU keeps together.
        row_state=(shape_of(num_lines // width + 1, 128),) * len(optimizer.row_state),
    )
    ids = Ids(
        rows=shape_of(NUM_IDS, dtype=jnp.int32),
        slots=shape_of(NUM_IDS, dtype=jnp.int32),
        logical_rows=shape_of(NUM_IDS, 2, dtype=jnp.uint32),
        offsets=shape_of(NUM_BAGS + 1, dtype=jnp.int32),
        weights=shape_of(NUM_IDS) if weighted else None,
    )
    return stores, ids, shape_of(NUM_BAGS, width), jax.eval_shape(lambda: slots_of(width))


def compiled_update(
    kernels: ModuleType,
    kind: str,
    rule: str,
    width: int,
    *,
    dtype=jnp.float32,
    storage_rounding: str = "nearest",
    weighted: bool,
) -> Any:
    """The bytes of an update whose stores are donated."""

    def update(stores: Stores, ids: Ids, gradients, slots: Slots):
        return kernels.sparse_update(
            stores,
            ids,
            gradients,
            slots=slots,
            step=jnp.int32(1),
            seed=jnp.uint32(0),
            optimizer=ROW_OPTIMIZERS[rule],
            width=width,
            storage_rounding=storage_rounding,
            statistics=None,
            enabled=jnp.bool(True),
        )

    shapes = update_shapes(rule, width, dtype, split=storage_rounding == "split", weighted=weighted)
    return compiled_for(kind, update, shapes, donated=(0,))
