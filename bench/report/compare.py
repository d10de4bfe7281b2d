"""``compare A B``: two studies, two configurations of studies, or two runs against each other."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.files import visible
from bench.record import exp_or_infinity, number
from bench.report.comparison import Difference, difference_family, losses, over_seeds
from bench.report.provenance import code_note
from bench.report.quantities import (
    EXPERTS,
    QUANTITIES,
    UNKNOWN_WORDS,
    Quantity,
    p_value,
    percent,
    share,
    signed,
)
from bench.report.tables import difference_words
from bench.report.terminal import WIDTH
from bench.study.labels import DIGITS
from bench.study.runs import (
    Basis,
    Configuration,
    Run,
    doubled_words,
    find_run,
    grouped,
    is_of_run,
    load_study,
    study_folder,
)
from gnnmoe.config import Refused, brief, unknown_name

Placed = tuple[Basis, Configuration]
"""A configuration, and the basis on which it was measured."""
PERPLEXITY = "perplexity"
MEASURED = {found.limit: found for found in QUANTITIES if found.limit}
"""The quantities that are compared by their geometric means, by the name that --fail-if has for them."""


@dataclass(frozen=True)
class Side:
    """A side of the comparison, A or B."""

    name: str
    runs: list[Run]
    label: str | None
    """The only configuration that counts; None: all configurations count."""

    def configurations(self, allow_unequal: bool) -> list[Placed]:
        """Return the configurations of this side; one that ran on several devices is several."""
        groups = grouped(self.runs, allow_unequal)
        return [
            (group.basis, one)
            for group in groups
            for one in group.configurations
            if self.label in (None, one.label)
        ]


@dataclass(frozen=True)
class Compared:
    """B minus A, and what could not be compared."""

    differences: list[Difference]
    missing: list[str]
    """Sentences on configurations of one side only, or without a common seed that counts."""
    doubled: list[str]
    """Sentences on seeds of a configuration that have several runs, which are left out."""


def read_side(text: str, results_dir: Path) -> Side:
    """Return the side that a text names: a study, ``STUDY:CONFIGURATION``, or a run's id or its beginning.

    Raises:
        Refused: nothing has this name, or several runs have it.
    """
    folder = study_folder(text, results_dir)
    if folder is not None:
        return Side(text, load_study(folder).runs, None)
    for colon in (place for place, letter in enumerate(text) if letter == ":"):
        study, label = text[:colon], text[colon + 1 :]
        folder = study_folder(study, results_dir)
        if folder is not None:
            runs = load_study(folder).runs
            known = [one.label for _, one in Side(text, runs, None).configurations(True)]
            if label not in known:
                raise Refused(unknown_name(f"configuration of {study}", label, known))
            return Side(text, runs, label)
    if ":" in text:
        study = text.partition(":")[0]
        raise Refused(
            f"there is no study {brief(study)} in {results_dir}; python -m bench.report ls lists them."
        )
    run = find_run(text, results_dir)
    run_id = run.record.run_id
    if not is_of_run(run.folder, run_id) and not is_of_run(run.folder, run_id, set_aside=True):
        raise Refused(
            f"the record in {run.folder} is of run {run_id}: a copy, or a renamed folder, "
            "which does not count."
        )
    return Side(text, [run], None)


def compare_sides(first: Side, second: Side, allow_unequal: bool = False) -> Compared:
    """Return B minus A for every configuration that both have, or for the one that each side names.

    Raises:
        Refused: nothing can be compared: no configuration or no seed is in common, or corpus, device,
            evaluation, used batch or length differ (``allow_unequal`` allows the last three to differ).
    """
    ours, theirs = (side.configurations(allow_unequal) for side in (first, second))
    named = bool(first.label and second.label) or len(ours) == len(theirs) == 1
    pairs, missing = _pairs(ours, theirs, named)
    doubled = [
        f"{side}, {text}"
        for side, some in (("A", ours), ("B", theirs))
        for _, one in some
        for text in doubled_words(one)
    ]
    differences = difference_family([(other, one) for one, other in pairs])
    found = [(difference.reference, difference.candidate) for difference in differences]
    missing += [
        f"{one.label}: no seed counts on both sides"
        for one, other in pairs
        if not any(one is a and other is b for a, b in found) and not (one.doubled or other.doubled)
    ]
    if not differences:
        nothing = "they have no configuration in common; name one of each: STUDY:CONFIGURATION"
        why = "; ".join([*doubled, *missing]) or nothing
        hint = "" if allow_unequal else " (--allow-unequal lets evaluation, batch and length differ)"
        raise Refused(f"{first.name} and {second.name} cannot be compared: {why}{hint}.")
    return Compared(differences, missing, doubled)


def _pairs(
    ours: Sequence[Placed], theirs: Sequence[Placed], named: bool
) -> tuple[list[tuple[Configuration, Configuration]], list[str]]:
    """Return A and B of every comparison, and sentences on configurations that have no partner.

    Partners have the same configuration. The code of the coupler may differ; then the versions are compared.
    """
    pairs, missing, taken = [], [], set()
    for basis, one in ours:
        partners = [(place, other) for place, other in theirs if named or other.key[0] == one.key[0]]
        alike = partners or [(place, other) for place, other in theirs if other.flags == one.flags]
        fitting = [other for place, other in partners if place.fits(basis)]
        taken |= {id(other) for _, other in alike}
        pairs += [(one, other) for other in fitting]
        if not alike:
            missing.append(f"{one.label}: only in A")
        elif not any(place.fits(basis) for place, _ in alike):
            missing.append(f"{one.label} in {basis.words()}, against {alike[0][0].words()}")
        elif not fitting:
            missing.append(
                f"{one.label}: B has another configuration of these settings (configuration "
                f"{alike[0][1].key[0][:DIGITS]} against {one.key[0][:DIGITS]})"
            )
    missing += [f"{other.label}: only in B" for _, other in theirs if id(other) not in taken]
    return pairs, missing


@dataclass(frozen=True)
class Limit:
    """A limit of the change from A to B, such as ``perplexity > 1%``; it tests the mean over seeds."""

    quantity: str
    sign: str
    percent: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Return the limit that a text states.

        Raises:
            Refused: it has another form, or an unknown quantity.
        """
        found = re.fullmatch(r"\s*([\w/]+)\s*([<>])\s*([+-]?[0-9]+(?:\.[0-9]+)?)\s*%\s*", text)
        if not found:
            raise Refused(
                f'--fail-if is {brief(text)}; write a quantity and a limit, such as "perplexity > 1%".'
            )
        known = [PERPLEXITY, *MEASURED]
        if found[1] not in known:
            raise Refused(unknown_name("quantity", found[1], known))
        return cls(found[1], found[2], float(found[3]))

    def verdict(self, difference: Difference) -> tuple[bool, str]:
        """Return whether the mean change is beyond the limit, and why; what was not measured fails."""
        ratio = ratio_of(self.quantity, difference)
        limit = f"--fail-if {self.quantity} {self.sign} {self.percent:g}%"
        if ratio is None:
            return True, f"{limit}: FAILS, {self.quantity} was not measured on both sides"
        change = 100 * (ratio - 1)
        fails = change > self.percent if self.sign == ">" else change < self.percent
        why = f"{limit}: {'FAILS' if fails else 'passes'}, the mean change is {percent(ratio, 2)}"
        if self.quantity == PERPLEXITY and difference.verdict.kind == "not resolved":
            why += " (not significant; --fail-if tests the mean only)"
        return fails, why


