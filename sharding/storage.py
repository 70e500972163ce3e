"""Storage: bytes of one device under a plan. All devices have arrays of the same shapes, so it is the same on each.

Letters: W devices, Q quantities.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pallas_kernels import xla
from pallas_kernels.implementations import implementation_of
from pallas_kernels.target import Target
from sharding.codec import Codec, code_bytes
from sharding.cost_settings import HOME_IDS, HOME_VECTORS, IDS, QUANTITIES, SENT_ROWS, VECTORS
from sharding.groups import Family
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


def _words_of_sent_row(dtype: str, codec: Codec, width: int) -> float:
    """Words of a row that travels by id: as it goes out and comes in and, of a code, as it is read."""
    stored, coded = width * jnp.dtype(dtype).itemsize, code_bytes(codec, width)
    return 2 * stored / _WORD_BYTES if stored <= coded else coded / _WORD_BYTES + _words_of_read(codec, width)


def _vectors_per_id(table: TableSpec, width: int, weighted: bool, target: Target, largest_store: int) -> float:
    """Float32 vectors of a row's width that the update of a group holds for each id."""
    if table.rule is None:
        return 0.0
    kernels = implementation_of(
        None,
        dtype=jnp.dtype(table.dtype),
        width=width,
        optimizer=table.rule,
        storage_rounding=table.rounding,
        largest_store=largest_store,
        target=target,
    )
    # The others write sums of blocks of long runs alone.
    return xla.VECTORS_PER_ID + weighted if kernels is xla else 1.0 / xla.RUN_BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupBuffers:
    """Bytes that a step needs beside the stores for one of each quantity of a group's fullest device.

    Attributes:
        ids: Of ids of the batch that trains and of the next: out, in, and as the kernels want them.
        vectors: Of pooled vectors or their gradients, of whichever is larger: at the owner, and in the exchange, as
            they are or in codes.
        gradients: Of gradients that travel by id; those of all groups come first, before any is updated.
        in_turn: Of what an update holds of its ids, and of rows that travel by id. Groups take turns: of all groups and
            quantities, only the largest product counts.
    """

    ids: Float[np.ndarray, " Q"]
    vectors: Float[np.ndarray, " Q"]
    gradients: Float[np.ndarray, " Q"]
    in_turn: Float[np.ndarray, " Q"]

    @property
    def together(self) -> Float[np.ndarray, " Q"]:
        """All that groups hold at a time."""
        return self.ids + self.vectors + self.gradients


def buffers_of_group(
    table: TableSpec,
    width: int,
    family: Family,
    *,
    num_devices: int,
    samples_per_device: int,
    weighted: bool,
    codecs: tuple[Codec, Codec],
    target: Target,
    largest_store: int,
) -> GroupBuffers:
    """Counts bytes of a group for one of each quantity.

    Args:
        table: Any table of the group.
        width: Stored width.
        family: How vectors come home.
        num_devices: Devices of the mesh.
        samples_per_device: Samples of one device.
        weighted: Whether ids have weights.
        codecs: How vectors travel, forward and backward.
        target: The devices, which say what kernels there are.
        largest_store: Bytes of the largest array of its store on a device; 0 if it is not known yet.
    """
    forward, backward = codecs
    batch = samples_per_device * num_devices
    words = 1 + weighted
    ids, vectors, gradients, in_turn = np.zeros((4, len(QUANTITIES)))
    # Out, in, and as the kernels want them: row, slot, logical row; offsets of bags.
    ids[IDS] = 2 * (1 + words)
    ids[VECTORS] = batch
    # Where rows are on every device, so are the ids of all.
    held, copies = (HOME_IDS, num_devices) if family == "local" else (IDS, 1)
    ids[held] += copies * (2 + words)
    exchanged = width + max(code_bytes(codec, width) for codec in codecs) / _WORD_BYTES
    vectors[VECTORS] = batch * exchanged
    if family == "local" and num_devices > 1 and table.rule is not None:
        # Every device gets the gradients of all, and puts them in the order of bags.
        vectors[HOME_VECTORS] = batch * exchanged
    if family == "rows_by_id":
        gradients[IDS] = _words_of_read(backward, width)
    in_turn[held] = copies * width * _vectors_per_id(table, width, weighted, target, largest_store)
    in_turn[SENT_ROWS] = _words_of_sent_row(table.dtype, forward, width)
    return GroupBuffers(
        ids=_BATCHES * _SPARE * _WORD_BYTES * ids,
        vectors=_WORD_BYTES * vectors,
        gradients=_SPARE * _WORD_BYTES * gradients,
        in_turn=_SPARE * _WORD_BYTES * in_turn,
    )


def buffers_at_home(*, ids: float, elements: float, weighted: bool) -> tuple[float, float]:
    """Bytes of a device's own ids, and of its vectors and their gradients: the same under every plan.

    Args:
        ids: Ids of its samples.
        elements: Numbers of its vectors.
        weighted: Whether ids have weights.
    """
    return _BATCHES * _SPARE * _WORD_BYTES * ids * (1 + weighted), 2 * _WORD_BYTES * elements


def storage_of(
    layout: Layout,
    fullest: Sequence[Float[np.ndarray, " Q"]],
    buffers: Sequence[GroupBuffers],
    *,
    at_home: tuple[float, float],
    dense_bytes: int,
) -> Storage:
    """Counts bytes: exactly those of stores; buffers have room beyond the mean.

    Args:
        layout: The layout.
        fullest: `sharding.cost_settings.QUANTITIES` of the fullest device, for each group.
        buffers: Bytes for one of each, for each group.
        at_home: Bytes of a device's own ids and vectors; see `buffers_at_home`.
        dense_bytes: Bytes of the dense part.
    """
    weights = element_state = row_state = 0
    alone = np.zeros(layout.num_devices)
    for store in layout.stores:
        weights += store.lines_per_device * LINE_BYTES
        element_state += sum(store.state_lines(array.dtype) for array in store.element_state) * LINE_BYTES
        row_state += store.scalar_lines_per_device * LINE_BYTES * len(store.row_state)
        alone += _alone(store)
    ids, vectors = at_home
    gradients = in_turn = 0.0
    for most, each in zip(fullest, buffers, strict=True):
        ids += float(each.ids @ most)
        vectors += float(each.vectors @ most)
        gradients += float(each.gradients @ most)
        in_turn = max(in_turn, float((each.in_turn * most).max()))
    return Storage(
        weights=weights,
        element_state=element_state,
        row_state=row_state,
        ids=int(ids),
        vectors=int(vectors),
        rows=int(gradients + in_turn),
        dense=dense_bytes,
        weights_alone=tuple(alone.astype(np.int64).tolist()),
    )
