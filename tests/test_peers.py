"""benchmarks/peers: workloads are what they say, and our side trains the model that they define.

The oracle is plain JAX with dense gradients; where PyTorch and TorchRec are at hand, they are asked, too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.peers.case import Case, batches, dense_flops, rows_of_upper_triangle, table_blocks, table_bytes
from benchmarks.peers.environment import FOLDER
from benchmarks.peers.jax_model import PlainJax, initial_params, loss_of
from benchmarks.peers.ours_model import Ours
from benchmarks.peers.process import PEERS, started

STEPS = 10
DOT = Case(
    name="dot",
    num_rows=(50, 3, 400),
    pooling_factors=(1, 4, 2),
    dim=8,
    num_dense=5,
    bottom_mlp=(16, 8),
    top_mlp=(16, 1),
    cross_layers=0,
    cross_rank=0,
    batch_size=64,
    ids="zipf",
    optimizer="sgd",
    learning_rate=0.2,
    table_learning_rate=2.0,
)
CROSS = dataclasses.replace(DOT, name="cross", cross_layers=2, cross_rank=4, ids="uniform")


def losses_by_dense_gradients(case: Case) -> list[float]:
    """Row-wise AdaGrad written out over whole tables; rows without a gradient stay as they are."""
    params, loss = initial_params(case), jax.jit(jax.value_and_grad(loss_of(case)))
    params["tables"] = [
        jnp.concatenate([jnp.asarray(rows) for _, rows in table_blocks(case, number)])
        for number in range(len(case.num_rows))
    ]
    moments = [np.zeros((rows, 1), np.float32) for rows in case.num_rows]
    made, losses = batches(case), []
    for step in range(STEPS):
        batch = made[step % len(made)]
        value, gradients = loss(params, batch.dense, batch.ids, batch.label)
        losses.append(float(value))
        tables = params.pop("tables")
        of_tables = gradients.pop("tables")
        params = jax.tree.map(lambda p, g: p - case.learning_rate * g, params, gradients)
        params["tables"] = []
        for table, gradient, moment in zip(tables, of_tables, moments, strict=True):
            rows = np.asarray(gradient)
            moment += np.mean(rows**2, axis=1, keepdims=True)
            change = np.float32(case.table_learning_rate) * rows / (np.sqrt(moment) + np.float32(case.eps))
            params["tables"].append(table - change)
    return losses


@pytest.mark.parametrize("case", [pytest.param(DOT, id="dot"), pytest.param(CROSS, id="cross", marks=pytest.mark.slow)])
def test_our_side_with_sgd_has_the_losses_of_dense_gradients(case: Case) -> None:
    ours = Ours(case)
    ours.load()
    # A user's first version broadcasts as numpy does.
    with jax.numpy_rank_promotion("allow"):
        plain = PlainJax(case)
        plain.load()
        expected = plain.losses(STEPS)
    # Sums over samples and bags are ordered differently: a few units of 2**-23.
    np.testing.assert_allclose(ours.losses(STEPS), expected, rtol=2e-6)
    # The first batch again, after four updates.
    assert expected[4] < expected[0] - 1e-3


def test_our_side_with_rowwise_adagrad_has_the_losses_of_the_rule_written_out() -> None:
    case = dataclasses.replace(DOT, optimizer="rowwise_adagrad", table_learning_rate=0.005)
    ours = Ours(case)
    ours.load()
    with jax.numpy_rank_promotion("allow"):
        expected = losses_by_dense_gradients(case)
    np.testing.assert_allclose(ours.losses(STEPS), expected, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrec", "torch"])
def test_peers_have_our_losses(name: str) -> None:
    if not (FOLDER / "made").exists():
        pytest.skip(f"{FOLDER.name} is not there: benchmarks/peers/environment.py makes it")
    ours = Ours(DOT)
    ours.load()
    with started(PEERS[name], DOT) as peer:
        theirs = peer.ask(f"losses {STEPS}")["losses"]
    np.testing.assert_allclose(ours.losses(STEPS), theirs, rtol=2e-6)


def test_batches_when_made_twice_then_are_the_same_and_within_their_tables() -> None:
    for first, second in zip(batches(DOT), batches(DOT), strict=True):
        np.testing.assert_array_equal(first.ids, second.ids)
        np.testing.assert_array_equal(first.dense, second.dense)
        assert first.ids.size == first.lengths.sum()
        ends = np.cumsum(first.lengths.sum(axis=1))
        for rows, ids in zip(DOT.num_rows, np.split(first.ids, ends[:-1]), strict=True):
            assert ids.min() >= 0
            assert ids.max() < rows


def test_rows_of_upper_triangle_pair_the_same_vectors() -> None:
    vectors = np.random.default_rng(0).random((DOT.num_vectors, DOT.dim))
    products = vectors @ vectors.T
    lower, upper = products[np.tril_indices(4, -1)], products[np.triu_indices(4, 1)]
    x = np.arange(DOT.dim)
    np.testing.assert_array_equal(np.concatenate([x, lower])[rows_of_upper_triangle(DOT)], np.concatenate([x, upper]))


def test_dense_flops_count_three_products_a_weight_but_two_at_the_dense_features() -> None:
    # Bottom 5-16-8, top (8 + 6 pairs)-16-1; 64 samples, an addition and a multiplication each.
    assert dense_flops(DOT) == 2 * 64 * (2 * 5 * 16 + 3 * (16 * 8 + 14 * 16 + 16))
    # Two cross layers of 32-4 and 4-32; the top takes 32.
    assert dense_flops(CROSS) == 2 * 64 * (2 * 5 * 16 + 3 * (16 * 8 + 4 * 32 * 4 + 32 * 16 + 16))


def test_table_bytes_count_each_id_once_and_each_distinct_row_twice() -> None:
    batch = batches(DOT)[0]
    ends = np.cumsum(batch.lengths.sum(axis=1))
    distinct = sum(len(np.unique(ids)) for ids in np.split(batch.ids, ends[:-1]))
    assert table_bytes(DOT, batch) == (64 * 7 + 2 * distinct) * 8 * 4
    rowwise = dataclasses.replace(DOT, optimizer="rowwise_adagrad")
    assert table_bytes(rowwise, batch) - table_bytes(DOT, batch) == 2 * distinct * 4
