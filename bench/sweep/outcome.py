"""What became of a run: what lies in its folder, what a child's end means, and writing it down.

torchrun ends with status 1 whatever ended its processes, and adds pages of its own to their output, with the
name of the host. So a run over several devices is judged as its first ended process.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bench.device import OUT_OF_MEMORY_OUTPUT
from bench.files import CANNOT_WRITE, NOT_WRITTEN, Busy, cannot_write, kind_of, utc_now
from bench.record import (
    BUSY,
    NOT_REACHED,
    STATUSES,
    Damaged,
    Environment,
    Record,
    RunFolder,
    Time,
    TimePart,
    is_measured,
    is_stale,
    not_measured,
)
from bench.sweep.executors.base import Task
from bench.sweep.plan import PlannedRun
from gnnmoe.config import Refused

FINAL = frozenset(STATUSES) - {"interrupted"}
TAIL_LINES, TAIL_CHARACTERS = 20, 2000
TELLING = re.compile(r"error: |status +\w+: |([\w.]+\.)?\w+(Error|Exception)\b")
ASKED_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TORCHRUN_LOG = re.compile(r"[IWE]\d{4} [\d:.]+ \d+ \S*torch/distributed/")
TORCHRUN_TRACEBACK = re.compile(r'  File ".*torch/distributed/run\.py", line \d+, in <module>')
ROOT_CAUSE, EXIT_CODE = "Root Cause (first observed failure):", re.compile(r"  exitcode  : (-?\d+) ")
SIGNAL = re.compile(r".*\bSignalException: Process \d+ got signal: (\d+)")
Stop = Literal["signal", "failure", "budget", "unwritable"]


class Unwritable(Exception):
    """The results folder cannot be written: no run can go on."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run: the status of its record, or ``refused``, and what to show of the record."""

    status: str
    error: str | None = None
    loss_nats: float | None = None
    """On validation, per token."""
    seconds: float | None = None
    """Of the whole run, where it is ok and was not resumed."""
    environment: Environment | None = field(default=None, compare=False, repr=False)

    @property
    def failed(self) -> bool:
        """Whether something is wrong that the next call of the sweep would not simply continue."""
        return self.status not in ("ok", "interrupted")


@dataclass
class SweepResult:
    """What became of all runs of a sweep."""

    runs: list[PlannedRun]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By run_id; a run that was never started has none."""
    stopped: Stop | None = None
    """Why the sweep ended before its last run: a signal, the first failure (where asked for), its time
    budget, or a results folder that cannot be written."""
    message: str | None = None
    """What could not be written."""
    left_for_budget: int = 0
    """Runs that were not started because they were not expected to end in time."""
    seconds: float = 0.0

    @property
    def counts(self) -> Counter[str]:
        """How many runs have each status; ``left`` counts the runs without a status."""
        return Counter(
            self.outcomes[run.run_id].status if run.run_id in self.outcomes else "left" for run in self.runs
        )

    @property
    def exit_status(self) -> int:
        """2: the results cannot be written; 130: a signal came; 1: a run failed; 0: all that ran is ok."""
        if self.stopped == "unwritable":
            return 2
        if self.stopped == "signal":
            return 130
        outcomes = self.outcomes.values()
        ended_by_others = self.stopped is None and any(found.status == "interrupted" for found in outcomes)
        return int(self.stopped == "failure" or ended_by_others or any(found.failed for found in outcomes))


# --- what lies in a folder ------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderState:
    """What lies in a run's folder, and the flags to start the run with; None: nothing is left to do."""

    outcome: Outcome | None
    flags: tuple[str, ...] | None
    stale: bool | None = False
    """Whether other code made the record; None: it does not say."""


