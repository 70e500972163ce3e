"""Storage: bytes of one device under a plan. All devices have arrays of the same shapes, so it is the same on each."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pallas_kernels import xla
from pallas_kernels.implementations import implementation_of
from pallas_kernels.target import Target
from sharding.codec import Codec, code_bytes
from sharding.groups import Group
from sharding.layout import LINE_BYTES, Layout, StoreLayout, state_of_store, store_name
from sharding.tables import TableSpec

_WORD_BYTES = 4
# Capacities have room beyond the mean (`sharding.capacities`).
_SPARE = 1.25
# The ids of the next batch are routed while a batch trains.
_BATCHES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """Bytes of one device.

    Attributes:
        weights: Line stores.
        element_state: Optimizer state of one number an element.
        row_state: Optimizer state of one number a row.
        ids: Ids of the batch that trains and of the next, on their way and as the kernels want them.
        vectors: Pooled vectors and their gradients: of the owner, of the exchange, at home.
        rows: Gradients of single ids, and rows that travel by id.
        dense: The dense part.
        weights_alone: Weights and state that each device has of its own, without the padding to the fullest.
    """

    weights: int
    element_state: int
    row_state: int
    ids: int
    vectors: int
    rows: int
    dense: int
    weights_alone: tuple[int, ...]

    @property
    def stores(self) -> int:
        """Weights and optimizer state: what stays from step to step."""
        return self.weights + self.element_state + self.row_state

    @property
    def buffers(self) -> int:
        """What a step needs beside them."""
        return self.ids + self.vectors + self.rows

    @property
    def total(self) -> int:
        """All of it."""
        return self.stores + self.buffers + self.dense


def bytes_per_row(table: TableSpec, width: int) -> int:
    """Bytes of one stored row of a table with its optimizer state."""
    elements, scalars = state_of_store(store_name(table))
    per_element = sum(jnp.dtype(dtype).itemsize for dtype in (table.dtype, *(array.dtype for array in elements)))
    return width * per_element + sum(jnp.dtype(array.dtype).itemsize for array in scalars)


def _alone(store: StoreLayout) -> Float[np.ndarray, " W"]:
    used = np.zeros(store.num_devices)
    for shard in store.shards:
        used[shard.owners] += shard.rows_per_owner * bytes_per_row(shard.table, shard.width)
    return used


def _words_of_read(codec: Codec, width: int) -> float:
    """Words of a vector that has come, and of its codes."""
    return width if codec == "float32" else width + code_bytes(codec, width) / _WORD_BYTES


def _words_of_sent_row(group: Group, codec: Codec) -> float:
    """Words of a row that travels by id: as it goes out and comes in and, of a code, as it is read."""
    stored, coded = group.width * jnp.dtype(group.dtype).itemsize, code_bytes(codec, group.width)
    return 2 * stored / _WORD_BYTES if stored <= coded else coded / _WORD_BYTES + _words_of_read(codec, group.width)


def _vectors_per_id(group: Group, store: StoreLayout, target: Target, weighted: bool) -> float:
    """Float32 vectors of a row's width that the update of a group, which lies in a store, holds for each id."""
    table = group.table
    if table.rule is None:
        return 0.0
    kernels = implementation_of(
        None,
        dtype=jnp.dtype(group.dtype),
        width=group.width,
        optimizer=table.rule,
        storage_rounding=table.rounding,
        largest_store=store.largest_array,
        target=target,
    )
    # The others write sums of blocks of long runs alone.
    return xla.VECTORS_PER_ID + weighted if kernels is xla else 1.0 / xla.RUN_BLOCK


def storage_of(
    layout: Layout,
    quantities: Sequence[Mapping[str, float]],
    *,
    samples_per_device: int,
    ids_per_sample: float,
    weighted: bool,
    dense_bytes: int,
    target: Target,
    codecs: tuple[Codec, Codec] = ("float32", "float32"),
) -> Storage:
    """Counts bytes.

    Stores are exact. Buffers are those of one direction, the larger of forward and backward: of each group, what the
    owner pools for all devices and the exchange's buffer, of the same size or of its codes. Groups are updated one
    after the other: of the largest, the vectors an id that the kernel holds; rows that travel by id bring the gradients
    of all groups first.

    Args:
        layout: The layout.
        quantities: `sharding.cost.QUANTITIES` of the fullest device, for each group.
        samples_per_device: Samples of one device.
        ids_per_sample: Mean ids of all features in a sample.
        weighted: Whether ids have weights.
        dense_bytes: Bytes of the dense part.
        target: The devices, which say what kernels there are.
        codecs: How vectors travel, forward and backward.
    """
    forward, backward = codecs
    weights = element_state = row_state = 0
    alone = np.zeros(layout.num_devices)
    for store in layout.stores:
        weights += store.lines_per_device * LINE_BYTES
        element_state += sum(store.state_lines(array.dtype) for array in store.element_state) * LINE_BYTES
        row_state += store.scalar_lines_per_device * LINE_BYTES * len(store.row_state)
        alone += _alone(store)
    batch = samples_per_device * layout.num_devices
    words = 1 + weighted
    ids = samples_per_device * ids_per_sample * words
    vectors = rows = sent_back = 0.0
    for group, most in zip(layout.groups, quantities, strict=True):
        # Out, in, and as the kernels want them: row, slot, logical row; offsets of bags.
        travelling = 2 * most["ids"] * (1 + words)
        held = most["ids"] if group.family != "local" else most["home_ids"] * layout.num_devices
        ids += travelling + held * (2 + words) + batch * most["vectors"]
        pooled = batch * most["vectors"]
        exchanged = max(code_bytes(codec, group.width) for codec in codecs) / _WORD_BYTES
        vectors += pooled * (group.width + exchanged)
        if group.family == "local" and layout.num_devices > 1 and group.table.rule is not None:
            # Every device gets the gradients of all, and puts them in the order of bags.
            vectors += batch * most["home_vectors"] * (group.width + exchanged)
        rows_sent = most["sent_rows"] * _words_of_sent_row(group, forward)
        if group.family == "rows_by_id":
            sent_back += most["ids"] * _words_of_read(backward, group.width)
        rows = max(
            rows, _vectors_per_id(group, layout.store_of(group), target, weighted) * held * group.width, rows_sent
        )
        # At home: the vectors, and their gradients.
        home = sum(lookup.vectors * lookup.shard.num_columns for lookup in group.lookups)
        vectors += 2 * samples_per_device * home
    return Storage(
        weights=weights,
        element_state=element_state,
        row_state=row_state,
        ids=int(_BATCHES * _SPARE * ids * _WORD_BYTES),
        vectors=int(vectors * _WORD_BYTES),
        rows=int(_SPARE * (rows + sent_back) * _WORD_BYTES),
        dense=dense_bytes,
        weights_alone=tuple(alone.astype(np.int64).tolist()),
    )
