"""``python -m bench.report STUDY``: judge a study: verdicts, tables, pictures, one page."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import Place, Several, flags
from bench.interruption import interruptible
from bench.screen import guard_screen
from gnnmoe.config import Refused

if TYPE_CHECKING:
    from rich.console import Console

    from bench.report.contents import Report

PROG = "python -m bench.report"
USAGE = f"""\
{PROG} STUDY         verdicts, tables, plots and one page of a study
{PROG} compare A B   two studies, configurations (STUDY:LABEL) or runs
{PROG} ls [STUDY]    the studies, or the runs of a study
{PROG} show ID       the record of one run
Each with --help."""


@flags
class ReportConfig:
    """Say which coupler is better, by how much and at what cost; write tables, plots and one page.

    Other commands, each with --help: compare A B (two studies, configurations STUDY:LABEL, or runs), ls
    (the studies, or the runs of a study), show ID (the record of a run). Exit status: 0 done; 1 --verify
    found a difference, or a seed of a configuration has several runs; 2 wrong input.
    """

    study: Annotated[str, tyro.conf.Positional]
    """A study's name, or the path of its folder."""
    results_dir: Place = Path("results")
    """Folder of all results."""
    baseline: str | None = None
    """Label of the baseline, the configuration with which all others are compared (default: the mean
    coupler)."""
    hypotheses: Place | None = None
    """File of hypotheses to answer (default: the hypotheses that the sweep kept)."""
    out: Place | None = None
    """Folder of the report (default: report, in the study's folder)."""
    allow_unequal: bool = False
    """Compare also runs that differ in evaluation, batch or length."""
    plots: bool = True
    """Draw the plots. Without plots, the plots of an earlier report in the folder are deleted."""
    columns: Annotated[Several, tyro.conf.arg(metavar="NAME")] = ()
    """A column of the LaTeX tables beside the names of the rows; may be given several times. Default: six
    columns that fit a paper."""
    verify: bool = False
    """Compute the existing report again from the records, and print where it differs."""
    page: Place | None = None
    """Instead of a report, write its table and answers into this Markdown page, between the study's marks."""
    image: Place | None = None
    """Instead of a report, write its picture of all perplexities to this file (.png or .svg)."""
    publish: Place | None = None
    """Instead of a report, copy the study into this new folder for publication. The copy has no checkpoints
    and no losses per token; it has the hash of every file, for --verify."""

    def __post_init__(self) -> None:
        if sum([self.verify, self.page is not None, self.image is not None, self.publish is not None]) > 1:
            raise Refused("--verify, --page, --image and --publish exclude each other; give one of them.")


@flags
class CompareConfig:
    """Compare B with A, paired by seed: what changed, and whether the change is larger than the noise.

    A side is a study (its name or path), a configuration (STUDY:LABEL) or a run (its id, the beginning of the
    id, or STUDY/ID). Exit status: 0 done; 1 a --fail-if holds or was not measured, or a seed of a
    configuration has several runs; 2 wrong input.
    """

    a: Annotated[str, tyro.conf.Positional]
    """The side to compare with."""
    b: Annotated[str, tyro.conf.Positional]
    """The side that is judged."""
    results_dir: Place = Path("results")
    """Folder of all results."""
    fail_if: Annotated[Several, tyro.conf.arg(metavar="CONDITION")] = ()
    """Exit with status 1 on this change from A to B: "perplexity > 1%" or "tokens/s < -5%". Other quantities:
    test_perplexity, memory, step_time, parameters. It tests the mean change over seeds, not whether the
    change is significant. May be given several times."""
    allow_unequal: bool = False
    """Compare also runs that differ in evaluation, batch or length."""


@flags
class ListConfig:
    """List the studies, or the runs of one study."""

    study: Annotated[str | None, tyro.conf.Positional] = None
    """A study's name, or the path of its folder."""
    results_dir: Place = Path("results")
    """Folder of all results."""


@flags
class ShowConfig:
    """Show the record of one run, as bench.run did at its end."""

    run_id: Annotated[str, tyro.conf.Positional]
    """The run's id, or the beginning of it, or STUDY/ID."""
    results_dir: Place = Path("results")
    """Folder of all results."""


@interruptible("files that were written stay; the same command writes all of them again.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of the first word; return the exit status."""
    guard_screen()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(USAGE, file=sys.stderr)
        return 2
    config_type, act = COMMANDS.get(arguments[0], (ReportConfig, report))
    name = f" {arguments.pop(0)}" if arguments[0] in COMMANDS else ""
    config = parse(config_type, arguments, prog=PROG + name)
    show_warnings_plainly()
    from rich.console import Console

    console = Console(highlight=False)
    try:
        return act(config, console)
    except Refused as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'a file'} cannot be used ({error.strerror}).")


