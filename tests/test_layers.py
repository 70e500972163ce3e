"""The layers against numpy in float64, and the cross network against TorchRec's figures."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlrm_jax.layers import MLP, Linear, LowRankCross, Projection
from pallas_kernels import cpu
from pallas_kernels.interaction import dot_interaction, num_pairs
from pallas_kernels.linear import linear

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")

# float32 sums of at most a few dozen products.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
# bfloat16 keeps 8 bits: operands are off by up to 2^-9, and the errors of a product's terms partly cancel.
BF16_CLOSE: dict[str, Any] = {"rtol": 2e-2, "atol": 5e-2}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parameters(module) -> dict[Any, Any]:
    return nnx.to_pure_dict(nnx.state(module))


def dot_interaction_oracle(vectors, cotangent, self_interaction):
    """Dot products and gradient, pair by pair."""
    vectors, cotangent = vectors.astype(np.float64), cotangent.astype(np.float64)
    pairs = [(i, j) for i in range(vectors.shape[1]) for j in range(i + self_interaction)]
    gradient = np.zeros_like(vectors)
    for pair, (i, j) in enumerate(pairs):
        gradient[:, i] += cotangent[:, pair, None] * vectors[:, j]
        gradient[:, j] += cotangent[:, pair, None] * vectors[:, i]
    values = [(vectors[:, i] * vectors[:, j]).sum(-1) for i, j in pairs]
    return np.stack(values, axis=1) if pairs else np.zeros((len(vectors), 0)), gradient


@pytest.mark.parametrize("platform", ["cpu", "any"])
@pytest.mark.parametrize("self_interaction", [False, True])
@pytest.mark.parametrize("batch_size", [5, 0])
@pytest.mark.parametrize(("has_x", "num_embeddings"), [(True, 0), (True, 1), (True, 6), (False, 1), (False, 7)])
@pytest.mark.parametrize(
    ("dtype", "of_embeddings", "tolerance"), [(F32, F32, CLOSE), (BF16, BF16, BF16_CLOSE), (BF16, F32, BF16_CLOSE)]
)
def test_dot_interaction_when_run_then_x_and_the_pairs_in_row_major_order_and_their_gradient(
    platform, self_interaction, batch_size, has_x, num_embeddings, dtype, of_embeddings, tolerance, monkeypatch
):
    if platform == "any":
        monkeypatch.setattr(cpu, "available", lambda: False)
    x, embeddings = random(batch_size, 8 * has_x), random(batch_size, num_embeddings, 8, seed=1)
    vectors = np.concatenate([x[:, None], embeddings], axis=1) if has_x else embeddings
    cotangent = random(batch_size, x.shape[1] + num_pairs(vectors.shape[1], self_interaction=self_interaction), seed=2)

    @jax.jit
    def run(x, embeddings, cotangent):
        def interact(x, embeddings):
            return dot_interaction(x.astype(dtype), embeddings.astype(of_embeddings), self_interaction)

        values, pullback = jax.vjp(interact, x, embeddings)
        return values, *pullback(cotangent.astype(dtype))

    values, *gradients = run(x, embeddings, cotangent)
    expected_pairs, gradient = dot_interaction_oracle(vectors, cotangent[:, x.shape[1] :], self_interaction)
    expected = (
        np.concatenate([x, expected_pairs], axis=1),
        cotangent[:, : x.shape[1]] + (gradient[:, 0] if has_x else 0),
        gradient[:, has_x:],
    )
    assert values.dtype == dtype
    for given, wanted in zip((values, *gradients), expected, strict=True):
        np.testing.assert_allclose(given.astype(jnp.float32), wanted, **tolerance)


def test_dot_interaction_when_x_and_embeddings_differ_in_dtype_then_an_error_names_both():
    with pytest.raises(ValueError, match="x is float32, but the embeddings are bfloat16; give them in the same dtype"):
        dot_interaction(jnp.ones((5, 8)), jnp.ones((5, 2, 8), BF16), False)


@pytest.mark.parametrize("platform", ["cpu", "any"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, CLOSE), (BF16, BF16_CLOSE)])
def test_linear_when_run_then_values_and_gradients_match_float64(platform, relu, biased, dtype, tolerance, monkeypatch):
    if platform == "any":
        monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)
    x, kernel, cotangent = random(6, 16), random(16, 3, seed=1), random(6, 3, seed=2)
    bias = random(3, seed=3) if biased else None

    @jax.jit
    def run(x, kernel, bias, cotangent):
        values, pullback = jax.vjp(lambda x, *params: linear(x.astype(dtype), *params, relu), x, kernel, bias)
        return values, pullback(cotangent.astype(values.dtype))

    values, (x_grad, kernel_grad, bias_grad) = run(x, kernel, bias, cotangent)
    assert values.dtype == (dtype if relu else jnp.float32)
    assert x_grad.dtype == kernel_grad.dtype == jnp.float32
    expected = x.astype(np.float64) @ kernel + (bias if biased else 0)
    # Whether a sum is positive is not close: no test of rounding.
    passed = cotangent * (np.asarray(values, np.float32) > 0) if relu else cotangent
    np.testing.assert_allclose(
        np.asarray(values, np.float32), np.maximum(expected, 0) if relu else expected, **tolerance
    )
    np.testing.assert_allclose(x_grad, passed.astype(np.float64) @ kernel.T, **tolerance)
    np.testing.assert_allclose(kernel_grad, x.T.astype(np.float64) @ passed, **tolerance)
    if biased:
        np.testing.assert_allclose(bias_grad, passed.sum(axis=0), **tolerance)
    else:
        assert bias_grad is None


def product_dtypes(jaxpr):
    """Operand dtypes of all matrix products, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(str(operand.aval.dtype) for operand in equation.invars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns"):
                yield from product_dtypes(inner)
            elif hasattr(inner, "jaxpr"):
                yield from product_dtypes(inner.jaxpr)


@pytest.mark.parametrize("able", [False, True])
def test_products_when_computing_in_bfloat16_then_no_operand_is_float32_forward_or_backward(able, monkeypatch):
    if able and not cpu.available():
        pytest.skip("the library of the cpu kernels was not built here")
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: able)
    mlp = MLP(4, (8, 6), last_relu=True, compute_dtype=BF16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(mlp)

    def loss(params, x):
        y = nnx.merge(graph, params)(x).reshape(2, 3, 2)
        return jnp.sum(dot_interaction(y[:, 0], y[:, 1:], False).astype(jnp.float32))

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, jnp.ones((2, 4))).jaxpr
    dtypes = list(product_dtypes(jaxpr))
    # Those of other platforms, where hosts have products of their own.
    assert len(dtypes) == 8
    assert set(dtypes) == {("bfloat16", "bfloat16")}


