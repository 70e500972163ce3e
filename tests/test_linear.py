"""Dense layers: the kernels of hosts that multiply bfloat16, or float32 by parts in bfloat16; models of such layers."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlrm_jax.model import DLRM, ModelConfig
from pallas_kernels import cpu, cpu_layers
from pallas_kernels.linear import linear
from sharding.compiler_options import compiler_options

DOT = {"bottom_mlp": (32, 16), "top_mlp": (64, 32, 1)}
MODELS: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
    "dot": (DOT, [(5, 16)]),
    "dot, projected": (DOT, [(3, 32), (2, 16)]),
    "cat": (DOT | {"interaction": "cat"}, [(5, 16)]),
    "cat, projected": (DOT | {"interaction": "cat", "projection_dim": 8}, [(3, 32), (1, 16)]),
    "cat, one feature": (DOT | {"interaction": "cat", "bottom_mlp": ()}, [(1, 16)]),
    "dcnv2": (DOT | {"interaction": "dcnv2", "cross_layers": 2, "cross_rank": 24}, [(4, 16)]),
    "wide last layer": (DOT | {"top_mlp": (1,)}, [(5, 16)]),
}

# Multipliers and the dtype that is computed in, and what Linux calls them.
WAYS = {
    ("amx", "bfloat16"): "amx_bf16",
    ("avx512_bf16", "bfloat16"): "avx512_bf16",
    ("amx", "float32"): "amx_bf16",
}


def skip_without(multiplier: str, dtype: str) -> None:
    """Skips what cannot run here. It asks Linux for the processor, so that one that is not made use of is a failure."""
    if not cpu.available():
        pytest.skip("no cpu kernels were built")
    known = Path("/proc/cpuinfo")
    if not known.exists() or WAYS[multiplier, dtype] not in known.read_text().split():
        pytest.skip(f"this processor has no {multiplier}: its instructions cannot be run")


@pytest.fixture(params=WAYS, ids="-".join)
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Each way of multiplying."""
    skip_without(*request.param)
    return request.param


@pytest.fixture
def in_float32() -> None:
    """Of a test of numbers in three parts."""
    if not cpu.multiplies(jnp.dtype(jnp.float32)):
        pytest.skip("this processor has no AMX")


