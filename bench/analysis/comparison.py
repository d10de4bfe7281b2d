"""Configurations against each other: paired by seed, judged once, with what each costs.

Losses are mean nats per token on validation. A difference is candidate − reference; lower is better.
exp(difference) is the ratio of the perplexities.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.analysis import quantities
from bench.analysis.articles import article_interval
from bench.analysis.marginal import CostOverMean, any_measured, cost_over_mean, training_flops
from bench.analysis.over_seeds import Interval, Summary, losses, summary
from bench.analysis.significance import bca_interval
from bench.analysis.statistics import Paired, Verdict, compare_family
from bench.record import is_measured
from bench.study.runs import Configuration, Group
from gnnmoe.config import Refused
from gnnmoe.naming import unknown_name


@dataclass(frozen=True)
class Difference:
    """Candidate less reference, over the seeds that both have."""

    candidate: Configuration
    reference: Configuration
    by_seed: dict[int, float]
    """Nats."""
    paired: Paired
    p_adjusted: float
    """Holm over the family."""
    verdict: Verdict

    @property
    def bootstrap(self) -> Interval | None:
        """The BCa interval of the mean difference in nats; descriptive, too narrow for few seeds."""
        return bca_interval(list(self.by_seed.values()))

    @property
    def articles(self) -> Interval | None:
        """The 95 % interval of the difference in nats over the articles scored: evaluation noise alone."""
        pairs = [(self.candidate.counted[seed].articles, self.reference.counted[seed].articles)
                 for seed in self.by_seed]  # fmt: skip
        known = [(a, b) for a, b in pairs if a is not None and b is not None and np.array_equal(a[1], b[1])]
        if not known or len(known) < len(pairs):
            return None
        return article_interval(np.mean([a[0] - b[0] for a, b in known], axis=0), known[0][0][1])


@dataclass(frozen=True)
class ComparisonRow:
    """One configuration of a comparison."""

    configuration: Configuration
    loss: Summary
    test_loss: Summary
    tokens_per_second: Summary
    step_seconds: Summary
    peak_memory_bytes: Summary
    parameters: int | None
    coupler_parameters: int | None
    flops_per_token: float | None
    against: Difference | None
    """None for the reference itself, and where the two share no seed."""
    cost: CostOverMean | None
    """None without a mean coupler to compare with."""


@dataclass(frozen=True)
class Comparison:
    """All configurations of a group against one of them, and every one against every other."""

    group: Group
    reference: Configuration
    rows: list[ComparisonRow]
    """The reference first, then by loss; what was not measured last."""
    pairs: list[Difference]
    """Every pair once: those with the reference as in ``rows``, then the others, judged together."""

    @property
    def comparisons(self) -> int:
        """How many comparisons with the reference were judged together."""
        return sum(row.against is not None for row in self.rows)

    def best(self) -> Configuration | None:
        """Return the configuration that is better than every other one beyond the noise, if one is."""
        measured = [row.configuration for row in self.rows if row.loss.n]
        winners = [pair.candidate if pair.verdict.kind == "better" else pair.reference
                   for pair in self.pairs if pair.verdict.kind in ("better", "worse")]  # fmt: skip
        rivals = len(measured) - 1
        return next((found for found in measured
                     if rivals and sum(found is winner for winner in winners) == rivals), None)  # fmt: skip


def compare(group: Group, reference: str | None = None) -> Comparison:
    """Compare the configurations of a group with the one labelled ``reference``, and with each other.

    None takes the ``mean`` coupler, else the first configuration that was measured. The comparisons with
    the reference are one family of Holm's correction, those among the others another: one verdict a pair.

    Raises:
        Refused: no configuration has this label.
    """
    chosen = _reference(group, reference)
    others = [found for found in group.configurations if found is not chosen]
    others.sort(key=lambda found: _order(losses(found).mean))
    with_reference = difference_family([(found, chosen) for found in others])
    against = {id(pair.candidate): pair for pair in with_reference}
    rows = [_row(found, group, against.get(id(found))) for found in (chosen, *others)]
    among_others = difference_family([(b, a) for a, b in itertools.combinations(others, 2)])
    return Comparison(group, chosen, rows, [*with_reference, *among_others])


def _order(loss: float | None) -> tuple[bool, float]:
    return loss is None, loss or 0.0


def _reference(group: Group, label: str | None) -> Configuration:
    found = group.configurations
    if label is not None:
        chosen = next((one for one in found if one.label == label), None)
        if chosen is None:
            raise Refused(unknown_name("configuration", label, [one.label for one in found]))
        return chosen
    measured = [one for one in found if one.counted] or found
    return next((one for one in measured if one.coupler == "mean"), measured[0])


def difference_family(pairs: Sequence[tuple[Configuration, Configuration]]) -> list[Difference]:
    """Return candidate less reference for a family of pairs; those without a common seed are left out."""
    known = []
    for candidate, reference in pairs:
        ours, theirs = losses(candidate).values, losses(reference).values
        by_seed = {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}
        if by_seed:
            known.append((candidate, reference, by_seed))
    judged = compare_family([np.array(list(by_seed.values())) for _, _, by_seed in known])
    return [
        Difference(candidate, reference, by_seed, paired, p, verdict)
        for (candidate, reference, by_seed), (paired, p, verdict) in zip(known, judged, strict=True)
    ]


def _row(configuration: Configuration, group: Group, against: Difference | None) -> ComparisonRow:
    record = any_measured(configuration)
    parameters = record.parameters if record and is_measured(record.parameters) else None
    return ComparisonRow(
        configuration, losses(configuration), losses(configuration, "test"),
        summary(configuration, quantities.tokens_per_second),
        summary(configuration, quantities.median_step_seconds),
        summary(configuration, quantities.peak_memory_bytes),
        parameters and parameters.total, parameters and parameters.coupler,
        training_flops(record), against, cost_over_mean(configuration, group),
    )  # fmt: skip
