"""Imports flow one way, and the quick parts stay quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ORDER = (
    "files config device record data identity gate portrait training measure"
    " tune sweeps analysis"
).split()
COMMANDS = set("run sweep report speed check cli speeding __main__".split())


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


def test_data_flow_down_the_list_and_never_up():
    """Layout: a part imports only from parts above it; the commands import from all of them."""
    for path in (REPOSITORY / "bench").rglob("*.py"):
        own = path.relative_to(REPOSITORY / "bench").parts[0].removesuffix(".py")
        if own in COMMANDS or own == "__init__" or path.name == "__main__.py":
            continue
        assert own in ORDER, f"{path} is in no part of the layout"
        for name in imports(path):
            other = part(name)
            if other and other != own:
                assert other in ORDER[: ORDER.index(own)], f"{path.name} ({own}) imports {name}"


def test_only_the_pyg_backends_import_pyg():
    users = {
        path.relative_to(REPOSITORY / "gnnmoe").as_posix()
        for path in (REPOSITORY / "gnnmoe").rglob("*.py")
        if any(name.split(".")[0] == "torch_geometric" for name in imports(path))
    }
    assert users == {"hypergraph_backends.py"}


@pytest.mark.parametrize(
    "module",
    ["gnnmoe", "bench.config", "bench.record", "bench.sweeps.shorthand", "bench.analysis.summary"],
)
def test_no_torch_where_nothing_is_computed(module):
    """Names are imported lazily, and the analysis imports no torch."""
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=60).returncode == 0
