"""``python -m bench.run``: check a coupler, train a model with it, measure it, record it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import RunConfig

PROG = "python -m bench.run"
EXIT_STATUS = {"ok": 0, "interrupted": 130}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one configuration; return the exit status (0 ok, 2 wrong input, 130 stopped, else 1)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config = parse(RunConfig, arguments, prog=PROG)
    show_warnings_plainly()

    from rich.console import Console

    from bench.analysis.summary import print_summary
    from bench.device import keep_freed_memory
    from bench.prepare import prepare
    from bench.progress import Reporter
    from bench.session import Session

    keep_freed_memory()
    console = Console(highlight=False)
    reporter = Reporter(console, quiet=config.places.quiet)
    try:
        prepared = prepare(config)
        finished = prepared.folder.read_record()
        if finished is not None and finished["status"] == "ok" and not config.places.force:
            console.print(f"run {prepared.run_id} is finished; this is its record (--force runs it again)")
            print_summary(finished, prepared.folder.path, console)
            return 0
        if finished is not None:
            reporter.line(
                f"an earlier record ({finished['status']}) is kept at {prepared.folder.set_aside()}"
            )
        session = Session(prepared, shlex.join([*PROG.split(), *arguments]), reporter)
        _announce(prepared, reporter)
    except ValueError as error:
        fail(str(error))
    try:
        record = session.run()
    except KeyboardInterrupt:
        record = session.record
    print_summary(record, prepared.folder.path, console)
    return EXIT_STATUS.get(record["status"], 1)


def _announce(prepared, reporter) -> None:
    warning = prepared.corpus.warning
    if warning:
        reporter.console.print(f"WARNING: {warning}", style="bold yellow", markup=False)
    for loader in prepared.loaders.values():
        if loader.dataset.note and not loader.dataset.note.startswith("test"):
            reporter.line(f"note: {loader.dataset.note}")


if __name__ == "__main__":
    sys.exit(main())
