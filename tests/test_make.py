"""The Makefile: what a newcomer types first."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_make_alone_lists_every_target_that_the_readme_names() -> None:
    listed = set(re.findall(r"^  make ([a-z-]+)", make().stdout, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(code_of((ROOT / "README.md").read_text()))))
    assert {"train", "test", "venv", "lint", "test-all", "bench", "docs"} <= listed
    assert named <= listed


def test_make_without_a_fitting_python_says_in_one_line_what_to_do(tmp_path: Path) -> None:
    result = make(f"VENV={tmp_path}/venv", "PYTHON=/bin/false", "venv")
    assert result.returncode != 0
    message = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(message) == 1
    assert "/bin/false is not Python 3.12" in message[0]
    assert "make PYTHON=" in message[0]
    assert not (tmp_path / "venv").exists()


def test_make_with_an_unknown_extra_names_those_there_are(tmp_path: Path) -> None:
    result = make(f"VENV={tmp_path}/venv", "EXTRAS=gpus", "venv")
    assert result.returncode != 0
    assert "EXTRAS names gpus" in result.stderr
    assert "gpu tpu" in result.stderr


def code_of(markdown: str) -> list[str]:
    """Code blocks and code spans of a page."""
    return re.findall(r"```.*?```|`[^`\n]+`", markdown, re.DOTALL)
