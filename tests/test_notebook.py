"""Claims about notebooks/quickstart.ipynb: it runs from top to bottom as it is committed, and shows what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.builders import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def printed(cells: list[Any]) -> str:
    return "".join(
        (output.get("text", "") if output.get("name") == "stdout" else "")
        + output.get("data", {}).get("text/plain", "")
        for cell in cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []
    for cell in code:
        compile(cell.source, NOTEBOOK.name, "exec")


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tree of its own, whose files are the repository's, so that its runs/ is not."""
    for name in ("configs", "distill", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    )
    client.execute()
    shown = printed(notebook.cells)
    run = tmp_path / "runs" / "quickstart"
    summary = json.loads((run / "summary.json").read_text())
    accuracy = {who: summary[who]["metrics"]["accuracy"] for who in ("teacher", "student", "undistilled_student")}
    assert accuracy["teacher"] > 0.85, accuracy
    assert accuracy["student"] > 0.8, accuracy
    assert accuracy["student"] > accuracy["undistilled_student"], accuracy
    for figure in accuracy.values():
        assert f"{figure:.3f}" in shown
    assert (run / "artefacts" / "int8" / "model.onnx").is_file()
    images = [data for cell in notebook.cells for output in cell.get("outputs", []) for data in output.get("data", {})]
    assert images.count("image/png") == 1
    student, artefact = (printed([cell]) for cell in notebook.cells if "in zip(texts" in cell.source)
    for said in (student, artefact):
        assert [line.split()[0] for line in said.splitlines()] == ["business", "sport", "politics"], said
