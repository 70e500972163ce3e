"""Rounding: kinds for all tables from an optimum that has fractions of tables."""

import numpy as np
from jaxtyping import Float

from sharding.programme import Programme, Search

# Times that the programme is solved again with what cannot be whole left out.
_DIVES = 2
# Rounds of cuts once vectors are whole, and the search that follows.
_ROUNDS = 3
_SEARCH = Search(whole="all", gap=1e-3, nodes=30, ladders=True, settled=True, heuristics=())


def dive(programme: Programme, columns: Float[np.ndarray, " columns"]) -> Float[np.ndarray, " columns"]:
    """Columns of the optimum once what cannot be whole is left out; a few tables may still be in fractions."""
    for _ in range(_DIVES):
        programme.keep_whole(columns)
        dived = programme.solve()
        if dived is None:
            break
        columns = dived.columns
    return columns


def round_off(programme: Programme, columns: Float[np.ndarray, " columns"]) -> Float[np.ndarray, " columns"]:
    """Columns of whole tables, of a programme that is too large to search.

    It dives, lets vectors be whole, and searches for kinds of the tables that are in fractions then.
    """
    columns = dive(programme, columns)
    solved = programme.whole_vectors(columns)
    for _ in range(_ROUNDS):
        if solved is None or not programme.add_cuts(solved.columns):
            break
        columns, solved = solved.columns, programme.solve()
    if solved is not None:
        columns = solved.columns
    searched = programme.search(_SEARCH, None, columns)
    return columns if searched is None else searched.columns
