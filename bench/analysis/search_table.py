"""A batch-size search on the screen, in 80 columns: every trial, the limit, the knee, and what to use."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MIB = 2**20


def print_search(found: dict[str, Any], batch_size: int, console: Console) -> None:
    """Print the record of a search (``bench.tuning.tune``) and what it says of a batch of ``batch_size``."""
    console.print(_trials(found))
    for line in _lines(found, batch_size):
        console.print(Text(line))


def _trials(found: dict[str, Any]) -> Table:
    limit = (
        f"{found['limit_bytes'] / MIB:,.1f} MiB = {found['target']:.0%} of {_mib(found['budget_bytes'])} MiB"
    )
    table = Table(
        title=f"length {found['length']}, limit {limit}, {found['device_name']}",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, width=80,
    )  # fmt: skip
    for heading in ("size", "predicted\nMiB", "measured\nMiB", "tokens/s", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("", overflow="fold", ratio=1)
    for trial in found["trials"]:
        table.add_row(
            f"{trial['size']:,}", _mib(trial["predicted_peak_bytes"]), _mib(trial["measured_peak_bytes"]),
            "–" if trial["tokens_per_second"] is None else f"{trial['tokens_per_second']:,.0f}",
            f"{trial['seconds']:.1f}", _verdict(trial, found),
        )  # fmt: skip
    return table


def _verdict(trial: dict[str, Any], found: dict[str, Any]) -> Text:
    if trial["failure"] is not None:
        return Text(f"✗ {trial['failure'].splitlines()[0]}", style="red")
    marks = [name for name, size in (("largest", found.get("largest")), ("knee", found.get("knee")))
             if size == trial["size"]]  # fmt: skip
    return Text(" ".join(["✓", *marks]), style="green")


def _lines(found: dict[str, Any], batch_size: int) -> list[str]:
    why = {
        "limit": "more does not fit", "cap": "more is not allowed", "max_trials": "the trials ran out",
        "max_seconds": "the time ran out",
    }[found["stopped"]]  # fmt: skip
    kept = " (kept from an earlier search)" if found["from_cache"] else ""
    lines = [
        f"largest that ran: {found['largest']:,} of at most {found['cap']:,}: {why}{kept}.",
        f"knee: {found['knee']:,}, the smallest within 5 % of the best tokens/s.",
    ]
    micro = max(size for size in range(1, batch_size + 1)
                if batch_size % size == 0 and size <= max(found["largest"], 1))  # fmt: skip
    split = "whole" if micro == batch_size else f"as {batch_size // micro} micro-batches of {micro}"
    flag = "" if micro == batch_size else f" (--micro-batch-size {micro})"
    return [*lines, f"a batch of {batch_size} runs {split}{flag}."]


def _mib(count: int | None) -> str:
    return "–" if count is None else f"{count / MIB:,.1f}"
