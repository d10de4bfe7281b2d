"""Two sides against each other: studies, configurations of studies, or single runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.analysis import quantities
from bench.analysis.comparison import Difference, difference_family
from bench.analysis.find import find_runs, study_folder
from bench.analysis.marginal import any_measured
from bench.analysis.numbers import percent
from bench.analysis.over_seeds import losses, summary
from bench.analysis.quantities import exp_or_infinity
from bench.analysis.setting import Setting
from bench.analysis.study import Configuration, Run, grouped, load_study
from gnnmoe.naming import unknown_name


@dataclass(frozen=True)
class Side:
    """What A or B names."""

    name: str
    runs: list[Run]
    label: str | None
    """The one configuration that counts; None: all."""

    def configurations(self, allow_unequal: bool) -> list[Configuration]:
        """Return the configurations of this side."""
        found = [one for group in grouped(self.runs, allow_unequal) for one in group.configurations]
        return [one for one in found if self.label in (None, one.label)]


def read_side(text: str, results_dir: Path) -> Side:
    """Return the side that a text names: a study, ``STUDY:CONFIGURATION``, or a run's id (or its beginning).

    Raises:
        ValueError: nothing, or more than one run, has this name.
    """
    study, colon, label = text.partition(":")
    folder = study_folder(study, results_dir)
    if folder is not None:
        runs = load_study(folder).runs
        side = Side(text, runs, label or None)
        known = [one.label for one in Side(text, runs, None).configurations(True)]
        if label and label not in known:
            raise ValueError(unknown_name(f"configuration of {study}", label, known))
        return side
    if colon:
        raise ValueError(
            f"there is no study {study!r} in {results_dir}; python -m bench.report ls lists them."
        )
    return Side(text, find_runs(text, results_dir), None)


def compare_sides(first: Side, second: Side, allow_unequal: bool = False) -> list[Difference]:
    """Return B less A for every configuration that both have, or for the one that each side names.

    Raises:
        ValueError: the sides have no configuration in common, or corpus, device, evaluation, used batch or
            length differ (the last three pass with ``allow_unequal``).
    """
    pairs = _pairs(*(side.configurations(allow_unequal) for side in (first, second)))
    if not pairs:
        raise ValueError(
            f"{first.name} and {second.name} have no configuration in common; "
            "name one of each: STUDY:CONFIGURATION."
        )
    for ours, theirs in pairs:
        _refuse_unequal(ours, theirs, allow_unequal)
    found = difference_family([(theirs, ours) for ours, theirs in pairs])
    if not found:
        raise ValueError(
            f"{first.name} and {second.name} have no seed in common whose runs ended ok on both sides."
        )
    return found


def _pairs(
    ours: Sequence[Configuration], theirs: Sequence[Configuration]
) -> list[tuple[Configuration, Configuration]]:
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    return [(one, other) for one in ours for other in theirs if one.settings == other.settings]


def _refuse_unequal(ours: Configuration, theirs: Configuration, allow_unequal: bool) -> None:
    settings = [
        Setting.of(run.record, allow_unequal) for one in (ours, theirs) for run in one.runs if run.counts
    ]
    for other in settings[1:]:
        if not settings[0].fits(other):
            hint = "" if allow_unequal else "; --allow-unequal lets evaluation, batch and length differ"
            raise ValueError(
                f"{ours.label} and {theirs.label} cannot be compared: {settings[0].words()}, "
                f"against {other.words()}{hint}."
            )


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
            ValueError: it has another form, or an unknown quantity.
        """
        found = re.fullmatch(r"\s*([\w/]+)\s*([<>])\s*([+-]?[0-9]+(?:\.[0-9]+)?)\s*%\s*", text)
        if not found:
            raise ValueError(f'fail_if is {text!r}; write a quantity and a limit of its change: "ppl > 1%".')
        if found[1] not in QUANTITIES:
            raise ValueError(unknown_name("quantity", found[1], QUANTITIES))
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


def _ratio_of(quantity: Callable[..., float | None]) -> Callable[[Difference], float | None]:
    def ratio(difference: Difference) -> float | None:
        ours, theirs = (summary(one, quantity) for one in (difference.reference, difference.candidate))
        return theirs.mean / ours.mean if ours.mean and theirs.mean is not None else None

    return ratio


def _parameters(difference: Difference) -> float | None:
    ours, theirs = (any_measured(one) for one in (difference.reference, difference.candidate))
    if ours is None or theirs is None:
        return None
    return theirs["parameters"]["total"] / ours["parameters"]["total"]


def _perplexity(difference: Difference) -> float | None:
    return exp_or_infinity(difference.paired.mean)


def _test_perplexity(difference: Difference) -> float | None:
    ours, theirs = (losses(one, "test").values for one in (difference.reference, difference.candidate))
    seeds = ours.keys() & theirs.keys()
    return exp_or_infinity(sum(theirs[s] - ours[s] for s in seeds) / len(seeds)) if seeds else None


QUANTITIES: dict[str, Callable[[Difference], float | None]] = {
    "ppl": _perplexity, "test_ppl": _test_perplexity, "parameters": _parameters,
    "tokens/s": _ratio_of(quantities.tokens_per_second),
    "step_time": _ratio_of(quantities.median_step_seconds),
    "memory": _ratio_of(quantities.peak_memory_bytes),
}  # fmt: skip
