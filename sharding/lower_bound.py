"""Lower bound: a step's seconds that no plan made of the candidates can beat, and the kinds of placement that it uses.

A plan gives each table t one candidate c and each slice an owner. In group g and quantity q (ids, vectors, distinct
rows, ...) device d then has the load ``X_gq(d)``, in seconds, and a step costs ``sum_gq max_d X_gq(d)`` plus what is
the same on every device. The bound is the optimum of a mixed integer programme with less in it, so it is at most that::

    minimise    sum_gq Z_gq + sum_tc x_tc fixed_tc
    subject to  sum_c x_tc = 1 for each table
                Z_gq >= sum_tc x_tc total_tcq / W                              (a maximum is at least the mean)
                Z_gq = seconds of a vector * P_g, P_g a whole number           (q: vectors a sample)
                P_g * bins >= sum_tc x_tc vectors_tc                           (bins: W devices, or N nodes)
                sum_tc x_tc bytes_tc / W + bytes of buffers that need Z_gq <= bytes of a device
                the cuts of `sharding.cuts`, where an optimum breaks them      (what whole slices on whole bins mean)
                those of `sharding.dealing`, of few slices                     (all quantities of a group together)

First x and P may be fractions (a table may be in two halves), and cuts are added until that hardly raises the optimum.
Then P is whole, and of programmes that are not large, x. Both are searched by branch and bound, which stops after a
number of nodes and gives the bound that it has proved by then. Where candidates are many, it branches on levels of the
maxima, too (`sharding.ladders`), and proves more where it is asked less: that no plan costs less than a target.

Letters: W devices, C chips of a node.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sharding.candidates import Choices
from sharding.programme import Programme, Search, Solved
from sharding.rounding import dive, round_off

# Solves with fractions, each with the cuts that the optimum before broke; the last, where that raised the bound by less
# than a share.
_ROUNDS = 30
_LARGE_ROUNDS = 12
_QUICK_ROUNDS = 4
_PROGRESS = 3e-4
# Searches up to as many candidates, and those of models of many tables, which have seconds for them, not a minute.
_MEDIUM = 4000
_FEW_TABLES = 300
_HURRIED = (
    (Search(whole="vectors", gap=3e-4, nodes=20, heuristics=()), 1),
    (Search(whole="all", gap=3e-4, nodes=30, ladders=True, heuristics=("root_reduced_cost",), dearest=0.02), 1),
)
# For other models, the searches for whole vectors and for whole tables, each with its rounds: up to so many candidates.
# The best whole tables are found late, and only then does their bound rise. Where ladders find as much, they search for
# whole tables. In between, solutions that are nearly the best make good starts, since they are unlike each other.
_SEARCHES = (
    (400, ((Search(whole="vectors", gap=3e-4, nodes=20), 3), (Search(whole="all", gap=3e-4, nodes=400), 12))),
    (1300, ((Search(whole="vectors", gap=3e-3, nodes=20), 3), (Search(whole="all", gap=3e-3, nodes=400), 2))),
    (
        _MEDIUM,
        (
            (Search(whole="vectors", gap=3e-4, nodes=20), 1),
            (Search(whole="all", gap=3e-4, nodes=100, ladders=True), 3),
        ),
    ),
)
# Targets above the bound, as shares of it; the lower is tried if the higher is not proved.
_TARGETS = (8e-3, 4e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relaxed:
    """The optimum of the relaxation.

    Attributes:
        seconds: The bound.
        shares: x of each table's candidates, in order: of one solution, or of several that are worth a start.
    """

    seconds: float
    shares: tuple[tuple[Float[np.ndarray, " candidates"], ...], ...]


def relax(choices: Choices, num_devices: int, memory: float, *, quick: bool = False) -> Relaxed | None:
    """Solves the relaxation.

    Args:
        choices: Candidates of each table; none may be without.
        num_devices: W.
        memory: Bytes of a device that stores and buffers may take.
        quick: Whether fractions will do, and few cuts: a looser bound, sooner. For starts.

    Returns:
        The optimum; None if all devices together have too little memory.
    """
    if memory <= choices.buffers.constant:
        return None
    programme = Programme(choices, num_devices, memory)
    large = programme.num_x > _MEDIUM
    solved = programme.solve()
    if solved is None:
        return None
    middle = solved.columns
    for _ in range(_QUICK_ROUNDS if quick else _LARGE_ROUNDS if large else _ROUNDS):
        # Optima of large programmes jump to and fro: cuts are deeper that part them from where all so far were.
        middle = (middle + solved.columns) / 2
        points = (middle, solved.columns) if large else (solved.columns,)
        if not any(programme.add_cuts(point) for point in points):
            break
        before, solved = solved, programme.solve()
        if solved is None:
            return None
        if solved.bound < before.bound * (1.0 + _PROGRESS):
            break
    columns = solved.columns
    proved = [solved]
    starts: list[np.ndarray] = []
    searches = () if quick or large else _searches(programme.num_x, len(choices.tables))
    for how, rounds in searches:
        if how.ladders and searches is not _HURRIED:
            bound = max(one.bound for one in proved)
            targets = (bound * (1.0 + share) for share in _TARGETS)
            target = next((target for target in targets if programme.proves(target, columns)), bound)
            proved.append(Solved(bound=target, cost=np.inf, columns=columns))
        for _ in range(rounds):
            searched = programme.search(how, starts[-1] if starts else None, columns)
            if searched is None:
                break
            before = max(one.bound for one in proved)
            proved.append(searched)
            if how.whole == "all":
                starts += [*searched.others, searched.columns]
            else:
                columns = searched.columns
            added = programme.add_cuts(searched.columns)
            if how.whole == "all":
                added |= programme.add_dealing_cuts(searched.columns)
            if not added or (how.whole == "vectors" and searched.bound < before * (1.0 + 5 * _PROGRESS)):
                break
    dived = (round_off if large else dive)(programme, columns)
    ends = np.cumsum([len(options) for options in choices.of_table])[:-1]
    return Relaxed(
        # Less what the solver may be off by.
        seconds=_best_bound(proved) * programme.unit * (1.0 - 1e-5),
        shares=tuple(tuple(np.split(each[: programme.num_x], ends)) for each in (dived, *starts)),
    )


def _best_bound(proved: Sequence[Solved]) -> float:
    """The highest bound that no solution beats.

    Each programme has all rows of those before it, so a solution of one is a solution of all before it: where it costs
    less than their bound, that is wrong.
    """
    cheapest, best = np.inf, proved[0].bound
    for one in reversed(proved):
        cheapest = min(cheapest, one.cost)
        if one.bound <= cheapest * (1.0 + 1e-6):
            best = max(best, one.bound)
    return best


def _searches(num_candidates: int, num_tables: int) -> tuple[tuple[Search, int], ...]:
    """The searches, and the most rounds of each."""
    if num_tables > _FEW_TABLES:
        return _HURRIED
    return next(searches for most, searches in _SEARCHES if num_candidates <= most)
