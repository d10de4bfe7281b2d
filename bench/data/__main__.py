"""``python -m bench.data``: measure the data loader (python -m bench.data profile)."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import Count, Length, Place, Workers, flags
from bench.interruption import interruptible
from bench.screen import guard_screen
from gnnmoe.config import Refused, unknown_name

if TYPE_CHECKING:
    from rich.table import Table

    from bench.data.profile import LoaderProfile

WIDTH = 80


@flags
class ProfileConfig:
    """Time the loader batch by batch, and compare the counts of an epoch with the expected counts.

    Exit status: 0 all as expected, 1 a count is wrong or fetching is too slow, 2 wrong input.
    """

    data_dir: Place | None = None
    """Folder with the text (default: GNNMOE_DATA_DIR, else as --data-source says)."""
    data_source: Literal["auto", "folder", "hub", "embedded"] = "auto"
    """Where the text comes from; auto: a folder, a local cache, the hub, else the embedded text."""
    batch_size: Count = 32
    """Samples in a batch."""
    max_seq_length: Length = 128
    """Tokens in a sample."""
    num_workers_dataloader: Workers = 0
    """Processes that load data (0: none; auto: half the cores, at most 4)."""
    batches: Count = 200
    """Batches to time."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"
    """Device to which each batch is copied; the copy is part of the measured time."""


@interruptible("a profile keeps nothing.")
def main(argv: Sequence[str] | None = None) -> int:
    """Profile the loader; print two tables and return the exit status."""
    guard_screen()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("python -m bench.data profile: how fast and how right the loader is; --help lists its flags")
        return 0 if arguments else 2
    if arguments[0] != "profile":
        fail(unknown_name("command of bench.data", arguments[0], ["profile"]))
    config = parse(ProfileConfig, arguments[1:], prog="python -m bench.data profile")
    show_warnings_plainly()
    from rich.console import Console

    try:
        profile, title = measure(config)
    except Refused as error:
        fail(str(error))
    console = Console(highlight=False)
    console.print(speed_table(profile, title))
    console.print(check_table(profile))
    return 0 if profile.passed else 1


def measure(config: ProfileConfig) -> tuple[LoaderProfile, str]:
    """Load the corpus and profile its loader; return the profile and a title that names what was profiled."""
    from bench.data.corpus import load_corpus, say_unknown_words
    from bench.data.profile import profile_loader
    from bench.device import resolve_device

    device = resolve_device(config.device)
    start = time.perf_counter()
    corpus = load_corpus(data_dir=config.data_dir, source=config.data_source)
    say_unknown_words(corpus.splits)
    profile = profile_loader(
        corpus,
        batch_size=config.batch_size,
        max_seq_length=config.max_seq_length,
        num_workers=config.num_workers_dataloader,
        batches=config.batches,
        device=device,
        corpus_seconds=time.perf_counter() - start,
    )
    size = f"B {config.batch_size}, L {config.max_seq_length}, workers {config.num_workers_dataloader}"
    return profile, f"{corpus.name} {corpus.config_name} ({corpus.source}), {size}, {device.type}"


def speed_table(profile: LoaderProfile, title: str) -> Table:
    """Return the table of times."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", width=WIDTH)
    table.add_column("fetching")
    table.add_column("", justify="right")
    table.add_row("preparing, s", f"{profile.prepare_seconds:,.2f}")
    table.add_row("batches timed", f"{len(profile.fetch_seconds):,}")
    for name, value in profile.milliseconds().items():
        table.add_row(f"{name} ms per batch", f"{value:,.3f}")
    table.add_row("tokens/s", f"{profile.tokens_per_second:,.0f}")
    return table


def check_table(profile: LoaderProfile) -> Table:
    """Return the table of expected and got."""
    from rich.table import Table

    table = Table(title="one epoch of each, counted from the tensors", title_justify="left", width=WIDTH)
    table.add_column("check")
    for heading in ("expected", "got"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for check in profile.checks:
        form = ",.3f" if check.at_most else ",d"
        verdict = "[green]✓" if check.passed else "[bold red]✗"
        table.add_row(
            check.name, "< " * check.at_most + format(check.expected, form), format(check.got, form), verdict
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
