"""The output of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from bench.files import visible
from bench.record import exp_or_infinity, number

FORWARD_SHARE = 1 / 3
"""A forward pass as a share of a training step, until the first evaluation shows it."""
AUDITED = 1.15
"""The final evaluation with its audit, in final evaluations."""


@dataclass(frozen=True)
class Workload:
    """What a run does from the start of its training on, to tell how long the rest takes."""

    steps: int
    eval_every: int
    eval_batches: int = 0
    """Batches of one evaluation in training."""
    final_batches: int = 0
    """Batches of the evaluations at the end."""
    speed_steps: int = 0
    """Steps of the speed pass."""

    def evaluations_after(self, step: int) -> int:
        """Return how many evaluations come after the step and its own evaluation."""
        if step >= self.steps:
            return 0
        return math.ceil(self.steps / self.eval_every) - step // self.eval_every

    def seconds_left(self, step: int, step_seconds: float, batch_seconds: float) -> float:
        """Return the seconds after ``step`` of training, evaluations and speed pass."""
        batches = self.evaluations_after(step) * self.eval_batches + AUDITED * self.final_batches
        return (self.steps - step + self.speed_steps) * step_seconds + batches * batch_seconds


class Reporter:
    """Prints phases, training progress and evaluations to ``console``; nothing if ``quiet``."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self._bar: Progress | None = None
        self._work = Workload(0, 1)
        self._first, self._step, self._tokens, self._started = 0, 0, 0, 0.0
        self._step_seconds = 0.0
        self._eval_seconds, self._eval_batches, self._last_batch = 0.0, 0, 0.0
        self._validation = ""

    def line(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            self.console.print(visible(text), markup=False, highlight=False)

    @contextmanager
    def phase(self, description: str) -> Iterator[None]:
        """Announce a phase; the bar, if there is one, ends with the phase."""
        self.line(f"{description} …")
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def training_begins(self, work: Workload, done_steps: int = 0) -> None:
        """Start counting after ``done_steps`` steps; show the bar on a terminal."""
        self._work, self._first, self._step = work, done_steps, done_steps
        self._tokens, self._started = 0, time.perf_counter()
        self._eval_seconds, self._eval_batches = 0.0, 0
        self._show(done_steps, work.steps, "", "")

    def step(self, row: dict[str, Any]) -> None:
        """Show one training step."""
        self._tokens, self._step = self._tokens + row["tokens"], row["step"]
        seconds = max(1e-9, time.perf_counter() - self._started - self._eval_seconds)
        self._step_seconds = seconds / (self._step - self._first)
        text = f"loss {number(row['loss'], 3)}{self._validation} · {self._tokens / seconds:,.0f} tokens/s"
        self._show(self._step, self._work.steps, text, self._left())

    def evaluating(self, done: int, batches: int) -> None:
        """Show that ``done`` of the ``batches`` of an evaluation are done; 0: it begins."""
        now = time.perf_counter()
        if done:
            self._eval_seconds += now - self._last_batch
            self._eval_batches += 1
        self._last_batch = now
        left = f"{_clock((batches - done) * self._batch_seconds())} left"
        self._show(done, batches, "evaluating", left)

    def evaluated(self, row: dict[str, Any]) -> None:
        """Show one evaluation."""
        perplexity = number(exp_or_infinity(row["nll_sum"] / row["tokens"]))
        self._validation = f" · val ppl {perplexity}"
        elapsed, self._step = time.perf_counter() - self._started, row["step"]
        self.line(f"  step {row['step']}/{self._work.steps}: validation perplexity {perplexity}, "
                  f"{_clock(elapsed)}, about {self._left()}")  # fmt: skip

    def _batch_seconds(self) -> float:
        """Return the seconds of a batch in an evaluation, estimated until the first batch is done."""
        if self._eval_batches:
            return self._eval_seconds / self._eval_batches
        return self._step_seconds * FORWARD_SHARE

    def _left(self) -> str:
        """Return the time left of the whole run, with evaluations and speed pass."""
        seconds = self._work.seconds_left(self._step, self._step_seconds, self._batch_seconds())
        return f"{_clock(seconds)} left"

    def _show(self, completed: int, total: int, text: str, left: str) -> None:
        if self.quiet or not self.console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.description}"),
                TextColumn("{task.fields[left]}"), console=self.console, transient=True,
            )  # fmt: skip
            self._bar.add_task("", total=total, left="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=completed, total=total, description=text, left=left)


def _clock(seconds: float) -> str:
    """Return a time such as 45 s, 3 min 20 s or 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
    )
