"""Ids: those of a batch, at the device that holds their rows.

Letters: n ids, G bags.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels.scans import bags_of_ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ids:
    """The ids of a batch as an update wants them, in canonical order: feature, sample, position in the bag.

    Attributes:
        rows: Row that each id names, of the store seen as ``[-1, width]``. A row outside the store is ignored.
        slots: Slot of each id, see `Slots`. Equal rows have equal slots.
        offsets: Bags, as in `pooled_lookup`.
        weights: One weight for each id, or None for 1.
        logical_rows: Row of the table that each id names, as one or two 32-bit words, low word first: with the step
            and the seed it determines the random bits of rounding. None where no bits are drawn.
    """

    rows: Int32[Any, " n"]
    slots: Int32[Any, " n"]
    offsets: Int32[Any, " G+1"]
    weights: Float[Any, " n"] | None = None
    logical_rows: UInt32[Any, "n words"] | None = None

    def given_logical_rows(self) -> UInt32[Array, "n words"]:
        """The logical rows; ValueError where there are none."""
        if self.logical_rows is None:
            raise ValueError("stochastic rounding needs the logical row of each id, but the ids have none")
        return self.logical_rows

    def sort_keys(self, num_rows: int) -> tuple[Int32[Array, " n"], Int32[Array, " n"]]:
        """What an update sorts the ids by, and their bags.

        Args:
            num_rows: Rows of the store.

        Returns:
            The row of each id, ``num_rows`` where it lies outside the store or the id behind the last bag; and each
            id's bag.
        """
        rows, num_bags = self.rows, self.offsets.shape[0] - 1
        bags = bags_of_ids(self.offsets, rows.shape[0])
        valid = (rows >= 0) & (rows < num_rows) & (bags < num_bags)
        return jnp.where(valid, rows, num_rows), bags
