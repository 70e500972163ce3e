"""The ids of an update, sorted by row, for the kernels of TPUs: TensorCore and SparseCores.

Letters: n ids, G bags.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.ids import Ids


class SortedIds(NamedTuple):
    """Ids in ascending order of rows, those of one row as they were given; those without a row come last.

    Attributes:
        rows: Row of each; the number of rows in place of rows and bags that do not exist.
        order: Which id it was.
        fields: What goes with it: "bag", "slot", "weight" and "statistic 0", ... where there are any, and the caller's.
        count: How many have a row.
    """

    rows: Int32[Array, " n"]
    order: Int32[Array, " n"]
    fields: dict[str, Array]
    count: Int32[Array, ""]


def sort_ids(
    ids: Ids,
    statistics: Float[Array, "n k"] | None,
    more: Mapping[str, Array] | None = None,
    *,
    num_rows: int,
) -> SortedIds:
    """Sorts the ids by row, stably.

    Args:
        ids: The ids.
        statistics: As in `pallas_kernels.sparse_update`.
        more: Further fields.
        num_rows: Rows of the store.
    """
    number = jnp.arange(ids.rows.shape[0], dtype=jnp.int32)
    keys, bags = ids.sort_keys(num_rows)
    fields = {"bag": bags, "slot": ids.slots}
    if ids.weights is not None:
        fields["weight"] = ids.weights
    if statistics is not None:
        fields |= {f"statistic {k}": statistics[:, k] for k in range(statistics.shape[1])}
    fields |= more or {}
    # By one key: SparseCores sort by no more, and their sorts take a second to compile, others half a minute.
    sorted_rows, order, *values = jax.lax.sort((keys, number, *fields.values()), num_keys=1, is_stable=True)
    count = jnp.sum(keys < num_rows, dtype=jnp.int32)
    return SortedIds(sorted_rows, order, dict(zip(fields, values, strict=True)), count)