def report(config: ReportConfig, console: Console) -> int:
    """Make, print and write a report; or verify one, write a page or an image, or publish the study."""
    from bench.files import not_linked_out
    from bench.study.runs import the_study

    path = the_study(config.study, config.results_dir)
    if config.publish is not None:
        from bench.report.publish import publish_study

        console.print(publish_study(path, config.publish), markup=False, soft_wrap=True)
        return 0
    folder = config.out or not_linked_out(path, "report")
    if config.verify:
        return _verify(config, path, folder, console)
    options = _options(config, path)
    with console.status("reading the records …"):
        made = _make(path, options)
    if config.page is not None or config.image is not None:
        from bench.report.contents import write_image, write_study

        if config.page is not None:
            write_study(config.page, made)
        if config.image is not None:
            write_image(config.image, made)
        for text in made.doubled():
            print(f"error: {text}", file=sys.stderr)
        return 1 if made.doubled() else 0
    from bench.report.files import OPTIONS, PAGE, SUMMARY, read_options, write_report
    from bench.report.terminal import print_report

    earlier = read_options(folder)["files"] if (folder / OPTIONS).is_file() else {}
    outdated = not config.plots and any(name.startswith("plots/") for name in earlier)
    with console.status("drawing and writing …"):
        write_report(made, options, folder, plots=config.plots)
    places = [f"page: {folder / PAGE}", f"tables, plots, {SUMMARY}: {folder}"]
    if not config.plots:
        places[1] = f"tables, {SUMMARY}: {folder}"
    if outdated:
        places.append("--no-plots deleted the plots of the earlier report, which may not fit these records.")
    print_report(made, console, places)
    return 1 if made.doubled() else 0


def _verify(config: ReportConfig, path: Path, folder: Path, console: Console) -> int:
    from bench.files import visible
    from bench.report.files import verify

    with console.status("recomputing …"):
        problems, what = verify(path, folder, lambda found: _make(path, found or _options(config, path)))
    lines = [f"differs: {problem}" for problem in problems]
    for line in (*lines, f"{'NOT verified' if problems else 'verified'}: {what}"):
        console.print(visible(line), markup=False, soft_wrap=True)
    return 1 if problems else 0


def _options(config: ReportConfig, path: Path) -> dict[str, Any]:
    """Return the options of a new report."""
    from bench.study.hypotheses import load_hypotheses, stated

    given = config.hypotheses
    try:
        hypotheses, when = stated(path) if given is None else (load_hypotheses(given), None)
    except Refused as error:
        if given is not None:
            raise
        warnings.warn(f"{error} The report is made without hypotheses.", stacklevel=2)
        hypotheses, when = [], None
    return {
        "baseline": config.baseline,
        "allow_unequal": config.allow_unequal,
        "stated": when,
        "hypotheses": hypotheses,
        "columns": config.columns,
    }


def _make(path: Path, options: dict[str, Any]) -> Report:
    from bench.report.contents import make_report
    from bench.study.runs import load_study

    study = load_study(path, options["allow_unequal"])
    columns = options["columns"]
    return make_report(study, options["baseline"], options["hypotheses"], options["stated"], columns)


def compare(config: CompareConfig, console: Console) -> int:
    """Compare two sides and check the limits."""
    from bench.report.compare import Limit, compare_sides, print_differences, read_side

    limits = [Limit.parse(text) for text in config.fail_if]
    first, second = (read_side(text, config.results_dir) for text in (config.a, config.b))
    compared = compare_sides(first, second, config.allow_unequal)
    print_differences(first, second, compared, console)
    failed = bool(limits and compared.missing) or bool(compared.doubled)
    for limit in limits:
        for difference in compared.differences:
            fails, why = limit.verdict(difference)
            failed |= fails
            console.print(f"{difference.candidate.label}: {why}", markup=False)
    return 1 if failed else 0


def list_studies(config: ListConfig, console: Console) -> int:
    """List the studies, or the runs of one study."""
    from bench.report.terminal import runs_listing, studies_listing
    from bench.study.runs import studies_in, the_study

    if config.study is not None:
        console.print(runs_listing(the_study(config.study, config.results_dir)))
        return 0
    found = studies_in(config.results_dir)
    if not found:
        raise Refused(f"{config.results_dir} holds no study; bench.run or bench.sweep makes one.")
    console.print(studies_listing(found, config.results_dir))
    return 0


def show(config: ShowConfig, console: Console) -> int:
    """Show the record of one run."""
    from bench.files import visible
    from bench.report.summary import print_summary
    from bench.study.labels import files_named
    from bench.study.runs import find_run

    run = find_run(config.run_id, config.results_dir)
    print_summary(run.record, run.folder, console)
    lines = [f"command: {run.record.command}"]
    if names := files_named(run.record.config):
        lines.append(f"A record keeps no absolute paths: start the command where {names} can be found.")
    for line in lines:
        console.print(visible(line), markup=False, highlight=False, soft_wrap=True)
    return 0


COMMANDS: dict[str, tuple[type, Any]] = {
    "compare": (CompareConfig, compare),
    "ls": (ListConfig, list_studies),
    "show": (ShowConfig, show),
}

if __name__ == "__main__":
    sys.exit(main())
