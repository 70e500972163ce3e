"""TableState: the arrays that hold all tables of a model."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Shaped

from pallas_kernels import Stores
from pallas_kernels.zeros import zeros
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
    abstract = abstract_state(layout, None)

    def zeros_of_device(array: jax.ShapeDtypeStruct) -> Shaped[Array, "lines line"]:
        return zeros((array.shape[0] // layout.num_devices, *array.shape[1:]), array.dtype)

    def init_local() -> TableState:
        device, bits = device_number(), jnp.uint32(seed & 0xFFFFFFFF)
        state = {}
        for store in layout.stores:
            arrays = abstract[store.name]
            low = (initial_store(store, bits, device, low_halves=True),) if store.split else ()
            rules = arrays.element_state[: len(arrays.element_state) - len(low)]
            state[store.name] = Stores(
                weights=initial_store(store, bits, device),
                element_state=(*map(zeros_of_device, rules), *low),
                row_state=tuple(map(zeros_of_device, arrays.row_state)),
            )
        return state

    return jax.shard_map(init_local, mesh=mesh, in_specs=(), out_specs=BY_DEVICE, check_vma=False)()
