"""Studies of other people: their texts shown as text, and the paths that they name kept in their folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gnnmoe.config import Refused

MOST_NESTED = 100
"""Levels of nested JSON that are read; a record has about 8."""
LONGEST_NAME = 200
"""Letters of a file name that a file may name; those of a report and of a run have at most 40."""
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0, C1), what overrides the direction of writing, and what UTF-8 cannot hold."""


def visible(text: str, keep: str = "") -> str:
    r"""Return ``text`` with each control character as its escape (``\x1b``), but for those in ``keep``."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def shown(value: Any, name: str = "") -> Any:
    """Return a nested value of JSON as it may be shown: every text and key ``visible``.

    The texts under the name ``error`` keep their line breaks.

    Raises:
        Refused: it is nested too deeply.
    """
    return _shown(value, name, MOST_NESTED)


def inside(folder: Path, name: str, source: Path) -> Path:
    """Return the path of the file ``name`` in ``folder``, as the file ``source`` names it.

    Raises:
        Refused: the name leaves the folder; or a symbolic link does.
    """
    parts = re.split(r"[/\\]", name)
    plain = not {"", ".", ".."} & set(parts) and "\0" not in name and ":" not in parts[0]
    if not plain or max(map(len, parts)) > LONGEST_NAME:
        said = repr(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…")
        raise Refused(
            f"{source} names the file {said}, which is not in {folder}. Nothing was changed. Do not use "
            f"a study that you do not trust; else delete {source.name} and try again."
        )
    return not_linked_out(folder, name)


def not_linked_out(folder: Path, name: str) -> Path:
    """Return the path of the file ``name`` of our own in ``folder``, which others may have made.

    Raises:
        Refused: it is, or lies behind, a symbolic link that leads out of the folder.
    """
    try:
        stays = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        stays = False
    if not stays:
        raise Refused(
            f"{folder / name} is a symbolic link, or lies behind one, that leads out of {folder}. "
            "Nothing was changed; delete the link and try again."
        )
    return folder / name


def _shown(value: Any, name: str, levels: int) -> Any:
    if isinstance(value, str):
        return visible(value, keep="\n" if name == "error" else "")
    if not isinstance(value, dict | list):
        return value
    if not levels:
        raise Refused(f"it is nested more than {MOST_NESTED} levels deep")
    if isinstance(value, dict):
        return {visible(key): _shown(item, key, levels - 1) for key, item in value.items()}
    return [_shown(item, name, levels - 1) for item in value]


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
