"""Fitting: puts tables elsewhere until an assignment takes no more than a device's memory, whatever that costs."""

from sharding.assignment import Assignment
from sharding.candidates import Candidate


def fit(assignment: Assignment, rounds: int = 4) -> bool:
    """Takes tables out, the largest first, and puts each where devices need fewest bytes, until that is little enough.

    Args:
        assignment: The assignment; changed.
        rounds: Most times that each table is put elsewhere.

    Returns:
        Whether it fits.
    """
    held = [(candidate.total_bytes, candidate.table) for candidate in assignment.candidate if candidate is not None]
    tables = [table for _, table in sorted(held, reverse=True) if table not in assignment.choices.bundled]
    for _ in range(rounds):
        before = assignment.most_bytes
        for table in tables:
            if assignment.most_bytes <= assignment.memory:
                return True
            assignment.remove(table)
            ways = [_lightest(assignment, candidate) for candidate in assignment.choices.of_table[table]]
            _, _, bins, candidate = min(ways, key=lambda way: way[:2])
            assignment.place(candidate, bins)
        if assignment.most_bytes >= before:
            break
    return assignment.most_bytes <= assignment.memory


def _lightest(assignment: Assignment, candidate: Candidate) -> tuple[float, float, tuple[int, ...], Candidate]:
    """Bytes of a device and seconds of a step with a candidate where it needs fewest bytes, and its bins."""
    place = assignment.best_bins(candidate, lightest=True)
    assert place is not None
    assignment.place(candidate, place[2])
    size, cost = assignment.most_bytes, assignment.cost
    assignment.remove(candidate.table)
    return size, cost, place[2], candidate
