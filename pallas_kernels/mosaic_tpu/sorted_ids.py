"""The ids of an update, sorted by row, for the kernels of TPUs: TensorCore and SparseCores.

Letters: n ids, G bags.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.ids import Ids
from pallas_kernels.target import current_target

# By the names that JAX has for them. Others sort on SparseCores, if XLA is told to (`sharding.compiler_options`).
_WITHOUT_SPARSECORES = ("TPU v4", "TPU v5 lite", "TPU v5e")


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
    num_slots: int,
) -> SortedIds:
    """Sorts the ids by row, stably.

    A TensorCore's sort of a million ids takes half a minute to compile, with each array that it moves some more: so it
    moves as few as can be. SparseCores' sorts take a second; they sort by one key only.

    Args:
        ids: The ids.
        statistics: As in `pallas_kernels.sparse_update`.
        more: Further fields, alike for all ids of a row.
        num_rows: Rows of the store.
        num_slots: Slots.

    Returns:
        The ids. Those of one row in one bag may come in any order if they have neither weights nor statistics: nothing
        but `order` tells them apart.
    """
    number = jnp.arange(ids.rows.shape[0], dtype=jnp.int32)
    keys, bags = ids.sort_keys(num_rows)
    on_tensorcore = current_target().device_kind.startswith(_WITHOUT_SPARSECORES)
    slot_bits = (num_slots - 1).bit_length()
    slot_mask = (1 << slot_bits) - 1
    in_one = on_tensorcore and ids.offsets.shape[0] << slot_bits <= 2**31
    fields = {"bag": (bags << slot_bits) | (ids.slots & slot_mask)} if in_one else {"bag": bags, "slot": ids.slots}
    if ids.weights is not None:
        fields["weight"] = ids.weights
    if statistics is not None:
        fields |= {f"statistic {k}": statistics[:, k] for k in range(statistics.shape[1])}
    fields |= more or {}
    # A stable sort moves the number of each id, too. Bags ascend with the ids, so they can stand in for it.
    by_bag = on_tensorcore and ids.weights is None and statistics is None
    sorted_rows, *values, order = jax.lax.sort(
        (keys, *fields.values(), number), num_keys=2 if by_bag else 1, is_stable=not by_bag
    )
    fields = dict(zip(fields, values, strict=True))
    if in_one:
        fields |= {"bag": fields["bag"] >> slot_bits, "slot": fields["bag"] & slot_mask}
    return SortedIds(sorted_rows, order, fields, jnp.sum(keys < num_rows, dtype=jnp.int32))
