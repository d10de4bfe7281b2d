"""A hash of what a module's source says: of its syntax tree, without comments and docstrings."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

SKIPPED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})  # fields of a node that change nothing


@cache
def code_of(folder: Path, *names: str) -> str:
    """Return one hash of the modules ``names`` of a folder: what they store is kept under it."""
    hashes = [syntax_sha256((folder / f"{name}.py").read_bytes()) for name in names]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def syntax_sha256(source: bytes) -> str:
    """Return the hash of a module's syntax tree; comments, docstrings and layout do not count.

    It is the same in every Python version that parses the source to the same tree.
    """
    parts: list[str] = []
    _write(ast.parse(source), parts)
    return hashlib.sha256("".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _write(value: Any, parts: list[str]) -> None:
    """Append a node, a list or a plain value to ``parts``; texts that stand alone are left out."""
    if isinstance(value, ast.AST):
        parts.append(f"({type(value).__name__}")
        for name in value._fields:
            part = getattr(value, name, None)
            if isinstance(value, ast.JoinedStr) and name == "values":  # Python 3.12 adds empty texts
                part = [item for item in value.values if getattr(item, "value", None) != ""]
            if part is not None and part != [] and name not in SKIPPED:
                parts.append(f" {name}=")
                _write(part, parts)
        parts.append(")")
    elif isinstance(value, list):
        parts.append("[")
        for item in value:
            if not _is_text(item):
                _write(item, parts)
        parts.append("]")
    else:
        parts.append(repr(value))


def _is_text(node: Any) -> bool:
    """Whether a statement is a text alone: a docstring of a module, class, function or attribute."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
