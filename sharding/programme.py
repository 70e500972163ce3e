"""The programme of the lower bound in HiGHS: its rows, its optimum, branch and bound. See `sharding.lower_bound`."""

import dataclasses
import itertools
import math
from typing import Literal

import highspy
import numpy as np
from jaxtyping import Bool, Float

from sharding.candidates import SPREAD, Choices
from sharding.cuts import VECTORS_PLACE, Cuts
from sharding.dealing import MOST_PLACES, least_dealt
from sharding.exchanges import PARTS, Exchanges
from sharding.highs import Row, add_rows, make_solver, make_whole
from sharding.ladders import ladders

# Up to how many candidates all say from the start that they need the exchanges of their part of the step. In larger
# programmes those say so that a solution has without them.
_MOST_EXCHANGES = 4000
# A dealing cut is worth a row if it raises its group's maxima by such a share; where all together raise them by no more
# than another, that is as good as true.
_WORTH_A_ROW = 3e-4
_CLOSE = 5e-3
# Nodes of the search tree of a proof.
_TARGET_NODES = 400
# What fractions may be off by.
_TOLERANCE = 1e-6
# Improving solutions of one search that are worth a start.
_SOLUTIONS = 5

_HEURISTICS = ("rins", "rens", "root_reduced_cost")

