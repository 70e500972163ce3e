"""One workload of peers.py as numbers: model, batches and initial weights, the same on every side.

Standard library and numpy only, since every environment imports it.

Letters: B samples, F features, n rows, D dimension, P pairs of vectors.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

# Distinct batches: enough that rows come back within the ten steps of the parity check, few enough to keep.
NUM_BATCHES = 4
# Initial rows are uniform in [-this, this], over the ids of a bag: large enough that a wrong row shows in the loss.
TABLE_SCALE = 0.1
ROWS_OF_BLOCK = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A workload.

    Attributes:
        name: Its name.
        num_rows: Rows of each table; each table has one feature.
        pooling_factors: Ids in each bag of each feature.
        dim: Columns of all tables.
        num_dense: Dense features.
        bottom_mlp: Widths of the bottom MLP, the last being `dim`.
        top_mlp: Widths of the top MLP, the last being 1.
        cross_layers: Low-rank cross layers (DCN V2); 0 for the dot products of all pairs of vectors.
        cross_rank: Their rank.
        batch_size: Samples of a step.
        ids: How ids are drawn: "uniform", or "zipf" with exponent 1.2.
        optimizer: Of the tables: "sgd" or "rowwise_adagrad". The dense part always has SGD.
        learning_rate: Of the dense part.
        table_learning_rate: Of the tables.
        eps: Of row-wise AdaGrad.
        dtype: Of the operands of matrix products: "float32" or "bfloat16". Weights, sums and tables are float32.
    """

    name: str
    num_rows: tuple[int, ...]
    pooling_factors: tuple[int, ...]
    dim: int
    num_dense: int
    bottom_mlp: tuple[int, ...]
    top_mlp: tuple[int, ...]
    cross_layers: int
    cross_rank: int
    batch_size: int
    ids: str
    optimizer: str
    learning_rate: float = 0.01
    table_learning_rate: float
    eps: float = 1e-8
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features, and of their tables."""
        return tuple(f"feature_{number}" for number in range(len(self.num_rows)))

    @property
    def num_vectors(self) -> int:
        """Vectors of a sample that interact: its embeddings and the bottom MLP's output."""
        return len(self.num_rows) + 1

    @property
    def interaction_width(self) -> int:
        """Width of what the top MLP is given."""
        if self.cross_layers:
            return self.num_vectors * self.dim
        return self.dim + self.num_vectors * (self.num_vectors - 1) // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseBatch:
    """A batch.

    Attributes:
        dense: [B, num_dense], float32.
        ids: Ids of all bags, int32: feature by feature, then sample by sample.
        lengths: Ids of each bag, [F, B], int32.
        label: 0 or 1, [B], float32.
    """

    dense: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    label: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseWeights:
    """Initial weights of the dense part. Kernels are [inputs, outputs].

    Attributes:
        bottom: Kernel and bias of each layer.
        cross: Of each cross layer: V, U and bias, where the layer adds `x_0 * ((x V) U + bias)` to x.
        top: Kernel and bias of each layer. The first takes the bottom MLP's output, then either the products of
            vectors i > j in the order (1, 0), (2, 0), (2, 1), ..., or what the cross layers give.
    """

    bottom: list[tuple[np.ndarray, np.ndarray]]
    cross: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    top: list[tuple[np.ndarray, np.ndarray]]


def batches(case: Case) -> list[CaseBatch]:
    """Makes the batches that training goes through in turn."""
    made = []
    for number in range(NUM_BATCHES):
        random = np.random.default_rng((1, number))
        ids = []
        for rows, factor in zip(case.num_rows, case.pooling_factors, strict=True):
            count = case.batch_size * factor
            if case.ids == "uniform":
                drawn = random.integers(0, rows, count)
            else:
                # The frequent rows lie anywhere in their table.
                drawn = (random.zipf(1.2, count) % rows) * 7919 % rows
            ids.append(drawn.astype(np.int32))
        factors = np.array(case.pooling_factors, np.int32)
        made.append(
            CaseBatch(
                dense=random.random((case.batch_size, case.num_dense), np.float32),
                ids=np.concatenate(ids),
                lengths=np.repeat(factors[:, None], case.batch_size, axis=1),
                label=random.integers(0, 2, case.batch_size).astype(np.float32),
            )
        )
    return made


def table_blocks(case: Case, number: int) -> Iterator[tuple[int, np.ndarray]]:
    """Initial rows of a table, in blocks, so that no side needs a second copy of a large table.

    Args:
        case: The workload.
        number: Number of the table.

    Yields:
        Number of the first row, and the rows.
    """
    random = np.random.Generator(np.random.SFC64((2, number)))
    scale = np.float32(2 * TABLE_SCALE / case.pooling_factors[number])
    for first in range(0, case.num_rows[number], ROWS_OF_BLOCK):
        count = min(ROWS_OF_BLOCK, case.num_rows[number] - first)
        yield first, (random.random((count, case.dim), np.float32) - np.float32(0.5)) * scale


def dense_weights(case: Case) -> DenseWeights:
    """Draws the initial weights of the dense part: Glorot's normal for kernels, small biases."""
    random = np.random.default_rng(3)

    def kernel(inputs: int, outputs: int) -> np.ndarray:
        return random.normal(0, math.sqrt(2 / (inputs + outputs)), (inputs, outputs)).astype(np.float32)

    def bias(outputs: int) -> np.ndarray:
        return random.normal(0, 0.01, outputs).astype(np.float32)

    def layers(inputs: int, widths: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(kernel(n, m), bias(m)) for n, m in itertools.pairwise((inputs, *widths))]

    width, rank = case.interaction_width, case.cross_rank
    return DenseWeights(
        bottom=layers(case.num_dense, case.bottom_mlp),
        cross=[(kernel(width, rank), kernel(rank, width), bias(width)) for _ in range(case.cross_layers)],
        top=layers(width, case.top_mlp),
    )


def rows_of_upper_triangle(case: Case) -> np.ndarray:
    """Rows of the first top kernel for a side whose pairs of vectors come as (0, 1), (0, 2), ..., (1, 2), ..."""
    lower = {pair: place for place, pair in enumerate(zip(*np.tril_indices(case.num_vectors, -1), strict=True))}
    places = [lower[j, i] for i, j in zip(*np.triu_indices(case.num_vectors, 1), strict=True)]
    return np.concatenate([np.arange(case.dim), case.dim + np.array(places)])


def dense_flops(case: Case) -> int:
    """Floating-point operations of a step's matrix products, forward and backward, the interaction left out."""
    widths = [(case.num_dense, *case.bottom_mlp), (case.interaction_width, *case.top_mlp)]
    products = [n * m for of_mlp in widths for n, m in itertools.pairwise(of_mlp)]
    products += [case.interaction_width * case.cross_rank] * (2 * case.cross_layers)
    # Three products of two operations for each weight; nobody asks for the gradient of the dense features.
    return 2 * case.batch_size * (3 * sum(products) - case.num_dense * case.bottom_mlp[0])


def table_bytes(case: Case, batch: CaseBatch) -> int:
    """Bytes that a step must move to and from the tables.

    Each id's row is read once for the lookup; each distinct row is read and written by the update, with its state.
    """
    bags = np.repeat(np.arange(case.batch_size * len(case.num_rows)) // case.batch_size, batch.lengths.reshape(-1))
    distinct = len(np.unique(bags.astype(np.int64) << 32 | batch.ids))
    state = 4 if case.optimizer == "rowwise_adagrad" else 0
    return len(batch.ids) * case.dim * 4 + distinct * 2 * (case.dim * 4 + state)