def ratio_of(name: str, difference: Difference) -> float | None:
    """Return B over A of a quantity by its name in --fail-if; None where it was not measured."""
    if name == PERPLEXITY:
        return exp_or_infinity(difference.paired.mean)
    found = measured(difference, MEASURED[name])
    return None if found is None else found[1] / found[0]


def measured(
    difference: Difference, quantity: Quantity, mean: Callable[[list[float]], float] = geometric_mean
) -> tuple[float, float] | None:
    """Return the means of A and B over the seeds that both have; None where not measured."""
    ours, theirs = (over_seeds(one, quantity).values for one in (difference.reference, difference.candidate))
    seeds = [seed for seed in difference.by_seed if seed in ours and seed in theirs]
    if not seeds:
        return None
    return mean([ours[seed] for seed in seeds]), mean([theirs[seed] for seed in seeds])


def print_differences(first: Side, second: Side, compared: Compared, console: Console) -> None:
    """Print for each pair the perplexities, the paired difference with its verdict, and the costs."""
    console.print(f"A: {visible(first.name)}\nB: {visible(second.name)}", markup=False)
    width = min(WIDTH, console.width)
    notes = [code_note(side.runs) for side in (first, second)]
    if notes[0] != notes[1]:
        for name, note in zip("AB", notes, strict=True):
            console.print(textwrap.fill(f"{name}: {note}", width), style="dim", markup=False)
    for difference in compared.differences:
        _print_difference(difference, len(compared.differences), width, console)
    for text in compared.doubled:
        console.print(textwrap.fill(text, width), style="bold yellow", markup=False)
    for text in compared.missing:
        console.print(textwrap.fill(f"not compared: {text}", width), style="bold yellow", markup=False)


