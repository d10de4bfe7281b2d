"""What a search found, on the screen in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MIB = 2**20
OF_SIZES = ("size", "predicted\nMiB", "measured\nMiB", "tokens/s", "seconds")
OF_SHAPES = ("length", "at once", "predicted\nMiB", "corrected\nMiB", "measured\nMiB")
ENDED = {"max_trials": "the trials ran out", "max_seconds": "the time ran out"}


def print_sizes(found: dict[str, Any], batch_size: int, console: Console) -> None:
    """Print the record of a search for a size: every trial, the limit, the knee, and how a batch is run."""
    table = _table(f"length {found['length']}, {_limit(found)}", OF_SIZES)
    for trial in found["trials"]:
        speed = trial["tokens_per_second"]
        marks = [name for name in ("largest", "knee") if found[name] == trial["size"]]
        table.add_row(
            f"{trial['size']:,}", *_peaks(trial, "predicted", "measured"),
            "–" if speed is None else f"{speed:,.0f}", f"{trial['seconds']:.1f}", _verdict(trial, *marks),
        )  # fmt: skip
    console.print(table)
    why = {"limit": "more does not fit", "cap": "more is not allowed", **ENDED}[found["stopped"]]
    micro = max(size for size in range(1, batch_size + 1)
                if batch_size % size == 0 and size <= max(found["largest"], 1))  # fmt: skip
    split = "whole" if micro == batch_size else f"as {batch_size // micro} micro-batches of {micro}"
    flag = "" if micro == batch_size else f" (--micro-batch-size {micro})"
    console.print(Text(
        f"largest that ran: {found['largest']:,} of at most {found['cap']:,}: {why}{_kept(found)}.\n"
        f"knee: {found['knee']:,}, the smallest within 5 % of the best tokens/s.\n"
        f"a batch of {batch_size} runs {split}{flag}."
    ))  # fmt: skip


def print_fit(found: dict[str, Any], console: Console) -> None:
    """Print the record of a fit: every trial, the limit, and the flags that use what was found."""
    table = _table(_limit(found), OF_SHAPES)
    for trial in found["trials"]:
        peaks = _peaks(trial, "predicted", "expected", "measured")
        table.add_row(str(trial["length"]), str(trial["size"]), *peaks, _verdict(trial))
    console.print(table)
    why = {"limit": "the next size does not fit", "largest": "nothing larger is allowed", **ENDED}
    console.print(Text(
        f"length {found['length']}, {found['micro_batch_size']} at once of a batch of {found['batch_size']}: "
        f"{why[found['stopped']]}{_kept(found)}.\nto use it: --max-seq-length {found['length']} "
        f"--micro-batch-size {found['micro_batch_size']}, or --fit-shape with the same flags."
    ))  # fmt: skip


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
                  width=80)  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("", overflow="fold", ratio=1)
    return table


def _limit(found: dict[str, Any]) -> str:
    limit, budget = _mib(found["limit_bytes"]), _mib(found["budget_bytes"])
    return f"limit {limit} MiB = {found['target']:.0%} of {budget} MiB, {found['device_name']}"


def _kept(found: dict[str, Any]) -> str:
    return " (kept from an earlier search)" if found["from_cache"] else ""


def _peaks(trial: dict[str, Any], *names: str) -> list[str]:
    return [_mib(trial[f"{name}_peak_bytes"]) for name in names]


def _verdict(trial: dict[str, Any], *marks: str) -> Text:
    if trial["failure"] is not None:
        return Text(f"✗ {trial['failure'].splitlines()[0]}", style="red")
    return Text(" ".join(["✓", *marks]), style="green")


def _mib(count: int | None) -> str:
    return "–" if count is None else f"{count / MIB:,.1f}"
