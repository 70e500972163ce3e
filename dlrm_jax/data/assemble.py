"""From the columns of row groups to batches: all samples of a window are gathered at once, then cut into steps.

One numpy take a column and window, not a step, is what makes it cheap to shuffle single rows.

Letters: b samples in a batch of this process, F sparse features.
"""

import dataclasses
import math
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from dlrm_jax.data.batch import Batch
from dlrm_jax.data.card import DatasetCard, SparseColumn
from dlrm_jax.data.order import PADDING, Window
from dlrm_jax.data.row_groups import Bags, RowGroup
from sharding.jagged import MAX_NARROW_ROWS, KeyedJagged, words_of_ids

# Room for bags beyond their mean, so that ordinary batches do not differ in capacity.
_SPARE_ROOM = 1.25
_CAPACITY_MULTIPLE = 1024
# Bags whose ids are located at a time, so that the places of the ids of a whole window are never held.
_BAGS_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowSamples:
    """All samples of one window, in the order of their batches.

    Attributes:
        dense: Normalised dense features.
        label: Labels.
        weight: Sample weights; 0 marks padding.
        values: For each feature, the ids of all bags.
        weights: For each feature, the weights beside its ids, or None.
        lengths: Ids in each bag.
        first_id: For each feature, where each step's ids begin, and the end of the last.
    """

    dense: Float[np.ndarray, "steps b num_dense"]
    label: Float[np.ndarray, "steps b"]
    weight: Float[np.ndarray, "steps b"]
    values: tuple[Int[np.ndarray, " ids"], ...]
    weights: tuple[Float[np.ndarray, " ids"] | None, ...]
    lengths: Int[np.ndarray, "steps F b"]
    first_id: Int[np.ndarray, "F steps+1"]


