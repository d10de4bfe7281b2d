"""Imports flow one way, and the quick parts stay quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tools.figures import circles

REPOSITORY = Path(__file__).parents[1]
ORDER = (
    "screen interruption files config help cli device record study data check training measure tune report"
    " run speed sweep __main__"
).split()
"""Each part imports only from parts before it."""


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(module: str) -> str:
    return module.split(".")[1] if module.startswith("bench.") else ""


def test_the_model_never_imports_the_harness():
    for path in (REPOSITORY / "gnnmoe").rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "bench"], path


def test_a_part_imports_only_parts_before_it():
    for path in (REPOSITORY / "bench").rglob("*.py"):
        own = path.relative_to(REPOSITORY / "bench").parts[0].removesuffix(".py")
        if own == "__init__":  # offers functions of other parts lazily
            continue
        assert own in ORDER, f"{path} is in no part of the layout"
        for name in imports(path):
            other = part(name)
            if other and other != own:
                assert other in ORDER[: ORDER.index(own)], f"{path} imports {name}"


def test_no_files_import_one_another():
    assert circles() == []


def test_no_package_imports_its_command():
    for path in (REPOSITORY / "bench").rglob("__init__.py"):
        assert not [name for name in imports(path) if name.endswith("__main__")], path


def test_only_the_pyg_backends_import_pyg():
    users = {
        path.relative_to(REPOSITORY / "gnnmoe").as_posix()
        for path in (REPOSITORY / "gnnmoe").rglob("*.py")
        if any(name.split(".")[0] == "torch_geometric" for name in imports(path))
    }
    assert users == {"hypergraph/backends.py"}


@pytest.mark.parametrize(
    "module",
    ["gnnmoe", "bench.config", "bench.record", "bench.sweep.specification", "bench.report.summary"],
)
def test_no_torch_where_nothing_is_computed(module):
    """Names are imported lazily, and the analysis imports no torch."""
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=60).returncode == 0
