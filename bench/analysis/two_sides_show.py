"""The comparison of two sides on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.analysis.comparison import Difference
from bench.analysis.labels import DIGITS
from bench.analysis.numbers import mebibytes, number, p_value, percent, share, signed, span
from bench.analysis.over_seeds import losses, unknown_words
from bench.analysis.provenance import code_note
from bench.analysis.quantities import exp_or_infinity
from bench.analysis.study import Configuration
from bench.analysis.two_sides import MEASURED, Compared, Side, measured
from bench.files import visible

WIDTH = 80
FORMATS: dict[str, Callable[[float], str]] = {
    "tokens/s": lambda value: number(value, 0), "step_time": lambda value: f"{number(1e3 * value, 1)} ms",
    "memory": mebibytes, "parameters": lambda value: number(value, 0),
}  # fmt: skip
SHOWN = {name: (quantity, FORMATS.get(name, number)) for name, quantity in MEASURED.items()}


def print_differences(first: Side, second: Side, compared: Compared, console: Console) -> None:
    """Print for each pair the perplexities, the paired difference with its verdict, and what it costs."""
    console.print(f"A: {visible(first.name)}\nB: {visible(second.name)}", markup=False)
    count = len(compared.differences)
    width = min(WIDTH, console.width)
    notes = [code_note(side.runs) for side in (first, second)]
    if notes[0] != notes[1]:
        for name, note in zip("AB", notes, strict=True):
            console.print(textwrap.fill(f"{name}: {note}", width), style="dim", markup=False)
    for difference in compared.differences:
        console.print()
        console.print(_title(difference), style="bold", markup=False)
        table = Table(width=width, box=None, padding=(0, 1, 0, 0), show_edge=False)
        for name in ("", "A", "B", "B over A"):
            table.add_column(name, justify="left" if name in ("", "B over A") else "right", overflow="fold")
        for row in _rows(difference):
            table.add_row(*map(escape, row))
        console.print(table)
        verdict = f"B is {difference.verdict.words()}; p {p_value(difference.p_adjusted)}, "
        verdict += f"after Holm over {count} comparisons" if count > 1 else "of this one comparison alone"
        console.print(textwrap.fill(verdict, width), markup=False)
    for text in compared.doubled:
        console.print(textwrap.fill(text, width), style="bold yellow", markup=False)
    for text in compared.missing:
        console.print(textwrap.fill(f"not compared: {text}", width), style="bold yellow", markup=False)


def _title(difference: Difference) -> str:
    sides = (difference.reference, difference.candidate)
    names = list(dict.fromkeys(side.label for side in sides))
    codes = [side.key[1] for side in sides]
    if len(names) == 1 and None not in codes and codes[0] != codes[1]:
        names = [f"{names[0]} · code {code[:DIGITS]}" for code in codes if code]
    seeds = ", ".join(map(str, difference.by_seed))
    return " → ".join(names) + f" (seeds {seeds})"


def _rows(difference: Difference) -> list[list[str]]:
    paired = difference.paired
    means = [_mean_loss(side, difference) for side in (difference.reference, difference.candidate)]
    rows = [["perplexity", *(number(exp_or_infinity(mean), 2) for mean in means),
             percent(exp_or_infinity(paired.mean), 2)],
            ["loss (nats)", *(number(mean, 4) for mean in means),
             f"{signed(paired.mean)} {span(paired.interval, 4, sign=True)}"]]  # fmt: skip
    unknown = [unknown_words(side) for side in (difference.reference, difference.candidate)]
    if any(unknown):
        rows.append(["unknown words", *map(share, unknown), ""])
    for name, (quantity, show) in SHOWN.items():
        found = measured(difference, quantity)
        if found is not None:
            rows.append([name, *map(show, found), percent(found[1] / found[0], 2)])
    return rows


def _mean_loss(side: Configuration, difference: Difference) -> float:
    """Return the mean loss of a side over the seeds that both have."""
    values = losses(side).values
    return fmean(values[seed] for seed in difference.by_seed)
