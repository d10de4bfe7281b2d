"""The work of a sweep: which run starts when, what ends it, and what is left. Everything is in the records.

Nothing is kept but the folders of the runs. So a sweep that was killed at any moment, even by kill -9,
goes on when it is called again: a finished run has its record; any other continues from its checkpoint.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console

from bench.config import seconds_of
from bench.files import Busy, cannot_write, lock
from bench.interruption import STOPPING, handling
from bench.record import Environment, stale_notes
from bench.sweep.executors.base import Executor, Task
from bench.sweep.live import Display
from bench.sweep.outcome import (
    Again,
    Attempt,
    FolderState,
    Outcome,
    Stop,
    SweepResult,
    Unwritable,
    is_busy,
    judge_child,
    launcher,
    look,
    remove_left_over_locks,
)
from bench.sweep.plan import PlannedRun
from bench.sweep.specification import SweepConfig
from bench.training.environment import device_name
from gnnmoe.config import Refused

POLL_SECONDS = 0.05
BUSY_SECONDS = 1.0
START_SECONDS = 5.0  # imports and plots, until a run of this sweep has shown what they take
FAILED = ("crashed", "diverged", "timeout", "check_failed", "damaged")
RETRIES = {
    None: frozenset(),
    "failed": frozenset(FAILED),
    "oom": frozenset({"oom"}),
    "all": frozenset({*FAILED, "oom"}),
}
Command = Callable[[PlannedRun], Sequence[str]]


def execute(
    runs: Sequence[PlannedRun],
    executor: Executor,
    config: SweepConfig,
    *,
    places: Sequence[str] = (),
    again: str = "the same command",
    console: Console | None = None,
    processes: int = 1,
    command: Command | None = None,
    before: Callable[[], object] = lambda: None,
) -> SweepResult:
    """Do all runs of the study ``config.study`` that are not done, in order; return what became of each.

    ``places`` are flags for every child: data folder, device, …. ``again`` is the command that goes on after
    an interruption. Each run has ``processes`` processes; ``command`` makes another child of a run.
    ``before`` is called before the first run, when no other sweep works on the study. After SIGINT or
    SIGTERM nothing more starts, and the children save their state; a second signal ends them at once.

    Raises:
        Refused: another sweep works on the study, or results cannot be written; nothing was started.
    """
    began = time.monotonic()
    result = SweepResult(list({run.run_id: run for run in runs}.values()))
    display = Display(console or Console(highlight=False), result, executor.slots)
    own = ["--results-dir", str(config.results_dir), "--study", str(config.study), *places, "--quiet"]
    command = command or (lambda run: [*launcher(processes), *run.arguments, *own])
    study = config.results_dir / str(config.study)
    with (
        closing(executor),
        signals_noted() as signals,
        sweep_lock(study, config.wait, display.line, lambda: bool(signals)) as held,
    ):
        if held:
            before()
            _RunningSweep(result, executor, config, command, display, signals, began).do()
        else:
            result.stopped = "signal"
    result.seconds = time.monotonic() - began
    display.summary(again)
    return result


@dataclass
class Waiting:
    """A run that waits for a slot."""

    run: PlannedRun
    flags: tuple[str, ...] | None = None
    """How to start it; None: as its folder says when its turn comes."""
    not_before: float = 0.0
    told: bool = False


class _RunningSweep:
    """The runs that wait, the running children, and the clock."""

    def __init__(
        self,
        result: SweepResult,
        executor: Executor,
        config: SweepConfig,
        command: Command,
        display: Display,
        signals: list[int],
        began: float,
    ) -> None:
        self.result, self.executor, self.config, self.command = result, executor, config, command
        self.display, self.signals = display, signals
        budget = seconds_of("time_budget", config.time_budget)
        self.deadline = None if budget is None else began + budget
        self.time_limit = seconds_of("run_timeout", config.run_timeout)
        self.forecast = Forecast()
        self.waiting: list[Waiting] = []
        self.running: dict[str, Attempt] = {}

    def do(self) -> None:
        """Work until nothing is left or something stops it; no child outlives this."""
        self._scan()
        try:
            with self.display.shown():
                while self.running or (self.waiting and not self.result.stopped):
                    self._watch()
                    self._collect()
                    self._fill()
                    running = list(self.running.values())
                    self.display.refresh(running, len(self.waiting), self._seconds_left)
                    time.sleep(POLL_SECONDS)
        finally:
            for run_id in self.running:
                self.executor.stop(run_id, at_once=True)
        if self.result.stopped == "budget":
            self.result.left_for_budget += len(self.waiting)

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
                self.waiting.append(Waiting(run))
            elif found.outcome is not None:
                self.result.outcomes[run.run_id] = found.outcome
        for study in {run.folder.parent for run in self.result.runs}:
            remove_left_over_locks(study, self.result.outcomes)
        self.display.found()
        for note in stale_notes(stale, self.config.keep_stale):
            self.display.line(note)
        if self.waiting:
            for run, outcome in done:
                self.forecast.learn(run, outcome)

    def _look(self, run: PlannedRun) -> FolderState:
        return look(run, RETRIES[self.config.retry], self.config.force, self.config.keep_stale)

    def _watch(self) -> None:
        """Heed signals, the sweep's time budget and the runs' time limit."""
        if self.signals:
            if self.result.stopped != "signal":
                self.display.line(
                    "stopping: each run saves its state; a second signal stops them immediately …"
                )
            self._stop("signal")
        if len(self.signals) > 1:
            for run_id in self.running:
                self.executor.stop(run_id, at_once=True)
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self._stop("budget")
        queued = self.executor.queued()
        for run_id, attempt in self.running.items():
            if attempt.wait_or_begin(run_id in queued):
                self.display.started(attempt)
            over = self.time_limit is not None and attempt.seconds > self.time_limit
            if over and attempt.stopped is None:
                attempt.stopped, attempt.time_limit = "timeout", self.time_limit
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
                verdict = Outcome("interrupted", str(error))
            if isinstance(verdict, Again):
                self._queue_again(attempt, verdict)
                continue
            self.result.outcomes[run_id] = verdict
            self.forecast.learn(attempt.run, verdict, attempt.seconds)
            self.display.ended(attempt, verdict)
            if verdict.failed and self.config.fail_fast:
                self._stop("failure")

    def _queue_again(self, attempt: Attempt, verdict: Again) -> None:
        run = attempt.run
        if verdict.why == "busy":
            self.waiting.append(Waiting(run, not_before=time.monotonic() + BUSY_SECONDS))
            return
        self.display.line(
            f"{run.label}: it cannot go on ({verdict.message.rstrip('.')}), so it starts at the beginning; "
            f"its folder is kept as {run.run_id}.1 (or .2, …)"
        )
        self.waiting.insert(0, Waiting(run, verdict.flags))

    def _fill(self) -> None:
        """Start runs while there are free slots."""
        try:
            while not self.result.stopped and len(self.running) < self.executor.slots:
                waiting = self._next()
                if waiting is None:
                    break
                self._start(waiting)
            self.executor.submit()
        except Unwritable as error:
            self._stop("unwritable", str(error))
        except OSError as error:
            self._stop("unwritable", f"runs cannot be started: {error}")
        now = time.monotonic()
        if self.waiting and not self.running and not any(self._fits(one.run, now) for one in self.waiting):
            self._stop("budget")

    def _next(self) -> Waiting | None:
        """Take the first run that may start and is expected to end before the deadline; None: no such run.

        Raises:
            Unwritable: a run's lock cannot be made.
        """
        now = time.monotonic()
        for place, waiting in enumerate(self.waiting):
            if waiting.not_before > now or not self._fits(waiting.run, now):
                continue
            if is_busy(waiting.run):
                waiting.not_before = now + BUSY_SECONDS
                if not waiting.told:
                    self.display.line(f"{waiting.run.label}: another process runs it; waiting for its end")
                waiting.told = True
                continue
            return self.waiting.pop(place)
        return None

    def _fits(self, run: PlannedRun, now: float) -> bool:
        """Whether a run is expected to end before the deadline; a run of which nothing is known is."""
        return self.deadline is None or now + (self.forecast.expected(run) or 0.0) <= self.deadline

    def _start(self, waiting: Waiting) -> None:
        run, flags = waiting.run, waiting.flags
        if flags is None:
            found = self._look(run)
            if found.flags is None and found.outcome is not None:  # another process has done it meanwhile
                self.result.outcomes[run.run_id] = found.outcome
                return
            flags = found.flags or ()
        log = run.folder.parent / ".logs" / f"{run.run_id}.log"
        task = Task(run.run_id, [*self.command(run), *flags], log, run.folder)
        try:
            attempt = Attempt.begin(run, task, flags)
        except OSError as error:
            raise Unwritable(cannot_write(run.folder.parent, error)) from error
        try:
            self.executor.start(task)
        except OSError as error:
            raise Unwritable(f"run {run.label} cannot be started: {error}") from error
        self.running[run.run_id] = attempt
        attempt.queued = run.run_id in self.executor.queued()
        self.display.started(attempt)

    def _seconds_left(self) -> float | None:
        """Return how long the rest is expected to take; None where that is not known of every run."""
        expected = [self.forecast.expected(waiting.run) for waiting in self.waiting]
        for attempt in self.running.values():
            whole = self.forecast.expected(attempt.run)
            expected.append(None if whole is None else max(0.0, whole - attempt.seconds))
        known = [seconds for seconds in expected if seconds is not None]
        return sum(known) / self.executor.slots if len(known) == len(expected) else None


# --- how long a run takes -------------------------------------------------------------------------


class Forecast:
    """Expects how long a run takes: cost × the median of (seconds per cost), or the median of the seconds.

    It learns from the runs of the study that this machine has finished.
    """

    def __init__(self) -> None:
        self._rates: list[float] = []
        self._durations: list[float] = []
        self._around: list[float] = []
        self._medians: list[float | None] = []

    def learn(self, run: PlannedRun, outcome: Outcome, elapsed: float | None = None) -> None:
        """Learn from a run that ended; ``elapsed`` is the time of its process, if it is ours."""
        if outcome.seconds is None or (elapsed is None and not made_here(outcome.environment)):
            return
        self._medians = []
        self._durations.append(outcome.seconds)
        if run.cost:
            self._rates.append(outcome.seconds / run.cost)
        if elapsed is not None:
            self._around.append(max(0.0, elapsed - outcome.seconds))

    def expected(self, run: PlannedRun) -> float | None:
        """Return the seconds that the run's process is expected to take, None where nothing is known."""
        if not self._medians:
            lists = self._rates, self._durations, self._around
            self._medians = [statistics.median(values) if values else None for values in lists]
        rate, duration, around = self._medians
        around = START_SECONDS if around is None else around
        if run.cost and rate is not None:
            return run.cost * rate + around
        return None if duration is None else duration + around