def test_linear_when_drawn_then_its_moments_are_those_of_the_dlrm_reference():
    layer = Linear(300, 500, compute_dtype=F32, rngs=nnx.Rngs(0))
    kernel, bias = np.asarray(parameters(layer)["kernel"]), np.asarray(parameters(layer)["bias"])
    # Five standard errors of a standard deviation estimated from that many draws.
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 800), rtol=5 / np.sqrt(2 * kernel.size))
    np.testing.assert_allclose(bias.std(), np.sqrt(1 / 500), rtol=5 / np.sqrt(2 * bias.size))
    assert abs(kernel.mean()) < 5 * np.sqrt(2 / 800 / kernel.size)


@pytest.mark.parametrize("last_relu", [False, True])
def test_mlp_when_run_then_it_matches_float64(last_relu):
    mlp = MLP(5, (7, 4), last_relu=last_relu, compute_dtype=F32, rngs=nnx.Rngs(0))
    x = random(6, 5)
    expected = x.astype(np.float64)
    for index, layer in parameters(mlp)["layers"].items():
        expected = expected @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        if index == 0 or last_relu:
            expected = np.maximum(expected, 0)
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, **CLOSE)


def test_mlp_when_it_has_no_layers_then_it_is_the_identity():
    mlp = MLP(5, (), last_relu=True, compute_dtype=F32, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(mlp(jnp.asarray(random(6, 5))), random(6, 5))


def test_projection_when_run_then_each_feature_has_its_own_map():
    projection = Projection(3, 4, 6, compute_dtype=F32, rngs=nnx.Rngs(0))
    x = random(5, 3, 4)
    expected = np.einsum("bkd,kdm->bkm", x.astype(np.float64), np.asarray(projection.kernel[...]))
    np.testing.assert_allclose(projection(jnp.asarray(x)), expected, **CLOSE)


def test_cross_network_when_drawn_then_biases_are_zero_and_kernels_xavier_normal():
    cross = LowRankCross(200, num_layers=1, rank=50, compute_dtype=F32, rngs=nnx.Rngs(0))
    down, up = parameters(cross)["down"][0], parameters(cross)["up"][0]
    np.testing.assert_array_equal(up["bias"], np.zeros(200))
    assert set(down) == {"kernel"}
    for layer in (down, up):
        kernel = np.asarray(layer["kernel"])
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 250), rtol=5 / np.sqrt(2 * kernel.size))


def golden_cross(shared, dtype):
    figures = np.load(shared / "golden" / "lowrank_cross.npz")
    cross = LowRankCross(24, num_layers=3, rank=4, compute_dtype=dtype, rngs=nnx.Rngs(0))
    graph, params = nnx.split(cross)
    # TorchRec keeps its kernels as [out, in].
    down = {layer: {"kernel": jnp.asarray(figures[f"V_{layer}"].T)} for layer in range(3)}
    up = {
        layer: {"kernel": jnp.asarray(figures[f"W_{layer}"].T), "bias": jnp.asarray(figures[f"bias_{layer}"])}
        for layer in range(3)
    }
    nnx.replace_by_pure_dict(params, {"down": down, "up": up})
    run = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    y, pullback = jax.vjp(run, params, jnp.asarray(figures["x"]))
    params_grad, x_grad = pullback(jnp.asarray(figures["y_grad"], dtype))
    found = {"y": y, "x_grad": x_grad}
    gradients = nnx.to_pure_dict(params_grad)
    for layer in range(3):
        found[f"V_grad_{layer}"] = gradients["down"][layer]["kernel"].T
        found[f"W_grad_{layer}"] = gradients["up"][layer]["kernel"].T
        found[f"bias_grad_{layer}"] = gradients["up"][layer]["bias"]
    return figures, found


def test_cross_network_when_compared_with_torchrec_then_output_and_every_gradient_agree(shared):
    figures, found = golden_cross(shared, F32)
    assert set(found) == {name for name in figures if name == "y" or "_grad" in name} - {"y_grad"}
    for name, value in found.items():
        # float32 in both, with sums in another order.
        np.testing.assert_allclose(value, figures[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_cross_network_when_computing_in_bfloat16_then_it_is_close_to_float32(shared):
    figures, found = golden_cross(shared, BF16)
    for name, value in found.items():
        scale = np.abs(figures[name]).max()
        # Three layers, each rounding its operands to 8 bits.
        np.testing.assert_allclose(value.astype(jnp.float32) / scale, figures[name] / scale, atol=2e-2, err_msg=name)
