"""The model against numpy in float64, and against the figures of facebookresearch/dlrm."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlrm_jax.losses import weighted_bce
from dlrm_jax.model import DLRM, ModelConfig
from sharding.errors import InputError

BATCH = 6
# float32 through four layers, with sums of at most a hundred terms.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}

DOT = ModelConfig(bottom_mlp=(16, 8), top_mlp=(12, 1), interaction="dot")
CAT = dataclasses.replace(DOT, interaction="cat")
DCN = dataclasses.replace(DOT, interaction="dcnv2", cross_layers=2, cross_rank=3)
CASES = {
    "dot": (DOT, 5, [(4, 8)]),
    "dot with self-interaction": (dataclasses.replace(DOT, self_interaction=True), 5, [(4, 8)]),
    "dot of several dimensions": (DOT, 5, [(2, 4), (3, 8), (1, 16)]),
    "dot without dense features": (dataclasses.replace(DOT, bottom_mlp=()), 0, [(2, 4), (3, 8)]),
    "cat": (CAT, 5, [(2, 4), (3, 8)]),
    "cat without bottom MLP": (dataclasses.replace(CAT, bottom_mlp=()), 5, [(2, 4)]),
    "cat with projection": (dataclasses.replace(CAT, projection_dim=6), 5, [(2, 4), (3, 6)]),
    "dense features alone": (CAT, 5, []),
    "dcnv2": (DCN, 5, [(2, 4), (3, 8)]),
    "dcnv2 without dense features": (dataclasses.replace(DCN, bottom_mlp=()), 0, [(3, 8)]),
}


def build(config, num_dense, shapes):
    rng = np.random.default_rng(0)
    model = DLRM(config, num_dense=num_dense, embedding_shapes=shapes, rngs=nnx.Rngs(1))
    dense = jnp.asarray(rng.normal(size=(BATCH, num_dense)), jnp.float32)
    embeddings = [jnp.asarray(rng.normal(size=(BATCH, k, d)), jnp.float32) for k, d in shapes]
    return model, dense, embeddings


def oracle(config, params, dense, embeddings):
    """The logits in float64, from the parameters as a nested dictionary."""

    def mlp(x, layers, last_relu):
        for index in range(len(layers)):
            x = x @ layers[index]["kernel"] + layers[index]["bias"]
            x = np.maximum(x, 0) if last_relu or index + 1 < len(layers) else x
        return x

    x = mlp(dense, params["bottom"]["layers"], True) if params.get("bottom") else dense
    vectors = []
    for index, group in enumerate(embeddings):
        projection = params.get("projections", {}).get(index)
        for feature in range(group.shape[1]):
            vector = group[:, feature]
            vectors.append(vector if projection is None else vector @ projection["kernel"][feature])
    if config.interaction == "dot":
        all_vectors = ([x] if dense.shape[1] else []) + vectors
        pairs = [
            (all_vectors[i] * all_vectors[j]).sum(1)
            for i in range(len(all_vectors))
            for j in range(i + config.self_interaction)
        ]
        z = np.concatenate([x, np.stack(pairs, 1)], axis=1)
    else:
        z = np.concatenate([x, *vectors], axis=1)
    if config.interaction == "dcnv2":
        first = z
        for layer in range(config.cross_layers):
            down, up = params["cross"]["down"][layer], params["cross"]["up"][layer]
            z = first * (z @ down["kernel"] @ up["kernel"] + up["bias"]) + z
    return mlp(z, params["top"]["layers"], False)[:, 0]


def to_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("case", CASES)
def test_logits_when_run_under_jit_then_they_match_float64(case):
    config, num_dense, shapes = CASES[case]
    model, dense, embeddings = build(config, num_dense, shapes)
    graph, params = nnx.split(model)
    logits = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs))(params, dense, embeddings)
    expected = oracle(config, to_float64(nnx.to_pure_dict(params)), *to_float64((dense, embeddings)))
    assert logits.shape == (BATCH,)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_gradients_when_taken_then_they_match_the_float64_slope_along_a_random_direction(case):
    config, num_dense, shapes = CASES[case]
    model, dense, embeddings = build(config, num_dense, shapes)
    graph, params = nnx.split(model)
    scale = np.random.default_rng(1).normal(size=BATCH).astype(np.float32)

    def loss(params, embeddings):
        return jnp.sum(nnx.merge(graph, params)(dense, embeddings) * scale)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, embeddings)
    gradients = to_float64((nnx.to_pure_dict(gradients[0]), gradients[1]))
    point = to_float64((nnx.to_pure_dict(params), embeddings))
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), point)

    def loss_at(step):
        moved = jax.tree.map(lambda leaf, way: leaf + step * way, point, direction)
        return (oracle(config, moved[0], to_float64(dense), moved[1]) * scale).sum()

    # A central difference in float64: its error is about step^2, and no ReLU changes sign within it.
    slope = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    products = jax.tree.map(lambda gradient, way: (gradient * way).sum(), gradients, direction)
    terms = np.array(jax.tree.leaves(products))
    np.testing.assert_allclose(terms.sum(), slope, rtol=1e-4, atol=1e-5 * np.abs(terms).sum())


@pytest.mark.parametrize("case", ["dot", "dot of several dimensions", "cat", "dcnv2"])
def test_logits_when_computing_in_bfloat16_then_they_are_close_to_float32_and_parameters_stay_float32(case):
    config, num_dense, shapes = CASES[case]
    model, dense, embeddings = build(config, num_dense, shapes)
    rounded, _, _ = build(dataclasses.replace(config, dtype="bfloat16"), num_dense, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(rounded))} == {np.dtype(np.float32)}
    logits, expected = rounded(dense, embeddings), model(dense, embeddings)
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits; relative to the largest logit, since the terms of one may cancel.
    assert np.abs(logits - expected).max() < 2e-2 * max(1.0, float(np.abs(expected).max()))
    assert not np.array_equal(logits, expected)


def test_logits_when_features_of_one_dimension_are_cut_into_groups_then_they_are_the_same():
    model, dense, embeddings = build(DOT, 5, [(4, 8)])
    cut = DLRM(DOT, num_dense=5, embedding_shapes=[(1, 8), (3, 8)], rngs=nnx.Rngs(1))
    groups = [embeddings[0][:, :1], embeddings[0][:, 1:]]
    np.testing.assert_array_equal(cut(dense, groups), model(dense, embeddings))


@pytest.mark.parametrize("config", [DOT, CAT, DCN], ids=["dot", "cat", "dcnv2"])
def test_program_when_there_are_a_thousand_features_then_it_is_no_longer_than_with_ten(config):
    def length(num_features):
        def run(dense, embeddings):
            return DLRM(config, num_dense=5, embedding_shapes=[(num_features, 8)], rngs=nnx.Rngs(0))(dense, embeddings)

        shapes = (jax.ShapeDtypeStruct((2, 5), jnp.float32), [jax.ShapeDtypeStruct((2, num_features, 8), jnp.float32)])
        return len(jax.make_jaxpr(run)(*shapes).eqns)

    assert length(1000) == length(10)


def test_model_when_built_twice_from_one_seed_then_parameters_are_equal():
    first, second = (nnx.state(build(DCN, 5, [(2, 4)])[0]) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bottom_mlp": (16, 0)}, "model.bottom_mlp"),
        ({"top_mlp": (16, 2)}, "model.top_mlp"),
        ({"top_mlp": ()}, "model.top_mlp"),
        ({"cross_rank": 0}, "model.cross_rank is 0"),
        ({"projection_dim": -1}, "model.projection_dim is -1"),
        ({"interaction": "sum"}, "model.interaction is 'sum'"),
        ({"dtype": "float16"}, "model.dtype is 'float16'"),
        ({"interaction": "cat", "self_interaction": True}, "model.self_interaction"),
    ],
)
def test_config_when_it_makes_no_model_then_one_line_names_the_field(changes, message):
    with pytest.raises(InputError, match=message) as error:
        dataclasses.replace(DOT, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "num_dense", "shapes", "message"),
    [
        (DOT, 0, [(2, 8)], "no dense features"),
        (dataclasses.replace(DOT, projection_dim=4), 5, [(2, 8)], "model.projection_dim is 4"),
        (dataclasses.replace(DOT, bottom_mlp=()), 0, [(1, 8)], "gives nothing"),
        (dataclasses.replace(CAT, bottom_mlp=()), 0, [], "gives nothing"),
    ],
)
def test_model_when_the_config_does_not_fit_the_features_then_one_line_says_so(config, num_dense, shapes, message):
    with pytest.raises(InputError, match=message):
        DLRM(config, num_dense=num_dense, embedding_shapes=shapes, rngs=nnx.Rngs(0))


def test_model_when_called_with_other_shapes_than_it_was_built_for_then_the_error_names_the_group():
    model, dense, embeddings = build(DOT, 5, [(2, 4), (3, 8)])
    with pytest.raises(InputError, match="dense has shape"):
        model(dense[:, :4], embeddings)
    with pytest.raises(InputError, match="1 groups of embeddings"):
        model(dense, embeddings[:1])
    with pytest.raises(InputError, match="embedding group 1"):
        model(dense, [embeddings[0], embeddings[0]])


def golden_run(shared, interaction):
    """Figures, and the same 20 steps with plain autodiff and SGD: losses, first probabilities, final parameters."""
    figures = dict(np.load(shared / "golden" / f"dlrm_{interaction}_sgd.npz"))
    num_tables, dim = len(figures["table_sizes"]), int(figures["dim"])
    num_steps, learning_rate = len(figures["losses"]), float(figures["lr"])
    config = ModelConfig(bottom_mlp=(16, 8), top_mlp=(16, 1), interaction=interaction)
    model = DLRM(config, num_dense=5, embedding_shapes=[(num_tables, dim)], rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    mlps: dict[Any, Any] = {
        name: {
            "layers": {
                index: {part: jnp.asarray(figures[f"init_{name}_{part}_{index}"]) for part in ("kernel", "bias")}
                for index in range(2)
            }
        }
        for name in ("bottom", "top")
    }
    nnx.replace_by_pure_dict(params, mlps)
    rows = np.cumsum([0, *figures["table_sizes"]])
    table = jnp.asarray(np.concatenate([figures[f"init_table_{t}"] for t in range(num_tables)]))
    capacity = max(len(figures[f"step{s}_values"]) for s in range(num_steps))

    def batch(step):
        lengths = figures[f"step{step}_lengths"]
        values = figures[f"step{step}_values"] + np.repeat(rows[:-1], lengths.sum(1)).astype(np.int32)
        bags = np.repeat(np.arange(lengths.size, dtype=np.int32), lengths.reshape(-1))
        padding = (0, capacity - len(values))
        # Padding belongs to a bag beyond the last, which segment_sum drops.
        bags = np.pad(bags, padding, constant_values=lengths.size)
        return figures[f"step{step}_dense"], figures[f"step{step}_label"], np.pad(values, padding), bags

    def loss(params, table, dense, label, values, bags):
        num_samples = len(label)
        pooled = jax.ops.segment_sum(table[values], bags, num_segments=num_tables * num_samples)
        embeddings = jnp.swapaxes(pooled.reshape(num_tables, num_samples, dim), 0, 1)
        logits = nnx.merge(graph, params)(dense, [embeddings])
        return weighted_bce(logits, label, jnp.ones_like(label)), jax.nn.sigmoid(logits)

    @jax.jit
    def sgd_step(params, table, *batch):
        (value, probability), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, table, *batch)
        stepped = jax.tree.map(lambda leaf, grad: leaf - learning_rate * grad, (params, table), gradients)
        return *stepped, value, probability

    losses, probabilities = [], []
    for step in range(num_steps):
        params, table, value, probability = sgd_step(params, table, *batch(step))
        losses.append(value)
        probabilities.append(probability)
    finals = {f"final_table_{t}": table[rows[t] : rows[t + 1]] for t in range(num_tables)}
    for name, mlp in nnx.to_pure_dict(params).items():
        for index, layer in mlp["layers"].items():
            finals |= {f"final_{name}_{part}_{index}": value for part, value in layer.items()}
    return figures, np.array(losses), np.asarray(probabilities[0]), finals


@pytest.mark.parametrize("interaction", ["dot", "cat"])
def test_training_when_compared_with_the_dlrm_reference_then_probabilities_losses_and_parameters_agree(
    shared, interaction
):
    figures, losses, first_probability, finals = golden_run(shared, interaction)
    # float32 in both, with sums in another order: about 1e-7 a step, of parameters of order 1, over 20 steps.
    np.testing.assert_allclose(first_probability, figures["step0_prob"], atol=1e-6)
    np.testing.assert_allclose(losses, figures["losses"], atol=2e-6)
    assert set(finals) == {name for name in figures if name.startswith("final_")}
    for name, value in finals.items():
        np.testing.assert_allclose(value, figures[name], atol=2e-6, err_msg=name)
