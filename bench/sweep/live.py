"""What a person sees of a sweep: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.files import visible
from bench.record import exp_or_infinity, number
from bench.sweep.outcome import Attempt, Outcome, SweepResult, written_at
from bench.sweep.plan import time_words

REFRESH_SECONDS = 0.5
SHOWN_FAILURES = 20


class Display:
    """Shows on ``console`` what becomes of the runs of a sweep."""

    def __init__(self, console: Console, result: SweepResult, slots: int) -> None:
        self.console, self.result, self.slots = console, result, slots
        self._labels = {run.run_id: run.label for run in result.runs}
        self._live: Live | None = None
        self._refreshed = -math.inf

    def line(self, text: str) -> None:
        """Print one line, above the table where there is one."""
        self.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    def found(self) -> None:
        """Say what was done before."""
        counts = Counter(found.status for found in self.result.outcomes.values())
        said = f"; already done: {_counts(counts)}" if counts else ""
        runs = len(self.result.runs)
        self.line(f"{runs} run{'s' * (runs != 1)}, {self.slots} at a time{said}")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table while the block lasts, on a terminal.

        No thread refreshes it: children are forked from this process.
        """
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as self._live:
            yield
        self._live = None

    def started(self, attempt: Attempt) -> None:
        """Say that a run starts, or waits for a cluster; the table shows it where there is one."""
        if self._live is None:
            word = "continues" if "--resume" in attempt.flags else "starts"
            self.line(f"{'queued' if attempt.queued else word:12} {attempt.run.label}")

    def ended(self, attempt: Attempt, outcome: Outcome) -> None:
        """Say what became of a run."""
        what = ", ".join(part for part in (_quality(outcome), time_words(attempt.seconds)) if part)
        place = f"{len(self.result.outcomes)} of {len(self.result.runs)}"
        self.line(f"{outcome.status:12} {attempt.run.label}: {what} ({place})")
        if outcome.failed or (outcome.status == "interrupted" and attempt.stopped is None):
            self.line(f"{'':12} {_short(outcome.error or '', 200)}")

    def refresh(
        self, running: Sequence[Attempt], waiting: int, seconds_left: Callable[[], float | None]
    ) -> None:
        """Draw the table anew when it is time."""
        if self._live is not None and time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            self._live.update(self.table(running, waiting, seconds_left()), refresh=True)
            self._refreshed = time.monotonic()

    def table(self, running: Sequence[Attempt], waiting: int, seconds_left: float | None) -> RenderableType:
        """Return a row for each running run, the counts and the best so far; 80 columns are enough."""
        table = Table(box=None, show_header=False, width=self.console.width, padding=(0, 1, 0, 0))
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column(width=10, no_wrap=True, justify="right")
        table.add_column(width=34, no_wrap=True, overflow="ellipsis")
        room = max(1, self.console.height - 6)
        for attempt in running[:room]:
            state = "in the queue" if attempt.queued else last_validation(attempt) or "preparing"
            table.add_row(Text(attempt.run.label), time_words(attempt.seconds), Text(state))
        lines = [f"… and {len(running) - room} more"] if len(running) > room else []
        outcomes = self.result.outcomes
        failed = sum(found.failed for found in outcomes.values())
        left = "" if seconds_left is None else f" · about {time_words(seconds_left)} left"
        counts = f"{len(outcomes)} of {len(self.result.runs)} done · {len(running)} running · {failed} failed"
        lines.append(f"{counts} · {waiting} waiting{left}")
        if best := _best(outcomes):
            lines.append(f"best: {_quality(outcomes[best])} {self._labels[best]}")
        text = Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
        return Group(table, text)

    def summary(self, again: str) -> None:
        """Say how the sweep ended, what failed and why, and how to go on."""
        result = self.result
        words = f"{len(result.runs)} runs in {time_words(result.seconds)}: {_counts(result.counts)}"
        if best := _best(result.outcomes):
            words += f"; best: {_quality(result.outcomes[best])}, {self._labels[best]}"
        self.line(words)
        failures = [(run_id, found) for run_id, found in result.outcomes.items() if found.failed]
        for run_id, found in failures[:SHOWN_FAILURES]:
            self.line(
                f"{found.status:12} {self._labels[run_id]} ({run_id}): {_short(found.error or '', 160)}"
            )
        if len(failures) > SHOWN_FAILURES:
            self.line(f"{'':12} … and {len(failures) - SHOWN_FAILURES} more")
        if failures:
            self.line(f"The output of each run is in {result.runs[0].folder.parent / '.logs'}.")
        if result.message:
            self.line(f"error: {result.message}")
        if result.left_for_budget:
            count = result.left_for_budget
            self.line(f"{count} run{'s' * (count != 1)} did not start: they would end after the time budget.")
        if result.stopped is not None:
            self.line(f"To continue: {again}")


def last_validation(attempt: Attempt) -> str | None:
    """Return ``step 40/120: perplexity 480.1`` from the end of the history; None before its first step."""
    run = attempt.run
    if written_at(run.folder / "record.json") == attempt.record_before:  # the history is older
        return None
    last, step = None, None
    for row in reversed(_last_rows(run.folder / "history.jsonl")):
        with suppress(ValueError, KeyError, TypeError, ZeroDivisionError):  # a row that is being written
            entry = json.loads(row)
            step = step or entry["step"]
            if entry["kind"] == "validation":
                last = _perplexity(entry["nll_sum"] / entry["tokens"])
                break
    if step is None:
        return None
    place = f"step {step}" + (f"/{run.steps}" if run.steps else "")
    return f"{place}: {last}" if last else place


def _last_rows(path: Path, size: int = 2**16) -> list[str]:
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read().decode(errors="replace").splitlines()
    return []


def _best(outcomes: Mapping[str, Outcome]) -> str | None:
    """Return the run_id of the ok run with the lowest loss; many perplexities may be infinite."""
    known = [
        (found.loss_nats, run_id)
        for run_id, found in outcomes.items()
        if found.status == "ok" and found.loss_nats is not None
    ]
    return min(known, key=lambda one: one[0])[1] if known else None


def _counts(counts: Counter[str]) -> str:
    order = sorted(counts.items(), key=lambda item: (item[0] != "ok", item[0] == "left", item[0]))
    return ", ".join(f"{number} {status}" for status, number in order) or "nothing"


def _quality(outcome: Outcome) -> str:
    return "" if outcome.loss_nats is None else _perplexity(outcome.loss_nats)


def _perplexity(nats: float) -> str:
    return f"perplexity {number(exp_or_infinity(nats))}"


def _short(text: str, length: int) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= length else line[: length - 1] + "…"
