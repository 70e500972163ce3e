"""What a training step's time and memory are made of: stages, quantities, settings of the terms, and the dense part.

Letters: T stages.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from sharding.codec import Codec

STAGES = (
    "ids inside",
    "ids between",
    "lookup",
    "forward inside",
    "forward between",
    "backward inside",
    "backward between",
    "statistics inside",
    "statistics between",
    "update",
    "all-reduce inside",
    "all-reduce between",
    "dense",
    "latency",
)
# Quantities of a device in one group: ids that it receives, vectors a sample that it pools for all devices, distinct
# rows that it updates, rows that it has room to send home (summed over who may ask), ids of rows that are cut into
# column slices; then, where the samples live: vectors a sample, and ids.
QUANTITIES = ("ids", "vectors", "distinct", "sent_rows", "cut_ids", "home_vectors", "home_ids")
IDS, VECTORS, DISTINCT, SENT_ROWS, CUT_IDS, HOME_VECTORS, HOME_IDS = range(len(QUANTITIES))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostSettings:
    """What a step's time is made of. Each term is multiplied by its number here; 0 leaves it out.

    Attributes:
        ids: Ids to the owners of their rows.
        lookup: Rows read and vectors written, at HBM bandwidth.
        forward: Vectors home.
        backward: Gradients of vectors back to the owners.
        statistics: The second pass of rules that need whole-row statistics, for tables in column slices.
        update: Ids sorted, rows and optimizer state read and written, at HBM bandwidth.
        all_reduce: Gradients of the dense part.
        dense: The dense part's arithmetic.
        latency: Start of each exchange.
        overlap: Share of the exchanges that can hide behind the dense part's arithmetic.
        dense_efficiency: Share of the peak arithmetic that the dense part reaches.
        bandwidth_efficiency: Share of memory and link bandwidth that is reached.
        forward_codec: How vectors travel home (`sharding.codec`).
        backward_codec: How their gradients travel back.
    """

    ids: float = 1.0
    lookup: float = 1.0
    forward: float = 1.0
    backward: float = 1.0
    statistics: float = 1.0
    update: float = 1.0
    all_reduce: float = 1.0
    dense: float = 1.0
    latency: float = 1.0
    overlap: float = 0.0
    dense_efficiency: float = 0.5
    bandwidth_efficiency: float = 0.8
    forward_codec: Codec = "float32"
    backward_codec: Codec = "float32"

    def multipliers(self) -> Float[np.ndarray, " T"]:
        """The multiplier of each stage."""
        return np.array([getattr(self, stage.split()[0].replace("-", "_")) for stage in STAGES])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseLoad:
    """The dense part, which is data-parallel.

    Attributes:
        parameters: Numbers whose gradients are all-reduced.
        gradient_bytes: Bytes of each of these on its way.
        flops_per_sample: Arithmetic of forward and backward for one sample.
        memory_bytes: Bytes on each device: parameters, gradients, optimizer state, activations.
        dtype: Dtype of its matrix products.
    """

    parameters: int = 0
    gradient_bytes: int = 4
    flops_per_sample: float = 0.0
    memory_bytes: int = 0
    dtype: str = "float32"
