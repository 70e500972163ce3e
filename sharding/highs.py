"""HiGHS, as the planner asks it: with one thread, so that the same input has the same answer."""

from collections.abc import Sequence

import highspy
import numpy as np

# Columns, their coefficients, and the least and the most that they add up to.
Row = tuple[np.ndarray, np.ndarray, float, float]

# By default, 1e-6, HiGHS 1.15 now and then cuts off the optimum and proves a bound that a plan beats.
_TOLERANCE = 1e-9


def make_solver() -> highspy.Highs:
    """A solver without a problem."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    # Of several threads, which one is first would decide.
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("mip_feasibility_tolerance", _TOLERANCE)
    return solver


def at_most(one: int, other: int) -> Row:
    """The row ``columns[one] <= columns[other]``."""
    return np.array([one, other]), np.array([1.0, -1.0]), -highspy.kHighsInf, 0.0


def add_rows(solver: highspy.Highs, rows: Sequence[Row]) -> None:
    """Adds rows to a problem, all at once."""
    if rows:
        lengths = [len(columns) for columns, *_ in rows]
        solver.addRows(
            len(rows),
            np.array([lower for *_, lower, _ in rows]),
            np.array([upper for *_, upper in rows]),
            sum(lengths),
            np.cumsum([0, *lengths[:-1]], dtype=np.int32),
            np.concatenate([columns for columns, *_ in rows]).astype(np.int32),
            np.concatenate([values for _, values, *_ in rows]),
        )


def make_whole(solver: highspy.Highs, columns: np.ndarray) -> None:
    """Lets columns be whole numbers only."""
    kinds = np.full(len(columns), int(highspy.HighsVarType.kInteger), np.uint8)
    solver.changeColsIntegrality(len(columns), columns.astype(np.int32), kinds)