def look(run: PlannedRun, retry: frozenset[str], force: bool, keep_stale: bool = False) -> FolderState:
    """Return what is to be done about a run: a finished or failed run stays, unless asked for again.

    An interrupted run is continued; ``retry`` holds the statuses that are run again. A run that other code
    made is run again from its beginning, unless ``keep_stale``.
    """
    record = folder_of(run).read_record()
    if record is None or _lacks_a_record(run.folder):  # or it was killed before its record
        return FolderState(None, ())
    outcome, status = outcome_of(record), record.status
    stale = is_stale(record, run.code)
    if force or status in retry or (stale and not keep_stale):
        return FolderState(outcome, ("--force",), stale)
    if status == "interrupted":
        return FolderState(outcome, ("--resume",), stale)
    allowed = status == "check_failed" and "--allow-failed-check" in run.arguments
    if allowed and isinstance(record, Record) and not is_measured(record.speed):  # it was not allowed then
        return FolderState(outcome, (), stale)
    return FolderState(outcome, None, stale)


def _lacks_a_record(folder: Path) -> bool:
    try:
        return kind_of(folder / "record.json") is None
    except Refused:  # it is damaged, as where links form a circle
        return False


def is_busy(run: PlannedRun) -> bool:
    """Whether another process works on the run: one started by hand, or a child of a killed sweep.

    Raises:
        Unwritable: the run's lock cannot be made.
    """
    try:
        with folder_of(run).locked():
            return False
    except Busy:
        return True
    except Refused as error:
        raise Unwritable(str(error)) from error


def remove_left_over_locks(study: Path, done: Container[str]) -> None:
    """Remove the locks of processes that were killed after their run was ``done``, as while drawing plots."""
    for lock in study.glob(".*.lock"):
        run_id = lock.name.removeprefix(".").removesuffix(".lock")
        if run_id in done:
            with suppress(Refused), RunFolder(study.parent, study.name, run_id).locked():
                pass


def outcome_of(record: Record | Damaged) -> Outcome:
    """Return what a record says of its run."""
    if isinstance(record, Damaged):
        return Outcome(record.status, record.why)
    scored = record.split()
    whole = record.status == "ok" and len(record.time.parts) < 2
    return Outcome(
        record.status,
        record.error and record.error.partition("\n")[0],
        loss_nats=None if scored is None else scored.loss_nats,
        seconds=record.time.seconds.get("total") if whole else None,
        environment=record.environment if is_measured(record.environment) else None,
    )


def written_at(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written anew; None: no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def folder_of(run: PlannedRun) -> RunFolder:
    """Return the folder of a run."""
    return RunFolder(run.folder.parent.parent, run.folder.parent.name, run.run_id)


# --- what a child's end means ---------------------------------------------------------------------


@dataclass(frozen=True)
class Again:
    """The child was refused for a reason that passes; start it again with these flags."""

    flags: tuple[str, ...]
    why: Literal["busy", "checkpoint"]
    message: str = ""
    """The words of the refusal."""


@dataclass
class Attempt:
    """One child of a run, from its start."""

    run: PlannedRun
    task: Task
    flags: tuple[str, ...]
    stopped: Literal["sweep", "timeout"] | None = None
    """Why the sweep asked it to end."""
    time_limit: float | None = None
    started: float = field(default_factory=time.monotonic)
    start: str = field(default_factory=utc_now)
    record_before: tuple[int, ...] | None = None
    log_before: int = 0
    queued: bool = False
    """Whether a cluster has not begun it."""

    def __post_init__(self) -> None:
        self.record_before = written_at(self.run.folder / "record.json")
        self.log_before = self.task.log.stat().st_size if self.task.log.exists() else 0

    @classmethod
    def begin(cls, run: PlannedRun, task: Task, flags: tuple[str, ...]) -> Attempt:
        """Write the command into the task's log; the child's output comes after it.

        Raises:
            OSError: the log cannot be written, so no record could be either.
        """
        task.log.parent.mkdir(exist_ok=True)
        with task.log.open("a") as log:
            log.write(f"{utc_now()} $ {shlex.join(task.command)}\n")
        return cls(run, task, flags)

    def wait_or_begin(self, queued: bool) -> bool:
        """Start the clock anew while the task waits in a cluster's queue; return whether it begins now."""
        if queued:
            self.started, self.start = time.monotonic(), utc_now()
        before, self.queued = self.queued, queued
        return before and not queued

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return time.monotonic() - self.started

    def output(self) -> list[str]:
        """Return the lines at the end of its output, up to 64 KiB of them."""
        with suppress(OSError), self.task.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self.log_before, end - 2**16))
            lines = file.read().decode(errors="replace").splitlines()
            return [line.rstrip() for line in lines if line.strip()]
        return []