class IdCapacity:
    """How many ids a batch has room for: static, because each new shape compiles the training step again.

    Features of one id have exactly their room. Bags have room for somewhat more than their mean; a batch that needs
    more raises the capacity to the next power of two, for good. Nothing is ever dropped.
    """

    def __init__(self, columns: Sequence[SparseColumn], batch_size: int):
        """Sizes the room from the card's pooling factors.

        Args:
            columns: The sparse features of a batch.
            batch_size: Samples in a batch.
        """
        bags = [column for column in columns if column.bag]
        spared = sum(min(_SPARE_ROOM * bag.mean_pooling_factor, bag.max_pooling_factor) for bag in bags)
        room = math.ceil(batch_size * spared / _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE
        most = batch_size * sum(bag.max_pooling_factor for bag in bags)
        self.value = batch_size * (len(columns) - len(bags)) + min(room, most)
        self._lock = threading.Lock()  # several iterators of a loader may be under way

    def at_least(self, num_ids: int) -> int:
        """Returns the capacity, after raising it if so many ids do not fit."""
        with self._lock:
            if num_ids > self.value:
                self.value = 1 << (num_ids - 1).bit_length()
            return self.value


def padding_row(card: DatasetCard) -> RowGroup:
    """Returns the one row that fills up a batch: weight 0, label 0, dense features 0, empty bags."""
    no_weights = np.zeros(0, np.float32)
    return RowGroup(
        dense=np.zeros((1, len(card.dense)), np.float32),
        label=np.zeros(1, np.float32),
        weight=np.zeros(1, np.float32),
        sparse=tuple(
            Bags(
                values=np.zeros(0, np.int32 if column.num_rows <= MAX_NARROW_ROWS else np.int64),
                offsets=np.zeros(2, np.int64),
                weights=None if column.weights is None else no_weights,
            )
            for column in card.sparse
        ),
    )


def gather_window(window: Window, groups: Mapping[int, RowGroup], padding: RowGroup) -> WindowSamples:
    """Takes the samples of a window out of row groups.

    Args:
        window: Which rows, in which order.
        groups: The row groups that the window needs, at least.
        padding: One row, for samples that are padding.

    Returns:
        The samples.
    """
    firsts, stops = window.first_row.tolist(), (window.first_row + window.num_rows).tolist()
    pieces = [(groups[group], *rows) for group, *rows in zip(window.group.tolist(), firsts, stops, strict=True)]
    steps, b = window.source.shape
    source = window.source.reshape(-1)
    if (source == PADDING).any():
        pieces.insert(0, (padding, 0, 1))
        source = source - PADDING  # the padding row has place 0, and every other place is one further
    dense = np.concatenate([group.dense[first:stop] for group, first, stop in pieces]).take(source, axis=0)
    label = np.concatenate([group.label[first:stop] for group, first, stop in pieces]).take(source)
    weight = np.concatenate([group.weight[first:stop] for group, first, stop in pieces]).take(source)
    values, weights = [], []
    F = len(padding.sparse)
    lengths = np.ones((steps, F, b), np.int32)
    first_id = np.empty((F, steps + 1), np.int64)
    for feature in range(F):
        bags = _gather_bags([(group.sparse[feature], first, stop) for group, first, stop in pieces], source)
        values.append(bags.values)
        weights.append(bags.weights)
        if bags.offsets is None:
            first_id[feature] = np.arange(steps + 1) * b
        else:
            lengths[:, feature] = np.diff(bags.offsets).reshape(steps, b)
            first_id[feature] = bags.offsets[::b]
    return WindowSamples(
        dense=dense.reshape(steps, b, -1) if dense.size else np.zeros((steps, b, 0), np.float32),
        label=label.reshape(steps, b),
        weight=weight.reshape(steps, b),
        values=tuple(values),
        weights=tuple(weights),
        lengths=lengths,
        first_id=first_id,
    )


def _gather_bags(pieces: Sequence[tuple[Bags, int, int]], source: Int[np.ndarray, " samples"]) -> Bags:
    """Lays the pieces' bags end to end and takes those that ``source`` names."""
    if all(bags.offsets is None for bags, _, _ in pieces):
        values = np.concatenate([bags.values[first:stop] for bags, first, stop in pieces])
        return Bags(values=values.take(source), offsets=None, weights=None)
    lengths, spans = [], []
    for bags, first, stop in pieces:
        offsets = np.arange(first, stop + 1) if bags.offsets is None else bags.offsets[first : stop + 1]
        lengths.append(np.diff(offsets))
        spans.append((bags, slice(int(offsets[0]), int(offsets[-1]))))
    lengths = np.concatenate(lengths)
    values = _take_bags(np.concatenate([bags.values[span] for bags, span in spans]), lengths, source)
    weights = None
    if pieces[0][0].weights is not None:
        weights = _take_bags(np.concatenate([bags.weights[span] for bags, span in spans]), lengths, source)
    return Bags(values=values, offsets=np.concatenate([[0], np.cumsum(lengths.take(source))]), weights=weights)


def _take_bags(
    values: Shaped[np.ndarray, " ids"], lengths: Int[np.ndarray, " rows"], source: Int[np.ndarray, " samples"]
) -> Shaped[np.ndarray, " taken"]:
    """Takes whole bags, given end to end with their lengths."""
    if lengths[0] > 0 and (lengths == lengths[0]).all():
        return values.reshape(-1, lengths[0]).take(source, axis=0).reshape(-1)
    starts = (np.cumsum(lengths) - lengths).take(source)
    lengths = lengths.take(source)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    taken = np.empty(offsets[-1], values.dtype)
    for first in range(0, len(source), _BAGS_AT_ONCE):
        part = slice(first, first + _BAGS_AT_ONCE)
        ids = slice(offsets[first], offsets[part.stop] if part.stop < len(source) else offsets[-1])
        places = np.repeat(starts[part] - offsets[:-1][part], lengths[part]) + np.arange(ids.start, ids.stop)
        np.take(values, places, out=taken[ids], mode="clip")  # the other modes copy `out`
    return taken


def cut_batches(samples: WindowSamples, features: tuple[str, ...], capacity: IdCapacity) -> Iterator[Batch]:
    """Yields the batches of a window.

    Args:
        samples: The samples of the window.
        features: Names of the sparse features.
        capacity: Room for the ids of a batch; raised where a batch needs more.

    Yields:
        One batch a step. Its arrays except the ids are views into the window.
    """
    weighted = any(weights is not None for weights in samples.weights)
    for step in range(len(samples.label)):
        spans = samples.first_id[:, step : step + 2].tolist()
        num_ids = sum(stop - start for start, stop in spans)
        room = capacity.at_least(num_ids) - num_ids
        values = [values[start:stop] for values, (start, stop) in zip(samples.values, spans, strict=True)]
        weights = None
        if weighted:
            weights = [
                np.ones(stop - start, np.float32) if weights is None else weights[start:stop]
                for weights, (start, stop) in zip(samples.weights, spans, strict=True)
            ]
            weights = np.concatenate([*weights, np.zeros(room, np.float32)])
        all_values = np.concatenate([*values, np.zeros(room, np.int32)])
        yield Batch(
            dense=samples.dense[step],
            ids=KeyedJagged(
                values=all_values if all_values.dtype == np.int32 else words_of_ids(all_values),
                lengths=samples.lengths[step],
                weights=weights,
                features=features,
            ),
            label=samples.label[step],
            weight=samples.weight[step],
        )


def one_batch(rows: RowGroup, card: DatasetCard, batch_size: int) -> Batch:
    """Makes one batch of some rows, in their order, with padding at its end.

    Args:
        rows: At most ``batch_size`` rows.
        card: The dataset's card, with the sparse features of the rows.
        batch_size: Samples in the batch.

    Returns:
        The batch.
    """
    num_rows = len(rows.label)
    source = np.full((1, batch_size), PADDING)
    source[0, :num_rows] = np.arange(num_rows)
    window = Window(
        group=np.zeros(1, np.int64),
        first_row=np.zeros(1, np.int64),
        num_rows=np.array([num_rows]),
        source=source,
        released=(),
    )
    samples = gather_window(window, {0: rows}, padding_row(card))
    features = tuple(column.name for column in card.sparse)
    return next(cut_batches(samples, features, IdCapacity(card.sparse, batch_size)))
