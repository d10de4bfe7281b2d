"""``python -m bench.tune``: find the largest batch that fits a memory budget."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import MemoryConfig, RunConfig, TuneConfig
from bench.help import Help
from bench.interruption import interruptible, keeping
from bench.screen import guard_screen
from gnnmoe.config import Refused

if TYPE_CHECKING:
    from bench.tune.find import Say
    from bench.tune.search import Trial
    from bench.tune.trials import Request

OF_A_RUN = ("control_memory", "micro_batch_size", "tune_fallback")  # flags that say how to train
ABOUT = Help(
    usual=(
        "coupler_type coupler_option preset data_dir batch_size max_seq_length num_experts embed_dim"
        " memory_budget memory_target fit_shape tune_max_seconds device precision"
    ).split(),
    examples=("--coupler HGNN --memory-budget 8GiB", "--preset baseline --fit-shape"),
)


@interruptible("the search keeps no answer.")
def main(argv: Sequence[str] | None = None) -> int:
    """Search for the config that the flags name; return the exit status."""
    guard_screen()
    config = parse(TuneConfig, argv, prog="python -m bench.tune", presets=True, about=ABOUT)
    show_warnings_plainly()
    try:
        memory = _switched_on(config.memory)
        return _search(replace(config, memory=replace(memory, tune_init=None)), memory.tune_init)
    except Refused as error:
        fail(str(error))


def _switched_on(memory: MemoryConfig) -> MemoryConfig:
    """Return the flags with the switch of a search, which the command itself stands for.

    Raises:
        Refused: a flag would do nothing here.
    """
    from bench.tune.find import refuse_wrong_flags

    given = [f"--{name.replace('_', '-')}" for name in OF_A_RUN if getattr(memory, name)]
    if given:
        raise Refused(
            f"bench.tune trains nothing, so that it does not use {' and '.join(given)}; "
            "drop it here, and give it to bench.run."
        )
    memory = replace(memory, tune_batch_size=memory.tune_batch_size or not memory.fit_shape)
    refuse_wrong_flags(memory)
    return memory


def _search(config: RunConfig, start: int | None) -> int:
    """Search and print the answer; ``start``: rows of the first trial, which may be any number."""
    from bench.device import keep_freed_memory
    from bench.training.ranks import ALONE
    from bench.tune.find import find, words_of
    from bench.tune.search import SearchFailed

    keep_freed_memory()
    console = Console(highlight=False)
    progress = Console(stderr=True, highlight=False, markup=False, quiet=config.places.quiet)

    def show_trial(trial: Trial) -> None:
        progress.print(f"  {trial.shape.rows} sequences: {trial.failure or 'fits'} ({trial.seconds:.1f} s)")

    fits = config.memory.fit_shape
    try:
        request = request_of(config, start, progress.print)
        found = find(request, ALONE, progress.print, None if fits else show_trial)
    except SearchFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    keeping("the search had ended; the same command shows its answer, or searches again.")
    if fits:
        progress.print(words_of(found))
        print_fit(found, console)
    else:
        print_sizes(found, config.training.batch_size, console)
    return 0


def request_of(config: RunConfig, start: int | None, say: Say) -> Request:
    """Return the search, after everything that a run with this config would be refused for."""
    from bench.data.corpus import say_unknown_words
    from bench.training.ranks import ALONE
    from bench.training.step import Execution
    from bench.tune.find import checked, request_for

    say("loading the data …")
    device = Execution.of(config).device
    found = checked(config, device)
    say_unknown_words(found.corpus.splits)
    samples = found.loaders["train"].sampler_obj.samples_in(0)
    say("trying batch sizes …")
    sizes = {"epoch_samples": samples, "any_size": not config.memory.fit_shape, "start": start}
    return request_for(config, found.model, found.corpus, device, ALONE, say=say, **sizes)


# --- The answer on the screen, in 80 columns

MIB = 2**20
SIZES_HEADINGS = ("size", "predicted\nMiB", "measured\nMiB", "tokens/s", "seconds")
SHAPES_HEADINGS = ("length", "sequences", "predicted\nMiB", "corrected\nMiB", "measured\nMiB")
ENDED = {"max_trials": "the trials ran out", "max_seconds": "the time ran out"}


def print_sizes(found: dict[str, Any], batch_size: int, console: Console) -> None:
    """Print the record of a search for a size: every trial, the limit, the knee, and how a batch is run."""
    table = _table(f"length {found['length']}, {_limit(found)}", SIZES_HEADINGS)
    for trial in found["trials"]:
        speed = trial["tokens_per_second"]
        marks = [name for name in ("largest", "knee") if found[name] == trial["size"]]
        table.add_row(
            f"{trial['size']:,}",
            *_peaks(trial, "predicted", "measured"),
            "–" if speed is None else f"{speed:,.0f}",
            f"{trial['seconds']:.1f}",
            _verdict(trial, *marks),
        )
    console.print(table)
    why = {"limit": "a larger size does not fit", "cap": "a larger size is not allowed", **ENDED}[
        found["stopped"]
    ]
    fitting = range(1, max(found["largest"], 1) + 1)
    micro = max(size for size in fitting if batch_size % size == 0)
    split = "whole" if micro == batch_size else f"as {batch_size // micro} micro-batches of {micro}"
    flag = "" if micro == batch_size else f" (--micro-batch-size {micro})"
    text = (
        f"largest size: {found['largest']:,} of at most {found['cap']:,}: {why}{_kept(found)}.\n"
        f"knee: {found['knee']:,}, the smallest size within 5% of the best tokens/s.\n"
        f"A batch of {batch_size} sequences runs {split}{flag}."
    )
    console.print(Text(text))


def print_fit(found: dict[str, Any], console: Console) -> None:
    """Print the record of a fit: every trial, the limit, and the flags that use the answer."""
    table = _table(_limit(found), SHAPES_HEADINGS)
    for trial in found["trials"]:
        peaks = _peaks(trial, "predicted", "expected", "measured")
        table.add_row(str(trial["length"]), str(trial["size"]), *peaks, _verdict(trial))
    console.print(table)
    why = {"limit": "the next size does not fit", "largest": "nothing larger is allowed", **ENDED}
    text = (
        f"length {found['length']}, micro-batches of {found['micro_batch_size']} for a batch of "
        f"{found['batch_size']}: "
        f"{why[found['stopped']]}{_kept(found)}.\nTo use it: --max-seq-length {found['length']} "
        f"--micro-batch-size {found['micro_batch_size']}, or --fit-shape with the same flags."
    )
    console.print(Text(text))


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, width=80
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("", overflow="fold", ratio=1)
    return table


def _limit(found: dict[str, Any]) -> str:
    limit, budget = _mib(found["limit_bytes"]), _mib(found["budget_bytes"])
    return f"limit {limit} MiB = {found['target']:.0%} of {budget} MiB, {found['device_name']}"


def _kept(found: dict[str, Any]) -> str:
    return " (from an earlier search)" if found["from_cache"] else ""


def _peaks(trial: dict[str, Any], *names: str) -> list[str]:
    return [_mib(trial[f"{name}_peak_bytes"]) for name in names]


def _verdict(trial: dict[str, Any], *marks: str) -> Text:
    if trial["failure"] is not None:
        return Text(f"✗ {trial['failure'].splitlines()[0]}", style="red")
    return Text(" ".join(["✓", *marks]), style="green")


def _mib(count: int | None) -> str:
    return "–" if count is None else f"{count / MIB:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
