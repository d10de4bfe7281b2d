"""``python -m bench.run``: check a coupler, train a model with it, measure and record it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from bench.cli import fail, parse, show_warnings_plainly, silent_but_on_the_first_rank
from bench.config import RunConfig
from bench.files import CANNOT_WRITE, NOT_WRITTEN, without_places
from bench.help import Help
from bench.interruption import INTERRUPTED, Interruption, interruptible, keeping, say
from bench.screen import guard_screen
from gnnmoe.config import Refused

if TYPE_CHECKING:
    from bench.record import Record
    from bench.run.prepare import Prepared
    from bench.run.progress import Reporter
    from bench.run.resume import Earlier
    from bench.run.session import Session
    from bench.training.ranks import Ranks

PROG = "python -m bench.run"
ABOUT = Help(
    usual=(
        "coupler_type coupler_option preset data_dir max_steps batch_size learning_rate seed num_experts"
        " study resume force"
    ).split(),
    examples=(
        "--coupler HGNN",
        "--coupler mean --max-steps 700 --seed 1 --study first",
        "--list    (all couplers, layers and strategies)",
    ),
)
EXIT_STATUS = {"ok": 0, "interrupted": INTERRUPTED}


@interruptible("the run had not begun.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run one configuration; return the exit status (0 ok, 2 wrong input, 74 not written, 130 stopped)."""
    guard_screen()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--list" in arguments:
        from bench.check.listing import print_list

        return print_list()
    with silent_but_on_the_first_rank():
        config = parse(RunConfig, arguments, prog=PROG, presets=True, about=ABOUT)
        show_warnings_plainly()
        with Interruption().installed() as interruption:
            return _run(config, shlex.join([*PROG.split(), *arguments]), interruption)


def _run(config: RunConfig, command: str, interruption: Interruption) -> int:
    from bench.training.ranks import Ranks, die_with_torchrun, watched

    try:
        ranks = Ranks.join(config.places.device, config.places.rank_timeout)
    except Refused as error:
        fail(str(error))
    die_with_torchrun(ranks)
    with watched(ranks):
        status = _run_on(ranks, config, command, interruption)
    if status == 0:
        ranks.leave()
    return status


def _run_on(ranks: Ranks, config: RunConfig, command: str, interruption: Interruption) -> int:
    from rich.console import Console

    from bench.device import keep_freed_memory
    from bench.report.summary import print_summary
    from bench.run.prepare import prepare
    from bench.run.progress import Reporter
    from bench.run.session import Session
    from gnnmoe.discovery import files_read_once

    keep_freed_memory()
    console = Console(highlight=False)
    reporter = Reporter(console, quiet=config.places.quiet)
    try:
        with ExitStack() as stack:
            stack.enter_context(files_read_once())
            prepared = ranks.in_turn(lambda: prepare(config, ranks))
            reporter.quiet = prepared.config.places.quiet
            record, earlier = ranks.from_first(lambda: _look(prepared, reporter, stack))
            drawn = record is not None and any((prepared.folder.path / "plots").glob("[!.]*"))
            if record is None:
                session = Session(prepared, without_places(command), reporter, interruption, earlier)
                ranks.from_first(session.begin)
                keeping("the run has begun; --resume continues it.")
                _announce(prepared, reporter)
                record = _run_session(session)
            keeping("the run has ended.")
            if prepared.config.places.plots and not drawn:  # it may have been killed while drawing
                _draw(prepared, reporter, record)
            interruption.over()
    except Refused as error:
        fail(str(error))
    print_summary(record, prepared.folder.path, console, again=command)
    if record.status == "interrupted" and CANNOT_WRITE in (record.error or ""):
        return NOT_WRITTEN
    return EXIT_STATUS.get(record.status, 1)


def _look(prepared: Prepared, reporter: Reporter, stack: ExitStack) -> tuple[Record | None, Earlier]:
    """Return the record of the run if it is finished, else what it goes on from.

    The run is locked until ``stack`` ends. Raises Refused where there is something to decide first.
    """
    from bench.run import resume

    resume.refuse_another_class(prepared)
    stack.enter_context(prepared.folder.locked())
    record, earlier = resume.finished_record(prepared, reporter), resume.NOTHING
    if record is None:
        earlier = resume.to_resume(prepared, reporter)
        resume.make_room(prepared, reporter)
    return record, earlier


def _announce(prepared: Prepared, reporter: Reporter) -> None:
    if prepared.corpus.warning:
        reporter.console.print(f"WARNING: {prepared.corpus.warning}", style="bold yellow", markup=False)


def _draw(prepared: Prepared, reporter: Reporter, record: Record) -> None:
    """Draw the plots; a run is no worse for plots that fail, or that a signal stops."""
    try:
        with reporter.phase("drawing"):
            from bench.report.plots.run import plot_run

            plot_run(prepared.folder.path)
    except Exception as error:
        print(f"note: the plots could not be drawn: {type(error).__name__}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        finished = "the run is finished; the same command draws its plots."
        say(
            finished if record.status == "ok" else f"the run stays {record.status}; its plots were not drawn."
        )


def _run_session(session: Session) -> Record:
    try:
        return session.run()
    except KeyboardInterrupt:
        return session.record


if __name__ == "__main__":
    sys.exit(main())
