"""The low-rank cross network: kernels of hosts beside the reference, and both beside the formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu, cpu_layers
from pallas_kernels.cross import _backward, _forward, _layer, _layer_grads, cross_network
from pallas_kernels.cross_layer import CrossLayer

# The kernels cannot run elsewhere; what any platform can do is tested everywhere.
NATIVE = [dtype for dtype in ("bfloat16", "float32") if cpu.multiplies(jnp.dtype(dtype))]
native = pytest.mark.parametrize(
    "dtype", NATIVE or [pytest.param("", marks=pytest.mark.skip("this processor does not multiply bfloat16"))]
)


def sparse_integers(seed: int, *shape: int, share: float) -> np.ndarray:
    """Zeros and a share of small integers: whatever is added up here is exact in float32."""
    random = np.random.default_rng(seed)
    return random.integers(-2, 3, shape) * (random.random(shape) < share)


def network(
    samples: int, columns: int, rank: int, num_layers: int, dtype: str = "bfloat16"
) -> tuple[jax.Array, tuple[CrossLayer, ...]]:
    x = jnp.asarray(sparse_integers(0, samples, columns, share=0.5), dtype)
    layers = []
    for number in range(num_layers):
        seeds = (3 * number + part for part in (1, 2, 3))
        shapes = (columns, rank), (rank, columns), (columns,)
        arrays = (sparse_integers(seed, *shape, share=0.15) for seed, shape in zip(seeds, shapes, strict=True))
        layers.append(CrossLayer(*(jnp.asarray(array, jnp.float32) for array in arrays)))
    return x, tuple(layers)


@native
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(0, 3, 2), (1, 1, 1), (37, 45, 8), (70, 32, 64), (2, 40_000, 3)])
def test_native_when_sums_are_exact_then_every_result_equals_the_reference(
    sizes: tuple[int, int, int], num_layers: int, dtype: str
) -> None:
    # 40,000 columns are more numbers than a task of the elementwise arithmetic takes.
    x, layers = network(*sizes, num_layers, dtype)
    cotangent = jnp.asarray(sparse_integers(50, *x.shape, share=0.3), dtype)
    found = {}
    for name, layer, grads in (
        ("native", cpu_layers.cross_layer, cpu_layers.cross_layer_grads),
        ("reference", _layer, _layer_grads),
    ):
        y, residuals = jax.jit(partial(_forward, layer))(x, layers)
        found[name] = y, residuals, jax.jit(partial(_backward, grads))(x, layers, residuals, cotangent)
    assert found["native"][0].dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, found["native"], found["reference"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 4e-2)])
def test_cross_network_when_differentiated_then_it_is_the_formula_s_gradient(dtype, tolerance: float) -> None:
    keys = iter(jax.random.split(jax.random.key(0), 20))
    x = jax.random.normal(next(keys), (50, 48)).astype(dtype)
    layers = tuple(
        CrossLayer(*(jax.random.normal(next(keys), shape) / 8 for shape in ((48, 16), (16, 48), (48,))))
        for _ in range(3)
    )

    def formula(x, layers):
        first = y = x.astype(jnp.float32)
        for layer in layers:
            y = first * (y @ layer.down @ layer.up + layer.bias[None]) + y
        return y

    y, pullback = jax.vjp(jax.jit(cross_network), x, layers)
    expected, expected_pullback = jax.vjp(jax.jit(formula), x, layers)
    cotangent = jax.random.normal(next(keys), y.shape).astype(dtype)
    assert y.dtype == dtype
    found = jax.tree.leaves((y, *pullback(cotangent)))
    formula_s = jax.tree.leaves((expected, *expected_pullback(cotangent.astype(jnp.float32))))
    for given, wanted in zip(found, formula_s, strict=True):
        wanted = np.asarray(wanted, np.float64)
        np.testing.assert_allclose(np.asarray(given, np.float64), wanted, atol=tolerance * np.abs(wanted).max())


def test_cross_network_under_vmap_then_each_has_its_own_layers() -> None:
    several = [network(5, 33, 4, 2), network(5, 33, 4, 2)]
    several[1] = (several[1][0], tuple(jax.tree.map(lambda array: -array, layer) for layer in several[1][1]))
    x, layers = jax.tree.map(lambda *arrays: jnp.stack(arrays), *several)

    def loss(x, layers):
        return cross_network(x, layers).astype(jnp.float32).sum()

    found = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1))))(x, layers)
    for number, (own_x, own_layers) in enumerate(several):
        expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(own_x, own_layers)
        jax.tree.map(lambda a, b, n=number: np.testing.assert_array_equal(a[n], b), found, expected)


def test_cross_network_without_layers_then_it_is_the_identity() -> None:
    x = jnp.ones((2, 3), jnp.bfloat16)
    y, pullback = jax.vjp(lambda x: cross_network(x, ()), x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(pullback(2 * x)[0], 2 * x)


@native
def test_program_of_a_host_then_it_has_no_product_of_xla_s(dtype: str) -> None:
    x, layers = network(40, 64, 8, 2, dtype)
    program = jax.jit(jax.grad(lambda x, layers: cross_network(x, layers).astype(jnp.float32).sum(), (0, 1)))
    text = program.lower(x, layers).compile().as_text()
    assert text is not None
    assert '"dlrm_cross_sum"' in text
    assert '"dlrm_cross_grads"' in text
    assert " dot(" not in text
