"""TableState: the arrays that hold all tables of a model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, UInt16

from sharding.initial import initial_store
from sharding.layout import LINE_BYTES, Layout
from sharding.mesh import BY_DEVICE, device_number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TableState:
    """All tables of a model: line stores by name, and the optimizer state beside them.

    Attributes:
        weights: Lines of weights.
        element_state: Lines of state of one number an element, in the order of the rule's `element_state`.
        row_state: Lines of state of one number a row, in the order of the rule's `row_state`.
    """

    weights: dict[str, Float[Any, "lines line"]]
    element_state: dict[str, tuple[Float[Any, "state_lines line"], ...]]
    row_state: dict[str, tuple[Float[Any, "scalar_lines line"], ...]]


def abstract_state(layout: Layout, sharding: NamedSharding | None) -> TableState:
    """Shapes and dtypes of the arrays of a layout, without making them.

    Args:
        layout: The layout.
        sharding: Sharding to attach to each; None for none.
    """

    def lines(per_device: int, dtype: str) -> jax.ShapeDtypeStruct:
        shape = (per_device * layout.num_devices, LINE_BYTES // jnp.dtype(dtype).itemsize)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    stores = layout.stores
    return TableState(
        weights={s.name: lines(s.lines_per_device, s.dtype) for s in stores},
        element_state={s.name: tuple(lines(s.state_lines(a.dtype), a.dtype) for a in s.element_state) for s in stores},
        row_state={s.name: tuple(lines(s.scalar_lines_per_device, a.dtype) for a in s.row_state) for s in stores},
    )


def init_state(layout: Layout, mesh: Mesh, seed: int) -> TableState:
    """Makes the tables as their initialisers say, and optimizer state of zeros.

    Args:
        layout: The layout.
        mesh: Its devices.
        seed: Seed of the first values.
    """
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_state(layout, None))

    def init_local() -> tuple[dict[str, Float[Array, "lines line"]], dict[str, UInt16[Array, "lines line"]]]:
        device, bits = device_number(), jnp.uint32(seed & 0xFFFFFFFF)
        high = {store.name: initial_store(store, bits, device) for store in layout.stores}
        low = {s.name: initial_store(s, bits, device, low_halves=True) for s in layout.stores if s.split}
        return high, low

    weights, low = jax.shard_map(init_local, mesh=mesh, in_specs=(), out_specs=BY_DEVICE, check_vma=False)()
    state = {name: (*zeros.element_state[name][:-1], of_store) for name, of_store in low.items()}
    return dataclasses.replace(zeros, weights=weights, element_state={**zeros.element_state, **state})
