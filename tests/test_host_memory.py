"""host_memory: what is freed is not cleared again when it is allocated next."""

import subprocess
import sys

import pytest

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
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    kept, before, after = result.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    # 64 MB are 16,384 pages of 4 KB, or 1,024 of 64 KB.
    assert int(before) > 500
    assert int(after) < 50
