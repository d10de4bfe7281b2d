"""List what can be trained: couplers, hypergraph layers and hyperedge strategies, one line each."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator

from gnnmoe.couplers.registry import COUPLERS
from gnnmoe.hypergraph.strategies import STRATEGIES
from gnnmoe.layers.base import LAYERS

KINDS = {"coupler": COUPLERS, "hgnn-conv-type": LAYERS, "static-hyperedge-strategy": STRATEGIES}


def print_list() -> int:
    """Print the list, also of installed packages, and return the exit status 0."""
    print("\n".join(_lines()))
    return 0


def _lines() -> Iterator[str]:
    width = max(len(name) for registry in KINDS.values() for name in registry)
    columns = shutil.get_terminal_size().columns
    for flag, registry in KINDS.items():
        yield f"--{flag}"
        for name, thing in registry.items():
            said = (inspect.getdoc(thing) or "no description").splitlines()[0].replace("``", "`")
            yield textwrap.fill(f"  {name:{width}}  {said}", columns, subsequent_indent=" " * (width + 4))
        yield ""
    yield "Your own: path/to/file.py:Name or package.module:Name (see CONTRIBUTING.md)."
