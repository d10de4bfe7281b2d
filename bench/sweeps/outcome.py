"""What a child's end means for its record, and writing it where the child could not."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from bench.device import OUT_OF_MEMORY_OUTPUT
from bench.files import Busy, cannot_write, utc_now
from bench.record import BUSY, NOT_REACHED, Record, RunFolder, Time, TimePart, not_measured
from bench.sweeps.executor import Outcome, PlannedRun, Task
from bench.sweeps.folders import FINAL, Unwritable, folder_of, is_busy, outcome_of, written_at
from bench.sweeps.torchrun import as_one_process
from gnnmoe.config import Refused

TAIL_LINES, TAIL_CHARACTERS = 20, 2000
TELLING = re.compile(r"error: |status +\w+: |([\w.]+\.)?\w+(Error|Exception)\b")
ASKED_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
        self.record_before = written_at(self.task.run.folder / "record.json")
        self.log_before = self.task.log.stat().st_size if self.task.log.exists() else 0

    @classmethod
    def begin(cls, task: Task, flags: tuple[str, ...]) -> Attempt:
        """Write the command into the task's log; a child's output is what comes after it.

        Raises:
            OSError: the log cannot be written, so no record could be either.
        """
        task.log.parent.mkdir(exist_ok=True)
        with task.log.open("a") as log:
            log.write(f"{utc_now()} $ {shlex.join(task.command)}\n")
        return cls(task, flags)

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
    interrupted. One that its own time limit ended is a time-out; one that was refused (exit status 2)
    has no record; every other end is a crash, or out of memory where its last lines say so.

    Raises:
        Unwritable: the status cannot be written; the record stays as it was.
    """
    run = attempt.task.run
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
    telling = [line for line in tail if TELLING.match(line)] or tail  # the last one may be a path
    return telling[-1] if telling else f"ended with exit status {exit_status} and said nothing"


def _written(attempt: Attempt, status: str, error: str, tail: Sequence[str], begun: bool) -> Outcome | Again:
    """Write the status, the error and the last lines of output into the run's record and its log.

    ``begun``: the child wrote a record, so that its part of the run is the last one in it.
    """
    run, store = attempt.task.run, folder_of(attempt.task.run)
    error = error[:TAIL_CHARACTERS]
    text = "\n".join(tail)[-TAIL_CHARACTERS:]
    in_record = f"{error}\nlast lines of its output:\n{text}" if len(tail) > 1 or text != error else error
    part = TimePart(command=shlex.join(attempt.task.command), start=attempt.start, end=utc_now(),
                    seconds={"total": attempt.seconds}, resumed_at_step=None)  # fmt: skip
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
        run_id=run.run_id, study=run.folder.parent.name, status=status, error=error, command=part.command,
        environment=not_measured(NOT_REACHED), time=Time.of([part]),
        tuned=not_measured("no search was asked for"), **run.known,
    )  # fmt: skip


def _create(store: RunFolder, record: Record) -> None:
    """Make the folder whole or not at all; an earlier one is set aside, as a child would have done."""
    if store.path.exists():
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
