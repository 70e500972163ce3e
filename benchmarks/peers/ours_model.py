"""This project: the steps that the training loop runs, with its look-ahead, its checks and its metrics.

python -m benchmarks.peers.ours_model CASE STARTED
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.case import Case, CaseBatch, batches, dense_weights, table_blocks
from benchmarks.peers.repeated_steps import RepeatedSteps
from benchmarks.peers.serve import MATMUL_SIZE, serve
from dlrm_jax.config import Config, DataConfig, DenseOptimizerConfig, EmbeddingConfig, TableConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary
from dlrm_jax.host_memory import keep_freed_memory
from dlrm_jax.model import ModelConfig
from dlrm_jax.recommender import Recommender
from dlrm_jax.sources import card_of
from pallas_kernels.linear import linear
from sharding import KeyedJagged
from sharding.compiler_options import compiler_options


class Ours:
    """Trains a case; see `serve.Side`."""

    def __init__(self, case: Case):
        self._case = case
        config = config_of(case)
        self._recommender = recommender = Recommender(config, card_of(config))
        if recommender.features != case.features:
            raise RuntimeError(f"features are {recommender.features}, but the weights are in order {case.features}")
        batches_of_case = [_batch_of(batch, case.features) for batch in batches(case)]
        room = recommender.first_capacities(case.batch_size, batches_of_case[0].ids.capacity)
        self._repeated = RepeatedSteps(recommender, batches_of_case, room)
        self._operands = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), case.dtype), jnp.ones((MATMUL_SIZE, MATMUL_SIZE))
        product = jax.jit(
            lambda x, kernel: linear(x, kernel, None, False), compiler_options=compiler_options("cpu", "cpu")
        )
        self._product = product.lower(*self._operands).compile()
        jax.block_until_ready(self._repeated.replayed.state)

    def load(self) -> None:
        """See `serve.Side`."""
        steps = self._repeated.replayed
        state, weights = steps.state, dense_weights(self._case)
        named: dict[str, np.ndarray] = {}
        for mlp, layers in (("bottom", weights.bottom), ("top", weights.top)):
            for number, (kernel, bias) in enumerate(layers):
                prefix = f"['{mlp}']['layers'][{number}]"
                named |= {f"{prefix}['kernel'].value": kernel, f"{prefix}['bias'].value": bias}
        for number, (v, u, bias) in enumerate(weights.cross):
            named[f"['cross']['down'][{number}]['kernel'].value"] = v
            up = f"['cross']['up'][{number}]"
            named |= {f"{up}['kernel'].value": u, f"{up}['bias'].value": bias}
        dense_params = jax.tree_util.tree_map_with_path(
            lambda path, held: jax.device_put(named[jax.tree_util.keystr(path)], held.sharding), state.dense_params
        )
        tables, held = self._recommender.tables, state.tables
        # The steps' own reference would keep the arrays that are given away here.
        steps.state = dataclasses.replace(state, dense_params=dense_params)
        del state
        for number, name in enumerate(self._case.features):
            for first, rows in table_blocks(self._case, number):
                held = tables.write_rows(held, name, first, rows)
        steps.state = dataclasses.replace(steps.state, tables=held)

    def losses(self, steps: int) -> list[float]:
        """See `serve.Side`."""
        losses = []
        for _ in range(steps):
            self._repeated.window = self._repeated.replayed.new_window()
            self.run(1)
            losses.append(self._repeated.window.compute().log_loss)
        return losses

    def run(self, steps: int) -> None:
        """See `serve.Side`."""
        self._repeated.run(steps)

    def matmul(self) -> None:
        """See `serve.Side`."""
        jax.block_until_ready(self._product(*self._operands))


def config_of(case: Case) -> Config:
    """The config of a case."""
    bags = list(zip(case.features, case.num_rows, case.pooling_factors, strict=True))
    return Config(
        name=case.name,
        data=DataConfig(path=None, batch_size=case.batch_size),
        embedding=EmbeddingConfig(
            default=TableConfig(
                dim=case.dim,
                optimizer="sgd" if case.optimizer == "sgd" else "rowwise_adagrad",
                learning_rate=case.table_learning_rate,
                eps=case.eps,
            )
        ),
        model=ModelConfig(
            bottom_mlp=case.bottom_mlp,
            top_mlp=case.top_mlp,
            interaction="dcnv2" if case.cross_layers else "dot",
            cross_layers=case.cross_layers or 1,
            cross_rank=case.cross_rank or 1,
            dtype=case.dtype,
        ),
        dense_optimizer=DenseOptimizerConfig(name="sgd", learning_rate=case.learning_rate),
        stated=DatasetCard(
            name=case.name,
            dense=tuple(DenseColumn(name=f"dense_{number}") for number in range(case.num_dense)),
            sparse=tuple(
                SparseColumn(
                    name=name,
                    num_rows=rows,
                    bag=factor > 1,
                    max_pooling_factor=factor,
                    mean_pooling_factor=float(factor),
                )
                for name, rows, factor in bags
            ),
            splits={"train": SplitSummary(num_samples=2**20, positive_rate=0.5)},
        ),
    )


def _batch_of(batch: CaseBatch, features: tuple[str, ...]) -> Batch:
    return Batch(
        dense=batch.dense,
        ids=KeyedJagged(values=batch.ids, lengths=batch.lengths, features=features),
        label=batch.label,
        weight=np.ones_like(batch.label),
    )


if __name__ == "__main__":
    # As scripts/train.py does.
    keep_freed_memory()
    serve(Ours)
