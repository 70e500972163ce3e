"""Annealing: slices and tables change places with one another, now and then for the worse, ever less so.

Where all bins pool as many vectors as the fullest, no table can go anywhere without one more vector on all devices.
What helps then leaves the vectors as they are: two slices of a group change bins, or two tables of different groups
take each other's kind and bins, a trade. Which pairs help is not known beforehand, but a try costs little: at a bin,
one slice is replaced by another, and only its group's maxima change.
"""

import math
import operator
import random
from collections.abc import Set
from typing import NamedTuple

import numpy as np

from sharding.assignment import NOISE, Assignment
from sharding.candidates import SPREAD, Candidate

# Tries, of each movable table and in all; how much worse a try may typically leave things, at first and at last, as a
# share of the cost.
_TRIES_OF_TABLE = 2000
_TRIES = 200_000
_WARM, _COLD = 5e-4, 1e-5


class _Replaced(NamedTuple):
    """At a bin of their group, a slice of one candidate makes room for one of another."""

    place: int
    out: Candidate
    into: Candidate


class _Loads:
    """Loads of an assignment as lists, of the devices that can differ.

    A cell is as many devices as the profiles of a group are constant over: a node, mostly, where rows are spread over
    its chips.
    """

    def __init__(self, assignment: Assignment):
        options = assignment.choices.of_table
        self._units = [assignment.num_devices] * len(assignment.choices.groups)
        for candidate in (candidate for candidates in options for candidate in candidates):
            even = bool((np.ptp(candidate.profile, axis=1) <= NOISE * candidate.profile.max(axis=1)).all())
            self._units[candidate.group] = math.gcd(self._units[candidate.group], candidate.span if even else 1)
        self._cells = [load[:, ::unit].tolist() for load, unit in zip(assignment.load, self._units, strict=True)]
        self.most: list[list[float]] = assignment.most.tolist()
        self._bytes: list[list[float]] = assignment.bytes.tolist()
        self._memory = assignment.memory
        buffers = assignment.choices.buffers
        self._together, self._in_turn = buffers.together.tolist(), buffers.in_turn.tolist()
        self._fixed_bytes = buffers.constant + assignment.fixed_bytes
        self._entries: dict[Candidate, list[tuple[int, int, float]]] = {}
        self.cost = assignment.cost

    def _entries_of(self, candidate: Candidate) -> list[tuple[int, int, float]]:
        """Quantity, cell and seconds of what a slice adds."""
        if candidate not in self._entries:
            profile = candidate.profile[:, :: self._units[candidate.group]]
            self._entries[candidate] = [(q, cell, float(profile[q, cell])) for q, cell in np.argwhere(profile).tolist()]
        return self._entries[candidate]

    def fullest(self, group: int, quantity: int, span: int) -> int:
        """The bin that the maximum is in."""
        cells = self._cells[group][quantity]
        return cells.index(max(cells)) * self._units[group] // span

    def replace(self, changes: list[_Replaced], fixed: float) -> None:
        """Changes loads, maxima and cost; `fixed` are seconds that every device has more."""
        groups = set()
        for place, out, into in changes:
            group = into.group
            groups.add(group)
            cells, first = self._cells[group], place * into.span // self._units[group]
            for quantity, cell, seconds in self._entries_of(out):
                cells[quantity][first + cell] -= seconds
            for quantity, cell, seconds in self._entries_of(into):
                cells[quantity][first + cell] += seconds
        for group in groups:
            before = sum(self.most[group])
            self.most[group] = [max(cells) for cells in self._cells[group]]
            fixed += sum(self.most[group]) - before
        self.cost += fixed

    def fits(self, changes: list[_Replaced]) -> bool:
        """Whether memory has room for changes, which loads have already; if so, they are counted."""
        self._change_bytes(changes, 1)
        if sum(max(held) for held in self._bytes) + self._buffers() <= self._memory:
            return True
        self._change_bytes(changes, -1)
        return False

    def _buffers(self) -> float:
        """Bytes beside the stores; see `candidates.Buffers`."""
        together, largest = self._fixed_bytes, 0.0
        for most, sizes, in_turn in zip(self.most, self._together, self._in_turn, strict=True):
            together += sum(map(operator.mul, most, sizes))
            largest = max(largest, *map(operator.mul, most, in_turn))
        return together + largest

    def _change_bytes(self, changes: list[_Replaced], sign: int) -> None:
        for place, out, into in changes:
            self._fixed_bytes += sign * (into.fixed_bytes - out.fixed_bytes) / into.num_slices
            more = sign * (into.owner_bytes - out.owner_bytes)
            held = self._bytes[into.store]
            for device in range(place * into.span, (place + 1) * into.span) if more else ():
                held[device] += more


