"""The derivative of matrix products on hosts, and dense parts that compute in bfloat16 there."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlrm_jax.model import DLRM, ModelConfig
from pallas_kernels import cpu
from pallas_kernels.products import product_grads
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


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has programs made as for a processor that multiplies bfloat16, whatever this one does."""
    if not cpu.available():
        pytest.skip("the library of the cpu kernels was not built here")
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize(
    ("samples", "inputs", "outputs"), [(40, 24, 8), (40, 8, 24), (33, 17, 9), (16, 12, 1), (8, 1, 5)]
)
def test_product_grads_when_computing_in_bfloat16_then_those_of_any_platform(
    samples: int, inputs: int, outputs: int
) -> None:
    random = np.random.default_rng(0)
    # Small integers: every product and sum is exact in bfloat16 times bfloat16 added up in float32.
    x, kernel, cotangent = (
        jnp.asarray(random.integers(-8, 9, shape), jnp.bfloat16)
        for shape in ((samples, inputs), (inputs, outputs), (samples, outputs))
    )
    options = compiler_options("cpu", "cpu", "bfloat16")
    x_grad, kernel_grad = jax.jit(product_grads, compiler_options=options)(x, kernel, cotangent)
    assert x_grad.dtype == kernel_grad.dtype == jnp.float32
    np.testing.assert_array_equal(x_grad, np.asarray(cotangent, np.float64) @ np.asarray(kernel, np.float64).T)
    np.testing.assert_array_equal(kernel_grad, np.asarray(x, np.float64).T @ np.asarray(cotangent, np.float64))


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


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("name", MODELS)
def test_model_in_bfloat16_then_its_gradients_are_nearly_those_in_float32(name: str) -> None:
    gradients = {}
    for dtype in ("bfloat16", "float32"):
        loss, arguments = loss_of(name, dtype, samples=512)
        options = compiler_options("cpu", "cpu", dtype)
        gradients[dtype] = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)), compiler_options=options)(*arguments))
    for given, wanted in zip(gradients["bfloat16"], gradients["float32"], strict=True):
        # A rounding of 2^-9 decides on a ReLU of one sample in some hundred: 7 % of an embedding's gradient here.
        assert jnp.linalg.norm(given - wanted) < 0.12 * jnp.linalg.norm(wanted)


@pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="this processor does not multiply bfloat16")
# XLA has YNNPACK multiply no batches of matrices: those of projections are in float32.
@pytest.mark.parametrize("name", [name for name in MODELS if "projected" not in name])
def test_model_in_bfloat16_then_no_product_of_its_program_has_operands_in_float32(name: str) -> None:
    loss, arguments = loss_of(name, "bfloat16", samples=48)
    options = compiler_options("cpu", "cpu", "bfloat16")
    program = jax.jit(jax.grad(loss, (0, 1)), compiler_options=options).lower(*arguments).compile().as_text()
    assert program is not None
    dtypes = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", program))
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\((%[\w.-]+), (%[\w.-]+)\)", program)
    # XLA itself multiplies by vectors.
    of_matrices = [operands for sizes, *operands in products if "1" not in sizes.split(",")]
    assert of_matrices
    assert {dtypes[operand] for operands in of_matrices for operand in operands} == {"bf16"}
