"""``python -m bench.run``: check a coupler, train a model with it, measure it, record it."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import RunConfig

if TYPE_CHECKING:
    from bench.prepare import Prepared
    from bench.progress import Reporter
    from bench.records.schema import Record

PROG = "python -m bench.run"
EXIT_STATUS = {"ok": 0, "interrupted": 130}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one configuration; return the exit status (0 ok, 2 wrong input, 130 stopped, else 1)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config = parse(RunConfig, arguments, prog=PROG, presets=True)
    show_warnings_plainly()
    try:
        with _termination_as_interrupt():
            return _run(config, shlex.join([*PROG.split(), *arguments]))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_STATUS["interrupted"]


def _run(config: RunConfig, command: str) -> int:
    from rich.console import Console

    from bench.analysis.summary import print_summary
    from bench.device import keep_freed_memory
    from bench.prepare import prepare
    from bench.progress import Reporter

    keep_freed_memory()
    console = Console(highlight=False)
    reporter = Reporter(console, quiet=config.places.quiet)
    try:
        prepared = prepare(config)
        with prepared.folder.locked():
            record = _finished(prepared, reporter) or _new(prepared, command, reporter)
    except ValueError as error:
        fail(str(error))
    print_summary(record, prepared.folder.path, console)
    return EXIT_STATUS.get(record["status"], 1)


def _finished(prepared: Prepared, reporter: Reporter) -> Record | None:
    """Return the record of a run that is finished; set anything else that is there aside."""
    from bench.measure.environment import code_sha256
    from bench.measure.quantity import is_measured

    record, config = prepared.folder.read_record(), prepared.config
    if record is None:
        return None
    allowed = record["status"] == "gate_failed" and config.measure.allow_failed_gate
    finished = record["status"] == "ok" or (allowed and is_measured(record["speed"]))
    if finished and not config.places.force:
        reporter.console.print(f"run {prepared.run_id} is finished; --force runs it again. Its record:")
        if record["environment"]["code_sha256"] != code_sha256(config.model.coupler_type):
            reporter.console.print("note: it was made with another state of the code", markup=False)
        return record
    kept = prepared.folder.set_aside()
    reporter.line(f"an earlier record ({record['status']}) is kept at {kept}")
    return None


def _new(prepared: Prepared, command: str, reporter: Reporter) -> Record:
    from bench.session import Session

    session = Session(prepared, command, reporter)
    session.begin()
    if prepared.corpus.warning:
        reporter.console.print(f"WARNING: {prepared.corpus.warning}", style="bold yellow", markup=False)
    notes = [getattr(loader.dataset, "note", None) for loader in prepared.loaders.values()]
    for note in dict.fromkeys(note for note in notes if note):
        reporter.line(f"note: {note}")
    try:
        return session.run()
    except KeyboardInterrupt:
        return session.record


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does: with its record written."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
