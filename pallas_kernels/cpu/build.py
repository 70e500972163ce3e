"""Compiles the library of the `cpu` kernels. Runs inside the package's build, so it needs the standard library only.

    .venv/bin/python pallas_kernels/cpu/build.py

The library has no Python in it, and XLA keeps old handlers working, so one build serves any Python and any later
jaxlib than the one whose headers it saw.
"""

import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "libdlrm_cpu.so"

# Contraction is off because the sources say where products and sums are fused; the two -fno let loops with square roots
# and comparisons be vectorised, and change no result.
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# AVX2, FMA and F16C: every x86-64 server since 2015. A processor without them is told so, and uses `xla`.
MACHINE_FLAGS = {"x86_64": ("-march=x86-64-v3",), "AMD64": ("-march=x86-64-v3",), "aarch64": (), "arm64": ()}


def source_digest() -> str:
    """Digest of the sources and flags, which the library carries: a stale one is told from a fresh one."""
    digest = hashlib.sha256(repr((FLAGS, MACHINE_FLAGS)).encode())
    for source in sorted((*FOLDER.glob("*.cc"), *FOLDER.glob("*.h"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def build() -> str | None:
    """Compiles the library to `LIBRARY`.

    Returns:
        None, or in a sentence why there is no library: no compiler, no headers, a machine that is not supported, a
        folder that cannot be written, or the compiler's first error.
    """
    try:
        return _build()
    except OSError as error:
        return str(error)


def _build() -> str | None:
    LIBRARY.unlink(missing_ok=True)
    machine = platform.machine()
    if machine not in MACHINE_FLAGS:
        return f"the kernels are written for x86-64 and aarch64, not {machine}"
    compiler = next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := _path(name))), None
    )
    if compiler is None:
        return "no C++ compiler: neither $CXX nor g++ nor clang++ is on the path"
    jaxlib = importlib.util.find_spec("jaxlib")
    if jaxlib is None or not jaxlib.submodule_search_locations:
        return "jaxlib, which has XLA's headers, is not installed where the package is built"
    headers = Path(jaxlib.submodule_search_locations[0]) / "include"
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".build-") as folder:
        # Renamed when whole: a process that loads the library never sees half of it.
        whole = Path(folder) / LIBRARY.name
        command = [
            *(
                *compiler,
                *FLAGS,
                *MACHINE_FLAGS[machine],
                f'-DDLRM_SOURCES="{source_digest()}"',
                "-isystem",
                str(headers),
            ),
            *(*map(str, sorted(FOLDER.glob("*.cc"))), "-o", str(whole)),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()[-1:]
            return f"{compiler[0]} failed: {lines[0] if lines else result.returncode}"
        os.replace(whole, LIBRARY)
    return None


def _path(compiler: str) -> list[str] | None:
    """$CXX may carry flags or a wrapper: `ccache g++`."""
    words = compiler.split()
    found = shutil.which(words[0]) if words else None
    return [found, *words[1:]] if found else None


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    reason = build()
    if reason is not None:
        sys.exit(f"no cpu kernels: {reason}")
    print(LIBRARY)
