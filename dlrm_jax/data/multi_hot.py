"""Bags from single ids: the multi-hot Criteo of the MLPerf DLRM-DCNv2 benchmark."""

import numpy as np
from jaxtyping import Int64

from dlrm_jax.data.hashing import hash_to_range, mix64

# Ids in a bag of each of the 26 features (MLPerf DLRM-DCNv2; 214 in all).
POOLING_FACTORS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
# Numbers hashed at a time, so that a bag of 100 does not multiply the memory of a block.
_HASHES_AT_ONCE = 2**20


def expand_bags(
    ids: Int64[np.ndarray, " samples"], *, num_rows: int, pooling_factor: int, feature: int, seed: int
) -> Int64[np.ndarray, "samples pooling_factor"]:
    """Gives every id its bag: the id itself, then pseudo-random ids of its table.

    MLPerf draws a lookup table of bags once, uniformly over the rows, and every occurrence of an id gets that id's
    bag. Here the lookup table is a counter hash, so that it takes no memory and needs no order: ::

        bag(id)[0] = id
        bag(id)[p] = hash(seed, feature, id, p) scaled to [0, num_rows)      for p = 1, ..., pooling_factor - 1

    Ids may repeat within a bag. Row 0 (missing or rare) is an id like any other.

    Args:
        ids: One id for each sample, in [0, num_rows).
        num_rows: Rows of the table, at most 2^32.
        pooling_factor: Ids in a bag.
        feature: Number of the feature, so that features have different bags.
        seed: Seed of all bags.

    Returns:
        The bags, one in each row.
    """
    bags = np.empty((len(ids), pooling_factor), np.int64)
    bags[:, 0] = ids
    stream = mix64(mix64(np.array([seed], np.uint64)) ^ np.uint64(feature))
    positions = np.arange(1, pooling_factor, dtype=np.uint64)
    step = max(1, _HASHES_AT_ONCE // pooling_factor)
    for start in range(0, len(ids), step):
        of_id = mix64(ids[start : start + step].astype(np.uint64) ^ stream)
        bags[start : start + step, 1:] = hash_to_range(mix64(of_id[:, None] + positions), num_rows)
    return bags
