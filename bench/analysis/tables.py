"""The tables of a study: figures in full as csv, and as people read them as Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

Cells = dict[str, Any]
TO_LATEX = {
    "−": "$-$", "·": "$\\cdot$", "×": "$\\times$", "±": "$\\pm$", "≤": "$\\leq$", "†": "\\dag{}",
    "–": "--", "…": "\\ldots{}", "→": "$\\rightarrow$",
}  # fmt: skip
KNOWN_LETTERS = frozenset(map(chr, range(0xC0, 0x100))) - frozenset("×÷ÐðÞþ")
"""Of Latin-1, what LaTeX reads in UTF-8 with its usual fonts."""


@dataclass(frozen=True)
class Table:
    """One table: the figures, and the same as it is shown."""

    name: str
    """Also its files' name, without ending."""
    caption: str
    figures: pd.DataFrame
    """Raw, with units in the names of the columns."""
    shown: pd.DataFrame
    """Text only, as many rows as ``figures``."""
    bold: frozenset[int] = frozenset()
    """Rows that are best beyond the noise."""
    notes: list[str] = field(default_factory=list)

    def files(self) -> dict[str, str]:
        """Return the contents of the Markdown, csv and LaTeX files, by file name."""
        return {
            f"{self.name}.md": self.markdown(),
            f"{self.name}.csv": self.figures.to_csv(index=False, lineterminator="\n"),
            f"{self.name}.tex": self.latex(),
        }

    def markdown(self) -> str:
        """Return the table in Markdown, with caption and notes."""
        shown = self.shown.map(_escape_markdown)
        for row in self.bold:
            shown.iloc[row, 0] = f"**{shown.iloc[row, 0]}**"
        body = shown.to_markdown(index=False, disable_numparse=True)
        notes = "".join(f"\n{_escape_markdown(note)}\n" for note in self.notes)
        return f"**{_escape_markdown(self.caption)}**\n\n{body}\n{notes}"

    def latex(self) -> str:
        """Return the table in LaTeX, for a document that loads the package booktabs."""
        style: Any = self.shown.map(_plain_letters).style.format(escape="latex")
        style = style.hide(axis="index").format_index(escape="latex", axis="columns")
        if self.bold and len(self.shown.columns):
            cells = pd.IndexSlice[sorted(self.bold), [self.shown.columns[0]]]
            style = style.map(lambda _: "textbf:--rwrap;", subset=cells)
        numeric = "l" + "r" * (len(self.shown.columns) - 1)
        text = style.to_latex(hrules=True, column_format=numeric)
        notes = "\n".join(f"% {_plain_letters(note)}" for note in [self.caption, *self.notes])
        text = f"{notes}\n{text}"
        for letter, command in TO_LATEX.items():
            text = text.replace(letter, command)
        return text


def make_table(name: str, caption: str, rows: Sequence[tuple[Cells, Cells]], **more: Any) -> Table:
    """Return a table of rows, each with its figures and its texts, by column."""
    figures = pd.DataFrame([figures for figures, _ in rows]).convert_dtypes()
    shown = pd.DataFrame([shown for _, shown in rows], dtype=object)
    return Table(name, caption, figures, shown.fillna("").astype(str), **more)


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|~$])", r"\\\1", " ".join(text.split()))


def _plain_letters(text: str) -> str:
    """Return ``text`` in one line, with "?" for letters that LaTeX may not know."""
    return "".join(letter if letter.isascii() or letter in TO_LATEX or letter in KNOWN_LETTERS else "?"
                   for letter in " ".join(text.split()))  # fmt: skip
