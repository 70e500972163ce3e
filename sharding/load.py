"""FeatureLoad: how many ids a feature brings and how they are spread over rows, as far as anyone has counted."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float

from sharding.errors import InputError
from sharding.tables import FeatureSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureLoad:
    """The ids of one feature, on average.

    Attributes:
        feature: Name of the feature.
        pooling_factor: Mean ids in a bag.
        weighted: Whether each id carries a weight.
        top: The most frequent rows, each with its share of all ids, most frequent first; () if nobody counted.
        coverage: Pairs (k, share), by rising k: the share of all ids that the k most frequent rows make up; the last k
            is the number of rows that occur at all. () means that every row is equally likely.
    """

    feature: str
    pooling_factor: float = 1.0
    weighted: bool = False
    top: tuple[tuple[int, float], ...] = ()
    coverage: tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        if not 0.0 <= self.pooling_factor < float("inf"):
            raise InputError(
                f"load of feature {self.feature!r}: pooling_factor is {self.pooling_factor}; it must be finite and at "
                "least 0"
            )
        shares = [share for _, share in self.coverage]
        ranks = [rank for rank, _ in self.coverage]
        if ranks != sorted(set(ranks)) or shares != sorted(shares) or not all(0 <= share <= 1.001 for share in shares):
            raise InputError(
                f"load of feature {self.feature!r}: coverage {self.coverage} must rise in both numbers, shares up to 1"
            )
        if sum(share for _, share in self.top) > 1.001 or any(row < 0 or share < 0 for row, share in self.top):
            raise InputError(
                f"load of feature {self.feature!r}: top must hold rows of at least 0, whose shares add up to at most 1"
            )

    @cached_property
    def _hot_rows(self) -> tuple[tuple[int, float], ...]:
        """Rows that are known to be hot. Where only their rank is known, it stands for the row number."""
        if self.top:
            return self.top
        rows: list[tuple[int, float]] = []
        for (rank, before), (last, upto) in zip(((0, 0.0), *self.coverage), self.coverage, strict=False):
            if last > 100:
                break
            rows += [(row, (upto - before) / (last - rank)) for row in range(rank, last)]
        return tuple(rows)

    def owner_shares(self, num_owners: int) -> Float[np.ndarray, " num_owners"]:
        """Share of the ids that each owner of a table receives whose row r is on owner ``r mod num_owners``.

        Hot rows are counted where they are; all other rows are taken to be spread evenly.
        """
        shares = np.zeros(num_owners)
        for row, share in self._hot_rows if num_owners > 1 else ():
            shares[row % num_owners] += share
        return shares + max(0.0, 1.0 - float(shares.sum())) / num_owners

    def distinct(self, num_rows: int, num_ids: float) -> float:
        """Expected number of distinct rows among ``num_ids`` ids drawn at random.

        ``sum_r 1 - (1 - p_r)**n``, where the p_r between two known points of the coverage are equal, and all p_r are
        equal where nothing is known.

        Args:
            num_rows: Rows of the table.
            num_ids: Ids drawn.
        """
        points = self.coverage or ((num_rows, 1.0),)
        ranks = np.minimum([0, *(rank for rank, _ in points)], num_rows)
        sizes = np.diff(ranks).astype(np.float64)
        shares = np.diff([0.0, *(share for _, share in points)])
        probability = np.minimum(shares / np.maximum(sizes, 1.0), 1.0 - 1e-15)
        found = float((-sizes * np.expm1(num_ids * np.log1p(-probability))).sum())
        return min(found, num_ids, float(num_rows))


def loads_by_feature(features: Sequence[FeatureSpec], loads: Sequence[FeatureLoad]) -> dict[str, FeatureLoad]:
    """The load of each feature; of one that has none: ``max_ids`` ids a bag where known, else one, all rows alike.

    Raises:
        InputError: A load is of no feature, or a feature has two.
    """
    names = {feature.name for feature in features}
    found: dict[str, FeatureLoad] = {}
    for load in loads:
        if load.feature not in names:
            raise InputError(f"a load is given for feature {load.feature!r}; the features are {sorted(names)[:20]}")
        if load.feature in found:
            raise InputError(f"feature {load.feature!r} is given two loads; keep one")
        found[load.feature] = load
    for feature in features:
        if feature.name not in found:
            found[feature.name] = FeatureLoad(feature=feature.name, pooling_factor=float(feature.max_ids or 1))
    return found
