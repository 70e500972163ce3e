"""Lower bound: a step's seconds that no plan made of the candidates can beat, and the kinds of placement that it uses.

A plan gives each table t one candidate c and each slice an owner. In group g and quantity q (ids, vectors, distinct
rows, ...) device d then has the load ``X_gq(d)``, in seconds, and a step costs ``sum_gq max_d X_gq(d)`` plus what is
the same on every device. The bound is the optimum of a mixed integer programme with less in it, so it is at most that::

    minimise    sum_gq Z_gq + sum_tc x_tc fixed_tc
    subject to  sum_c x_tc = 1 for each table, 0 <= x <= 1                              (a table may be in two halves)
                Z_gq >= sum_tc x_tc total_tcq / W                                       (a maximum is at least the mean)
                Z_gq >= sum_i (m_i - m_i+1) x_i, m_i the max_d profile_q(d) of any members of g, falling     (nests)
                Z_gq >= sum_tc x_tc profile_tcq(d)                                      (row-wise: where hot rows are)
                Z_gq = seconds of a vector * P_g, P_g a whole number                    (q: vectors a sample)
                P_g * bins >= sum_tc x_tc vectors_tc       (bins: W devices, or for table-row-wise N nodes)
                sum_tc x_tc bytes_tc <= W * bytes of a device

The third line has the profile of a table that is spread over the chips of a node averaged over nodes, and that of one
on a device averaged over devices: it, too, holds for every plan. A nest says that no slice is divisible: where tables
are whole, and i is the first member with x_i = 1, the sum is at most m_i, which the maximum has to reach. A nest of one
member is the plainest. Both are added only where an optimum breaks them. Of programmes that are large, the vectors need
not be whole; of those that are small, tables have to be, too (x is 0 or 1). A search that stops early gives the bound
that it has proved by then. What limits the bound: nothing says that the items of a group can be dealt out evenly.

Letters: W devices, C chips of a node, L devices of one slice.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import optimize, sparse

from sharding.candidates import SPREAD, Candidate, Choices
from sharding.cost import VECTORS
from sharding.layout import FAMILIES, Family

# Solves; each adds the rows that the optimum before broke. The last, where that raised the bound by less than a share.
_ROUNDS = 15
_QUICK_ROUNDS = 4
_FEW_ROUNDS = 1
_WHOLE_ROUNDS = 1
_PROGRESS = 5e-4
# By how much, in thousandths of the least that tables can take.
_BROKEN = 0.03
# Nodes of the search tree, not seconds: the same input has the same plan on a slow machine.
_NODES = 20
_GAP = 2e-3
# Candidates up to which the programme is solved with whole numbers of vectors, and with whole tables.
_MEDIUM = 4000
_SMALL = 250
# Times that the relaxation is solved again with what cannot be whole left out.
_DIVES = 2
_VECTORS = SPREAD.index(VECTORS)


Whole = Literal["nothing", "vectors", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """A part of the step that takes a fixed number of exchanges if any table needs it; see `Step.latency_seconds`."""

    families: tuple[Family, ...]
    exchanges: int
    second_pass: bool = False


_PARTS = (
    *(_Part(families=(family,), exchanges=2) for family in FAMILIES),
    _Part(families=tuple(family for family in FAMILIES if family != "local"), exchanges=1),
    _Part(families=FAMILIES, exchanges=2, second_pass=True),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relaxed:
    """The optimum of the relaxation.

    Attributes:
        seconds: The bound.
        shares: x of each table's candidates, in order: of one solution, or of several that are worth a start.
    """

    seconds: float
    shares: tuple[tuple[Float[np.ndarray, " candidates"], ...], ...]


def at_device(candidate: Candidate, quantity: int, device: int, num_devices: int) -> float:
    """Seconds of one quantity that a candidate adds to a device, averaged over where its slices may be."""
    profile = candidate.profile[quantity]
    return float(profile[device % candidate.span]) * candidate.num_slices * candidate.span / num_devices


class _Programme:
    """Rows of the programme. Columns: the candidates, Z of each group and quantity, P of each group."""

    def __init__(self, choices: Choices, num_devices: int, chips: int, memory: float):
        self.choices = choices
        self.num_devices = num_devices
        self.candidates = [candidate for group in choices.of_table for candidate in group]
        # The unit of seconds, so that the solver's tolerances fit.
        least = sum(min(c.fixed + c.seconds / num_devices for c in group) for group in choices.of_table if group)
        self.unit = least / 1000.0 or 1.0
        self.num_x, self.num_z = len(self.candidates), len(choices.groups) * len(SPREAD)
        self.first_y = self.num_x + self.num_z + len(choices.groups)
        self.num_columns = self.first_y + len(_PARTS)
        self._entries: list[tuple[np.ndarray, np.ndarray]] = []
        self._lower: list[float] = []
        self._upper: list[float] = []
        self.cuts: set[tuple[int, ...]] = set()
        self.lower = np.zeros(self.num_columns)
        self.upper = np.full(self.num_columns, np.inf)
        self.upper[: self.num_x] = 1.0
        self.groups = np.array([c.group for c in self.candidates])
        self.totals = np.array([c.profile.sum(axis=1) * c.num_slices for c in self.candidates])
        self.costs = np.array([c.fixed + c.seconds / num_devices for c in self.candidates]) / self.unit
        self.peaks = np.array([c.profile.max(axis=1) for c in self.candidates]) / self.unit
        # Members of each group, by falling size of their slices in a quantity.
        self.nests: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        for group, quantity in np.ndindex(len(choices.groups), len(SPREAD)):
            members = np.flatnonzero((self.groups == group) & (self.peaks[:, quantity] > 0))
            if len(members):
                order = members[np.argsort(-self.peaks[members, quantity], kind="stable")]
                self.nests[group, quantity] = order, self.peaks[order, quantity]
        first = 0
        for group in choices.of_table:
            self._row(np.arange(first, first + len(group)), np.ones(len(group)), 1.0, 1.0)
            first += len(group)
        for number, key in enumerate(choices.groups):
            members = np.flatnonzero(self.groups == number)
            for quantity in range(len(SPREAD)):
                mean = self.totals[members, quantity] / num_devices / self.unit
                self._at_most(members, mean, self.num_x + number * len(SPREAD) + quantity)
            if choices.vector_seconds[number] > 0 and key.family in ("table_wise", "table_row_wise"):
                bins = num_devices if key.family == "table_wise" else num_devices // chips
                spans = np.array([self.candidates[i].span for i in members])
                vectors = self.totals[members, _VECTORS] / spans / choices.vector_seconds[number]
                whole = self.num_x + self.num_z + number
                self._at_most(members, vectors / bins, whole)
                z = self.num_x + number * len(SPREAD) + _VECTORS
                self._row(
                    np.array([whole, z]), np.array([choices.vector_seconds[number] / self.unit, -1.0]), -np.inf, 0
                )
        self._count_exchanges()
        sizes = np.array([c.total_bytes for c in self.candidates], np.float64)
        self._row(np.arange(self.num_x), sizes / (memory * num_devices), -np.inf, 1.0)

    def _count_exchanges(self) -> None:
        """Seconds that exchanges take to start: of each part of the step that there is, y = 1."""
        self.objective = np.zeros(self.num_columns)
        self.objective[: self.num_x] = [c.fixed / self.unit for c in self.candidates]
        self.objective[self.num_x : self.num_x + self.num_z] = 1.0
        for number, part in enumerate(_PARTS):
            self.objective[self.first_y + number] = part.exchanges * self.choices.exchange_seconds / self.unit
            members = [
                i
                for i, candidate in enumerate(self.candidates)
                if self.choices.groups[candidate.group].family in part.families
                and (candidate.has_second_pass or not part.second_pass)
            ]
            if self.choices.exchange_seconds > 0 and len(members) <= _MEDIUM:
                for member in members:
                    self._at_most(np.array([member]), np.ones(1), self.first_y + number)

    def _row(self, columns: np.ndarray, values: np.ndarray, lower: float, upper: float) -> None:
        self._entries.append((columns, values))
        self._lower.append(lower)
        self._upper.append(upper)

    def _at_most(self, members: np.ndarray, values: np.ndarray, column: int) -> None:
        """``values @ x[members] <= column``."""
        self._row(np.append(members, column), np.append(values, -1.0), -np.inf, 0.0)

    def solve(self, whole: Whole) -> tuple[float, np.ndarray] | None:
        """The bound in units, and all columns; None if nothing is feasible."""
        rows = np.repeat(np.arange(len(self._entries)), [len(columns) for columns, _ in self._entries])
        columns = np.concatenate([columns for columns, _ in self._entries])
        values = np.concatenate([values for _, values in self._entries])
        matrix = sparse.csr_array((values, (rows, columns)), shape=(len(self._entries), self.num_columns))
        integral = np.zeros(self.num_columns)
        integral[self.num_x + self.num_z :] = whole != "nothing"
        integral[: self.num_x] = whole == "all"
        result = optimize.milp(
            self.objective,
            integrality=integral,
            # pyright takes the types of scipy's defaults for those of its arguments.
            bounds=optimize.Bounds(self.lower, self.upper),  # pyright: ignore[reportArgumentType]
            constraints=optimize.LinearConstraint(matrix, self._lower, self._upper),  # pyright: ignore[reportArgumentType]
            options={"node_limit": _NODES, "mip_rel_gap": _GAP},
        )
        if result.x is None:
            return None
        bound = result.fun if whole == "nothing" else result.mip_dual_bound
        return (result.fun if bound is None else bound), result.x

    def add_all_peaks(self) -> None:
        """Adds that no slice is divisible, for all of them: needed once tables are whole."""
        for (group, quantity), (members, peaks) in self.nests.items():
            column = self.num_x + group * len(SPREAD) + quantity
            for member, peak in zip(members.tolist(), peaks.tolist(), strict=True):
                self._at_most(np.array([member]), np.array([peak]), column)

    def keep_whole(self, solution: np.ndarray) -> None:
        """Leaves out the candidates that the maxima of a solution have no room for.

        A table in two halves hides how large it is; this is how the search gets kinds that can be whole.
        """
        z = solution[self.num_x : self.num_x + self.num_z].reshape(-1, len(SPREAD))
        excess = (self.peaks - z[self.groups] * 1.1).clip(min=0.0).sum(axis=1)
        first = 0
        for group in self.choices.of_table:
            mine = slice(first, first + len(group))
            first += len(group)
            # The least of the evils, where all are too large: what rises then, rises.
            kept = excess[mine] <= 0.01
            kept[(excess[mine] + self.costs[mine]).argmin()] |= not kept.any()
            self.upper[mine] = kept

    def add_broken_rows(self, solution: np.ndarray) -> bool:
        """Adds rows that a solution breaks; says whether there are any."""
        found = len(self._entries)
        x = solution[: self.num_x]
        z = solution[self.num_x : self.num_x + self.num_z].reshape(-1, len(SPREAD))
        # A slice alone is the simplest nest: many at a time, so that few solves do.
        for candidate, quantity in np.argwhere(x[:, None] * self.peaks > z[self.groups] + _BROKEN).tolist():
            if (candidate, quantity) not in self.cuts:
                self.cuts.add((candidate, quantity))
                column = self.num_x + int(self.groups[candidate]) * len(SPREAD) + quantity
                self._at_most(np.array([candidate]), self.peaks[candidate, quantity, None], column)
        for (group, quantity), (members, peaks) in self.nests.items():
            highest = np.maximum.accumulate(x[members])
            if float(highest @ -np.diff(peaks, append=0.0)) <= z[group, quantity] + _BROKEN:
                continue
            # Those that are more chosen than all that are larger.
            records = np.flatnonzero(np.diff(highest, prepend=0.0) > 0)
            steps = -np.diff(peaks[records], append=0.0)
            key = (-2, group, quantity, *records[steps > 0].tolist())
            if key not in self.cuts:
                self.cuts.add(key)
                self._at_most(
                    members[records[steps > 0]], steps[steps > 0], self.num_x + group * len(SPREAD) + quantity
                )
        used = np.flatnonzero(x > 1e-6)
        for group in np.unique(self.groups[used]).tolist():
            members = [i for i in used.tolist() if self.groups[i] == group and self.candidates[i].span > 1]
            for quantity in range(len(SPREAD)) if members else ():
                load = np.zeros(self.num_devices)
                for i in members:
                    c = self.candidates[i]
                    tiled = np.tile(c.profile[quantity], self.num_devices // c.span)
                    load += x[i] * tiled * c.num_slices * c.span / self.num_devices
                device = int(load.argmax())
                key = (-1, group, quantity, device)
                spread = load[device] / self.unit
                if spread > z[group, quantity] + 0.02 and key not in self.cuts:
                    self.cuts.add(key)
                    all_members = np.flatnonzero(self.groups == group)
                    values = [
                        at_device(self.candidates[i], quantity, device, self.num_devices) / self.unit
                        for i in all_members.tolist()
                    ]
                    self._at_most(all_members, np.array(values), self.num_x + group * len(SPREAD) + quantity)
        return len(self._entries) > found


def relax(choices: Choices, num_devices: int, chips: int, memory: float, *, quick: bool = False) -> Relaxed | None:
    """Solves the relaxation.

    Args:
        choices: Candidates of each table; none may be without.
        num_devices: W.
        chips: C.
        memory: Bytes of a device that stores may take.
        quick: Whether any number of vectors will do, whole or not, and few rows: a looser bound, sooner. For starts.

    Returns:
        The optimum; None if all devices together have too little memory.
    """
    programme = _Programme(choices, num_devices, chips, memory)
    large = programme.num_x > _MEDIUM
    rounds = _FEW_ROUNDS if quick and large else _QUICK_ROUNDS if quick or large else _ROUNDS
    solved = _with_rows(programme, "nothing", rounds)
    if solved is None:
        return None
    seconds, solution = solved
    found: list[np.ndarray] = []
    if programme.num_x <= _MEDIUM and not quick:
        whole = _with_rows(programme, "vectors", _WHOLE_ROUNDS)
        if whole is not None:
            seconds, solution = max(seconds, whole[0]), whole[1]
    if programme.num_x <= _SMALL and not quick:
        programme.add_all_peaks()
        whole = programme.solve("all")
        if whole is not None:
            seconds = max(seconds, whole[0])
            found.append(whole[1])
    for _ in range(_DIVES):
        programme.keep_whole(solution)
        dived = programme.solve("nothing")
        if dived is None:
            break
        solution = dived[1]
    ends = np.cumsum([len(group) for group in choices.of_table])[:-1]
    return Relaxed(
        # Less what the solver may be off by.
        seconds=seconds * programme.unit * (1.0 - 1e-5),
        shares=tuple(tuple(np.split(each[: programme.num_x], ends)) for each in (solution, *found)),
    )


def _with_rows(programme: _Programme, whole: Whole, rounds: int) -> tuple[float, np.ndarray] | None:
    """Solves, adds the rows that the optimum breaks, and again; the best bound, and the last optimum."""
    solved = programme.solve(whole)
    for _ in range(rounds):
        if solved is None or not programme.add_broken_rows(solved[1]):
            break
        before, (bound, solution) = solved[0], programme.solve(whole) or solved
        solved = max(before, bound), solution
        if bound < before * (1.0 + _PROGRESS):
            break
    return solved