Whole = Literal["vectors", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solved:
    """A bound in units, the cost and columns of the optimum (or of the best there is), and columns found before it."""

    bound: float
    cost: float
    columns: Float[np.ndarray, " columns"]
    others: tuple[Float[np.ndarray, " columns"], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A way to search.

    Attributes:
        whole: What is to be whole.
        gap: The share of the cost that may stay open.
        nodes: Nodes of the search tree, not seconds: the same input has the same plan on a slow machine.
        ladders: Whether it branches on levels of maxima, too, and tries no branch out before it is taken.
        settled: Whether tables stay as they are that are whole already.
        heuristics: Those of HiGHS' heuristics that search a programme of their own which may be used.
        dearest: The highest reduced cost of a candidate, as a share of the optimum; dearer ones are left out.
    """

    whole: Whole
    gap: float
    nodes: int
    ladders: bool = False
    settled: bool = False
    heuristics: tuple[str, ...] = _HEURISTICS
    dearest: float = math.inf


class Programme:
    """The programme in HiGHS, which goes on from the last optimum when rows are added.

    Columns: x of the candidates, Z of each group and quantity, P of each group, y of each part of the step.
    """

    def __init__(self, choices: Choices, num_devices: int, memory: float):
        self.choices, self.num_devices = choices, num_devices
        candidates = [candidate for options in choices.of_table for candidate in options]
        # The unit of seconds, so that the solver's tolerances fit.
        least = sum(min(c.fixed + c.seconds / num_devices for c in options) for options in choices.of_table if options)
        self.unit = least / 1000.0 or 1.0
        self.cuts = Cuts(choices, num_devices, self.unit)
        self.costs = np.array([c.fixed + c.seconds / num_devices for c in candidates]) / self.unit
        self.num_x = len(candidates)
        self.first_p = self.num_x + len(choices.groups) * len(SPREAD)
        self.first_y = self.first_p + len(choices.groups)
        self.num_columns = self.first_y + len(PARTS)
        self._rows: list[Row] = []
        objective = np.zeros(self.num_columns)
        objective[: self.num_x] = [c.fixed / self.unit for c in candidates]
        objective[self.num_x : self.first_p] = 1.0
        objective[self.first_y :] = [part.exchanges * choices.exchange_seconds / self.unit for part in PARTS]
        upper = np.full(self.num_columns, highspy.kHighsInf)
        upper[: self.num_x] = 1.0
        programme = highspy.HighsLp()
        programme.num_col_ = self.num_columns
        programme.col_cost_, programme.col_lower_, programme.col_upper_ = objective, np.zeros(self.num_columns), upper
        programme.a_matrix_.start_ = np.zeros(self.num_columns + 1, np.int32)
        self._highs = make_solver()
        self._highs.passModel(programme)
        self._kept = np.ones(self.num_x, np.bool_)
        ends = np.cumsum([len(options) for options in choices.of_table]).tolist()
        self._of_table = [slice(first, end) for first, end in itertools.pairwise([0, *ends])]
        for mine in self._of_table:
            self._row(np.arange(mine.start, mine.stop), np.ones(mine.stop - mine.start), 1.0, 1.0)
        self._maxima()
        self._exchanges = Exchanges(choices, self.first_y)
        if self.num_x <= _MOST_EXCHANGES:
            self._rows += self._exchanges.all()
        sizes = np.array([c.total_bytes for c in candidates], np.float64)
        self._row(np.arange(self.num_x), sizes / (memory * num_devices), -highspy.kHighsInf, 1.0)
        self._add_rows()
        # With buffers only where a solution has no room for them. Shares of a device's memory: of candidates, and for
        # each maximum.
        fixed = np.array([c.fixed_bytes for c in candidates])
        room = memory - choices.buffers.constant
        self._held = (sizes / num_devices + fixed) / room
        self._together, self._in_turn = (
            each * self.unit / room for each in (choices.buffers.together, choices.buffers.in_turn)
        )
        self._crowded: set[int] = set()

    def _maxima(self) -> None:
        """A maximum is at least the mean; vectors are counted in whole numbers."""
        cuts = self.cuts
        for group, mine in enumerate(cuts.members):
            if not len(mine):
                continue
            shares = cuts.slices[mine] * cuts.spans[mine] / self.num_devices
            for quantity in range(len(SPREAD)):
                self._at_most(mine, cuts.means[mine, quantity] * shares, self._z(group, quantity))
            if cuts.counts_vectors[group]:
                self._at_most(mine, cuts.vectors[mine] * shares, self.first_p + group)
                seconds = self.choices.vector_seconds[group] / self.unit
                self._at_most(np.array([self.first_p + group]), np.array([seconds]), self._z(group, VECTORS_PLACE))

    def _z(self, group: int, quantity: int) -> int:
        return self.num_x + group * len(SPREAD) + quantity

    def _row(self, columns: np.ndarray, values: np.ndarray, lower: float, upper: float) -> None:
        self._rows.append((columns, values, lower, upper))

    def _at_most(self, members: np.ndarray, values: np.ndarray, column: int) -> None:
        """``values @ columns[members] <= column``."""
        self._row(np.append(members, column), np.append(values, -1.0), -highspy.kHighsInf, 0.0)

    def _add_rows(self) -> bool:
        """Gives the solver the rows that are new; says whether there are any."""
        rows, self._rows = self._rows, []
        add_rows(self._highs, rows)
        return bool(rows)

    def add_cuts(self, columns: np.ndarray) -> bool:
        """Adds the cuts that a solution breaks; says whether there are any."""
        z = columns[self.num_x : self.first_p].reshape(-1, len(SPREAD))
        for cut in self.cuts.broken(columns[: self.num_x], z, columns[self.first_p : self.first_y]):
            members, values = cut.members, cut.values
            if cut.of_vectors:
                members, values = np.append(members, self.first_p + cut.group), np.append(values, -cut.of_vectors)
            self._at_most(members, values, self._z(cut.group, cut.quantity))
        self._rows += self._exchanges.broken(columns)
        self._fit(columns[: self.num_x], z)
        return self._add_rows()

    def _fit(self, x: Float[np.ndarray, " candidates"], z: Float[np.ndarray, "groups Q"]) -> None:
        """Adds the row of stores and buffers, if those of a solution are larger than memory.

        There is one row for each maximum that may be the largest of what groups hold in their turn.
        """
        turn = int((self._in_turn * z).argmax())
        share = self._held @ x + (self._together * z).sum() + self._in_turn.flat[turn] * z.flat[turn]
        if share <= 1.0 or turn in self._crowded:
            return
        self._crowded.add(turn)
        sizes = self._together.ravel().copy()
        sizes[turn] += self._in_turn.flat[turn]
        self._row(np.arange(self.first_p), np.concatenate([self._held, sizes]), -highspy.kHighsInf, 1.0)

    def add_dealing_cuts(self, columns: np.ndarray) -> bool:
        """Adds what dealing out the slices of whole tables costs, where that is more than a solution says.

        See `sharding.dealing`. Of slices that are on several devices, it counts the mean over these.

        Returns:
            Whether that is so much more that the next solution should be another.
        """
        z = columns[self.num_x : self.first_p].reshape(-1, len(SPREAD)).sum(axis=1)
        cuts, excess = self.cuts, 0.0
        for group, mine in enumerate(cuts.members):
            chosen, bins = mine[columns[mine] > 0.5], cuts.bins[group]
            if bins == 1 or not 1 < len(chosen) <= MOST_PLACES // bins:
                continue
            least = least_dealt(cuts.means[chosen], cuts.slices[chosen], bins)
            if least > z[group] * (1.0 + _WORTH_A_ROW):
                excess += least - z[group]
                each = cuts.means[chosen].sum(axis=1)
                maxima = np.array([self._z(group, quantity) for quantity in range(len(SPREAD))])
                values = np.append(each, -np.ones(len(SPREAD)))
                self._row(np.append(chosen, maxima), values, -highspy.kHighsInf, float(each.sum()) - least)
        self._add_rows()
        return excess > _CLOSE * z.sum()

    def solve(self) -> Solved | None:
        """The optimum where all may be fractions; None if nothing is feasible."""
        self._highs.run()
        if self._highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        cost = self._highs.getInfo().objective_function_value
        return Solved(bound=cost, cost=cost, columns=np.array(self._highs.getSolution().col_value))

    def search(self, how: Search, start: np.ndarray | None, near: np.ndarray) -> Solved | None:
        """Branch and bound with whole numbers; None if it found no solution.

        Args:
            how: What is to be whole, and the limits.
            start: Columns whose x are whole, to begin from.
            near: Columns of a solution, which says where levels of maxima matter.
        """
        highs = make_solver()
        highs.passModel(self._highs.getLp())
        num_levels = self._add_ladders(highs, near) if how.ladders else 0
        beyond = math.inf
        if how.settled:
            self._keep(highs, self._unsettled(near))
        if how.dearest < math.inf:
            relaxed = self._reduced_costs(highs)
            if relaxed is None:
                return None
            optimum, reduced = relaxed
            self._keep(highs, reduced <= how.dearest * optimum)
            # What is left out leads there.
            beyond = optimum * (1.0 + how.dearest)
        for heuristic in _HEURISTICS:
            highs.setOptionValue(f"mip_heuristic_run_{heuristic}", heuristic in how.heuristics)
        integral = np.arange(self.first_p if how.whole == "vectors" else 0, self.num_columns + num_levels)
        make_whole(highs, integral[(integral < self.num_x) | (integral >= self.first_p)])
        _limit(highs, how.nodes, how.gap, hasty=how.ladders)
        if start is not None:
            highs.setSolution(self.num_x, np.arange(self.num_x, dtype=np.int32), np.round(start[: self.num_x]))
        found: list[np.ndarray] = []
        highs.cbMipImprovingSolution.subscribe(lambda event: found.append(np.array(event.data_out.mip_solution)))
        highs.run()
        info = highs.getInfo()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        columns = np.array(highs.getSolution().col_value)[: self.num_columns]
        return Solved(
            bound=min(info.mip_dual_bound, beyond),
            cost=info.objective_function_value,
            columns=columns,
            others=tuple(each[: self.num_columns] for each in found[-_SOLUTIONS:-1]),
        )

    def proves(self, target: float, near: np.ndarray) -> bool:
        """Whether no plan costs less than a target, as far as branch and bound finds that out in its nodes.

        Vectors and levels are whole, tables may be fractions but for what the optimum says of them: a candidate whose
        reduced cost leads beyond the target is in no plan that is cheaper. All branches beyond it are left alone, so
        that there are few.

        Args:
            target: The cost, in units.
            near: As for `search`.
        """
        highs = make_solver()
        highs.passModel(self._highs.getLp())
        num_levels = self._add_ladders(highs, near, fine=True)
        relaxed = self._reduced_costs(highs)
        if relaxed is None:
            return False
        optimum, reduced = relaxed
        self._keep(highs, reduced <= target - optimum)
        make_whole(highs, np.arange(self.first_p, self.num_columns + num_levels))
        highs.setOptionValue("objective_bound", target)
        _limit(highs, _TARGET_NODES, 0.0, hasty=True)
        highs.run()
        # Ended, and found nothing cheaper.
        status = highs.getModelStatus()
        if status == highspy.HighsModelStatus.kOptimal:
            return highs.getInfo().objective_function_value >= target
        return status == highspy.HighsModelStatus.kInfeasible

    def _unsettled(self, columns: np.ndarray) -> Bool[np.ndarray, " candidates"]:
        """Candidates that tables may have: of one that is whole, what it has."""
        kept = self._kept.copy()
        for mine in self._of_table:
            if columns[mine].max() > 1.0 - _TOLERANCE:
                kept[mine] = columns[mine] > 0.5
        return kept

    def _reduced_costs(self, highs: highspy.Highs) -> tuple[float, Float[np.ndarray, " candidates"]] | None:
        """The optimum where all may be fractions, and reduced costs of candidates; None if there is none."""
        highs.run()
        if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        optimum = highs.getInfo().objective_function_value
        return optimum, np.array(highs.getSolution().col_dual)[: self.num_x]

    def _add_ladders(self, highs: highspy.Highs, near: np.ndarray, *, fine: bool = False) -> int:
        z = near[self.num_x : self.first_p].reshape(-1, len(SPREAD))
        num_levels, rows = ladders(self.cuts, z, self.num_x, self.num_columns, fine=fine)
        highs.addVars(num_levels, np.zeros(num_levels), np.ones(num_levels))
        add_rows(highs, rows)
        return num_levels

    def keep_whole(self, columns: np.ndarray) -> None:
        """Leaves out the candidates that the maxima of a solution have no room for.

        A table in two halves hides how large it is; this is how the search gets kinds that can be whole.
        """
        z = columns[self.num_x : self.first_p].reshape(-1, len(SPREAD))
        excess = (self.cuts.peaks - z[self.cuts.groups] * 1.1).clip(min=0.0).sum(axis=1)
        kept = excess <= 0.01
        for mine in self._of_table:
            # The least of the evils, where all are too large: what rises then, rises.
            kept[mine][(excess[mine] + self.costs[mine]).argmin()] |= not kept[mine].any()
        self._kept = kept
        self._keep(self._highs, kept)

    def whole_vectors(self, columns: np.ndarray) -> Solved | None:
        """The optimum with whole vectors on the fullest bins: of each group as many as cost less, rounded up or down.

        The groups have their turn one by one, those whose vectors are dear first.

        Args:
            columns: Columns of a solution.

        Returns:
            The optimum; None if all that was left fits nowhere.
        """
        seconds = np.where(self.cuts.counts_vectors, self.choices.vector_seconds, 0.0)
        best: Solved | None = None
        while True:
            vectors = columns[self.first_p : self.first_y]
            fractions = np.abs(vectors - np.round(vectors)) > _TOLERANCE
            group = int((seconds * fractions).argmax())
            if not seconds[group] * fractions[group]:
                return best
            found: list[tuple[float, int, Solved]] = []
            for whole in (math.floor(vectors[group]), math.ceil(vectors[group])):
                self._set_vectors(group, whole, whole)
                solved = self.solve()
                if solved is not None:
                    found.append((solved.cost, whole, solved))
            if not found:
                return None
            _, whole, best = min(found, key=lambda each: each[:2])
            self._set_vectors(group, whole, whole)
            columns = best.columns

    def _set_vectors(self, group: int, lower: float, upper: float) -> None:
        self._highs.changeColBounds(self.first_p + group, lower, upper)

    def _keep(self, highs: highspy.Highs, kept: Bool[np.ndarray, " candidates"]) -> None:
        """Leaves out all other candidates."""
        every = np.arange(self.num_x, dtype=np.int32)
        highs.changeColsBounds(self.num_x, every, np.zeros(self.num_x), kept.astype(np.float64))


def _limit(highs: highspy.Highs, nodes: int, gap: float, *, hasty: bool) -> None:
    """Branch and bound ends after so many nodes or within a gap; in haste no branch is tried out before it is taken."""
    highs.setOptionValue("mip_max_nodes", nodes)
    highs.setOptionValue("mip_rel_gap", gap)
    # A restart costs more here than it gives.
    highs.setOptionValue("mip_allow_restart", False)
    if hasty:
        highs.setOptionValue("mip_pscost_minreliable", 0)
