"""``python -m bench.check --coupler NAME``: proof that a coupler leaks nothing, and what it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import ModelConfig, flags
from gnnmoe.config import Refused

if TYPE_CHECKING:
    from rich.console import Console

    from bench.portrait import Portrait
    from bench.portrait.show import CheckedCoupler
    from gnnmoe.config import GNNMoEConfig

ANY_VOCABULARY = 64  # the leak check's models are small; no coupler sees the vocabulary


@flags
class CheckConfig:
    """Check on small tensors that a coupler leaks nothing and computes what it says, and say what it is.

    Exit status: 0 passed, 1 a check failed or the FLOPs formula is wrong, 2 wrong input.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 0
    """Seed of the numbers that the checks draw."""
    all: bool = False
    """Check every coupler, and HGNN at each conv type (on all_pairs) and each strategy (at HypergraphConv),
    whatever the flags say of those two; the coupler named too, if it is another."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the coupler that the flags name, or all; print the verdicts and return the exit status."""
    config = parse(CheckConfig, argv, prog="python -m bench.check", presets=True)
    show_warnings_plainly()
    from rich.console import Console

    from bench.device import is_out_of_memory
    from bench.gate import refuse_wrong_names, run_gate
    from bench.portrait.show import CheckedCoupler, show_portrait

    model = config.model.resolved(ANY_VOCABULARY)
    console = Console(highlight=False)
    if config.all:
        return check_all(model, config.seed, console)
    try:
        refuse_wrong_names(model)
    except Refused as error:
        fail(str(error))
    try:
        report = run_gate(model, seed=config.seed)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fail("memory ran out, so nothing is known of the coupler; check it at a smaller width or length.")
    row = CheckedCoupler(model.coupler_type, report, portrait_or_reason(model, config.seed))
    show(row, model, console)
    show_portrait(row.portrait, console)
    return 0 if row.passed else 1


def check_all(model: GNNMoEConfig, seed: int, console: Console) -> int:
    """Check every coupler at the sizes of ``model``; print one table and return the exit status."""
    from rich.console import Console

    from bench.gate import refuse_wrong_hypergraph, run_gate
    from bench.portrait import list_couplers
    from bench.portrait.show import CheckedCoupler, show_all

    try:
        refuse_wrong_hypergraph(model)  # names that the flags give, and no entry has
        entries, left_out = list_couplers(model)
    except Refused as error:
        fail(str(error))
    rows: list[CheckedCoupler] = []
    with Console(stderr=True).status("checking …") as status:
        for number, entry in enumerate(entries, start=1):
            status.update(f"checking {entry.name} ({number} of {len(entries)}) …")
            report = run_gate(entry.config, seed=seed)
            rows.append(CheckedCoupler(entry.name, report, portrait_or_reason(entry.config, seed)))
    show_all(rows, left_out, console)
    return 0 if all(row.passed for row in rows) else 1


def portrait_or_reason(model: GNNMoEConfig, seed: int) -> Portrait | str:
    """Return the portrait, or one line that says why there is none: a stranger's coupler may raise."""
    from bench.gate.report import CheckFailed
    from bench.portrait import NoMixing, draw_portrait

    try:
        return draw_portrait(model, seed=seed)
    except (CheckFailed, NoMixing) as reason:
        return str(reason)
    except Exception as error:
        return f"it raised {type(error).__name__}: {error}"


def show(row: CheckedCoupler, config: GNNMoEConfig, console: Console) -> None:
    """Print a table of the checks and one sentence."""
    from rich.table import Table
    from rich.text import Text

    from bench.portrait.show import mark

    report = row.report
    table = Table("check", "", "detail", show_lines=bool(report.failures), title_justify="left")
    for check in report.checks:
        table.add_row(check.name, mark(check.passed), Text(check.detail, overflow="fold"))
    console.print(table)
    what = f"{config.coupler_type} at {config.num_experts} experts, width {config.embed_dim}"
    seconds = sum(check.seconds for check in report.checks)
    if row.passed:
        verdict = f"passed: {what} leaks nothing and computes what it says ({seconds:.1f} s)."
    elif report.passed:
        verdict = f"FAILED: {what} leaks nothing, but costs other than it says: its FLOPs formula is wrong."
    else:
        names = ", ".join(row.failures)
        verdict = f"FAILED: {what}: its perplexity does not count ({names})."
    console.print(Text(verdict, style="green" if row.passed else "bold red"))


if __name__ == "__main__":
    sys.exit(main())