def judge_child(attempt: Attempt, exit_status: int) -> Outcome | Again:
    """Return what a child's end means, and write it where the child could not write it itself.

    A record with a final status stays as it is. A run that the sweep, or anyone, asked to end stays
    interrupted. A run that its time limit ended is a time-out. A refused run (exit status 2) has no record.
    Every other end is a crash, or out of memory where its last lines say so.

    Raises:
        Unwritable: the run or its status cannot be written; the record stays as it was.
    """
    run = attempt.run
    record = folder_of(run).read_record()
    changed = written_at(run.folder / "record.json") != attempt.record_before
    if isinstance(record, Record) and record.status in FINAL and (changed or exit_status == 0):
        return outcome_of(record)
    exit_status, lines = as_one_process(exit_status, attempt.output())
    tail = lines[-TAIL_LINES:]
    if attempt.stopped == "sweep":
        return Outcome("interrupted", "stopped by the sweep")
    if attempt.stopped == "timeout":
        error = f"stopped after its time limit of {attempt.time_limit:g} s"
        return _written(attempt, "timeout", error, tail, changed)
    if exit_status == NOT_WRITTEN:
        said = record.error if isinstance(record, Record) and changed else None
        raise Unwritable(f"run {run.label}: {said or 'its results ' + CANNOT_WRITE + '.'}")
    if exit_status == 130 or -exit_status in ASKED_TO_END:
        return Outcome("interrupted", "stopped from outside")
    if exit_status == 2 and not changed:
        return _refused(attempt, tail)
    memory = [line for line in tail if any(text in line for text in OUT_OF_MEMORY_OUTPUT)]
    if memory:
        return _written(attempt, "oom", memory[-1], tail, changed)
    return _written(attempt, "crashed", _cause(exit_status, tail), tail, changed)


def _refused(attempt: Attempt, tail: Sequence[str]) -> Outcome | Again:
    starts = [number for number, line in enumerate(tail) if line.startswith("error: ")]
    message = " ".join(tail[starts[-1] :])[len("error: ") :] if starts else _cause(2, tail)
    if BUSY in message:
        return Again(attempt.flags, "busy")
    if CANNOT_WRITE in message:
        raise Unwritable(message)
    if "--resume" in attempt.flags:
        return Again(("--force",), "checkpoint", message)
    return Outcome("refused", message)


def _cause(exit_status: int, tail: Sequence[str]) -> str:
    if exit_status < 0:
        try:
            name = signal.Signals(-exit_status).name
        except ValueError:
            name = "unknown"
        perhaps = ", perhaps for memory" if -exit_status == signal.SIGKILL else ""
        return f"killed by signal {-exit_status} ({name}){perhaps}"
    if exit_status == 0:
        return "ended with exit status 0, but left no finished record under the planned run_id"
    telling = [line for line in tail if TELLING.match(line)] or tail  # the last line may be a path
    return telling[-1] if telling else f"ended with exit status {exit_status} and said nothing"


