"""Search: lowers the padded cost of an assignment step by step.

Moves: slices that change places within a group (`sharding.swaps`); tables, levels and families that are put elsewhere,
of whatever kind; ruins; annealing (`sharding.annealing`). A move is kept if the cost falls.
"""

from collections.abc import Set

import numpy as np
from jaxtyping import Int

from sharding.annealing import anneal
from sharding.assignment import NOISE, WORTH, Assignment, Placed, insert_best
from sharding.candidates import SPREAD, Candidate
from sharding.layout import FAMILIES
from sharding.swaps import swap_slices

# Tables that are taken out together.
_MOST_TAKEN = 60
# Most tables of one ruin, and how much worse than the cheapest the first of a cycle may leave things.
_MOST_RUINED = 10
_WORSE = 0.01
# Cycles of ruins, how many in a row may find nothing, and how many tables one puts back: of each so many, in all so
# many.
_CYCLES = 8
_IN_VAIN = 3
_INSERTS_OF_TABLE = 100
_INSERTS = 5000
# Up to how many tables ruins find anything in the time there is.
_FEW_TABLES = 200


def reinsert(assignment: Assignment, tables: list[int]) -> bool:
    """Takes each table out and puts it back where it costs least, of whatever kind; says whether that helped."""
    helped = False
    for table in tables:
        before = assignment.cost
        candidate, bins = assignment.remove(table)
        if assignment.cost > before * (1.0 - NOISE):
            # No maximum is its doing: nowhere else can it cost less.
            assignment.place(candidate, bins)
            continue
        insert_best(assignment, table)
        if assignment.candidate[table] is None or assignment.cost > before * (1.0 - NOISE):
            if assignment.candidate[table] is not None:
                assignment.remove(table)
            assignment.place(candidate, bins)
        else:
            helped = True
    return helped


def lower_levels(assignment: Assignment, movable: Set[int]) -> bool:
    """Lowers the maximum of each group's quantities by emptying all bins that reach it; says whether that helped.

    One move alone does not pay where several bins are equally full, such as when four tables too many make all devices
    pool one more vector. So all that is above a level is taken out and put back where it costs least.
    """
    helped = False
    most = assignment.most
    for place in np.argsort(-(most - assignment.load.mean(axis=2)), axis=None, kind="stable").tolist():
        group, quantity = divmod(place, len(SPREAD))
        if most[group, quantity] - assignment.load[group, quantity].mean() <= assignment.cost * WORTH:
            continue
        levels = np.unique(assignment.load[group, quantity])
        for level in sorted({float(levels[-2:][0]), float(np.quantile(assignment.load[group, quantity], 0.75))}):
            if level < most[group, quantity] * (1.0 - NOISE):
                helped |= _empty_above(assignment, group, quantity, level, movable)
    return helped


def _empty_above(assignment: Assignment, group: int, quantity: int, level: float, movable: Set[int]) -> bool:
    by_bin: dict[slice, list[int]] = {}
    held: dict[int, Candidate] = {}
    for table in sorted(movable):
        candidate = assignment.candidate[table]
        if candidate is not None and candidate.group == group and candidate.profile[quantity].max() > 0:
            held[table] = candidate
            for place in assignment.bins[table]:
                devices = slice(place * candidate.span, (place + 1) * candidate.span)
                by_bin.setdefault(devices, []).append(table)
    before = assignment.cost
    taken: list[Placed] = []
    for devices, tables in by_bin.items():
        while len(taken) < _MOST_TAKEN:
            excess = float(assignment.load[group, quantity, devices].max()) - level
            left = [table for table in tables if assignment.candidate[table] is not None]
            if excess <= level * NOISE or not left:
                break
            # The cheapest that will do; else the largest, and then another.
            sizes = {table: float(held[table].profile[quantity].max()) for table in left}
            enough = [table for table in left if sizes[table] >= excess]
            cheapest = min(enough, key=lambda table: (held[table].seconds, table)) if enough else None
            largest = max(left, key=lambda table, sizes=sizes: (sizes[table], table))
            taken.append(assignment.remove(largest if cheapest is None else cheapest))
    return _put_back(assignment, taken, before)


def _put_back(assignment: Assignment, taken: list[Placed], before: float, without: Set[int] = frozenset()) -> bool:
    """Puts tables where they cost least, the largest first; where they were, unless that is cheaper than before."""
    put = []
    for candidate, _ in sorted(taken, key=lambda entry: (-entry[0].seconds, entry[0].table)):
        if not insert_best(assignment, candidate.table, without=without):
            break
        put.append(candidate.table)
    if len(put) == len(taken) and assignment.cost < before * (1.0 - 1e-6):
        return True
    _undo(assignment, put, taken)
    return False


def _undo(assignment: Assignment, put: list[int], taken: list[Placed]) -> None:
    for table in put:
        assignment.remove(table)
    for candidate, bins in taken:
        assignment.place(candidate, bins)


def drop_families(assignment: Assignment, movable: Set[int]) -> bool:
    """Puts the tables of a whole family elsewhere if that saves more exchanges than it costs."""
    helped = False
    for family in FAMILIES:
        groups = {number for number, key in enumerate(assignment.choices.groups) if key.family == family}
        members = [t for t in sorted(movable) if (held := assignment.candidate[t]) is not None and held.group in groups]
        if 0 < len(members) <= _MOST_TAKEN and int(assignment.members[sorted(groups)].sum()) == len(members):
            before = assignment.cost
            taken = [assignment.remove(table) for table in members]
            helped |= _put_back(assignment, taken, before, without=groups)
    return helped


