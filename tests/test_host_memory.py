"""host_memory: what is freed is not cleared again when it is allocated next."""

import subprocess
import sys
from pathlib import Path

import pytest


def told_by(script: str, *arguments: str) -> list[str]:
    """What a process of its own prints, after whether its allocator took the options."""
    command = [sys.executable, "-c", script, *arguments]
    kept, *told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if kept == "False":
        # The options are glibc's: nothing is kept elsewhere, and no test could say otherwise.
        pytest.skip("the C library is not glibc")
    return told


MEASURE = """
import resource
from dlrm_jax.host_memory import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

again = [page_faults() for _ in range(2)][1]
kept = keep_freed_memory()
print(kept, again, [page_faults() for _ in range(2)][1])
"""


def test_freed_memory_when_kept_then_the_next_allocation_faults_no_page() -> None:
    before, after = told_by(MEASURE)
    # 64 MB are 16,384 pages of 4 KB, or 1,024 of 64 KB.
    assert int(before) > 500
    assert int(after) < 50


ARENAS = """
import ctypes, sys, threading
from dlrm_jax.host_memory import keep_freed_memory

kept = keep_freed_memory(devices=int(sys.argv[1]))
barrier, held = threading.Barrier(4), []

def allocate():
    held.append(b"x" * 2**16)
    barrier.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file) if kept else None
libc.fclose(file)
print(kept)
"""


@pytest.mark.parametrize("devices", [1, 8])
def test_threads_then_share_one_arena_where_there_is_one_device_and_have_their_own_where_there_are_several(
    devices: int, tmp_path: Path
) -> None:
    told = tmp_path / "arenas.xml"
    told_by(ARENAS, str(devices), str(told))
    arenas = told.read_text().count("<heap nr=")
    assert arenas == 1 if devices == 1 else arenas > 1
