"""``python -m bench``: the list of the commands."""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from bench.cli import fail
from gnnmoe.config import unknown_name

WIDTH = 80
BENCH = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands, or refuse an argument with status 2."""
    found = commands(BENCH)
    for argument in sys.argv[1:] if argv is None else argv:
        if argument in found:
            fail(f"a command is started as python -m bench.{argument}")
        if argument not in ("-h", "--help"):
            fail(unknown_name("command", argument, found))
    print("Commands, each started as python -m bench.NAME; --help lists its flags:")
    indent = max(map(len, found)) + 4
    for name, summary in found.items():
        print(f"  {name:{indent - 2}}{textwrap.shorten(summary, WIDTH - indent, placeholder=' …')}")
    return 0


def commands(folder: Path) -> dict[str, str]:
    """Return what each module with a ``main`` is for: the first line of its docstring, not imported."""
    found = {}
    for path in sorted([*folder.glob("[!_]*.py"), *folder.glob("[!_]*/__main__.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            name = path.parent.name if path.name == "__main__.py" else path.stem
            first = (ast.get_docstring(tree) or "").partition("\n")[0]
            found[name] = first.partition("``: ")[2] or first
    return found


if __name__ == "__main__":
    sys.exit(main())
