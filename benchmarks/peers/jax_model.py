"""JAX as a user would write it first: tables are parameters with dense gradients, and optax updates everything.

python -m benchmarks.peers.jax_model CASE STARTED
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peers.case import Case, CaseBatch, dense_weights, table_blocks
from benchmarks.peers.serve import MATMUL_SIZE, StepByStep, serve


def initial_params(case: Case) -> Any:
    """Parameters, the tables zero."""
    weights = dense_weights(case)
    dense = {"bottom": weights.bottom, "cross": weights.cross, "top": weights.top}
    return {"tables": [jnp.zeros((rows, case.dim)) for rows in case.num_rows], **jax.tree.map(jnp.asarray, dense)}


def loss_of(case: Case) -> Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]:
    """The loss of a batch: a function of parameters, dense features, ids and labels."""
    batch_size, factors = case.batch_size, case.pooling_factors
    ends = np.cumsum([batch_size * factor for factor in factors])
    pairs = np.tril_indices(case.num_vectors, -1)

    def logits(params: Any, dense: jax.Array, ids: jax.Array) -> jax.Array:
        x = _mlp(params["bottom"], dense, last_relu=True)
        bags = [
            of_feature.reshape(batch_size, factor)
            for of_feature, factor in zip(jnp.split(ids, ends[:-1]), factors, strict=True)
        ]
        pooled = [table[bag].sum(axis=1) for table, bag in zip(params["tables"], bags, strict=True)]
        vectors = jnp.stack([x, *pooled], axis=1)
        if case.cross_layers:
            first = z = vectors.reshape(batch_size, -1)
            for v, u, bias in params["cross"]:
                z = first * ((z @ v) @ u + bias) + z
        else:
            products = jnp.einsum("bid,bjd->bij", vectors, vectors)
            z = jnp.concatenate([x, products[:, pairs[0], pairs[1]]], axis=1)
        return _mlp(params["top"], z, last_relu=False)[:, 0]

    def loss(params: Any, dense: jax.Array, ids: jax.Array, label: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(logits(params, dense, ids), label).mean()

    return loss


class PlainJax(StepByStep):
    """Trains a case; see `serve.Side`."""

    def __init__(self, case: Case):
        super().__init__(case)
        self._case = case
        self._params = initial_params(case)
        optimizer = optax.partition(
            {"tables": optax.sgd(case.table_learning_rate), "dense": optax.sgd(case.learning_rate)},
            {"tables": "tables", "bottom": "dense", "cross": "dense", "top": "dense"},
        )
        self._optimizer_state = optimizer.init(self._params)
        loss = loss_of(case)

        def step(params: Any, state: Any, dense: jax.Array, ids: jax.Array, label: jax.Array) -> Any:
            value, gradients = jax.value_and_grad(loss)(params, dense, ids, label)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        self._compiled_step = jax.jit(step, donate_argnums=(0, 1))
        self._square = jnp.ones((MATMUL_SIZE, MATMUL_SIZE))
        self._product = jax.jit(jnp.matmul).lower(self._square, self._square).compile()

    def load(self) -> None:
        """See `serve.Side`."""
        write = jax.jit(
            lambda table, rows, first: jax.lax.dynamic_update_slice(table, rows, (first, 0)), donate_argnums=0
        )
        for number in range(len(self._case.num_rows)):
            for first, rows in table_blocks(self._case, number):
                self._params["tables"][number] = write(self._params["tables"][number], rows, first)

    def _train(self, batch: CaseBatch) -> jax.Array:
        self._params, self._optimizer_state, loss = self._compiled_step(
            self._params, self._optimizer_state, batch.dense, batch.ids, batch.label
        )
        return loss

    def matmul(self) -> None:
        """See `serve.Side`."""
        jax.block_until_ready(self._product(self._square, self._square))


def _mlp(layers: Any, x: jax.Array, *, last_relu: bool) -> jax.Array:
    for number, (kernel, bias) in enumerate(layers):
        x = x @ kernel + bias
        if last_relu or number + 1 < len(layers):
            x = jax.nn.relu(x)
    return x


if __name__ == "__main__":
    serve(PlainJax)
