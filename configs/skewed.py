"""Tables of models that are known by totals and means only: skewed sizes that meet them, the same on every machine."""

import dataclasses
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from dlrm_jax.config import DataConfig, EmbeddingConfig, TableConfig
from dlrm_jax.data.card import DatasetCard, DenseColumn, SparseColumn, SplitSummary

BATCH_SIZE = 65536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skewed:
    """What is known of a model's tables, and what is chosen.

    Attributes:
        name: Name of the model's config.
        num_parameters: Of all tables together.
        tables_of_dim: Number of tables by dim.
        pooling_factor: Mean ids in a bag, over all features.
        num_dense: Dense features.
        row_sigma: Standard deviation of the logarithm of a table's rows, which are log-normal.
        pooling_sigma: The same of a feature's pooling factor.
    """

    name: str
    num_parameters: int
    tables_of_dim: Mapping[int, int]
    pooling_factor: float
    num_dense: int
    row_sigma: float
    pooling_sigma: float = 1.0

    @property
    def num_tables(self) -> int:
        """Tables; each has one feature."""
        return sum(self.tables_of_dim.values())

    def dims(self) -> list[int]:
        """Dim of each table."""
        dims = [dim for dim, count in self.tables_of_dim.items() for _ in range(count)]
        return [dims[i] for i in _shuffled(self.num_tables, seed=0)]

    def card(self) -> DatasetCard:
        """The card of a dataset that does not exist."""
        rows = _log_normal(self.num_tables, self.row_sigma)
        rows *= self.num_parameters / np.dot(rows, self.dims())
        factors = _log_normal(self.num_tables, self.pooling_sigma)[_shuffled(self.num_tables, seed=1)]
        # No bag is without ids; the others shrink by what that adds.
        for _ in range(10):
            factors = np.maximum(1.0, factors * self.pooling_factor / factors.mean())
        return DatasetCard(
            name=self.name,
            dense=tuple(DenseColumn(name=f"dense_{i}") for i in range(self.num_dense)),
            sparse=tuple(
                SparseColumn(
                    name=f"sparse_{i}",
                    num_rows=max(1, round(rows[i])),
                    bag=True,
                    # Chosen: the longest bag has four times as many ids as the mean one.
                    max_pooling_factor=round(4 * factors[i]),
                    mean_pooling_factor=round(float(factors[i]), 2),
                )
                for i in range(self.num_tables)
            ),
            splits={
                split: SplitSummary(num_samples=steps * BATCH_SIZE, positive_rate=0.5)
                for split, steps in (("train", 1000), ("validation", 10))
            },
        )

    def embedding(self) -> EmbeddingConfig:
        """Tables in float16, stochastically rounded, with row-wise AdaGrad."""
        tables = {
            dim: TableConfig(dim=dim, dtype="float16", rounding="stochastic", optimizer="rowwise_adagrad")
            for dim in self.tables_of_dim
        }
        default = max(self.tables_of_dim, key=lambda dim: self.tables_of_dim[dim])
        return EmbeddingConfig(
            default=tables[default],
            tables={f"sparse_{i}": tables[dim] for i, dim in enumerate(self.dims()) if dim != default},
        )

    def data(self) -> DataConfig:
        """Random batches."""
        return DataConfig(path=None, batch_size=BATCH_SIZE, eval_batch_size=BATCH_SIZE)


def _log_normal(count: int, sigma: float) -> np.ndarray:
    """Quantiles, so that totals have no luck in them; rising."""
    normal = NormalDist()
    return np.exp([sigma * normal.inv_cdf((i + 0.5) / count) for i in range(count)])


def _shuffled(count: int, *, seed: int) -> np.ndarray:
    # The old generator: its numbers are promised not to change with numpy's versions.
    return np.random.RandomState(seed).permutation(count)
