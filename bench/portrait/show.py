"""A portrait on the screen, and the table of all couplers, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.gate import GateReport
from bench.gate.subject import TOLERANCE
from bench.portrait.mixing import Mixing
from bench.portrait.portrait import Portrait
from bench.portrait.verdict import amount, nonlinear_by, power

FLOPS = "FLOPs formula"
FLOPS_FAILURE = f"{FLOPS} wrong: "


@dataclass(frozen=True)
class CheckedCoupler:
    """What was found about one coupler."""

    name: str
    report: GateReport
    portrait: Portrait | str
    """The portrait, or why there is none."""

    @property
    def flops_mismatch(self) -> str:
        """How its FLOPs formula is wrong; empty where it is not, or nothing was measured."""
        return self.portrait.cost.flops_mismatch if isinstance(self.portrait, Portrait) else ""

    @property
    def failures(self) -> list[str]:
        """The names of what failed."""
        return [check.name for check in self.report.failures] + ([FLOPS] if self.flops_mismatch else [])

    @property
    def passed(self) -> bool:
        """Whether it passed the leak check, and it costs what it says."""
        return self.report.passed and not self.flops_mismatch


def mark(passed: bool) -> Text:
    """Return a green ✓ or a red ✗."""
    return Text("✓", style="green") if passed else Text("✗", style="bold red")


def show_portrait(portrait: Portrait | str, console: Console) -> None:
    """Print the numbers and the verdict, or the one line that says why there are none."""
    if isinstance(portrait, str):
        console.print(Text(f"no portrait: {portrait}"))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, value in _lines(portrait).items():
        table.add_row(label, Text(value, overflow="fold"))
    console.print(table)
    if portrait.cost.flops_mismatch:
        console.print(Text(FLOPS_FAILURE + portrait.cost.flops_mismatch, style="bold red"))
    console.print(Text(f"verdict: {portrait.sentence}.", style="bold"))


def _lines(portrait: Portrait) -> dict[str, str]:
    cost, mixing = portrait.cost, portrait.mixing
    counted = " (counted: it has no formula)" if cost.flops_counted else ""
    reads = "reads the layer input" if mixing.reads_layer_input else "does not read the layer input"
    dead = "; ".join(f"{name} ({reason})" for name, reason in cost.dead_parameters.items())
    dependence = mixing.token_dependence
    return {
        "parameters": f"{cost.parameters:,}, the combiner's included",
        "FLOPs a token": f"{cost.flops_per_token:,.0f} a forward{counted}",
        "linear in the experts": _linearity(mixing),
        "depends on the token": (
            f"yes: Jacobians differ by {amount(dependence)}" if dependence > TOLERANCE else "no"
        ) + f"; {reads}",
        "effective rank": f"{mixing.effective_rank:.2f} over {mixing.num_experts} experts",
        "dead parameters": dead or "none",
    }  # fmt: skip


def _linearity(mixing: Mixing) -> str:
    by_scale = mixing.nonlinearity.items()
    if nonlinear_by(mixing) <= TOLERANCE:
        return f"yes, to {power(max(mixing.nonlinearity.values()))}"
    usual, *others = (f"{amount(value)} at inputs of size {scale:g}" for scale, value in by_scale)
    return f"no: off by {usual} ({', '.join(others)})"


def show_all(rows: Sequence[CheckedCoupler], left_out: dict[str, str], console: Console) -> None:
    """Print a row for each coupler, what was left out, and the details of what failed."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("coupler", overflow="fold", max_width=19)
    table.add_column("")
    table.add_column("param-\neters", justify="right")
    table.add_column("FLOPs\na token", justify="right")
    table.add_column("before the shared combiner it …", overflow="fold")
    for row in rows:
        table.add_row(Text(row.name), mark(row.passed), *_cells(row.portrait))
    console.print(table)
    if left_out:
        reasons = [f"{name} ({reason.rstrip('.')})" for name, reason in left_out.items()]
        console.print(Text("left out: " + "; ".join(reasons)))
    for row in rows:
        for check in row.report.failures:
            console.print(Text(f"{row.name}: {check.name}: {check.detail}", style="bold red"))
        if row.flops_mismatch:
            text = f"{row.name}: {FLOPS_FAILURE}{row.flops_mismatch}"
            console.print(Text(text, style="bold red"))
    failed = [row.name for row in rows if not row.passed]
    if failed:
        text = f"FAILED: {len(failed)} of {len(rows)}: {', '.join(failed)}"
        console.print(Text(text, style="bold red"))
    else:
        console.print(Text(f"passed: all {len(rows)} leak nothing and compute what they say.", style="green"))


def _cells(portrait: Portrait | str) -> tuple[str, str, Text]:
    if isinstance(portrait, str):
        return "–", "–", Text(f"(no portrait: {portrait})")
    what = f"(its output: {portrait.mixing.why_output}) " if portrait.mixing.why_output else ""
    cost = portrait.cost
    return f"{cost.parameters:,}", f"{cost.flops_per_token:,.0f}", Text(what + portrait.verdict)
