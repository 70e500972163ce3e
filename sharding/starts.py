"""Starts: the kinds that were chosen, dealt out to devices and nodes by a partitioner."""

import math

import numpy as np
from jaxtyping import Int

from sharding.assignment import Assignment, insert_best
from sharding.candidates import SPREAD, Candidate, Choices
from sharding.cost import Step
from sharding.fitting import fit
from sharding.partition import Partitioner, greedy

# Times that tables are dealt out, since buffers take more than was left to them.
_DEALS = 3
# Rounds towards the least memory: a third gains 1 % of it at most.
_LIGHTEST_ROUNDS = 2


def initial_assignment(
    choices: Choices, chosen: list[Candidate], partitioner: Partitioner, step: Step, memory: float
) -> Assignment | None:
    """Deals the chosen candidates out, group by group, each group's slices by the partitioner.

    What a partitioner returns are bins without names (but for those that hold pinned tables). They are named so that
    memory is even: the bin with most bytes goes to the device that has fewest in that store. How large buffers are is
    known once all are dealt out: where they do not fit, it is done again with so much less memory.

    Returns:
        The assignment; None if memory has no place for a table, or not for the buffers.
    """
    kept = 0.0
    for _ in range(_DEALS):
        assignment = _dealt(choices.without_buffers(), chosen, partitioner, step, memory - kept)
        if assignment is None:
            return None
        assignment.let_choose(choices)
        assignment.memory = memory
        if assignment.most_bytes <= memory:
            return assignment
        kept = max(kept, choices.buffers.bytes_of(assignment.most))
    return None


def lightest_assignment(choices: Choices, step: Step, partitioner: Partitioner = greedy) -> Assignment:
    """Every table where a device needs fewest bytes, as far as that is easily found; no table is without candidates."""
    # What is spread over all devices is even.
    sizes = [[c.owner_bytes + c.fixed_bytes for c in candidates] for candidates in choices.of_table]
    chosen = [candidates[each.index(min(each))] for candidates, each in zip(choices.of_table, sizes, strict=True)]
    lightest = initial_assignment(choices, chosen, partitioner, step, math.inf)
    # Without a limit, there is a place for every table.
    assert lightest is not None
    lightest.memory = 0.0
    fit(lightest, rounds=_LIGHTEST_ROUNDS)
    return lightest


def _dealt(
    choices: Choices, chosen: list[Candidate], partitioner: Partitioner, step: Step, memory: float
) -> Assignment | None:
    assignment = Assignment(choices, step, memory)
    num_devices = assignment.num_devices
    of_group: dict[tuple[int, int], list[Candidate]] = {}
    for tables in choices.together:
        if not _place_together(assignment, [chosen[table] for table in tables]):
            return None
    for candidate in chosen:
        if candidate.table in choices.bundled:
            continue
        if candidate.owners is not None or candidate.span == num_devices:
            assignment.place(candidate, candidate.owners or (0,))
        else:
            of_group.setdefault((candidate.group, candidate.span), []).append(candidate)
    # Groups of large slices first: small ones fill what they leave.
    late: list[Candidate] = []
    for (group, span), items in sorted(
        of_group.items(), key=lambda entry: (-entry[0][1], -max(c.owner_bytes for c in entry[1]), entry[0])
    ):
        held = assignment.load[group].reshape(len(SPREAD), -1, span).max(axis=2).sum(axis=0)
        weights = [float(candidate.profile.max(axis=1).sum()) for candidate in items]
        bins = partitioner(weights, [candidate.num_slices for candidate in items], held)
        names = np.arange(len(held)) if np.ptp(held) > 0 else _even_memory(assignment, items, bins, span)
        for candidate, places in zip(items, bins, strict=True):
            named = tuple(names[list(places)].tolist())
            held = assignment.bytes[candidate.store].reshape(-1, span)[list(named)].max()
            if held + candidate.owner_bytes <= assignment.room(candidate.store):
                assignment.place(candidate, named)
            else:
                late.append(candidate)
    late.sort(key=lambda candidate: (-candidate.owner_bytes, candidate.table))
    for candidate in late:
        if not insert_best(assignment, candidate.table, first=candidate):
            return None
    return assignment if assignment.most_bytes <= memory else None


def _even_memory(
    assignment: Assignment, items: list[Candidate], bins: list[tuple[int, ...]], span: int
) -> Int[np.ndarray, " M"]:
    store = items[0].store
    held = assignment.bytes[store].reshape(-1, span).max(axis=1)
    sizes = np.zeros(len(held))
    for candidate, places in zip(items, bins, strict=True):
        sizes[list(places)] += candidate.owner_bytes
    names = np.empty(len(held), np.int64)
    names[np.argsort(-sizes, kind="stable")] = np.argsort(held, kind="stable")
    return names


def _place_together(assignment: Assignment, candidates: list[Candidate]) -> bool:
    """Places table-wise candidates on one device: where one is pinned, else the cheapest of those with room."""
    pinned = {candidate.owners[0] for candidate in candidates if candidate.owners}
    found: list[tuple[float, float, int]] = []
    for device in pinned or range(assignment.num_devices):
        for candidate in candidates:
            assignment.place(candidate, (device,))
        if assignment.most_bytes <= assignment.memory:
            found.append((assignment.cost, float(assignment.bytes[:, device].sum()), device))
        for candidate in candidates:
            assignment.remove(candidate.table)
    if not found:
        return False
    for candidate in candidates:
        assignment.place(candidate, (min(found)[2],))
    return True
