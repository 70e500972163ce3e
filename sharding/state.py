"""TableState: the arrays that hold all tables of a model."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, UInt16

from pallas_kernels import Stores
from sharding.initial import initial_store
from sharding.layout import LINE_BYTES, Layout
from sharding.mesh import BY_DEVICE, device_number

# All tables of a model: line stores by the names that the layout gives them, with the optimizer state beside them.
TableState = dict[str, Stores]


def abstract_state(layout: Layout, sharding: NamedSharding | None) -> TableState:
    """Shapes and dtypes of the arrays of a layout, without making them.

    Args:
        layout: The layout.
        sharding: Sharding to attach to each; None for none.
    """

    def lines(per_device: int, dtype: str) -> jax.ShapeDtypeStruct:
        shape = (per_device * layout.num_devices, LINE_BYTES // jnp.dtype(dtype).itemsize)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    return {
        store.name: Stores(
            weights=lines(store.lines_per_device, store.dtype),
            element_state=tuple(lines(store.state_lines(a.dtype), a.dtype) for a in store.element_state),
            row_state=tuple(lines(store.scalar_lines_per_device, a.dtype) for a in store.row_state),
        )
        for store in layout.stores
    }


def init_state(layout: Layout, mesh: Mesh, seed: int) -> TableState:
    """Makes the tables as their initialisers say, and optimizer state of zeros.

    Args:
        layout: The layout.
        mesh: Its devices.
        seed: Seed of the first values.
    """

    def init_local() -> tuple[dict[str, Float[Array, "lines line"]], dict[str, UInt16[Array, "lines line"]]]:
        device, bits = device_number(), jnp.uint32(seed & 0xFFFFFFFF)
        high = {store.name: initial_store(store, bits, device) for store in layout.stores}
        low = {s.name: initial_store(s, bits, device, low_halves=True) for s in layout.stores if s.split}
        return high, low

    weights, low = jax.shard_map(init_local, mesh=mesh, in_specs=(), out_specs=BY_DEVICE, check_vma=False)()
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_state(layout, None))
    for name, of_store in state.items():
        elements = of_store.element_state
        if name in low:
            elements = (*elements[:-1], low[name])
        state[name] = dataclasses.replace(of_store, weights=weights[name], element_state=elements)
    return state
