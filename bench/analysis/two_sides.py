"""Two sides against each other: studies, configurations of studies, or single runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from bench.analysis import quantities
from bench.analysis.comparison import Difference, difference_family
from bench.analysis.numbers import percent
from bench.analysis.over_seeds import summary
from bench.analysis.quantities import exp_or_infinity
from bench.record import Record, is_measured
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
from gnnmoe.config import Refused
from gnnmoe.naming import unknown_name

Quantity = Callable[[Record], float | None]
Placed = tuple[Basis, Configuration]
"""A configuration and the setting in which it was measured."""


@dataclass(frozen=True)
class Side:
    """What A or B names."""

    name: str
    runs: list[Run]
    label: str | None
    """The one configuration that counts; None: all."""

    def configurations(self, allow_unequal: bool) -> list[Placed]:
        """Return the configurations of this side; one of several devices is several."""
        groups = grouped(self.runs, allow_unequal)
        return [(group.basis, one) for group in groups for one in group.configurations
                if self.label in (None, one.label)]  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """B less A, and what could not be compared."""

    differences: list[Difference]
    missing: list[str]
    """In words: configurations of one side only, or without a common seed that counts."""
    doubled: list[str]
    """In words: the runs of one seed of one configuration, which are left out."""


def read_side(text: str, results_dir: Path) -> Side:
    """Return the side that a text names: a study, ``STUDY:CONFIGURATION``, or a run's id (or its beginning).

    Raises:
        Refused: nothing, or more than one run, has this name.
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
        raise Refused(f"there is no study {text.partition(':')[0]!r} in {results_dir}; "
                         "python -m bench.report ls lists them.")  # fmt: skip
    runs = [find_run(text, results_dir)]
    for run in runs:
        run_id = run.record.run_id
        if not is_of_run(run.folder, run_id) and not is_of_run(run.folder, run_id, set_aside=True):
            raise Refused(f"the record in {run.folder} is of run {run_id}: a copy, or a renamed folder, "
                             "which does not count.")  # fmt: skip
    return Side(text, runs, None)


def compare_sides(first: Side, second: Side, allow_unequal: bool = False) -> Compared:
    """Return B less A for every configuration that both have, or for the one that each side names.

    Raises:
        Refused: nothing can be compared: no configuration or no seed is in common, or corpus, device,
            evaluation, used batch or length differ (the last three pass with ``allow_unequal``).
    """
    ours, theirs = (side.configurations(allow_unequal) for side in (first, second))
    pairs, missing = _pairs(
        ours, theirs, named=bool(first.label and second.label) or len(ours) == len(theirs) == 1
    )
    doubled = [f"{side}, {text}" for side, some in (("A", ours), ("B", theirs)) for _, one in some
               for text in doubled_words(one)]  # fmt: skip
    differences = difference_family([(other, one) for one, other in pairs])
    found = [(difference.reference, difference.candidate) for difference in differences]
    missing += [f"{one.label}: no seed counts on both sides" for one, other in pairs
                if not any(one is a and other is b for a, b in found)
                and not (one.doubled or other.doubled)]  # fmt: skip
    if not differences:
        why = (
            "; ".join([*doubled, *missing])
            or "they have no configuration in common; name one of each: STUDY:CONFIGURATION"
        )
        hint = "" if allow_unequal else " (--allow-unequal lets evaluation, batch and length differ)"
        raise Refused(f"{first.name} and {second.name} cannot be compared: {why}{hint}.")
    return Compared(differences, missing, doubled)


def _pairs(
    ours: Sequence[Placed], theirs: Sequence[Placed], named: bool
) -> tuple[list[tuple[Configuration, Configuration]], list[str]]:
    """Return A and B of every comparison, and in words what has no partner that it may be compared with.

    Partners are of one configuration; the code of the coupler may differ, which is what is compared then.
    """
    pairs, missing, taken = [], [], set()
    for setting, one in ours:
        partners = [(place, other) for place, other in theirs if named or other.key[0] == one.key[0]]
        alike = partners or [(place, other) for place, other in theirs if other.flags == one.flags]
        fitting = [other for place, other in partners if place.fits(setting)]
        taken |= {id(other) for _, other in alike}
        pairs += [(one, other) for other in fitting]
        if not alike:
            missing.append(f"{one.label}: only in A")
        elif not any(place.fits(setting) for place, _ in alike):
            missing.append(f"{one.label} in {setting.words()}, against {alike[0][0].words()}")
        elif not fitting:
            missing.append(f"{one.label}: B has another configuration of these settings (configuration "
                           f"{alike[0][1].key[0][:DIGITS]} against {one.key[0][:DIGITS]})")  # fmt: skip
    missing += [f"{other.label}: only in B" for _, other in theirs if id(other) not in taken]
    return pairs, missing


@dataclass(frozen=True)
class Limit:
    """A condition on the change from A to B that a check fails on, such as ``ppl > 1%``."""

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
            raise Refused(f'fail_if is {text!r}; write a quantity and a limit of its change: "ppl > 1%".')
        if found[1] not in QUANTITIES:
            raise Refused(unknown_name("quantity", found[1], QUANTITIES))
        return cls(found[1], found[2], float(found[3]))

    def verdict(self, difference: Difference) -> tuple[bool, str]:
        """Return whether the check fails on a difference, and why in words; what is not measured fails."""
        ratio = QUANTITIES[self.quantity](difference)
        limit = f"{self.quantity} {self.sign} {self.percent:g} %"
        if ratio is None:
            return True, f"{limit}: {self.quantity} was not measured on both sides"
        change = 100 * (ratio - 1)
        fails = change > self.percent if self.sign == ">" else change < self.percent
        return fails, f"{limit}: {self.quantity} {percent(ratio, 2)}, {'FAILS' if fails else 'passes'}"


def measured(difference: Difference, quantity: Quantity) -> tuple[float, float] | None:
    """Return the geometric means of A and B over the seeds that both have; None where not measured."""
    ours, theirs = (summary(one, quantity).values for one in (difference.reference, difference.candidate))
    seeds = [seed for seed in difference.by_seed if seed in ours and seed in theirs]
    if not seeds:
        return None
    return geometric_mean(ours[seed] for seed in seeds), geometric_mean(theirs[seed] for seed in seeds)


def _ratio_of(quantity: Quantity) -> Callable[[Difference], float | None]:
    def ratio(difference: Difference) -> float | None:
        found = measured(difference, quantity)
        return None if found is None else found[1] / found[0]

    return ratio


def parameters(record: Record) -> float | None:
    """Return the number of parameters of the model."""
    return record.parameters.total if is_measured(record.parameters) else None


def _perplexity(difference: Difference) -> float | None:
    return exp_or_infinity(difference.paired.mean)


MEASURED: dict[str, Quantity] = {
    "test_ppl": lambda record: quantities.perplexity(record, "test"),
    "tokens/s": quantities.tokens_per_second,
    "step_time": quantities.median_step_seconds,
    "memory": quantities.peak_memory_bytes,
    "parameters": parameters,
}
QUANTITIES: dict[str, Callable[[Difference], float | None]] = {
    "ppl": _perplexity, **{name: _ratio_of(quantity) for name, quantity in MEASURED.items()},
}  # fmt: skip
