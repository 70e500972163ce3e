"""Swaps: slices of one group change places, so that its fullest device gets emptier."""

from collections.abc import Set

import numpy as np
from jaxtyping import Float

from sharding.assignment import NOISE, WORTH, Assignment
from sharding.candidates import SPREAD

_SWAPS_PER_GROUP = 200


class _Slices:
    """The slices of a group that may move, one row each; then one empty row for each bin, to swap with."""

    def __init__(self, assignment: Assignment, group: int, bundled: Set[int]):
        held = [
            (candidate, place)
            for candidate, bins in zip(assignment.candidate, assignment.bins, strict=True)
            if candidate is not None
            and candidate.group == group
            and candidate.span < assignment.num_devices
            and candidate.owners is None
            and candidate.table not in bundled
            for place in bins
        ]
        self.count = len(held)
        self.span = held[0][0].span if held else 1
        num_bins = assignment.num_devices // self.span
        self.candidates = [candidate for candidate, _ in held]
        self.profile = np.zeros((len(held) + num_bins, len(SPREAD), self.span))
        for row, (candidate, _) in enumerate(held):
            self.profile[row] = candidate.profile
        self.bytes = np.array([c.owner_bytes for c in self.candidates] + [0] * num_bins, np.float64)
        self.bin = np.array([place for _, place in held] + list(range(num_bins)))
        self.table = np.array([c.table for c in self.candidates] + [-1] * num_bins)
        # Whether a bin holds a slice of the table of a row.
        self.holds = np.zeros((len(held) + num_bins, num_bins), np.bool_)
        for row in range(len(held)):
            self.holds[row, self.bin[self.table == self.table[row]]] = True


def swap_slices(assignment: Assignment, group: int, bundled: Set[int]) -> None:
    """Swaps slices of the fullest bin with others, or moves them, as long as that lowers the group's cost.

    A swap is taken if the sum of maxima falls or, where it stays, the squares of the two bins' loads do.
    """
    slices = _Slices(assignment, group, bundled)
    for _ in range(_SWAPS_PER_GROUP if slices.count else 0):
        slack = assignment.most[group] - assignment.load[group].mean(axis=1)
        worth = np.flatnonzero(slack > assignment.cost * WORTH)
        if not any(_swap_once(assignment, group, slices, int(q)) for q in worth[np.argsort(-slack[worth])]):
            break


def _fullest(load: Float[np.ndarray, "... L"]) -> Float[np.ndarray, "..."]:
    """The maximum over the devices of a bin; of a single one without numpy's slow reduction of short axes."""
    return load[..., 0] if load.shape[-1] == 1 else load.max(axis=-1)


def _swap_once(assignment: Assignment, group: int, slices: _Slices, quantity: int) -> bool:
    load = assignment.load[group].reshape(len(SPREAD), -1, slices.span)
    per_bin = _fullest(load)
    full = int(per_bin[quantity].argmax())
    mine = np.flatnonzero(slices.bin[: slices.count] == full)
    other = np.flatnonzero(slices.bin != full)
    if not len(mine) or not len(other):
        return False
    change = slices.profile[other][None] - slices.profile[mine][:, None]
    places = slices.bin[other]
    here = _fullest(load[:, full] + change)
    there = _fullest(load[:, places].swapaxes(0, 1) - change)
    # The maximum over the bins that are neither: of the first three in order, at most two are.
    top = np.argsort(-per_bin, axis=1, kind="stable")[:, :3]
    rest = np.zeros((len(other), len(SPREAD)))
    for column in reversed(range(top.shape[1])):
        free = (top[None, :, column] != full) & (top[None, :, column] != places[:, None])
        rest = np.where(free, np.take_along_axis(per_bin, top[:, column : column + 1], 1)[None, :, 0], rest)
    after = np.maximum(np.maximum(here, there), rest)
    cost = after.sum(axis=2)
    squares = ((here**2 + there**2) - (per_bin[:, full] ** 2 + per_bin[:, places].T ** 2)).sum(axis=2)
    # Two slices of a table stay apart.
    clash = slices.holds[mine][:, places] | (slices.holds[other][:, full][None] & (slices.table[other] >= 0)[None])
    store = slices.candidates[0].store
    held = assignment.bytes[store].reshape(-1, slices.span).max(axis=1)
    more = slices.bytes[other][None] - slices.bytes[mine][:, None]
    risen = (after - assignment.most[group]).reshape(1, -1, len(SPREAD)).swapaxes(1, 2)
    buffers = assignment.more_buffers(np.array([group]), risen).reshape(cost.shape)
    room = np.maximum(assignment.room(store) - buffers.clip(min=0.0), 0.0)
    fits = ((more <= 0) | (held[full] + more <= room)) & ((more >= 0) | (held[places] - more <= room))
    fits &= (buffers <= 0) | (assignment.most_bytes + buffers <= assignment.memory)
    before = float(assignment.most[group].sum())
    noise = NOISE * before
    better = (
        ~clash & fits & ((cost < before - noise) | ((cost <= before + noise * 1e-3) & (squares < -(noise * before))))
    )
    if not better.any():
        return False
    score = np.where(better, cost, np.inf)
    ties = np.where(score <= score.min() + noise, squares, np.inf)
    row, column = np.unravel_index(int(ties.argmin()), ties.shape)
    _exchange(assignment, slices, int(mine[row]), int(other[column]))
    return True


def _exchange(assignment: Assignment, slices: _Slices, one: int, two: int) -> None:
    """Lets two slices change bins; one of them may be an empty row, which stays where it is."""
    to = {one: int(slices.bin[two]), two: int(slices.bin[one])}
    for row in (one, two):
        if slices.table[row] < 0:
            continue
        old = int(slices.bin[row])
        candidate, bins = assignment.remove(int(slices.table[row]))
        assignment.place(candidate, tuple(to[row] if place == old else place for place in bins))
        same = slices.table == slices.table[row]
        slices.holds[same, old] = False
        slices.holds[same, to[row]] = True
        slices.bin[row] = to[row]