def integers(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Small ones: every product, and every sum of some thousand, is exact."""
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape), dtype)


# Samples, inputs, outputs: none, one of each; sizes within a block and beyond it, beyond a part of the depth (256),
# beyond the rows of a task (256), beyond a group of panels (512 columns), and beyond all of them in either direction.
SIZES = [
    (0, 5, 3),
    (4, 0, 3),
    (1, 1, 1),
    (5, 3, 2),
    (33, 17, 9),
    (40, 64, 32),
    (70, 300, 65),
    (31, 600, 40),
    (1030, 13, 40),
    (9, 20, 530),
    (300, 270, 600),
    (2100, 45, 200),
    (8300, 13, 40),
    (8200, 300, 70),
    (8200, 0, 3),
]


def layer_and_gradients(dtype: str, num_samples: int) -> list[np.ndarray]:
    """Of numbers whose sums are rounded; with more work than one task takes."""
    random = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(random.normal(size=(num_samples, size)), dtype) for size in (300, 170))
    kernel, bias = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((300, 170), (170,)))
    y = jax.jit(partial(cpu_layers.linear, relu=True))(x, kernel, bias)
    return [np.asarray(array) for array in (y, *jax.jit(cpu_layers.linear_grads)(x, kernel, cotangent, y))]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_linear_then_equals_float64(
    way: tuple[str, str], sizes: tuple[int, int, int], biased: bool, relu: bool
) -> None:
    (samples, inputs, outputs), (multiplier, dtype) = sizes, way
    x, kernel = integers(0, samples, inputs, dtype=dtype), integers(1, inputs, outputs, dtype=jnp.float32)
    bias = integers(2, outputs, dtype=jnp.float32) if biased else None
    y = jax.jit(partial(cpu_layers.linear, relu=relu, multiplier=multiplier))(x, kernel, bias)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + (0 if bias is None else np.asarray(bias))
    if relu:
        expected = np.maximum(np.asarray(jnp.asarray(expected, dtype), np.float64), 0)
    assert y.dtype == (dtype if relu else jnp.float32)
    np.testing.assert_array_equal(np.asarray(y, np.float64), expected)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_linear_grads_then_equal_float64(way: tuple[str, str], sizes: tuple[int, int, int], relu: bool) -> None:
    (samples, inputs, outputs), (multiplier, dtype) = sizes, way
    x, kernel = integers(0, samples, inputs, dtype=dtype), integers(1, inputs, outputs, dtype=jnp.float32)
    # Without a ReLU cotangents are float32.
    cotangent = integers(2, samples, outputs, dtype=dtype if relu else jnp.float32)
    y = integers(3, samples, outputs, dtype=dtype) if relu else None
    call = jax.jit(partial(cpu_layers.linear_grads, multiplier=multiplier))
    x_grad, kernel_grad, bias_grad = call(x, kernel, cotangent, y)
    passed = np.asarray(cotangent, np.float64) * (1 if y is None else np.asarray(y, np.float64) > 0)
    expected = jnp.asarray(passed @ np.asarray(kernel, np.float64).T, dtype)
    np.testing.assert_array_equal(np.asarray(x_grad, np.float64), np.asarray(expected, np.float64))
    np.testing.assert_array_equal(kernel_grad, np.asarray(x, np.float64).T @ passed)
    np.testing.assert_array_equal(bias_grad, passed.sum(axis=0))


@pytest.mark.parametrize("multiplier", ["amx", "avx512_bf16"])
def test_linear_grads_in_bfloat16_when_operands_are_float32_then_they_are_rounded_and_the_biases_are_not(
    multiplier: str,
) -> None:
    skip_without(multiplier, "bfloat16")
    x, kernel = jnp.ones((3, 2), jnp.bfloat16), jnp.full((2, 4), 1 + 2**-10, jnp.float32)
    cotangent = jnp.full((3, 4), 1 + 2**-10, jnp.float32)
    x_grad, kernel_grad, bias_grad = jax.jit(partial(cpu_layers.linear_grads, multiplier=multiplier))(
        x, kernel, cotangent, None
    )
    np.testing.assert_array_equal(np.asarray(x_grad, np.float32), np.full((3, 2), 4.0))
    np.testing.assert_array_equal(kernel_grad, np.full((2, 4), 3.0))
    np.testing.assert_array_equal(bias_grad, np.full(4, 3 * (1 + 2**-10), np.float32))


def test_linear_when_a_sum_is_nan_or_infinite_then_the_relu_lets_it_through(way: tuple[str, str]) -> None:
    multiplier, dtype = way
    # 32 outputs are finished as vectors, the one behind them alone.
    x = jnp.asarray([[np.nan], [np.inf], [-np.inf]], dtype)
    call = jax.jit(partial(cpu_layers.linear, relu=True, multiplier=multiplier))
    y = np.asarray(call(x, jnp.ones((1, 33), jnp.float32), None), np.float32)
    # What an infinity's parts leave of it is NaN.
    expected = [[np.nan], [np.inf], [0.0]] if dtype == "bfloat16" else [[np.nan]] * 3
    np.testing.assert_array_equal(y, np.repeat(expected, 33, axis=1))


def test_linear_grads_when_outputs_are_nan_or_infinite_then_only_positive_ones_let_gradients_through(
    way: tuple[str, str],
) -> None:
    multiplier, dtype = way
    y = jnp.asarray([[np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0**-126, -(2.0**-126), 1.0]], dtype)
    x, kernel, cotangent = jnp.ones((1, 1), dtype), jnp.ones((1, 8)), jnp.ones(y.shape, dtype)
    _, _, bias_grad = jax.jit(partial(cpu_layers.linear_grads, multiplier=multiplier))(x, kernel, cotangent, y)
    np.testing.assert_array_equal(bias_grad, [0, 1, 0, 0, 0, 1, 0, 1])


@pytest.mark.parametrize("width", [90, 600])
def test_linear_in_float32_when_the_other_operand_is_the_identity_then_no_bit_is_lost(
    in_float32: None, width: int
) -> None:
    random = np.random.default_rng(0)
    # All 24 bits of each, and exponents that only the first part of a number can have.
    numbers = (random.normal(size=(70, width)) * 2.0 ** random.integers(-90, 90, (70, width))).astype(np.float32)
    x, identity = jnp.asarray(numbers), jnp.eye(width)
    np.testing.assert_array_equal(jax.jit(partial(cpu_layers.linear, relu=False))(x, identity, None), numbers)
    x_grad, _, _ = jax.jit(cpu_layers.linear_grads)(x, identity, x, None)
    np.testing.assert_array_equal(x_grad, numbers)
    # Of so many samples, a narrow layer's go in chunks.
    for samples, step in ((70, 1), (8200, 117)):
        chosen = jnp.arange(70) * step
        ones = jnp.zeros((samples, 70)).at[chosen, jnp.arange(70)].set(1)
        cotangent = jnp.zeros((samples, width)).at[chosen].set(x)
        _, kernel_grad, _ = jax.jit(cpu_layers.linear_grads)(ones, jnp.zeros((70, width)), cotangent, None)
        np.testing.assert_array_equal(kernel_grad, numbers)


@pytest.mark.parametrize("sizes", [(70, 300, 65), (2100, 45, 200), (300, 600, 600), (8300, 300, 70)])
def test_linear_in_float32_then_errors_are_those_of_float32(in_float32: None, sizes: tuple[int, int, int]) -> None:
    samples, inputs, outputs = sizes
    random = np.random.default_rng(0)
    shapes = (samples, inputs), (inputs, outputs), (samples, outputs)
    x, kernel, cotangent = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    y = jax.jit(partial(cpu_layers.linear, relu=False))(x, kernel, None)
    x_grad, kernel_grad, _ = jax.jit(cpu_layers.linear_grads)(x, kernel, cotangent, y)
    passed = np.where(np.asarray(y) > 0, cotangent, 0)
    for found, a, b in ((y, x, kernel), (x_grad, passed, kernel.T), (kernel_grad, x.T, passed)):
        exact, size = a.astype(np.float64) @ b, np.abs(a) @ np.abs(b)
        # One rounding is 2^-24 of a sum; a sum of some thousand products, each in six steps, has some of them.
        assert np.max(np.abs(np.asarray(found, np.float64) - exact) / size) < 2.0**-21


def test_linear_under_vmap_then_each_has_its_own_kernel() -> None:
    x, kernels = integers(0, 3, 5, 4), integers(1, 3, 4, 6, dtype=jnp.float32)
    gradients = jax.jit(jax.grad(lambda x, kernels: jax.vmap(layer)(x, kernels).sum(), argnums=(0, 1)))

    def layer(x, kernel):
        return linear(x, kernel, None, False)

    np.testing.assert_array_equal(jax.jit(jax.vmap(layer))(x, kernels), np.einsum("kbn,knm->kbm", x, kernels))
    x_grad, kernel_grads = gradients(x, kernels)
    sums = np.asarray(kernels).sum(axis=2)
    np.testing.assert_array_equal(np.asarray(x_grad, np.float32), np.repeat(sums[:, None], 5, axis=1))
    by_kernel = np.asarray(x, np.float32).sum(axis=1)
    np.testing.assert_array_equal(kernel_grads, np.repeat(by_kernel[:, :, None], 6, axis=2))


def loss_of(name: str, dtype: str, samples: int) -> tuple[Any, tuple[Any, list[jax.Array]]]:
    """A loss, and the parameters and embeddings that it is a function of."""
    config, shapes = MODELS[name]
    num_dense = 7 if config["bottom_mlp"] else 0
    model_config = ModelConfig(**config, dtype=dtype)
    model = DLRM(model_config, num_dense=num_dense, embedding_shapes=shapes, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    keys = jax.random.split(jax.random.key(1), 1 + len(shapes))
    dense = jax.random.normal(keys[0], (samples, num_dense))
    embeddings = [jax.random.normal(key, (samples, *shape)) for key, shape in zip(keys[1:], shapes, strict=True)]
    return lambda params, embeddings: jnp.mean(nnx.merge(graph, params)(dense, embeddings) ** 2), (params, embeddings)


@pytest.mark.parametrize("name", MODELS)
def test_model_in_bfloat16_then_its_gradients_are_nearly_those_in_float32(name: str) -> None:
    gradients = {}
    for dtype in ("bfloat16", "float32"):
        loss, arguments = loss_of(name, dtype, samples=512)
        options = compiler_options("cpu", "cpu")
        gradients[dtype] = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)), compiler_options=options)(*arguments))
    for given, wanted in zip(gradients["bfloat16"], gradients["float32"], strict=True):
        # A rounding of 2^-9 decides on a ReLU of one sample in some hundred: 7 % of an embedding's gradient here.
        assert jnp.linalg.norm(given - wanted) < 0.12 * jnp.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_model_then_its_program_has_no_product_of_xla_s(name: str, dtype: str) -> None:
    if not cpu.multiplies(jnp.dtype(dtype)):
        pytest.skip(f"this processor does not multiply {dtype}")
    loss, arguments = loss_of(name, dtype, samples=48)
    options = compiler_options("cpu", "cpu")
    program = jax.jit(jax.grad(loss, (0, 1)), compiler_options=options).lower(*arguments).compile().as_text()
    assert program is not None
    assert '"dlrm_product"' in program
    assert " dot(" not in program
