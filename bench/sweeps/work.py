"""The work of a sweep: which run starts when, what ends it, and what is left. Everything is in the records.

Nothing is kept but the runs' own folders, so that a sweep killed at any moment, even by kill -9, goes
on when it is called again: a finished run has its record, any other is continued from its checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console

from bench.files import cannot_write
from bench.record import stale_notes
from bench.sweeps.executor import (
    Choices,
    Executor,
    Outcome,
    PlannedRun,
    Stop,
    SweepResult,
    Task,
)
from bench.sweeps.folders import Found, Unwritable, look, remove_left_over_locks
from bench.sweeps.forecast import Forecast
from bench.sweeps.guard import Signals, sweep_lock
from bench.sweeps.live import Display, View
from bench.sweeps.outcome import Again, Attempt, judge_child
from bench.sweeps.queue import Queue, Waiting
from bench.sweeps.torchrun import launcher

POLL_SECONDS = 0.05
Command = Callable[[PlannedRun], Sequence[str]]


def execute(
    runs: Sequence[PlannedRun],
    executor: Executor,
    *,
    results_dir: Path,
    study: str,
    places: Sequence[str] = (),
    choices: Choices | None = None,
    wait: bool = False,
    again: str = "the same command",
    console: Console | None = None,
    processes: int = 1,
    command: Command | None = None,
    before: Callable[[], object] = lambda: None,
) -> SweepResult:
    """Do all runs that are not done, in their order, and return what became of each.

    ``places`` are flags for every child (data folder, device, …), ``again`` the command that goes on
    after an interruption, ``processes`` how many each run has, ``command`` what makes another child of a
    run, ``before`` what is done before the first run, when no other sweep is at the study. With ``wait``,
    one is waited for.
    SIGINT or SIGTERM starts nothing more and lets the children save their state; a second ends them at once.

    Raises:
        Refused: another sweep is at it, results cannot be written, or a record is newer; nothing started.
    """
    choices, began = choices or Choices(), time.monotonic()
    once = list({run.run_id: run for run in runs}.values())
    display = Display(console or Console(highlight=False), once, executor.slots)
    own = ["--results-dir", str(results_dir), "--study", study, *places, "--quiet"]
    command = command or (lambda run: [*launcher(processes), *run.arguments, *own])
    result = SweepResult(once)
    with (
        closing(executor),
        Signals().installed() as signals,
        sweep_lock(results_dir / study, wait, display.line, lambda: signals.count > 0) as held,
    ):
        if held:
            before()
            _Work(result, executor, choices, command, display, signals, began).do()
        else:
            result.stopped = "signal"
    result.seconds = time.monotonic() - began
    display.summary(result, again)
    return result


class _Work:
    """The queue, the running children, and the clock."""

    def __init__(
        self,
        result: SweepResult,
        executor: Executor,
        choices: Choices,
        command: Command,
        display: Display,
        signals: Signals,
        began: float,
    ) -> None:
        self.result, self.executor, self.choices, self.command = result, executor, choices, command
        self.display, self.signals = display, signals
        budget = choices.time_budget_seconds
        self.deadline = None if budget is None else began + budget
        self.forecast = Forecast()
        self.queue = Queue(self.deadline, self.forecast, display.line)
        self.running: dict[str, Attempt] = {}

    def do(self) -> None:
        """Work until nothing is left or something stops it; no child outlives this."""
        self._scan()
        try:
            with self.display.shown():
                while self.running or (self.queue and not self.result.stopped):
                    self._watch()
                    self._collect()
                    self._fill()
                    self.display.refresh(self._view)
                    time.sleep(POLL_SECONDS)
        finally:
            for run_id in self.running:
                self.executor.stop(run_id, at_once=True)
        if self.result.stopped == "budget":
            self.result.left_for_budget += len(self.queue)

    def _scan(self) -> None:
        """Read every record once: what is done is done, the rest is queued."""
        done: list[tuple[PlannedRun, Outcome]] = []
        stale: list[bool | None] = []
        for run in self.result.runs:
            found = self._look(run)
            stale.append(found.stale)
            if found.outcome is not None:
                done.append((run, found.outcome))
            if found.flags is not None:
                self.queue.add(run)
            elif found.outcome is not None:
                self.result.outcomes[run.run_id] = found.outcome
        for study in {run.folder.parent for run in self.result.runs}:
            remove_left_over_locks(study, self.result.outcomes)
        self.display.found(self.result.outcomes)
        for note in stale_notes(stale, self.choices.keep_stale):
            self.display.line(note)
        if self.queue:
            for run, outcome in done:
                self.forecast.learn(run, outcome)

    def _look(self, run: PlannedRun) -> Found:
        return look(run, self.choices.retried, self.choices.force, self.choices.keep_stale)

    def _watch(self) -> None:
        """Heed signals, the sweep's time budget and the runs' time limit."""
        now, limit = time.monotonic(), self.choices.run_timeout_seconds
        if self.signals.count:
            if self.result.stopped != "signal":
                self.display.line("stopping: each run saves its state; a second signal ends them at once …")
            self._stop("signal")
        if self.signals.count > 1:
            for run_id in self.running:
                self.executor.stop(run_id, at_once=True)
        if self.deadline is not None and now >= self.deadline:
            self._stop("budget")
        queued = self.executor.queued()
        for run_id, attempt in self.running.items():
            if attempt.wait_or_begin(run_id in queued):
                self.display.started(attempt)
            if limit is not None and attempt.stopped is None and attempt.seconds > limit:
                attempt.stopped, attempt.time_limit = "timeout", limit
                self.executor.stop(run_id)

    def _stop(self, why: Stop, message: str | None = None) -> None:
        """Start nothing more, and ask what runs to save its state; a signal outranks all other reasons."""
        if self.result.stopped is None or why == "signal":
            self.result.stopped = why
        self.result.message = self.result.message or message
        for run_id, attempt in self.running.items():
            if attempt.stopped is None:
                attempt.stopped = "sweep"
                self.executor.stop(run_id)

    def _collect(self) -> None:
        """Judge what has ended."""
        for run_id, exit_status in self.executor.ended().items():
            attempt = self.running.pop(run_id)
            if attempt.queued and attempt.stopped is not None:  # it never began
                continue
            try:
                verdict = judge_child(attempt, exit_status)
            except Unwritable as error:
                self._stop("unwritable", str(error))
                verdict = Outcome("interrupted", "its end could not be recorded")
            if isinstance(verdict, Again):
                self._queue_again(attempt, verdict)
                continue
            self.result.outcomes[run_id] = verdict
            self.forecast.learn(attempt.task.run, verdict, attempt.seconds)
            self.display.ended(attempt.task.run, verdict, attempt)
            if verdict.failed and self.choices.fail_fast:
                self._stop("failure")

    def _queue_again(self, attempt: Attempt, verdict: Again) -> None:
        run = attempt.task.run
        if verdict.why == "busy":
            self.queue.add_busy(run)
            return
        self.display.line(
            f"{run.label}: it cannot go on ({verdict.message.rstrip('.')}), so it starts at the beginning; "
            f"its folder is kept as {run.run_id}.1 (or .2, …)"
        )
        self.queue.add_first(run, verdict.flags)

    def _fill(self) -> None:
        """Start runs while there are free slots."""
        try:
            while not self.result.stopped and len(self.running) < self.executor.slots:
                waiting = self.queue.next()
                if waiting is None:
                    break
                self._start(waiting)
            self.executor.submit()
        except Unwritable as error:
            self._stop("unwritable", str(error))
        except OSError as error:
            self._stop("unwritable", f"runs cannot be started: {error}")
        if not self.running and self.queue.nothing_fits:
            self._stop("budget")

    def _start(self, waiting: Waiting) -> None:
        run, flags = waiting.run, waiting.flags
        if flags is None:
            found = self._look(run)
            if found.flags is None and found.outcome is not None:  # another process has done it meanwhile
                self.result.outcomes[run.run_id] = found.outcome
                return
            flags = found.flags or ()
        log = run.folder.parent / ".logs" / f"{run.run_id}.log"
        task = Task(run, [*self.command(run), *flags], log)
        try:
            attempt = Attempt.begin(task, flags)
        except OSError as error:
            raise Unwritable(cannot_write(run.folder.parent, error)) from error
        try:
            self.executor.start(task)
        except OSError as error:
            raise Unwritable(f"run {run.label} cannot be started: {error}") from error
        self.running[run.run_id] = attempt
        attempt.queued = run.run_id in self.executor.queued()
        self.display.started(attempt)

    def _view(self) -> View:
        """Return what the table shows."""
        expected = [self.forecast.expected(waiting.run) for waiting in self.queue.waiting]
        for attempt in self.running.values():
            whole = self.forecast.expected(attempt.task.run)
            expected.append(None if whole is None else max(0.0, whole - attempt.seconds))
        known = [seconds for seconds in expected if seconds is not None]
        left = sum(known) / self.executor.slots if len(known) == len(expected) else None
        return View(list(self.running.values()), len(self.queue), self.result.outcomes, left)
