"""The order of samples: a pure function of the seed, the epoch and the step (design.md, "Data order").

How it comes about, for one epoch of N samples:

1. The row groups are permuted (kept as they are without shuffling) and laid end to end: a stream of N rows.
2. Virtual shard ``v`` of V owns the rows ``[v * N // V, (v + 1) * N // V)`` of the stream.
3. A window covers K steps, K = max(1, shuffle_window // B). In each window every shard has its next ``K * B / V``
   rows, and permutes them.
4. A step takes the next ``B / V`` rows of every shard. In the batch they lie shard after shard, so that the batch of
   all shards is the concatenation of the batches of its parts. Shards differ by at most one row, so that only the
   last step can lack rows; padding then stands at the end of each shard's rows.

Nothing here depends on how many processes or threads there are; a process computes the part of its own shards.
Permutations sort raw Philox words (Salmon et al. 2011): numpy promises that these never change, which it does not
for ``Generator.permutation``.

Letters: B samples in a batch of all shards, V virtual shards, S shards of one process, b samples in the batch of
one process (B * S / V).
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

_GROUPS, _WINDOWS = 0, 1  # which of the two permutations a stream of random numbers serves
_WORDS_PER_COUNT = 4  # 64-bit words that Philox yields for one value of its counter

PADDING = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """What one process needs to build the batches of one window.

    Attributes:
        group: Row groups that its rows come from, one entry a piece.
        first_row: First row of each piece in its row group.
        num_rows: Rows of each piece.
        source: For each sample of the window's batches, its place among the rows of all pieces laid end to end, or
            ``PADDING``.
        released: Row groups that no later window of this process needs.
    """

    group: Int[np.ndarray, " pieces"]
    first_row: Int[np.ndarray, " pieces"]
    num_rows: Int[np.ndarray, " pieces"]
    source: Int[np.ndarray, "steps b"]
    released: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The order of one epoch for one process.

    Attributes:
        groups: Row groups to read, in the order of first need, each once.
        windows: The windows in order. An iterator, since their number grows with the dataset.
    """

    groups: Int[np.ndarray, " groups"]
    windows: Iterator[Window]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The order of all epochs of one split.

    Attributes:
        rows_per_group: Rows of each row group of the split.
        batch_size: Samples in a batch of all shards, a multiple of ``virtual_shards``.
        virtual_shards: Parts that the samples are dealt to.
        shuffle_window: Samples that are mixed with each other after the row groups have been permuted.
        seed: Seed of all permutations.
        shuffle: Whether to permute at all.
    """

    rows_per_group: tuple[int, ...]
    batch_size: int
    virtual_shards: int
    shuffle_window: int
    seed: int
    shuffle: bool

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return sum(self.rows_per_group)

    @property
    def rows_per_step(self) -> int:
        """Samples that each virtual shard gives to a batch."""
        return self.batch_size // self.virtual_shards

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the padded last one included."""
        longest_shard = -(-self.num_samples // self.virtual_shards)
        return -(-longest_shard // self.rows_per_step)

    @property
    def steps_per_window(self) -> int:
        """Steps whose samples are mixed with each other."""
        return min(max(1, self.shuffle_window // self.batch_size), self.steps_per_epoch)

    def epoch(self, epoch: int, first_step: int, shards: range) -> EpochOrder:
        """Computes the order of one epoch from a step on.

        Args:
            epoch: Which epoch.
            first_step: The first step wanted. Of the rows before it, only those in its window are looked at.
            shards: The virtual shards of this process, one after another.

        Returns:
            The row groups to read and the windows, the first of them without the steps before ``first_step``.
        """
        num_windows = -(-self.steps_per_epoch // self.steps_per_window)
        first_window = first_step // self.steps_per_window
        pieces = self._pieces(epoch, shards)
        pieces = pieces[pieces["window"] >= first_window]
        groups, first_piece = np.unique(pieces["group"], return_index=True)
        last_window = np.zeros(len(self.rows_per_group), np.int64)
        np.maximum.at(last_window, pieces["group"], pieces["window"])
        windows = (
            self._window(epoch, window, first_step, shards, pieces, last_window)
            for window in range(first_window, num_windows)
        )
        return EpochOrder(groups=groups[np.argsort(first_piece)], windows=windows)

    def _group_permutation(self, epoch: int) -> Int[np.ndarray, " groups"]:
        count = len(self.rows_per_group)
        if not self.shuffle:
            return np.arange(count)
        return np.argsort(_random_words(self.seed, epoch, (_GROUPS, 0), 0, count), kind="stable")

    def _pieces(self, epoch: int, shards: range) -> np.ndarray:
        """Cuts the stream wherever its row group, shard or window changes.

        Returns:
            One record a piece, sorted by window, then by shard, then by place in the shard.
        """
        groups = self._group_permutation(epoch)
        group_starts = np.concatenate([[0], np.cumsum(np.asarray(self.rows_per_group, np.int64)[groups])])
        shard_starts = np.arange(shards.start, shards.stop + 1) * self.num_samples // self.virtual_shards
        rows_per_window = self.steps_per_window * self.rows_per_step
        window_starts = [np.arange(start, stop, rows_per_window) for start, stop in itertools.pairwise(shard_starts)]
        inside = (group_starts >= shard_starts[0]) & (group_starts < shard_starts[-1])
        starts = np.unique(np.concatenate([group_starts[inside], *window_starts]))
        shard = np.searchsorted(shard_starts, starts, side="right") - 1
        place = np.searchsorted(group_starts, starts, side="right") - 1
        fields = [(name, np.int64) for name in ("window", "shard", "group", "first_row", "num_rows")]
        pieces = np.empty(len(starts), fields)
        pieces["window"] = (starts - shard_starts[shard]) // rows_per_window
        pieces["shard"] = shard
        pieces["group"] = groups[place]
        pieces["first_row"] = starts - group_starts[place]
        pieces["num_rows"] = np.diff(starts, append=shard_starts[-1])
        return pieces[np.argsort(pieces["window"], kind="stable")]  # the stream's order is that of the shards

    def _window(
        self,
        epoch: int,
        window: int,
        first_step: int,
        shards: range,
        pieces: np.ndarray,
        last_window: Int[np.ndarray, " groups"],
    ) -> Window:
        begin, end = np.searchsorted(pieces["window"], [window, window + 1])
        pieces = pieces[begin:end]
        first_of_window = window * self.steps_per_window
        steps = min(self.steps_per_window, self.steps_per_epoch - first_of_window)
        rows = np.bincount(pieces["shard"], pieces["num_rows"], minlength=len(shards)).astype(np.int64)
        source = self._window_source(epoch, window, steps, shards, rows)
        groups = np.unique(pieces["group"])
        return Window(
            group=pieces["group"],
            first_row=pieces["first_row"],
            num_rows=pieces["num_rows"],
            source=source[max(0, first_step - first_of_window) :],
            released=tuple(groups[last_window[groups] == window].tolist()),
        )

    def _window_source(
        self, epoch: int, window: int, steps: int, shards: range, rows: Int[np.ndarray, " S"]
    ) -> Int[np.ndarray, "steps b"]:
        """Permutes each shard's rows of a window and deals them to the steps."""
        S, slots = len(shards), steps * self.rows_per_step
        filled = np.arange(slots) < rows[:, None]
        if self.shuffle:
            # Each shard has its own stretch of the window's random numbers, as long as a whole window.
            words = self.steps_per_window * self.rows_per_step
            words += -words % _WORDS_PER_COUNT
            keys = _random_words(self.seed, epoch, (_WINDOWS, window), shards.start * words, S * words)
            # The low bits of a key are its place, so that sorting the keys, which is faster than argsort, permutes
            # the places, and no two keys are equal. Slots without a row sort last.
            low_bits = np.uint64((1 << words.bit_length()) - 1)
            keys = np.where(filled, keys.reshape(S, words)[:, :slots], ~np.uint64(0)) & ~low_bits
            place = (np.sort(keys | np.arange(slots, dtype=np.uint64), axis=1) & low_bits).astype(np.int64)
        else:
            place = np.broadcast_to(np.arange(slots), (S, slots))
        starts = np.cumsum(rows) - rows
        source = np.where(filled, starts[:, None] + place, PADDING)
        by_step = source.reshape(S, steps, self.rows_per_step).transpose(1, 0, 2)
        return by_step.reshape(steps, S * self.rows_per_step)


def _random_words(seed: int, epoch: int, stream: tuple[int, int], first: int, count: int) -> Int[np.ndarray, " count"]:
    """Words ``first`` to ``first + count`` of one of an epoch's streams; ``first`` is a multiple of four."""
    key = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint64)
    counter = np.array([first // _WORDS_PER_COUNT, *stream, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)
