"""The output of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.record import exp_or_infinity, number


class Reporter:
    """Prints phases, training progress and evaluations to ``console``; nothing if ``quiet``."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self._bar: Progress | None = None
        self._total, self._first, self._tokens, self._started = 0, 0, 0, 0.0
        self._validation = ""

    def line(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def phase(self, description: str) -> Iterator[None]:
        """Announce a phase; the training bar, if there is one, ends with the phase."""
        self.line(f"{description} …")
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def training_begins(self, total_steps: int, done_steps: int = 0) -> None:
        """Start counting after ``done_steps`` steps; show the bar on a terminal."""
        self._total, self._first = total_steps, done_steps
        self._tokens, self._started = 0, time.perf_counter()
        if self.console.is_terminal and not self.quiet:
            self._bar = Progress(
                BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True), console=self.console, transient=True,
            )  # fmt: skip
            self._bar.add_task("", total=total_steps, completed=done_steps)
            self._bar.start()

    def step(self, row: dict[str, Any]) -> None:
        """Show one training step."""
        self._tokens += row["tokens"]
        if self._bar is not None:
            rate = self._tokens / (time.perf_counter() - self._started)
            text = f"loss {number(row['loss'], 3)}{self._validation} · {rate:,.0f} tokens/s"
            self._bar.update(self._bar.task_ids[0], completed=row["step"], description=text)

    def evaluated(self, row: dict[str, Any]) -> None:
        """Show one evaluation."""
        perplexity = number(exp_or_infinity(row["nll_sum"] / row["tokens"]))
        self._validation = f" · val ppl {perplexity}"
        elapsed = time.perf_counter() - self._started
        left = elapsed / (row["step"] - self._first) * (self._total - row["step"])
        self.line(f"  step {row['step']}/{self._total}: validation perplexity {perplexity}, "
                  f"{elapsed:.0f} s, about {left:.0f} s left")  # fmt: skip
