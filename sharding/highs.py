"""HiGHS, as the planner asks it: with one thread, so that the same input has the same answer."""

import highspy

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
