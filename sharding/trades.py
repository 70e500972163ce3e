"""Trades: two tables take each other's kind and bins, as long as a smooth cost falls.

Where many devices are as full as the fullest, no single move lowers a maximum, and maxima do not say which moves lead
to a lower one. Smooth maxima do. Of the seconds X_gq(b) of group g and quantity q on bins b::

    tau log S_gq,  S_gq = sum_b exp(X_gq(b) / tau)

is above the maximum, by tau times the logarithm of the bins at most. The tables trade while the sum of these falls, and
tau with it, so that at last it is the cost (deterministic annealing; Rose 1998).

Let E_tq be the part of S_gq that is of the bins of table t. If another table u takes its place, a slice of which takes
a_ugq seconds of that kind, S_gq becomes ``S_gq + E_tq (exp((a_ugq - a_tgq) / tau) - 1)``, and so does that of the group
of u: a few operations try all other tables at once. That is exact unless slices of both share a bin or differ between
the devices of a bin. What is found is done, and undone if the cost does not fall.
"""

from collections.abc import Set

import numpy as np
from jaxtyping import Float, Int

from sharding.assignment import NOISE, Assignment
from sharding.candidates import SPREAD, Candidate

# tau at first and at last, as a share of the cost, and rounds in which it falls: every table trades once in each.
_WARM, _COLD = 1e-2, 3e-5
_ROUNDS = 8
# By how much a trade lowers the smooth cost, as a share of it.
_WORTH = 1e-7
# The largest exponent that is told from larger ones.
_MOST_EXPONENT = 500.0
_TINY = 1e-200

# Group, slices, and devices of a slice: what two tables must have candidates of, to trade.
_Way = tuple[int, int, int]


