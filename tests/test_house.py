"""The house: which floor may import which, and the habits that keep a file readable."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import dlrm_jax
import sharding.mesh

ROOT = Path(__file__).parents[1]
FLOORS = {
    "pallas_kernels": set(),
    "sharding": {"pallas_kernels"},
    "dlrm_jax": {"pallas_kernels", "sharding"},
    "configs": {"pallas_kernels", "sharding", "dlrm_jax"},
}
OURS = {*FLOORS, "scripts", "benchmarks", "tests"}
MAX_LINES = 500
MAX_EXPORTS = 24


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(), str(path))))


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: imports are absolute here"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_floors_below_it(floor: str) -> None:
    forbidden = OURS - FLOORS[floor] - {floor}
    upwards = {
        (str(path.relative_to(ROOT)), name)
        for path in python_files(floor)
        for name in imported_modules(path)
        if name.partition(".")[0] in forbidden
    }
    assert upwards == set()


def test_data_preparation_reaches_jax_only_through_batches() -> None:
    direct = {
        path.name
        for path in python_files("dlrm_jax/data")
        if path.name != "batch.py" and any(name.partition(".")[0] == "jax" for name in imported_modules(path))
    }
    assert direct == set()


def test_files_are_short_enough_to_read_in_one_sitting() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files(*OURS)}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_mesh_axis_names_are_spelt_in_one_module_only() -> None:
    spelt = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files(*FLOORS, "scripts")
        if path != ROOT / "sharding" / "mesh.py"
        for node in nodes_of(path)
        if isinstance(node, ast.Constant) and node.value in sharding.mesh.AXES
    }
    assert spelt == set()


def test_jax_is_configured_by_scripts_and_tests_only() -> None:
    configured = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files(*FLOORS)
        for node in nodes_of(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "jax.config.update"
    }
    assert configured == set()


@pytest.mark.parametrize("package", ["pallas_kernels", "sharding", "dlrm_jax"])
def test_a_package_exports_few_names(package: str) -> None:
    exported = [
        ast.literal_eval(node.value)
        for node in nodes_of(ROOT / package / "__init__.py")
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    names = [name for names in exported for name in names]
    assert len(names) == len(set(names))
    assert len(names) <= MAX_EXPORTS


def test_public_names_when_imported_from_the_package_then_are_all_there():
    for name in dlrm_jax.__all__:
        assert getattr(dlrm_jax, name).__module__.startswith("dlrm_jax.")


def test_step_when_imported_with_its_configs_then_needs_no_library_of_the_loader_or_the_scripts():
    absent = ("grain", "polars", "tyro", "tensorboardX", "msgspec", "highspy")
    step = "configs, dlrm_jax.sources, dlrm_jax.pipelined_step"
    program = f"import sys; sys.modules |= dict.fromkeys({absent!r}); import {step}"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
