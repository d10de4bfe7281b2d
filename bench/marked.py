"""What is made of records and written into a page, between two marks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.files import write_whole
from gnnmoe.config import Refused


def write_between(path: Path, put: Callable[[str], str]) -> None:
    """Let ``put`` make a page's new text of its old one, and write it whole.

    Raises:
        Refused: the page cannot be read or written; and what ``put`` raises.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise Refused(f"--page {path} cannot be read ({why}).") from error
    data = put(text).encode()
    try:
        write_whole(path, data)
    except OSError as error:
        raise Refused(f"--page {path} cannot be written ({error.strerror}).") from error


def between(text: str, marks: tuple[str, str], content: str) -> str:
    """Return a page's text with ``content`` between its marks.

    Raises:
        Refused: it has no such marks.
    """
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        lines = "\n".join(marks)
        raise Refused(f"the page has no place for tables; put these two lines in it:\n{lines}")
    return f"{before}{begin}\n\n{content}\n{end}{after}"