def ruin_and_recreate(assignment: Assignment, movable: Set[int], cycles: int, enough: float = 0.0) -> None:
    """Takes some tables out and puts them back where they cost least, again and again; keeps what was cheapest.

    Half are tables of a group that has a maximum far above its mean, some of them on the device that it is on, half are
    any (Schrimpf et al. 2000). A little worse than the cheapest is good enough to go on from, ever less so during a
    cycle; the next begins from the cheapest. The dice are the same in every run.

    Args:
        assignment: The assignment; changed.
        movable: Tables that may be moved.
        cycles: Most cycles.
        enough: The cost at which they end.
    """
    dice = np.random.default_rng(0)
    tables = np.array(sorted(movable))
    in_vain = 0
    for _ in range(cycles if len(tables) > 1 else 0):
        before = assignment.cost
        if before <= enough:
            break
        _ruin_cycle(assignment, tables, dice)
        in_vain = 0 if assignment.cost < before * (1.0 - NOISE) else in_vain + 1
        if in_vain == _IN_VAIN:
            break


def _ruin_cycle(assignment: Assignment, tables: Int[np.ndarray, " tables"], dice: np.random.Generator) -> None:
    best = current = assignment.cost
    cheapest = assignment.snapshot()
    inserts = total = min(_INSERTS, _INSERTS_OF_TABLE * len(tables))
    while inserts > 0:
        slack = (assignment.most - assignment.load.mean(axis=2)).clip(min=0.0).ravel()
        if slack.sum() <= best * WORTH:
            break
        maximum = divmod(int(dice.choice(len(slack), p=slack / slack.sum())), len(SPREAD))
        chosen = _to_ruin(assignment, tables, maximum, dice)
        before = [assignment.remove(table) for table in chosen]
        noise = dice.uniform(0.5, 1.5, len(before))
        order = np.argsort([-entry[0].seconds * by for entry, by in zip(before, noise, strict=True)], kind="stable")
        put = []
        for number in order.tolist():
            if not insert_best(assignment, chosen[number]):
                break
            put.append(chosen[number])
        worse = _WORSE * inserts / total
        inserts -= len(chosen)
        cost = assignment.cost
        if len(put) < len(chosen) or cost > min(best * (1.0 + worse), current * (1.0 + worse / 4)):
            _undo(assignment, put, before)
            continue
        current = cost
        if cost < best * (1.0 - NOISE):
            best, cheapest = cost, assignment.snapshot()
    assignment.restore(cheapest)


def _to_ruin(
    assignment: Assignment, tables: Int[np.ndarray, " tables"], maximum: tuple[int, int], dice: np.random.Generator
) -> list[int]:
    """Tables to take out so that a maximum, of a group and quantity, may fall."""
    group, quantity = maximum
    held = assignment.candidate
    of_group = [t for t in tables.tolist() if (candidate := held[t]) is not None and candidate.group == group]
    device = int(assignment.load[group, quantity].argmax())
    fullest = [
        t
        for t in of_group
        if (candidate := held[t]) is not None
        and candidate.profile[quantity].max() > 0
        and device // candidate.span in assignment.bins[t]
    ]
    count = int(dice.integers(2, max(3, min(_MOST_RUINED, len(tables) // 2) + 1)))
    # As long as these stay, so does the maximum.
    most = min(len(fullest), max(1, count // 2))
    chosen = set(dice.choice(fullest, int(dice.integers(1, most + 1)), replace=False).tolist()) if fullest else set()
    more = min(len(of_group), max(0, -(-count // 2) - len(chosen)))
    chosen.update(dice.choice(of_group, more, replace=False).tolist() if more else ())
    chosen.update(dice.choice(tables, min(len(tables), count // 2 + 1), replace=False).tolist())
    return sorted(chosen)


def improve(assignment: Assignment, rounds: int, *, cycles: int = _CYCLES, enough: float = 0.0) -> None:
    """Local search, until nothing helps: swaps within groups; levels, families and single tables put elsewhere.

    Args:
        assignment: The assignment; changed.
        rounds: Most rounds; 0 for the swaps alone.
        cycles: Most cycles of ruins, which follow where there are rounds; then comes annealing.
        enough: What costs no more than this is neither ruined nor annealed.
    """
    bundled = assignment.choices.bundled
    movable = set(range(len(assignment.choices.tables))) - bundled

    def swap() -> None:
        for group in range(len(assignment.choices.groups)):
            swap_slices(assignment, group, bundled)

    swap()
    for _ in range(rounds):
        before = assignment.cost
        lower_levels(assignment, movable)
        drop_families(assignment, movable)
        reinsert(assignment, sorted(movable, key=lambda table: (-_weight(assignment, table), table)))
        swap()
        if assignment.cost > before * (1.0 - 1e-3):
            break
    if rounds and len(movable) <= _FEW_TABLES:
        ruin_and_recreate(assignment, movable, cycles, enough)
        anneal(assignment, movable, enough)
        swap()


def _weight(assignment: Assignment, table: int) -> float:
    candidate = assignment.candidate[table]
    return 0.0 if candidate is None else candidate.seconds + candidate.fixed * assignment.num_devices