class _Smooth:
    """The smooth cost of an assignment, and its tables as arrays: one row each, empty if it may not move.

    Bins are those of a group's smallest slices; a larger one is on several.
    """

    def __init__(self, assignment: Assignment, movable: Set[int]):
        self.assignment = assignment
        options = assignment.choices.of_table
        ways: dict[_Way, int] = {}
        for candidate in (candidate for candidates in options for candidate in candidates):
            ways.setdefault(_way(candidate), len(ways))
        self._group = np.array([group for group, _, _ in ways])
        self._span = np.full(len(assignment.choices.groups), assignment.num_devices)
        np.minimum.at(self._span, self._group, [span for _, _, span in ways])
        most_bins = max(slices * span // int(self._span[group]) for group, slices, span in ways)
        self._bins = np.full((len(options), most_bins), -1)
        self._way = np.zeros(len(options), np.int64)
        self._seconds = np.zeros((len(options), len(ways), len(SPREAD)))
        self._fixed = np.full((len(options), len(ways)), np.inf)
        self._candidates: list[dict[int, Candidate]] = [{} for _ in options]
        self.tables: list[int] = []
        for table in sorted(movable):
            held = assignment.candidate[table]
            if held is None or held.owners is not None:
                continue
            self.tables.append(table)
            for candidate in options[table]:
                way = ways[_way(candidate)]
                self._candidates[table][way] = candidate
                self._seconds[table, way] = candidate.profile.max(axis=1)
                self._fixed[table, way] = candidate.fixed
            self._way[table] = ways[_way(held)]
            self._locate(table)
        self._has_way = np.isfinite(self._fixed)
        self._sum = np.ones((len(assignment.choices.groups), len(SPREAD)))
        self._most = np.zeros_like(self._sum)
        self._part = np.zeros((len(options), len(SPREAD)))

    def _locate(self, table: int) -> None:
        candidate = self.assignment.candidate[table]
        assert candidate is not None
        times = candidate.span // int(self._span[candidate.group])
        bins = [place * times + number for place in self.assignment.bins[table] for number in range(times)]
        self._bins[table] = bins + [-1] * (self._bins.shape[1] - len(bins))

    def soften(self, tau: float) -> None:
        """Begins anew with another tau, in seconds."""
        self._tau = tau
        for group in range(len(self._sum)):
            self._add_up(group)

    def _add_up(self, group: int) -> None:
        load = self.assignment.load[group].reshape(len(SPREAD), -1, self._span[group]).max(axis=2)
        self._most[group] = load.max(axis=1)
        parts = np.exp((load - self._most[group][:, None]) / self._tau)
        self._sum[group] = parts.sum(axis=1)
        members = np.flatnonzero(self._group[self._way] == group)
        # Of bin -1, nothing.
        parts = np.append(parts, np.zeros((len(SPREAD), 1)), axis=1)
        self._part[members] = parts[:, self._bins[members]].sum(axis=2).T

    def cost(self) -> float:
        """Seconds."""
        maxima = self._most.sum() + self._tau * np.log(self._sum).sum()
        return float(maxima) + self.assignment.fixed + self.assignment.latency

    def partner(self, one: int) -> tuple[int, float] | None:
        """The table that a table trades with best, and what that changes, in seconds."""
        way = self._way[one]
        others = np.flatnonzero(self._has_way[:, way] & self._has_way[one, self._way])
        others = others[others != one]
        if not len(others):
            return None
        ways = self._way[others]
        here, there = self._group[way], self._group[ways]
        at_mine = self._grown(self._part[one], self._seconds[others, way] - self._seconds[one, way])
        at_theirs = self._grown(self._part[others], self._seconds[one, ways] - self._seconds[others, ways])
        same = (here == there)[:, None]
        mine = self._sum[here] + at_mine + np.where(same, at_theirs, 0.0)
        theirs = self._sum[there] + np.where(same, 0.0, at_theirs)
        grown = np.log(np.maximum(mine, _TINY) / self._sum[here]).sum(axis=1)
        grown += np.log(np.maximum(theirs, _TINY) / self._sum[there]).sum(axis=1)
        change = self._tau * grown + self._fixed[others, way] - self._fixed[one, way]
        change += self._fixed[one, ways] - self._fixed[others, ways]
        best = int(change.argmin())
        return int(others[best]), float(change[best])

    def _grown(self, part: Float[np.ndarray, "*n Q"], seconds: Float[np.ndarray, "n Q"]) -> Float[np.ndarray, "n Q"]:
        """What a sum has more where slices take so many seconds more."""
        return part * np.expm1(np.minimum(seconds / self._tau, _MOST_EXPONENT))

    def trade(self, one: int, two: int) -> None:
        """Lets two tables trade."""
        ways: Int[np.ndarray, " 2"] = self._way[[one, two]]
        (_, mine), (_, theirs) = self.assignment.remove(one), self.assignment.remove(two)
        self.assignment.place(self._candidates[one][int(ways[1])], theirs)
        self.assignment.place(self._candidates[two][int(ways[0])], mine)
        self._way[[two, one]] = ways
        self._locate(one)
        self._locate(two)
        for group in set(self._group[ways].tolist()):
            self._add_up(group)


def _way(candidate: Candidate) -> _Way:
    return candidate.group, candidate.num_slices, candidate.span


def trade(assignment: Assignment, enough: float = 0.0) -> None:
    """Lets tables trade kinds and bins as long as the smooth cost falls; keeps what was cheapest.

    The dice, which decide on the order of tables, are the same in every run.

    Args:
        assignment: The assignment; changed.
        enough: What costs no more than this is left as it is.
    """
    best = assignment.cost
    if best <= enough:
        return
    smooth = _Smooth(assignment, set(range(len(assignment.choices.tables))) - assignment.choices.bundled)
    cheapest = assignment.snapshot()
    least = best * _WORTH
    dice = np.random.default_rng(0)
    for tau in (best * np.geomspace(_WARM, _COLD, _ROUNDS)).tolist():
        smooth.soften(tau)
        for one in dice.permutation(smooth.tables).tolist():
            found = smooth.partner(one)
            if found is None or found[1] > -least:
                continue
            before = smooth.cost()
            smooth.trade(one, found[0])
            if smooth.cost() >= before or assignment.most_bytes > assignment.memory:
                smooth.trade(one, found[0])
        if assignment.cost < best * (1.0 - NOISE):
            best, cheapest = assignment.cost, assignment.snapshot()
    assignment.restore(cheapest)
