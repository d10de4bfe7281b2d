"""Tables as the page shows them: each cell with the raw figure that it is sorted by."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from bench.analysis.tables import Table

RAW = {
    "n": ("n",), "seed": ("seed",), "seeds": ("seeds_paired",), "test perplexity": ("test_perplexity",),
    "perplexity": ("perplexity", "difference_nats"), "difference (nats)": ("difference_nats",),
    "p": ("p_holm",), "tokens/s": ("tokens_per_second",), "peak memory": ("peak_memory_bytes",),
    "cost over mean": ("step_time_ratio_to_mean_coupler",), "parameters": ("parameters",),
    "FLOPs a token": ("training_flops_per_token",), "batch asked / tuned / used": ("requested_batch_size",),
    "seconds": ("seconds",), "table": ("table",), "unknown words": ("unknown_words_share",),
    "unknown words, test": ("test_unknown_words_share",),
}  # fmt: skip
"""Shown column → the columns of figures that it is sorted by; the first that the table has counts."""
PARTS = re.compile(r" (?=\[)|(?<=,) (?!.*\])")
IN_FULL = {"error": "error"}
"""Shown column → the column of figures that has the whole text of what is shown cut."""


class Cell(NamedTuple):
    """One cell: what is shown, the number it is sorted by, and the whole text where a part is shown."""

    text: str
    value: str | None
    full: str | None

    @property
    def parts(self) -> list[str]:
        """The text in parts that may stand below each other: a mean and its interval, two costs."""
        return [self.text] if self.value is None else PARTS.split(self.text)


@dataclass(frozen=True)
class TableView:
    """One table, ready for the template."""

    name: str
    caption: str
    columns: list[tuple[str, bool]]
    """Each with whether it holds numbers."""
    rows: list[list[Cell]]
    bold: frozenset[int]
    notes: list[str]
    csv: str
    """All figures as a data: URI."""


def table_view(table: Table, csv: str) -> TableView:
    """Return a table with the raw figure beside each text."""
    titles = [title for title in table.shown.columns if title != "name" or any(table.shown[title])]
    raw = {title: next((name for name in RAW.get(title, ()) if name in table.figures), None)
           for title in titles}  # fmt: skip
    columns = [_cells(table, title, raw[title]) for title in titles]
    return TableView(
        table.name, table.caption, [(title, raw[title] is not None) for title in titles],
        [list(row) for row in zip(*columns, strict=True)], table.bold, table.notes, csv,
    )  # fmt: skip


def figures(study: str, tables: Sequence[Table]) -> dict[str, Any]:
    """Return the raw figures of tables by name, as columns and rows ready for JSON.

    What was not measured is None; infinity, which JSON has not, is the text ``inf``, as in the csv files.
    """
    return {"study": study, "tables": {
        table.name: {"columns": [str(name) for name in table.figures.columns],
                     "rows": [[plain(value) for value in row] for row in _rows(table.figures)]}
        for table in tables}}  # fmt: skip


def plain(value: Any) -> Any:
    """Return a figure as JSON has it."""
    if value is None or value is pd.NA:
        return None
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _cells(table: Table, title: str, raw: str | None) -> list[Cell]:
    texts = table.shown[title].tolist()
    values = [None] * len(texts) if raw is None else [_value(value) for value in table.figures[raw]]
    whole = table.figures[IN_FULL[title]].tolist() if title in IN_FULL else texts
    fulls = [str(full) if full is not pd.NA and full and full != text else None
             for full, text in zip(whole, texts, strict=True)]  # fmt: skip
    return [Cell(*found) for found in zip(texts, values, fulls, strict=True)]


def _value(value: Any) -> str | None:
    """Return a figure as JavaScript's Number reads it."""
    found = plain(value)
    return None if found is None else repr(found) if not isinstance(found, str) \
        else found.replace("inf", "Infinity")  # fmt: skip


def _rows(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(frame.astype(object).itertuples(index=False, name=None))
