"""Layers and lookups in a user's own `jax.shard_map`, which checks over which axes of the mesh arrays vary."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.cross import cross_network
from pallas_kernels.cross_layer import CrossLayer
from pallas_kernels.interaction import dot_interaction
from pallas_kernels.linear import linear
from pallas_kernels.lookup import pooled_lookup
from sharding.mesh import BY_DEVICE, make_mesh

SAMPLES, COLUMNS, RANK = 16, 8, 4


def _linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return linear(x, kernel, bias, relu=True)


def _cross(x: jax.Array, *arrays: jax.Array) -> jax.Array:
    return cross_network(x, (CrossLayer(*arrays),))


def _interaction(x: jax.Array, embeddings: jax.Array) -> jax.Array:
    return dot_interaction(x, jnp.broadcast_to(embeddings, (x.shape[0], *embeddings.shape)), self_interaction=False)


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (_linear, [(COLUMNS, 5), (5,)]),
        (_cross, [(COLUMNS, RANK), (RANK, COLUMNS), (COLUMNS,)]),
        (_interaction, [(3, COLUMNS)]),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_when_samples_are_spread_then_gradients_of_parameters_are_summed(
    layer: Callable, shapes: list[tuple[int, ...]], dtype: jnp.dtype
) -> None:
    # Small integers: sums are exact in any order.
    random = np.random.default_rng(0)

    def numbers(*shape: int) -> jax.Array:
        return jnp.asarray(random.integers(-2, 3, shape))

    x = numbers(SAMPLES, COLUMNS).astype(dtype)
    of_layer = dtype if layer is _interaction else jnp.float32
    parameters = [numbers(*shape).astype(of_layer) for shape in shapes]

    def gradients(x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        def loss(*given: jax.Array) -> jax.Array:
            return jnp.sum(layer(*given).astype(jnp.float32))

        return jax.grad(loss, range(1 + len(parameters)))(x, *parameters)

    replicated = (P(),) * len(shapes)
    spread = jax.shard_map(
        gradients, mesh=make_mesh(2, 2), in_specs=(BY_DEVICE, *replicated), out_specs=(BY_DEVICE, *replicated)
    )
    jax.tree.map(np.testing.assert_array_equal, jax.jit(spread)(x, *parameters), jax.jit(gradients)(x, *parameters))


def test_pooled_lookup_when_the_store_is_on_all_devices_then_each_looks_up_its_own_ids() -> None:
    random = np.random.default_rng(0)
    store = jnp.asarray(random.standard_normal((6, 128)), jnp.float32)
    rows = jnp.asarray(random.integers(0, 12, 8), jnp.int32)

    def lookup_local(store: jax.Array, rows: jax.Array) -> jax.Array:
        return pooled_lookup(store, rows, jnp.arange(3, dtype=jnp.int32), width=64)

    spread = jax.shard_map(lookup_local, mesh=make_mesh(2, 2), in_specs=(P(), BY_DEVICE), out_specs=BY_DEVICE)
    np.testing.assert_array_equal(jax.jit(spread)(store, rows), np.asarray(store).reshape(12, 64)[np.asarray(rows)])
