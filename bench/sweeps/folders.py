"""What lies in a run's folder, and what is to be done about it."""

from __future__ import annotations

from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.files import Busy
from bench.record import STATUSES, Damaged, Record, RunFolder, is_measured, is_stale
from bench.sweeps.executor import Outcome, PlannedRun
from gnnmoe.config import Refused

FINAL = frozenset(STATUSES) - {"interrupted"}


class Unwritable(Exception):
    """The results folder cannot be written: no run can go on."""


@dataclass(frozen=True)
class Found:
    """What lies in a run's folder, and the flags to start it with; None: nothing is left to do."""

    outcome: Outcome | None
    flags: tuple[str, ...] | None
    stale: bool | None = False
    """Whether other code made the record; None: it does not say."""


def look(run: PlannedRun, retry: frozenset[str], force: bool, keep_stale: bool = False) -> Found:
    """Return what is to be done about a run: finished and failed ones stay, unless asked for again.

    An interrupted run is continued; ``retry`` holds the statuses that are run again. A run that other code
    made is run again from its beginning, unless ``keep_stale``.
    """
    record = folder_of(run).read_record()
    if record is None or not (run.folder / "record.json").exists():  # or it was killed before its record
        return Found(None, ())
    outcome, status = outcome_of(record), record.status
    stale = is_stale(record, run.code)
    if force or status in retry or (stale and not keep_stale):
        return Found(outcome, ("--force",), stale)
    if status == "interrupted":
        return Found(outcome, ("--resume",), stale)
    allowed = status == "check_failed" and "--allow-failed-check" in run.arguments
    if allowed and isinstance(record, Record) and not is_measured(record.speed):  # not allowed then
        return Found(outcome, (), stale)
    return Found(outcome, None, stale)


def is_busy(run: PlannedRun) -> bool:
    """Whether another process is at the run: one started by hand, or a killed sweep's that is ending.

    Raises:
        Unwritable: its lock cannot be made.
    """
    try:
        with folder_of(run).locked():
            return False
    except Busy:
        return True
    except Refused as error:
        raise Unwritable(str(error)) from error


def remove_left_over_locks(study: Path, done: Container[str]) -> None:
    """Remove the locks of processes that were killed when their run was ``done``, as while drawing plots."""
    for lock in study.glob(".*.lock"):
        run_id = lock.name.removeprefix(".").removesuffix(".lock")
        if run_id in done:
            with suppress(Refused), RunFolder(study.parent, study.name, run_id).locked():
                pass


def outcome_of(record: Record | Damaged) -> Outcome:
    """Return what is worth knowing of a record."""
    if isinstance(record, Damaged):
        return Outcome(record.status, "record.json cannot be read")
    scored = record.split()
    whole = record.status == "ok" and len(record.time.parts) < 2
    return Outcome(
        record.status, record.error and record.error.partition("\n")[0],
        None if scored is None else scored.loss_nats,
        record.time.seconds.get("total") if whole else None,
        record.environment if is_measured(record.environment) else None,
    )  # fmt: skip


def written_at(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written anew, None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def folder_of(run: PlannedRun) -> RunFolder:
    """Return the run's folder as the store sees it."""
    return RunFolder(run.folder.parent.parent, run.folder.parent.name, run.run_id)
