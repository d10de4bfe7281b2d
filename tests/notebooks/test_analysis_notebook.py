"""The notebook runs as it is committed, on committed records and on a made study; it shows its pictures."""

from __future__ import annotations

import re
import socket
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
        shown += ["picture" if "image/png" in data else data.get("text/markdown") or data["text/plain"]]
    return "\n".join(shown)


def test_it_is_stored_with_its_pictures_and_says_nothing_of_the_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 1e6
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    shown = text_of(output for cell in cells for output in cell.get("outputs", ()))
    assert shown.count("picture") >= 3
    assert all(cell.outputs for cell in cells if cell.cell_type == "code" and "import os" not in cell.source)
    assert all(set(cell.metadata) <= {"tags"} for cell in cells), "times of execution"
    places = [str(REPOSITORY), str(Path.home()), socket.gethostname(), "/tmp/", "/home/"]
    assert not [place for place in places if len(place) > 2 and place in shown]


def test_it_reads_records_as_the_report_does():
    source = "\n".join(cell["source"] for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    modules = set(re.findall(r"^(?:from|import) (bench[\w.]*)", source, re.MULTILINE))
    assert "bench" in modules
    assert all(module.startswith(("bench.report.", "bench.study.")) for module in modules - {"bench"})


@pytest.mark.slow
def test_run_again_it_shows_what_is_stored(monkeypatch):
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    stored = text_of(output for cell in cells for output in cell.get("outputs", ()))
    assert executed(monkeypatch) == stored
    section = make_report(load_study(SMALL)).sections[0]
    said = [section.answer(), *section.sentences(), *(reading.sentence() for reading in section.weights)]
    assert [sentence for sentence in said if sentence not in stored] == []


def test_it_loads_any_study_by_its_name(monkeypatch, tmp_path):
    made_study(tmp_path / "other", {"mean": 0.0, "GNN": 0.03}, seeds=2, history=2, embedded=True,
               failed={("GNN", 1): "oom"})  # fmt: skip
    text = executed_here(monkeypatch, GNNMOE_RESULTS_DIR=str(tmp_path), GNNMOE_STUDY="other")
    assert "## other" in text
    assert text.count("picture") >= 1
    assert "NOT WIKITEXT-2" in text
