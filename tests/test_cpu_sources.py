"""The sources of the cpu kernels, read by each compiler that is here as on a system that is not Linux."""

import platform
import shutil
import subprocess
from pathlib import Path

import jaxlib
import pytest

from pallas_kernels import cpu


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_sources_when_the_system_is_not_linux_then_the_compiler_finds_no_error(compiler: str) -> None:
    build = cpu._build_module()
    flags = build.MACHINE_FLAGS.get(platform.machine())
    if flags is None or shutil.which(compiler) is None:
        pytest.skip(f"the kernels are not compiled by {compiler} here")
    headers = Path(jaxlib.__file__).parent / "include"
    command = [compiler, *build.FLAGS, *flags, "-U__linux__", "-fsyntax-only", '-DDLRM_SOURCES=""']
    command += ["-isystem", str(headers), *map(str, build.FOLDER.glob("*.cc"))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
