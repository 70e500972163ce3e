"""What is known of an update while its kernel is traced, and the memory of a subcore that it works in.

Letters: C items of a chunk, U units of a block, L lanes of a vector, m lines of a unit, h scalars of a slot.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu.lines import LANES, RowShape
from pallas_kernels.row_optimizers import STATISTICS_BLOCK
from pallas_kernels.sparsecore.work import bounds_size
from pallas_kernels.traced_rules import TracedRule

# Chunks whose items are in memory: the one being summed, the next, the one on its way; a power of two.
CHUNKS_HELD = 4
# Semaphores: of items, of gradients (two), of lines on their way in and out, of scalars.
WORDS, GRADIENTS, LINES_IN, LINES_OUT, SCALARS = 0, 1, 3, 4, 5
_NUM_SEMAPHORES = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareCall:
    """What is known of a call while it is traced.

    Attributes:
        shape: How rows lie on lines.
        rule: The rule, traced for vectors of L lanes, scalars being repeated.
        lanes: L.
        chunk: C.
        block: U.
        fields: Names of an item's fields, see `work.Work.words`.
        scalars_of_slot: h.
        workers: Vector subcores of the device.
        subcores: Vector subcores of a core.
        shares: Shares of the work; a subcore takes one or several.
        only_statistics: Whether sums over rows are asked for, and nothing is to be changed.
        one_by_one: Whether lines are copied one by one: interpret mode has no indirect copies.
    """

    shape: RowShape
    rule: TracedRule
    lanes: int
    chunk: int
    block: int
    fields: tuple[str, ...]
    scalars_of_slot: int
    workers: int
    subcores: int
    shares: int
    only_statistics: bool
    one_by_one: bool

    @property
    def num_elements(self) -> int:
        """Stores of elements: weights and elementwise state."""
        return 1 + len(self.rule.optimizer.element_state)

    @property
    def num_scalars(self) -> int:
        """Stores of row-wise state."""
        return len(self.rule.optimizer.row_state)

    @property
    def statistics_of_row(self) -> int:
        """Lanes that the partial sums of one row take."""
        return self.num_blocks * self.rule.num_statistics

    @property
    def num_blocks(self) -> int:
        """Blocks of columns that are summed apart."""
        return max(1, self.shape.width // STATISTICS_BLOCK)

    def scratch(self) -> dict[str, Any]:
        """The memory of a subcore that `update_share` works in."""
        m, chunk, block = self.shape.segments_per_row, self.chunk, self.block
        return {
            "bounds": pltpu.VMEM((2 * bounds_size(self.shares),), jnp.int32),
            "words": pltpu.VMEM((CHUNKS_HELD * len(self.fields) * chunk + LANES,), jnp.int32),
            "sources": pltpu.VMEM((2 * m, chunk + LANES), jnp.int32),
            "gradients": pltpu.VMEM((2 * m * chunk, LANES), jnp.float32),
            "units": pltpu.VMEM((LANES,), jnp.int32),
            "lines": pltpu.VMEM((2 * m, block + LANES), jnp.int32),
            "elements": [pltpu.VMEM((2 * m * block, LANES), jnp.float32) for _ in range(self.num_elements)],
            "places": pltpu.VMEM((2, chunk + LANES), jnp.int32),
            "scalars": [pltpu.VMEM((2 * chunk + LANES,), jnp.float32) for _ in range(self.num_scalars)],
            "hyper": pltpu.VMEM((self.scalars_of_slot * self.lanes,), jnp.float32),
            "sum": pltpu.VMEM((m * LANES,), jnp.float32),
            "summands": [pltpu.VMEM(((m + 1) * LANES,), jnp.float32) for _ in range(self.rule.num_statistics)],
            "statistics": [pltpu.VMEM((2 * block, LANES), jnp.float32)] * self.only_statistics,
            "ranks": [pltpu.VMEM((2, block + LANES), jnp.int32)] * self.only_statistics,
            "semaphores": pltpu.SemaphoreType.DMA((_NUM_SEMAPHORES,)),
        }
