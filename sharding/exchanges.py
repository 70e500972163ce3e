"""Rows of the programme of `sharding.lower_bound` about exchanges, which take a fixed time where any table needs them.

y of a part of the step is 1 if some table needs its exchanges: ``x_tc <= y_part`` for all candidates that do.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from sharding.candidates import Choices
from sharding.highs import Row, at_most
from sharding.layout import FAMILIES, Family

# Of a part, so many of the candidates that a solution has most of get their rows at a time.
_FEW_OF_PART = 3
# What fractions may be off by.
_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the step that takes a fixed number of exchanges if any table needs it; see `Step.latency_seconds`."""

    families: tuple[Family, ...]
    exchanges: int
    second_pass: bool = False


PARTS = (
    *(Part(families=(family,), exchanges=2) for family in FAMILIES),
    Part(families=tuple(family for family in FAMILIES if family != "local"), exchanges=1),
    Part(families=FAMILIES, exchanges=2, second_pass=True),
)


class Exchanges:
    """The rows, each of which is given once.

    Args:
        choices: Candidates of each table.
        first_y: The column of the first part; those of candidates are the first of all.
    """

    def __init__(self, choices: Choices, first_y: int):
        self._first_y = first_y
        candidates = [candidate for options in choices.of_table for candidate in options]
        self._members = [
            [
                number
                for number, candidate in enumerate(candidates)
                if choices.groups[candidate.group].family in part.families
                and (candidate.has_second_pass or not part.second_pass)
            ]
            for part in (PARTS if choices.exchange_seconds > 0 else ())
        ]
        self._given: set[tuple[int, int]] = set()

    def all(self) -> list[Row]:
        """The rows of all candidates."""
        return [row for part, members in enumerate(self._members) for row in self._rows(part, members)]

    def broken(self, columns: Float[np.ndarray, " columns"]) -> list[Row]:
        """Rows that a solution breaks: in each part, of those candidates that it has most of."""
        rows: list[Row] = []
        for part, members in enumerate(self._members):
            chosen = columns[members]
            most = np.argsort(-chosen, kind="stable")[:_FEW_OF_PART]
            least = columns[self._first_y + part] + _TOLERANCE
            rows += self._rows(part, [members[i] for i in most if chosen[i] > least])
        return rows

    def _rows(self, part: int, members: list[int]) -> list[Row]:
        new = [member for member in members if (part, member) not in self._given]
        self._given.update((part, member) for member in new)
        return [at_most(member, self._first_y + part) for member in new]
