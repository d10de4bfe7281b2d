"""One task on the machine that it was given to: a child process, its output, its signals.

Imports the standard library only, because Ray sends this file itself to its workers.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of prctl(2)
POLL_SECONDS = 0.1
Stamp = tuple[int, int]
ChildEnd = tuple[int, Stamp | None, list[int]]
"""A child's exit status (negative: a signal), its record's stamp as it was left, the signals that came."""


@dataclass(frozen=True)
class RemoteTask:
    """A task for another machine, which sees the same folders under the same names."""

    command: tuple[str, ...]
    variables: Mapping[str, str]
    cwd: Path
    log: Path
    begun: Path
    """An empty file that says that the task has begun."""
    record: Path
    record_before: Stamp | None
    """The record's stamp when the task was handed over."""

    def command_now(self) -> list[str]:
        """Return the command; where it had begun before (a requeued job), the command that goes on."""
        status = None
        if stamp(self.record) != self.record_before:
            with suppress(OSError, ValueError, KeyError, TypeError):
                status = json.loads(self.record.read_text())["status"]
        if status is None:
            return list(self.command)
        plain = [word for word in self.command if word not in ("--force", "--resume")]
        return [*plain, "--resume"] if status == "interrupted" else plain


def do(task: RemoteTask, asked_by: Sequence[int], grace_seconds: float) -> ChildEnd:
    """Do the task and return how it ended; called in the main thread.

    The first signal of ``asked_by`` is handed on as SIGTERM, once: a second signal would make a run leave
    without a checkpoint. A child that does not end within ``grace_seconds`` is killed.

    Raises:
        OSError: it cannot be started, or the folder of the results is not there.
    """
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in asked_by}
    child = None
    try:
        task.begun.touch()
        child = spawn(task.command_now(), task.log, task.variables, task.cwd)
        kill_at = None
        while child.poll() is None:
            if came and kill_at is None:
                child.send_signal(signal.SIGTERM)
                kill_at = time.monotonic() + grace_seconds
            if kill_at is not None and time.monotonic() > kill_at:
                kill_group(child.pid)
            time.sleep(POLL_SECONDS)
        return child.returncode, stamp(task.record), came
    finally:
        if child is not None:
            kill_group(child.pid)  # workers of its loader would hold the run's lock
        for number, handler in before.items():
            signal.signal(number, handler)


def spawn(
    command: Sequence[str], log: Path, variables: Mapping[str, str], cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own and add its output to ``log``; it is stopped if we die.

    Raises:
        OSError: it cannot be started, or its log cannot be written.
    """
    everything = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **variables}
    with log.open("ab") as output:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=everything,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_stop_with_parent(),
        )


def stamp(path: Path) -> Stamp | None:
    """Return what changes when a file is written anew, the same on all machines; None: no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def kill_group(leader: int) -> None:
    """Kill a child and what it started, on Linux also in sessions of their own, as torchrun starts them."""
    groups = {leader}
    for process in _descendants(leader):
        with suppress(ProcessLookupError):
            groups.add(os.getpgid(process))
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):  # macOS refuses where only a zombie is left
            os.killpg(group, signal.SIGKILL)


def _descendants(process: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for word in path.read_text().split():
                found += [int(word), *_descendants(int(word))]
    return found


def _stop_with_parent() -> Callable[[], None] | None:
    """Return what a child does before it becomes the run: ask for SIGTERM when its parent dies."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl = ctypes.CDLL(None).prctl
    except (AttributeError, OSError):
        return None
    parent = os.getpid()

    def prepare() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's own handler would swallow it
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return prepare