class _Places:
    """Candidates and bins of the tables that may move, and who is where."""

    def __init__(self, assignment: Assignment, movable: Set[int]):
        options = assignment.choices.of_table
        self.num_devices = assignment.num_devices
        self.candidate = list(assignment.candidate)
        self.bins = list(assignment.bins)
        self.tables = [t for t in sorted(movable) if (c := self.candidate[t]) is not None and c.owners is None]
        self.ways = [{(c.group, c.num_slices, c.span): c for c in candidates} for candidates in options]
        self.at: dict[tuple[int, int, int], list[int]] = {}
        for table in self.tables:
            self._enter(table)
        # Those whose candidates are of the same groups, so that they can trade.
        kin: dict[tuple[int, ...], list[int]] = {}
        for table in self.tables:
            kin.setdefault(tuple(sorted({c.group for c in options[table]})), []).append(table)
        self.kin = {table: tables for tables in kin.values() for table in tables}

    def held(self, table: int) -> Candidate:
        candidate = self.candidate[table]
        assert candidate is not None
        return candidate

    def _keys(self, table: int) -> list[tuple[int, int, int]]:
        held = self.held(table)
        return [(held.group, held.span, place) for place in self.bins[table]]

    def _enter(self, table: int) -> None:
        for key in self._keys(table):
            self.at.setdefault(key, []).append(table)

    def give(self, table: int, candidate: Candidate, bins: tuple[int, ...]) -> None:
        for key in self._keys(table):
            self.at[key].remove(table)
        self.candidate[table], self.bins[table] = candidate, bins
        self._enter(table)


def anneal(assignment: Assignment, movable: Set[int], enough: float = 0.0) -> None:
    """Swaps slices of a group and trades kinds and bins of tables (Kirkpatrick et al. 1983); keeps what was cheapest.

    The dice are the same in every run.

    Args:
        assignment: The assignment; changed.
        movable: Tables that may be moved.
        enough: What costs no more than this is left as it is.
    """
    before = assignment.cost
    places, loads = _Places(assignment, movable), _Loads(assignment)
    if before <= enough or len(places.tables) < 2:
        return
    dice = random.Random(0)
    best, cheapest = before, (list(places.candidate), list(places.bins))
    tries = min(_TRIES, _TRIES_OF_TABLE * len(places.tables))
    for number in range(tries):
        warmth = before * _WARM * (_COLD / _WARM) ** (number / tries)
        one = _first(places, loads, dice)
        changed = (_swap if dice.random() < 0.5 else _trade)(places, one, dice)
        if changed is None:
            continue
        changes, fixed, moved = changed
        cost = loads.cost
        loads.replace(changes, fixed)
        worse = loads.cost - cost
        if (worse > 0 and dice.random() >= math.exp(-worse / warmth)) or not loads.fits(changes):
            loads.replace([_Replaced(place, into, out) for place, out, into in changes], -fixed)
            continue
        for table, candidate, bins in moved:
            places.give(table, candidate, bins)
        if loads.cost < best * (1.0 - NOISE):
            best, cheapest = loads.cost, (list(places.candidate), list(places.bins))
    assignment.restore([(candidate, bins) for candidate, bins in zip(*cheapest, strict=True) if candidate is not None])


def _first(places: _Places, loads: _Loads, dice: random.Random) -> int:
    """A table to move: any, or one of those that make a maximum."""
    table = places.tables[int(dice.random() * len(places.tables))]
    if dice.random() < 0.5:
        return table
    held = places.held(table)
    quantity = int(dice.random() * len(SPREAD))
    if not loads.most[held.group][quantity]:
        return table
    fullest = places.at.get((held.group, held.span, loads.fullest(held.group, quantity, held.span)))
    return fullest[int(dice.random() * len(fullest))] if fullest else table


# Changes of loads, seconds that every device has more, and where tables are then.
_Changed = tuple[list[_Replaced], float, list[tuple[int, Candidate, tuple[int, ...]]]]


def _swap(places: _Places, one: int, dice: random.Random) -> _Changed | None:
    """A slice of a table and one of another of the group, on different bins."""
    here, mine = places.held(one), places.bins[one]
    x, y = mine[int(dice.random() * len(mine))], int(dice.random() * (places.num_devices // here.span))
    held = places.at.get((here.group, here.span, y))
    if y in mine or not held:
        return None
    two = held[int(dice.random() * len(held))]
    there, other = places.held(two), places.bins[two]
    if x in other:
        return None
    changes = [_Replaced(x, here, there), _Replaced(y, there, here)]
    moved = [
        (one, here, tuple(y if place == x else place for place in mine)),
        (two, there, tuple(x if place == y else place for place in other)),
    ]
    return changes, 0.0, moved


def _trade(places: _Places, one: int, dice: random.Random) -> _Changed | None:
    """Two tables that take each other's kind and bins."""
    two = places.kin[one][int(dice.random() * len(places.kin[one]))]
    here, there = places.held(one), places.held(two)
    key, other = (here.group, here.num_slices, here.span), (there.group, there.num_slices, there.span)
    if key == other or one == two:
        return None
    into_there, into_here = places.ways[one].get(other), places.ways[two].get(key)
    if into_there is None or into_here is None:
        return None
    mine, yours = places.bins[one], places.bins[two]
    changes = [_Replaced(place, here, into_here) for place in mine]
    changes += [_Replaced(place, there, into_there) for place in yours]
    fixed = into_here.fixed + into_there.fixed - here.fixed - there.fixed
    return changes, fixed, [(one, into_there, yours), (two, into_here, mine)]
