"""A fit of length and micro-batch on the screen, in 80 columns: every trial, the limit, and what to use."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MIB = 2**20
WHY = {
    "limit": "the next size does not fit", "largest": "nothing larger is allowed",
    "max_trials": "the trials ran out", "max_seconds": "the time ran out",
}  # fmt: skip


def print_fit(found: dict[str, Any], console: Console) -> None:
    """Print the record of a fit (``bench.fitting.find_shape``): predicted and measured peaks in turn."""
    limit = f"{_mib(found['limit_bytes'])} MiB = {found['target']:.0%} of {_mib(found['budget_bytes'])} MiB"
    table = Table(
        title=f"limit {limit}, {found['device_name']}", title_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False, show_edge=False, width=80,
    )  # fmt: skip
    for heading in ("length", "at once", "predicted\nMiB", "corrected\nMiB", "measured\nMiB"):
        table.add_column(heading, justify="right")
    table.add_column("", overflow="fold", ratio=1)
    for trial in found["trials"]:
        peaks = (trial[f"{name}_peak_bytes"] for name in ("predicted", "expected", "measured"))
        verdict = Text("✓", style="green") if trial["failure"] is None else Text(
            f"✗ {trial['failure'].splitlines()[0]}", style="red")  # fmt: skip
        table.add_row(str(trial["length"]), str(trial["size"]), *map(_mib, peaks), verdict)
    console.print(table)
    console.print(Text(
        f"length {found['length']}, {found['micro_batch_size']} at once of a batch of {found['batch_size']}: "
        f"{WHY[found['stopped']]}.\nto use it: --max-seq-length {found['length']} "
        f"--micro-batch-size {found['micro_batch_size']}, or --fit-shape with the same flags."
    ))  # fmt: skip


def _mib(count: int | None) -> str:
    return "–" if count is None else f"{count / MIB:,.1f}"
