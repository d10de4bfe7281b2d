"""``python -m bench``: the list of the commands; ``python -m bench NAME`` is ``python -m bench.NAME``."""

from __future__ import annotations

import ast
import importlib
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from bench.cli import fail
from bench.interruption import interruptible
from bench.screen import guard_screen
from gnnmoe.config import unknown_name

WIDTH = 80
BENCH = Path(__file__).parent


@interruptible("nothing is kept.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of the first word, or print the commands; refuse any other word with status 2."""
    guard_screen()
    found, arguments = commands(BENCH), list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in found:
        return importlib.import_module(f"bench.{arguments[0]}.__main__").main(arguments[1:])
    if arguments and arguments[0] not in ("-h", "--help"):
        fail(unknown_name("command", arguments[0], found))
    print("python -m bench NAME, or python -m bench.NAME; --help shows its flags. Commands:")
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
