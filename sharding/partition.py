"""Partitioners: numbers into bins so that the fullest holds little. Greedy, and Karmarkar-Karp's largest differencing.

A number may come in several copies that must lie in different bins: the column slices of a table.

Letters: n numbers, M bins.
"""

import heapq
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

Bins = list[tuple[int, ...]]
Partitioner = Callable[[Sequence[float], Sequence[int], Float[np.ndarray, " M"]], Bins]


def greedy(weights: Sequence[float], copies: Sequence[int], held: Float[np.ndarray, " M"]) -> Bins:
    """The largest number first, each into the least loaded bin (Graham 1969, LPT).

    Args:
        weights: The numbers, at least 0.
        copies: Copies of each, at most M.
        held: What each bin holds already.

    Returns:
        The bins of each number's copies.
    """
    loads = np.array(held, np.float64)
    bins: Bins = [()] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        chosen = np.argsort(loads, kind="stable")[: copies[item]]
        loads[chosen] += weights[item]
        bins[item] = tuple(chosen.tolist())
    return bins


def largest_differencing(weights: Sequence[float], copies: Sequence[int], held: Float[np.ndarray, " M"]) -> Bins:
    """The largest differencing method (Karmarkar and Karp 1982), for any number of bins.

    Begins with one partial solution for each number, M bins of which its copies fill the first. Joins the two whose
    fullest and emptiest bins differ most, the fullest bin of one with the emptiest of the other, until one is left.

    Args:
        weights: The numbers, at least 0.
        copies: Copies of each, at most M.
        held: What each bin holds already; one more partial solution, whose bins keep their names.

    Returns:
        The bins of each number's copies.
    """
    num_bins = len(held)
    loads: dict[int, np.ndarray] = {-1: np.array(held, np.float64)}
    members: dict[int, dict[int, list[int]]] = {-1: {}}
    for item, (weight, count) in enumerate(zip(weights, copies, strict=True)):
        loads[item] = np.where(np.arange(num_bins) < count, float(weight), 0.0)
        members[item] = {place: [item] for place in range(count)}
    heap = [(-float(np.ptp(load)), number) for number, load in loads.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, first = heapq.heappop(heap)
        _, second = heapq.heappop(heap)
        # That of `held`, -1, keeps its bins' names.
        kept, added = min(first, second), max(first, second)
        into = np.argsort(-loads[kept], kind="stable")
        out_of = np.argsort(loads[added], kind="stable")
        loads[kept][into] += loads.pop(added)[out_of]
        place_of = np.empty(num_bins, np.int64)
        place_of[out_of] = into
        for place, items in members.pop(added).items():
            members[kept].setdefault(int(place_of[place]), []).extend(items)
        heapq.heappush(heap, (-float(np.ptp(loads[kept])), kept))
    bins: list[list[int]] = [[] for _ in weights]
    for place, items in sorted(members[heap[0][1]].items()):
        for item in items:
            bins[item].append(place)
    return [tuple(places) for places in bins]


PARTITIONERS: dict[str, Partitioner] = {"greedy": greedy, "ldm": largest_differencing}
