"""Hatchling's hook: compiles the `cpu` kernels into the wheel, or into the source tree of an editable install."""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CpuKernels(BuildHookInterface):
    """Adds the library to a wheel. Where it cannot be built the package is installed without, and one line says why."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Runs before the files of a build are gathered.

        Args:
            version: "standard" or "editable".
            build_data: What hatchling is told: the files to include beside those it finds, and the wheel's tag.
        """
        # By path: importing the package would need jax, which a build environment does not have.
        path = Path(self.root) / "pallas_kernels" / "cpu" / "build.py"
        spec = importlib.util.spec_from_file_location("dlrm_cpu_build", path)
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        reason = build.build()
        if reason is not None:
            self.app.display_warning(f"installing without cpu kernels, `xla` serves instead: {reason}")
            return
        build_data["artifacts"].append("/" + str(build.LIBRARY.relative_to(self.root)))
        # Machine code, but none of Python's.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