def _written(attempt: Attempt, status: str, error: str, tail: Sequence[str], begun: bool) -> Outcome | Again:
    """Write the status, the error and the last lines of output into the run's record and its log.

    ``begun``: the child wrote a record, so that its part of the run is the last part there.
    """
    run, store = attempt.run, folder_of(attempt.run)
    error = error[:TAIL_CHARACTERS]
    text = "\n".join(tail)[-TAIL_CHARACTERS:]
    in_record = f"{error}\nlast lines of its output:\n{text}" if len(tail) > 1 or text != error else error
    part = TimePart(
        command=shlex.join(attempt.task.command),
        start=attempt.start,
        end=utc_now(),
        seconds={"total": attempt.seconds},
        resumed_at_step=None,
    )
    try:
        _wait_for_the_dead(run)
        with store.locked():
            record = store.read_record()
            if isinstance(record, Record) and record.status == "interrupted":
                record.status, record.error = status, in_record
                record.time = Time.of(_parts(record.time.parts, part, begun))
                store.write_record(record)
            else:
                _create(store, _record_of_none(run, part, status, in_record))
            store.log(f"status {status}: {error}\nlast lines of its output:\n{text}")
    except OSError as failure:
        raise Unwritable(cannot_write(run.folder, failure)) from failure
    except Busy:  # what the child left behind goes on with it
        return Again(attempt.flags, "busy")
    except Refused as failure:
        raise Unwritable(str(failure)) from failure
    return Outcome(status, error)


def _parts(parts: Sequence[TimePart], part: TimePart, begun: bool) -> list[TimePart]:
    """Return the parts of an interrupted run with the child's own, which the child may have begun."""
    if not begun:
        return [*parts, part]
    seconds = parts[-1].seconds | part.seconds
    return [*parts[:-1], parts[-1].model_copy(update={"end": part.end, "seconds": seconds})]


def _record_of_none(run: PlannedRun, part: TimePart, status: str, error: str) -> Record:
    """Return the record of a run that died before it wrote one."""
    return Record(
        run_id=run.run_id,
        study=run.folder.parent.name,
        status=status,
        error=error,
        command=part.command,
        environment=not_measured(NOT_REACHED),
        time=Time.of([part]),
        tuned=not_measured("no search was asked for"),
        **run.known,
    )


def _create(store: RunFolder, record: Record) -> None:
    """Make the folder whole or not at all; an earlier folder is set aside, as the child would have done."""
    if kind_of(store.path) is not None:
        store.set_aside()
    try:
        store.create(record)
    except Refused:
        shutil.rmtree(store.path, ignore_errors=True)
        raise


def _wait_for_the_dead(run: PlannedRun, patience: float = 5.0) -> None:
    """Wait until what a dead child left behind has let go of the run's lock."""
    deadline = time.monotonic() + patience
    while is_busy(run) and time.monotonic() < deadline:
        time.sleep(0.05)


# --- torchrun -------------------------------------------------------------------------------------


def launcher(processes: int) -> tuple[str, ...]:
    """Return the command that starts a run of so many processes, without the flags of the run."""
    run = ("-m", "bench.run")
    if processes == 1:
        return (sys.executable, *run)
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    return (sys.executable, *torchrun, *run)


def as_one_process(exit_status: int, lines: Sequence[str]) -> tuple[int, list[str]]:
    """Return the exit status of the process that ended first, or of torchrun's own signal, and the output.

    Without torchrun, both stay as they are.
    """
    kept = [line for line in lines if not TORCHRUN_LOG.match(line)]
    starts = [number for number, line in enumerate(kept) if TORCHRUN_TRACEBACK.match(line)]
    if not starts:
        return exit_status, kept
    start = starts[-1]
    while start > 0 and not kept[start].startswith("Traceback (most recent call last):"):
        start -= 1
    kept, report = kept[:start], kept[start:]
    if (ended := [found for line in report if (found := SIGNAL.match(line))]) and exit_status == 1:
        return -int(ended[-1][1]), kept
    if ROOT_CAUSE in report and exit_status == 1:
        codes = [found for line in report[report.index(ROOT_CAUSE) :] if (found := EXIT_CODE.match(line))]
        return (int(codes[0][1]) if codes else exit_status), kept
    return exit_status, kept
