"""offsets_of and bags_of_ids: where the bags of a batch begin, and which one each id is in."""

import functools

from jaxtyping import Array, Int32

from pallas_kernels import cpu, scans
from pallas_kernels.implementations import on_hosts


def offsets_of(lengths: Int32[Array, " G"]) -> Int32[Array, " G+1"]:
    """Finds where the ids of each bag begin: ``offsets[g] = lengths[0] + ... + lengths[g - 1]``.

    On hosts this is `cpu`'s, where it was built; elsewhere, and with the same bits, `scans.offsets_of`.

    Args:
        lengths: Ids of each bag.

    Returns:
        The first id of each bag, and the end of the last; modulo 2^32.
    """
    return on_hosts(cpu.offsets_of, scans.offsets_of, lengths)


def bags_of_ids(offsets: Int32[Array, " G+1"], num_ids: int) -> Int32[Array, " n"]:
    """Finds the bag of each id: ``bags[i]`` is the number of bags that end at or before id i.

    On hosts this is `cpu`'s, where it was built; elsewhere a running sum, which an XLA program of a host does id by id.

    Args:
        offsets: Ids of bag g are those from ``offsets[g]`` up to ``offsets[g + 1]``. Non-decreasing, from 0 on.
        num_ids: n.

    Returns:
        The bag of each id; G for ids beyond the last bag (padding).
    """
    native = functools.partial(cpu.bags_of_ids, num_ids=num_ids)
    return on_hosts(native, functools.partial(scans.bags_of_ids, num_ids=num_ids), offsets)
