"""TPU slices: the shape of so many chips, and what its links carry.

Source of what is said here of links: Austin et al., "How to Scale Your Model" (jax-ml.github.io/scaling-book), parts 2
and 3.
"""

import math
from collections.abc import Sequence

# Intrinsic time of a hop over a link: "typically around 1us" (part 3).
HOP_SECONDS = 1e-6
# Above this, slices of a three-dimensional torus are made of whole cubes of 4 x 4 x 4 chips.
_CUBE_CHIPS = 64


def slice_shape(num_chips: int, dimensions: int) -> tuple[int, ...] | None:
    """The most cubic shape that a slice of so many chips comes in.

    Args:
        num_chips: Chips.
        dimensions: 2 (v5e, v6e: sides are powers of two) or 3 (v5p, 7x: also any number of whole cubes).

    Returns:
        Sides, as Google Cloud writes them (2x2x1, 2x4x4, 4x4x12); None if there is no such slice.
    """
    if num_chips < 1:
        return None
    if dimensions == 3 and num_chips % _CUBE_CHIPS == 0:
        return tuple(4 * side for side in sorted(_sides(num_chips // _CUBE_CHIPS, 3)))
    if num_chips.bit_count() > 1:
        return None
    sides = _sides(num_chips, dimensions)
    # A host is 2 x 2 x 1: what does not extend in the third dimension is written so.
    return tuple(sorted(sides, reverse=dimensions == 3 and 1 in sides))


def _sides(product: int, count: int) -> list[int]:
    sides = [1] * count
    for prime in sorted(_prime_factors(product), reverse=True):
        sides[sides.index(min(sides))] *= prime
    return sides


def _prime_factors(number: int) -> list[int]:
    factors, candidate = [], 2
    while number > 1:
        while number % candidate == 0:
            factors.append(candidate)
            number //= candidate
        candidate += 1
    return factors


def has_wraparound(shape: Sequence[int]) -> tuple[bool, ...]:
    """Which dimensions of a whole slice are rings.

    Two dimensions: those of 16 chips; three: all of a slice of whole cubes (part 2).
    """
    if len(shape) == 2:
        return tuple(side == 16 for side in shape)
    return (all(side % 4 == 0 for side in shape),) * len(shape)


def all_to_all_bandwidth(
    shape: Sequence[int], rings: Sequence[bool], link_bandwidth: float, *, num_parts: int
) -> float:
    """Bytes per second that each chip sends to other parts while all chips exchange equally with all parts.

    The links in the middle of the longest dimension, of k chips, are the bottleneck. Of the S bytes of each of n chips,
    ``n S / 4`` cross them in each direction, and there are n / k of them, in a ring 2 n / k; so S takes
    ``k S / (4 link_bandwidth)`` seconds, in a ring half of it. Of S, (num_parts - 1) / num_parts goes to other parts.

    Args:
        shape: Chips along each dimension.
        rings: Which dimensions are rings.
        link_bandwidth: Of one link in one direction.
        num_parts: Parts of the chips: devices, or nodes.

    Returns:
        The bandwidth; that of all links together where there is but one part.
    """
    if num_parts == 1 or math.prod(shape) == 1:
        return 2 * len(shape) * link_bandwidth
    rates = [4 * link_bandwidth * (1 + ring) / side for side, ring in zip(shape, rings, strict=True) if side > 1]
    return min(rates) * (num_parts - 1) / num_parts


def longest_path_seconds(shape: Sequence[int], rings: Sequence[bool]) -> float:
    """Time that hops take on the longest path between two chips."""
    hops = sum(side // 2 if ring else side - 1 for side, ring in zip(shape, rings, strict=True))
    return max(hops, 1) * HOP_SECONDS
