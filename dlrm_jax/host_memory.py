"""Memory that a step has given back stays with the process, so that the next step need not have it cleared again."""

import ctypes
from collections.abc import Callable

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MOST = 2**31 - 1


def keep_freed_memory(*, devices: int = 1) -> bool:
    """Tells the allocator of this process to keep what is freed, up to 2 GB in one piece.

    On hosts XLA allocates all temporary arrays of a step when it begins and frees them when it ends. glibc returns
    pieces of that size to the system, which clears each page again when it is next touched: a fifth of the time of a
    small model's step.

    With one device all threads share one arena, since the arena of a thread holds no piece beyond 64 MB. The threads of
    several devices would wait for each other there, which takes longer than it saves: a device's part of a step is
    smaller, and they allocate all at once.

    Call it before JAX has started its threads; those that have allocated before keep their arenas. It changes no
    result. Larger pieces, as most tables are, come and go as ever.

    Args:
        devices: Devices that this process makes of its CPU.

    Returns:
        Whether the allocator took it: False where the C library is not glibc.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    options = {_M_MMAP_THRESHOLD: _MOST, _M_TRIM_THRESHOLD: _MOST} | ({_M_ARENA_MAX: 1} if devices == 1 else {})
    return all(mallopt(name, value) for name, value in options.items())


def give_back_freed_memory() -> None:
    """Gives the system what is free, once what comes next has arrays of other sizes, which hardly fit there."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where that is not glibc."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