def _print_difference(difference: Difference, count: int, width: int, console: Console) -> None:
    console.print()
    console.print(_title(difference), style="bold", markup=False)
    table = Table(width=width, box=None, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("", "A", "B", "B vs A"):
        table.add_column(name, justify="left" if name in ("", "B vs A") else "right", overflow="fold")
    for row in _rows(difference):
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(textwrap.fill(_verdict(difference, count), width), markup=False)


def _verdict(difference: Difference, count: int) -> str:
    """Return the verdict on B in words, and for how many comparisons its p is corrected."""
    found, p = difference.verdict, p_value(difference.p_adjusted)
    corrected = "" if count == 1 else f", after Holm's correction over {count} comparisons"
    if found.kind != "not resolved":
        return f"B is {found.words()} (p {p}{corrected})."
    text = f"No significant difference (p {p}{corrected}): {found.words()}."
    if count == 1 and found.seeds is not None:
        text += " The seeds are for this pair alone; a report corrects for all its pairs and needs more."
    return text


def _title(difference: Difference) -> str:
    sides = (difference.reference, difference.candidate)
    names = list(dict.fromkeys(side.label for side in sides))
    codes = [side.key[1] for side in sides]
    if len(names) == 1 and None not in codes and codes[0] != codes[1]:
        names = [f"{names[0]} · code {code[:DIGITS]}" for code in codes if code]
    seeds = ", ".join(map(str, difference.by_seed))
    return " → ".join(names) + f" (seeds {seeds})"


def _rows(difference: Difference) -> list[list[str]]:
    sides = (difference.reference, difference.candidate)
    means = [_mean_loss(side, difference) for side in sides]
    ratio = percent(exp_or_infinity(difference.paired.mean), 2)
    rows = [
        ["perplexity", *(number(exp_or_infinity(mean), 2) for mean in means), ratio],
        ["loss (nats)", *(number(mean, 4) for mean in means), difference_words(difference)],
    ]
    unknown = [over_seeds(side, UNKNOWN_WORDS).mean for side in sides]
    if any(unknown):
        rows.append(["unknown words", *map(share, unknown), ""])
    for name, quantity in MEASURED.items():
        found = measured(difference, quantity)
        if found is not None:
            rows.append([name, *map(quantity.show, found), percent(found[1] / found[0], 2)])
    for quantity in EXPERTS.values():
        found = measured(difference, quantity, fmean)
        if found is not None:
            rows.append(
                [f"experts: {quantity.title}", *map(quantity.show, found), signed(found[1] - found[0])]
            )
    return rows


def _mean_loss(side: Configuration, difference: Difference) -> float:
    """Return the mean loss of a side over the seeds that both have."""
    values = losses(side).values
    return fmean(values[seed] for seed in difference.by_seed)
