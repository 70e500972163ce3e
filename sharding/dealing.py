"""Dealing: what whole slices of a group cost on whole bins, all quantities together.

Slices are dealt out to bins, those of one table to different ones. What that costs at least, D(S) of a set S of
candidates, is found by branch and bound, as a programme of its own::

    minimise    sum_q Z_q
    subject to  sum_b y_cb = slices_c for each candidate c, y_cb 0 or 1
                Z_q >= sum_c seconds_cq y_cb for each bin b

One more candidate never makes it cheaper, and dearer by no more than its own seconds: each of its slices raises the
maximum of a quantity by no more than that. So any plan, of whichever candidates, obeys::

    sum_q Z_gq >= D(S) - sum_S (1 - x_c) sum_q seconds_cq
"""

import highspy
import numpy as np
from jaxtyping import Float, Int

from sharding.highs import make_solver, make_whole

# What there is time for: places of slices, and nodes of the tree.
MOST_PLACES = 150
_NODES = 200
_GAP = 1e-3


def least_dealt(seconds: Float[np.ndarray, "n Q"], slices: Int[np.ndarray, " n"], bins: int) -> float:
    """A lower bound of D, nearly always D.

    Args:
        seconds: Of a slice of each candidate.
        slices: Slices of each.
        bins: Bins to deal them out to.
    """
    count, quantities = seconds.shape
    places = count * bins
    num_columns = places + quantities
    solver = make_solver()
    upper = np.append(np.ones(places), np.full(quantities, highspy.kHighsInf))
    # The first candidate with one slice may as well be on the first bin, the next on one of the first two, and so on.
    order = np.lexsort((-seconds.sum(axis=1), slices))
    for number, candidate in enumerate(order[slices[order] == 1][:bins].tolist()):
        upper[candidate * bins + number + 1 : (candidate + 1) * bins] = 0.0
    solver.addVars(num_columns, np.zeros(num_columns), upper)
    maxima = np.arange(places, num_columns, dtype=np.int32)
    solver.changeColsCost(quantities, maxima, np.ones(quantities))
    least = np.maximum(seconds.max(axis=0), slices @ seconds / bins)
    solver.changeColsBounds(quantities, maxima, least, np.full(quantities, highspy.kHighsInf))
    make_whole(solver, np.arange(places))
    every = np.arange(places, dtype=np.int32).reshape(count, bins)
    for candidate in range(count):
        held = float(slices[candidate])
        solver.addRow(held, held, bins, every[candidate], np.ones(bins))
    for quantity in np.flatnonzero(seconds.any(axis=0)).tolist():
        for place in range(bins):
            columns = np.append(every[:, place], maxima[quantity])
            solver.addRow(-highspy.kHighsInf, 0.0, len(columns), columns, np.append(seconds[:, quantity], -1.0))
    solver.setOptionValue("mip_max_nodes", _NODES)
    solver.setOptionValue("mip_rel_gap", _GAP)
    solver.run()
    return max(float(solver.getInfo().mip_dual_bound), float(least.sum()))
