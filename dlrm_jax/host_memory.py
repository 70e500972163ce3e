"""Memory that a step has given back stays with the process, so that the next step need not have it cleared again."""

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells the allocator of this process to keep what is freed, up to 2 GB in one piece.

    On hosts XLA allocates all temporary arrays of a step when it begins and frees them when it ends. glibc returns
    pieces of that size to the system, which clears each page again when it is next touched: a fifth of the time of a
    small model's step. All threads then share one arena, since those of a thread cannot hold such pieces.

    Call it before JAX has started its threads; those that have allocated before keep their arenas. It changes no
    result. Larger pieces, as most tables are, come and go as ever.

    Returns:
        Whether the allocator took it: False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(
        mallopt(name, value)
        for name, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _MOST), (_M_TRIM_THRESHOLD, _MOST))
    )
