"""``python -m bench.check --coupler NAME``: proof that a coupler leaks nothing and computes what it says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import ModelConfig

if TYPE_CHECKING:
    from bench.gate import GateReport
    from gnnmoe.config import GNNMoEConfig

ANY_VOCABULARY = 64  # the gate's models are small; no coupler sees the vocabulary


@dataclass(kw_only=True)
class CheckConfig:
    """Check on small tensors that a coupler leaks nothing and computes what it says.

    Exit status: 0 passed, 1 failed, 2 wrong input.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 0
    """Seed of the numbers that the checks draw."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the coupler that the flags name, print the verdicts and return the exit status."""
    config = parse(CheckConfig, argv, prog="python -m bench.check")
    show_warnings_plainly()
    from bench.gate import refuse_wrong_names, run_gate

    model = config.model.resolved(ANY_VOCABULARY)
    try:
        refuse_wrong_names(model)
    except ValueError as error:
        fail(str(error))
    report = run_gate(model, seed=config.seed)
    show(report, model)
    return 0 if report.passed else 1


def show(report: GateReport, config: GNNMoEConfig) -> None:
    """Print a table of the checks and one sentence."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "", "detail", show_lines=bool(report.failures), title_justify="left")
    for check in report.checks:
        mark = Text("✓", style="green") if check.passed else Text("✗", style="bold red")
        table.add_row(check.name, mark, Text(check.detail, overflow="fold"))
    console = Console(highlight=False)
    console.print(table)
    what = f"{config.coupler_type} at {config.num_experts} experts, width {config.embed_dim}"
    seconds = sum(check.seconds for check in report.checks)
    if report.passed:
        verdict = f"passed: {what} leaks nothing and computes what it says ({seconds:.1f} s)."
    else:
        names = ", ".join(check.name for check in report.failures)
        verdict = f"FAILED: {what}: its perplexity does not count ({names})."
    console.print(Text(verdict, style="green" if report.passed else "bold red"))


if __name__ == "__main__":
    sys.exit(main())
