"""The batches of host_kernels.py, for both environments: the standard library and numpy only."""

import dataclasses

import numpy as np

NUM_TABLES, NUM_ROWS, BATCH_SIZE = 26, 200_000, 2048
LEARNING_RATE, EPS = 0.01, 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Width of the tables, ids of a bag, and how ids are drawn: "uniform" or "zipf"."""

    width: int
    pooling_factor: int
    ids: str

    @property
    def num_ids(self) -> int:
        """Ids of a batch."""
        return NUM_TABLES * BATCH_SIZE * self.pooling_factor


def batch_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Ids within their tables, table after table, and the gradient of each bag, [tables, samples, width]."""
    random = np.random.default_rng(0)
    if case.ids == "uniform":
        ids = random.integers(0, NUM_ROWS, case.num_ids)
    else:
        # Some rows take many ids, and lie anywhere in their table.
        ids = (random.zipf(1.2, case.num_ids) % NUM_ROWS) * 7919 % NUM_ROWS
    gradients = random.normal(size=(NUM_TABLES, BATCH_SIZE, case.width)).astype(np.float32)
    return ids.astype(np.int64), gradients
