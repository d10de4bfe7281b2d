"""The plan of a sweep as a table: what there is to do, what it costs, and what is there already."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.device import cpu_threads, format_bytes
from bench.measure.predict import CannotPredict
from bench.record import stale_notes
from bench.sweeps.live import time_words
from bench.sweeps.matching import Match
from bench.sweeps.plan import Configuration, Plan
from bench.sweeps.weighing import threads_of_a_run

MOST_ROWS = 40
DONE = ("ok", "check_failed")
COMPILED_PEAK = "peaks are of uncompiled steps; compiled ones took up to 1.8 times that on a GPU"


def show_plan(plan: Plan, match: Match | None, console: Console, keep_stale: bool = False) -> None:
    """Print the plan in at most 80 columns; stale runs are to be done again, unless ``keep_stale``."""
    seeds = f"{len(plan.seeds)} seed{'s' * (len(plan.seeds) > 1)}"
    title = f"{plan.study}: {len(plan.configurations)} configurations × {seeds}"
    table = Table(title=title, title_justify="left", width=80, box=None, padding=(0, 1, 0, 0))
    table.add_column("configuration", overflow="fold", ratio=1)
    headings = ["parameters", "FLOPs a token", *(["off by"] if match else []), "done", "left"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for configuration in plan.configurations[:MOST_ROWS]:
        table.add_row(*_row(configuration, match, keep_stale))
    console.print(table)
    if len(plan.configurations) > MOST_ROWS:
        console.print(f"… and {len(plan.configurations) - MOST_ROWS:,} more")
    statuses = [status for found in plan.configurations for status in found.ended(keep_stale)]
    done = sum(status in DONE for status in statuses)
    failed = sum(status not in (None, "interrupted", *DONE) for status in statuses)
    console.print(
        f"{len(plan.runs):,} runs: {done:,} done, {failed:,} failed, {len(plan.runs) - done - failed:,} to do"
    )
    for note in stale_notes([one for found in plan.configurations for one in found.stale], keep_stale):
        console.print(note)
    needed, comparisons = plan.seeds_needed(), max(1, len(plan.configurations) - 1)
    if len(plan.configurations) > 1:
        enough = "enough" if len(plan.seeds) >= needed else f"NOT enough: {len(plan.seeds)} given"
        others = f"{comparisons} other{'s' * (comparisons > 1)}"
        console.print(f"one against the {others} at p ≤ 0.05 takes {needed} paired seeds ({enough})")


def _row(configuration: Configuration, match: Match | None, keep_stale: bool) -> list[str]:
    model, per_token = configuration.model, configuration.flops_per_token
    done = sum(status in DONE for status in configuration.ended(keep_stale))
    cells = [
        configuration.label,
        f"{model.params:,}",
        "?" if per_token is None else f"{per_token / 1e6:,.2f} M",
    ]
    if match is not None and configuration.off_by is not None:
        cells.append(f"{100 * configuration.off_by:+.2f} %")
    return [*cells, str(done), str(len(configuration.runs) - done)]


def show_expected(plan: Plan, console: Console) -> None:
    """Print what one run of each configuration will take here, in at most 80 columns.

    The memory is predicted. The time is that of the training alone: its steps × a step, the median of
    three that are run now, one configuration after another, with the threads that a run has.
    """
    title = "one run here: peak memory predicted, training = steps × a step measured now"
    table = Table(title=title, title_justify="left", width=80, box=None, padding=(0, 1, 0, 0))
    table.add_column("configuration", overflow="fold", ratio=1)
    for heading in ("peak memory", "a step", "steps", "training"):
        table.add_column(heading, justify="right", no_wrap=True)
    total, shown = 0.0, plan.configurations[:MOST_ROWS]
    for number, configuration in enumerate(shown, 1):
        with console.status(f"{number} of {len(shown)}: {configuration.label} …"):
            memory, seconds = expected(configuration)
        steps = configuration.runs[0].steps or 0
        total += steps * seconds * len(configuration.runs)
        table.add_row(
            configuration.label, memory, f"{1e3 * seconds:,.0f} ms", f"{steps:,}", time_words(steps * seconds)
        )
    console.print(table)
    if any(configuration.training.config.execution.compile for configuration in shown):
        console.print(COMPILED_PEAK)
    rest = "" if len(shown) == len(plan.configurations) else f" of these {len(shown)} configurations"
    console.print(f"the training of all runs{rest}, one after another: about {time_words(total)}")


def expected(configuration: Configuration) -> tuple[str, float]:
    """Return the predicted peak, as shown, and the seconds of a step, measured with a run's threads."""
    training = configuration.training
    try:
        memory = format_bytes(training.peak_bytes())
    except CannotPredict:
        memory = "?"
    with cpu_threads(threads_of_a_run(training.device)):
        return memory, training.step_seconds()