def made_here(environment: Environment | None) -> bool:
    """Whether a record may come from this machine: a record has no host name, by design."""
    system = f"{platform.system()} {platform.machine()}"
    if environment is None or (environment.cpu_cores, environment.system) != (os.cpu_count(), system):
        return False
    if environment.device_type != "cpu":  # asking a GPU for its name would start CUDA here
        return True
    return environment.device_name == _processor()


@cache
def _processor() -> str:
    return device_name(torch.device("cpu"))


# --- one sweep for one study, and its signals -----------------------------------------------------


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Yield the list of SIGINT, SIGTERM and SIGHUP that came; outside the main thread none is noted."""
    came: list[int] = []
    with handling(STOPPING, lambda number, _: came.append(number)):
        yield came


@contextmanager
def sweep_lock(
    study: Path, wait: bool, tell: Callable[[str], None], given_up: Callable[[], bool]
) -> Iterator[bool]:
    """Keep every other sweep out of the study's folder while the block lasts; the kernel frees a dead lock.

    Yields False where ``given_up`` became true while it waited.

    Raises:
        Busy: another sweep works on the study, and ``wait`` is False.
        Refused: the folder cannot be written.
    """
    path = study / ".sweep.lock"
    try:
        study.mkdir(parents=True, exist_ok=True)
        held = lock(path)
        if held is None:
            message = f"another sweep{_holder(path)} is at {study}"
            if not wait:
                raise Busy(f"{message}; wait for it to end, or pass --wait.")
            tell(f"{message}; waiting for it to end …")
            held = lock(path, given_up)
    except OSError as error:
        raise Refused(cannot_write(study, error)) from error
    if held is None:
        yield False
        return
    with suppress(OSError):  # a full disk; the name of the holder is a courtesy
        path.write_text(str(os.getpid()))
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        held.release()


def _holder(lock_file: Path) -> str:
    with suppress(OSError):  # the holder may have left just now, with its file
        text = lock_file.read_text(errors="replace").strip()
        return f" (process {text})" if text.isdigit() else ""
    return ""
