"""notebooks/quickstart.ipynb: a newcomer runs it from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_in_git_holds_no_outputs(notebook):
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_notebook_run_from_top_to_bottom_shows_curves_predictions_and_rows(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    assert shown_by(notebook, "Image(", "image/png")
    assert "predicted" in shown_by(notebook, "predictor.predict(", "text/plain")
    assert "never" in shown_by(notebook, "read_table(", "text/plain")
    assert "num_samples=10000" in shown_by(notebook, 'predictor.evaluate("test")', "text/plain")


def shown_by(notebook: nbformat.NotebookNode, code: str, kind: str) -> str:
    """The last output of that kind of the cell that has this code."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and code in cell.source)
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})][-1]
