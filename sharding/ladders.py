"""Ladders: whole numbers that say which levels the maxima of a programme reach, for branch and bound to branch on.

Of group g and quantity q, let ``l_1 < l_2 < ...`` be levels among the peaks of its candidates, seconds of one slice,
and u_i be 1 if the maximum Z_gq is at least l_i, else 0::

    x_tc <= u_i           i: the highest level that the peak of candidate c reaches
    u_i+1 <= u_i
    Z_gq >= sum_i (l_i - l_i-1) u_i

In any plan the maximum is at least the largest of the chosen peaks, so that all of it holds. A branch on one x of many
says little, as others are nearly as good. One on a level leaves out all candidates above it at once, or pays for it:
solutions that are whole are found sooner, and are cheaper.
"""

import itertools

import highspy
import numpy as np
from jaxtyping import Float

from sharding.candidates import SPREAD
from sharding.cuts import Cuts
from sharding.highs import Row, at_most

# Levels of a maximum, and from which share of what a solution has on: to find solutions, and to prove a bound.
_COARSE = 16, 0.5
_FINE = 32, 1.0
# What a level must be, in units of seconds, to matter.
_LEAST = 1.0


def ladders(
    cuts: Cuts, z: Float[np.ndarray, "groups Q"], first_z: int, first_level: int, *, fine: bool = False
) -> tuple[int, list[Row]]:
    """The levels of all maxima.

    Args:
        cuts: The candidates.
        z: The maxima of a solution, in units: levels far below are reached anyway.
        first_z: The column of the first maximum.
        first_level: The column of the first level.
        fine: Whether there are many levels, all above the maxima.

    Returns:
        How many levels there are, and the rows.
    """
    most, least = _FINE if fine else _COARSE
    rows: list[Row] = []
    column = first_level
    for group, mine in enumerate(cuts.members):
        for quantity in range(len(SPREAD) if len(mine) else 0):
            peaks = cuts.peaks[mine, quantity]
            above = np.unique(peaks[peaks > max(_LEAST, least * z[group, quantity])])
            if not len(above):
                continue
            levels = above[np.unique(np.linspace(0, len(above) - 1, most + 1).round().astype(int)[:-1])]
            columns = np.arange(column, column + len(levels))
            column += len(levels)
            rows.extend(at_most(upper, lower) for lower, upper in itertools.pairwise(columns.tolist()))
            reached = np.searchsorted(levels, peaks, side="right") - 1
            some = reached >= 0
            rows.extend(map(at_most, mine[some].tolist(), columns[reached[some]].tolist()))
            maximum = np.append(columns, first_z + group * len(SPREAD) + quantity)
            rows.append((maximum, np.append(np.diff(levels, prepend=0.0), -1.0), -highspy.kHighsInf, 0.0))
    return column - first_level, rows
