"""The result of one coupler on the screen, and the table of all couplers, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.check.behaviour import NO_REFERENCE
from bench.check.mixing import Mixing
from bench.check.portrait import Portrait, amount, nonlinear_by, power
from bench.check.subject import TOLERANCE, CheckReport
from gnnmoe.config import GNNMoEConfig
from gnnmoe.discovery import short_name

FLOPS = "flops()"
FLOPS_FAILURE = f"`{FLOPS}` is wrong: "


@dataclass(frozen=True)
class CheckedCoupler:
    """The report and the portrait of one coupler."""

    name: str
    report: CheckReport
    portrait: Portrait | str
    """The portrait, or the reason why there is none."""

    @property
    def flops_mismatch(self) -> str:
        """How the FLOPs formula is wrong; empty if it is right or was not measured."""
        return self.portrait.cost.flops_mismatch if isinstance(self.portrait, Portrait) else ""

    @property
    def failures(self) -> list[str]:
        """The names of the failed checks."""
        return [check.name for check in self.report.failures] + ([FLOPS] if self.flops_mismatch else [])

    @property
    def passed(self) -> bool:
        """Whether the coupler passed the leak check and its FLOPs formula is right."""
        return self.report.passed and not self.flops_mismatch


def show_one(row: CheckedCoupler, config: GNNMoEConfig, console: Console) -> None:
    """Print a table of the checks, one sentence, and the portrait."""
    report = row.report
    table = Table("check", "", "detail", show_lines=bool(report.failures), title_justify="left")
    for check in report.checks:
        table.add_row(check.name, _mark(check.passed), Text(check.detail, overflow="fold"))
    console.print(table)
    what = f"{short_name(config.coupler_type)} at {config.num_experts} experts, width {config.embed_dim}"
    seconds = sum(check.seconds for check in report.checks)
    if row.passed:
        given = all(check.detail != NO_REFERENCE for check in report.checks)
        says = "every check agrees with its formula" if given else NO_REFERENCE
        verdict = f"passed: {what} has no leak; {says} ({seconds:.1f} s)."
    elif report.passed:
        verdict = f"FAILED: {what} has no leak, but {FLOPS_FAILURE}{row.flops_mismatch}."
    else:
        names = ", ".join(row.failures)
        verdict = f"FAILED: {what}: its perplexity does not count ({names})."
        verdict += f" {FLOPS_FAILURE}{row.flops_mismatch}." if row.flops_mismatch else ""
    console.print(Text(verdict, style="green" if row.passed else "bold red"))
    if isinstance(row.portrait, str):
        console.print(Text(f"no portrait: {row.portrait}"))
    else:
        _show_portrait(row.portrait, console)


def _show_portrait(portrait: Portrait, console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, value in _lines(portrait).items():
        table.add_row(label, Text(value, overflow="fold"))
    console.print(table)
    console.print(Text(f"verdict: {portrait.sentence}.", style="bold"))


def _lines(portrait: Portrait) -> dict[str, str]:
    cost, mixing = portrait.cost, portrait.mixing
    counted = " (counted by PyTorch; the coupler has no flops())" if cost.flops_counted else ""
    depends = mixing.token_dependence > TOLERANCE
    dependence = f"yes: Jacobians differ by {amount(mixing.token_dependence)}" if depends else "no"
    reads = "reads the layer input" if mixing.reads_layer_input else "does not read the layer input"
    dead = "; ".join(f"{name} ({reason})" for name, reason in cost.dead_parameters.items())
    return {
        "parameters": f"{cost.parameters:,}, with the combiner",
        "FLOPs per token": f"{cost.flops_per_token:,.0f} per forward pass{counted}",
        "linear in the experts": _linearity(mixing),
        "depends on the token": f"{dependence}; {reads}",
        "effective rank": f"{mixing.effective_rank:.2f} over {mixing.num_experts} experts",
        "dead parameters": dead or "none",
    }


def _linearity(mixing: Mixing) -> str:
    by_scale = mixing.nonlinearity.items()
    if nonlinear_by(mixing) <= TOLERANCE:
        return f"yes, to {power(max(mixing.nonlinearity.values()))}"
    usual, *others = (f"{amount(value)} at inputs of size {scale:g}" for scale, value in by_scale)
    return f"no: off by {usual} ({', '.join(others)})"


def show_all(rows: Sequence[CheckedCoupler], left_out: dict[str, str], console: Console) -> None:
    """Print one row per coupler, the couplers left out, and the details of every failed check."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("coupler", overflow="fold", max_width=19)
    table.add_column("")
    table.add_column("param-\neters", justify="right")
    table.add_column("FLOPs per\ntoken", justify="right")
    table.add_column("before the combiner, the coupler …", overflow="fold")
    for row in rows:
        table.add_row(Text(row.name), _mark(row.passed), *_cells(row.portrait))
    console.print(table)
    if left_out:
        reasons = [f"{name} ({reason.rstrip('.')})" for name, reason in left_out.items()]
        console.print(Text("left out: " + "; ".join(reasons)))
    for row in rows:
        details = [f"{check.name}: {check.detail}" for check in row.report.failures]
        details += [FLOPS_FAILURE + row.flops_mismatch] if row.flops_mismatch else []
        for detail in details:
            console.print(Text(f"{row.name}: {detail}", style="bold red"))
    failed = [row.name for row in rows if not row.passed]
    if failed:
        text = f"FAILED: {len(failed)} of {len(rows)}: {', '.join(failed)}"
        console.print(Text(text, style="bold red"))
    else:
        console.print(
            Text(
                f"passed: none of the {len(rows)} couplers leaks, and every check agrees with its formula.",
                style="green",
            )
        )


def _mark(passed: bool) -> Text:
    return Text("✓", style="green") if passed else Text("✗", style="bold red")


def _cells(portrait: Portrait | str) -> tuple[str, str, Text]:
    if isinstance(portrait, str):
        return "–", "–", Text(f"(no portrait: {portrait})")
    what = f"(its output: {portrait.mixing.why_output}) " if portrait.mixing.why_output else ""
    cost = portrait.cost
    return f"{cost.parameters:,}", f"{cost.flops_per_token:,.0f}", Text(what + portrait.verdict)
