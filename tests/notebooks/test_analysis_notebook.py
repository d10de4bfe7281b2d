"""The notebook runs as it is committed, on committed records and on a made study; it holds no outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient
from traitlets.config import Config

from bench.report.contents import make_report
from bench.study.runs import load_study
from tests.report._made_studies import made_study

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "notebooks" / "analysis.ipynb"
SMALL = REPOSITORY / "results" / "reference" / "small"


def executed(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """Run the notebook in a kernel of its own and return all text that it shows."""
    for name, value in {"PYTHONPATH": str(REPOSITORY), **environment}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return text_of(output for cell in notebook.cells for output in cell.get("outputs", ()))


def executed_here(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """Run the cells in this process, where no kernel starts, and return all text that they show."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(NOTEBOOK.parent)
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    shown = []
    try:
        with shell.builtin_trap, shell.display_trap:
            for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
                if cell.cell_type == "code":
                    with capture_output() as captured:
                        shell.run_cell(cell.source).raise_error()
                    shown += [captured.stdout, text_of({"data": output.data} for output in captured.outputs)]
    finally:
        InteractiveShell.clear_instance()
    return "\n".join(shown)


def text_of(outputs: Iterable[dict[str, Any]]) -> str:
    shown = []
    for output in outputs:
        assert output.get("output_type") != "error"
        data = output.get("data", {"text/plain": output.get("text", "")})
        shown += ["svg" if "image/svg+xml" in data else data.get("text/markdown") or data["text/plain"]]
    return "\n".join(shown)


def test_it_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_it_reads_records_as_the_report_does():
    source = "\n".join(cell["source"] for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    modules = set(re.findall(r"^(?:from|import) (bench[\w.]*)", source, re.MULTILINE))
    assert modules
    assert all(module.startswith(("bench.report.", "bench.study.")) for module in modules)


@pytest.mark.slow
def test_it_runs_on_the_committed_records(monkeypatch):
    text = executed(monkeypatch)
    section = make_report(load_study(SMALL)).sections[0]
    for sentence in section.sentences():
        assert sentence in text
    for reading in section.weights:
        assert reading.sentence() in text
    assert text.count("svg") >= 5


def test_it_loads_any_study_by_its_name(monkeypatch, tmp_path):
    made_study(tmp_path / "other", {"mean": 0.0, "GNN": 0.03}, seeds=2, history=2, embedded=True,
               failed={("GNN", 1): "oom"})  # fmt: skip
    text = executed_here(monkeypatch, GNNMOE_RESULTS_DIR=str(tmp_path), GNNMOE_STUDY="other")
    assert "## other" in text
    assert text.count("svg") >= 3
    assert "NOT WIKITEXT-2" in text
