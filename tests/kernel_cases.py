"""Inputs for the kernels inside few fixed shapes, and what numpy says of them, in float64 or float32.

Letters: n ids, G bags, R rows, w columns.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

NUM_IDS, NUM_BAGS, NUM_ROWS = 96, 24, 96
WIDTHS = (8, 16, 32, 64, 128, 384)
# What a row that does not exist may look like.
NOWHERE = (-1, -(2**31), NUM_ROWS, 2**31 - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch for the kernels."""

    rows: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def bags(self) -> np.ndarray:
        """Bag of each id that has one."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


@st.composite
def batches(draw: st.DrawFn, *, longest_bag: int = 9) -> Batch:
    """Bags of any length, empty ones among them; rows equal, distinct, Zipf, on one line, or none at all."""
    lengths = np.array(draw(st.lists(st.integers(0, longest_bag), min_size=NUM_BAGS, max_size=NUM_BAGS)))
    ends = np.minimum(np.cumsum(lengths), NUM_IDS)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["uniform", "equal", "distinct", "zipf", "neighbours", "nowhere"]))
    match kind:
        case "uniform":
            rows = random.integers(0, NUM_ROWS, NUM_IDS)
        case "equal":
            rows = np.full(NUM_IDS, random.integers(NUM_ROWS))
        case "distinct":
            rows = random.permutation(NUM_ROWS)[:NUM_IDS]
        case "zipf":
            rows = np.minimum(random.zipf(1.3, NUM_IDS), NUM_ROWS) - 1
        case "neighbours":
            rows = random.integers(0, 4, NUM_IDS)
        case "nowhere":
            rows = np.where(random.random(NUM_IDS) < 0.5, random.choice(NOWHERE, NUM_IDS), random.integers(0, NUM_ROWS))
    return Batch(
        rows=rows.astype(np.int32),
        offsets=np.concatenate([[0], ends]).astype(np.int32),
        weights=random.normal(size=NUM_IDS).astype(np.float32),
    )


def table_of(width: int, *, seed: int = 0, dtype=np.float32) -> np.ndarray:
    """Rows, [R, w]."""
    return np.asarray(np.random.default_rng(seed).normal(size=(NUM_ROWS, width)).astype(jnp.dtype(dtype)))


def lines_of(rows: np.ndarray):
    """The same numbers as a line store of 512 bytes a line."""
    return jnp.asarray(rows.reshape(-1, 512 // rows.dtype.itemsize))


def pooled(table: np.ndarray, ids: Batch, weights: np.ndarray | None, dtype=np.float64) -> np.ndarray:
    """Sums of bags, one id after the other, in a dtype."""
    result = np.zeros((len(ids.lengths), table.shape[1]), dtype)
    for i, bag in enumerate(ids.bags):
        if 0 <= ids.rows[i] < len(table):
            vector = table[ids.rows[i]].astype(dtype)
            result[bag] += vector if weights is None else vector * weights[i].astype(dtype)
    return result
