"""JAX as strict as it gets, a shared compilation cache, and where the shared material lies."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before JAX is imported. The compilers of the extra `aot` would otherwise look for their hardware, and libtpu refuse a
# second process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

ROOT = Path(__file__).resolve().parent.parent

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# One for each worker of pytest-xdist: JAX does not write its files in one piece.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax" / WORKER))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# Linux lets a process have 65,530 mappings of memory, and XLA's compiler for CPUs dies where it gets no more. A program
# takes dozens.
MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = 40_000


@pytest.fixture(autouse=True)
def programs_are_dropped_before_there_are_too_many() -> Iterator[None]:
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the project; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return folder


@pytest.fixture
def no_compilation_cache() -> Iterator[None]:
    """What was compiled for a device that is not here can be written to the cache, but never be read from it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
