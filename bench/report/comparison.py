"""Compare configurations: paired by seed, judged once, with their cost beside the mean coupler.

Losses are mean nats per token on validation. A difference is candidate minus reference, so lower is better;
exp(difference) is the ratio of the perplexities. The second half answers hypotheses that were stated before
the runs.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench.config import FlagTable, defaults
from bench.measure.rates import difference_of_medians, paired_ratios
from bench.record import exp_or_infinity, is_measured
from bench.report import quantities
from bench.report.quantities import (
    EXPERTS,
    PARAMETERS,
    PEAK_MEMORY,
    QUANTITIES,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
    TRAINING_FLOPS,
    Interval,
    Quantity,
    counted,
    digits_for,
    of_experts,
    p_value,
    percent,
    signed,
)
from bench.report.statistics import (
    Answer,
    Paired,
    Summary,
    Verdict,
    answer_claims,
    article_interval,
    bca_interval,
    compare_family,
)
from bench.study.hypotheses import Hypothesis, selects
from bench.study.labels import OF_HYPERGRAPHS
from bench.study.runs import Configuration, Group
from gnnmoe.config import Refused, unknown_name

OF_COUPLERS = {*OF_HYPERGRAPHS, "coupler_type", "coupler_option", "coupler_options", "gnn_layers", "ffn_dim"}
"""Flags in which a model may differ from the same model with the mean coupler."""
MOST_NAMED = 4
"""Configurations that an answer names; of more it gives the number."""
ANSWERED = {"tokens_per_second": TOKENS_PER_SECOND, "peak_memory": PEAK_MEMORY, **EXPERTS}
"""The quantities of hypotheses, except for the perplexity."""
IN_NATS = " (nats)"
WORDS = {"perplexity": "perplexity", "tokens_per_second": "tokens/s", "peak_memory": "peak memory of a step"}
WORDS |= {name: found.axis.removesuffix(IN_NATS) for name, found in EXPERTS.items()}


def over_seeds(configuration: Configuration, quantity: Quantity) -> Summary:
    """Return a quantity of the runs that count, by seed; seeds without it are left out."""
    values = {seed: quantity.read(run.record) for seed, run in configuration.counted.items()}
    return Summary({seed: value for seed, value in values.items() if value is not None})


def losses(configuration: Configuration, split: str = "validation") -> Summary:
    """Return the losses of the runs that count, in nats by seed."""
    values = {seed: run.loss(split) for seed, run in configuration.counted.items()}
    return Summary({seed: value for seed, value in values.items() if value is not None})


def of_model(configuration: Configuration, quantity: Quantity) -> float | None:
    """Return a quantity of the model from a run that recorded it; failed runs may have recorded it too."""
    runs = [*configuration.counted.values(), *configuration.runs]
    record = next((run.record for run in runs if is_measured(run.record.parameters)), None)
    return None if record is None else quantity.read(record)


@dataclass(frozen=True)
class Difference:
    """Candidate minus reference, over the seeds that both have."""

    candidate: Configuration
    reference: Configuration
    by_seed: dict[int, float]
    """In nats."""
    paired: Paired
    p_adjusted: float
    """By Holm over the family."""
    verdict: Verdict

    @property
    def bootstrap(self) -> Interval | None:
        """The BCa interval of the mean difference in nats; descriptive, and too narrow for few seeds."""
        return bca_interval(list(self.by_seed.values()))

    @property
    def articles(self) -> Interval | None:
        """The 95% interval of the difference in nats over the scored articles: evaluation noise alone."""
        pairs = [
            (self.candidate.counted[seed].articles, self.reference.counted[seed].articles)
            for seed in self.by_seed
        ]
        known = [(a, b) for a, b in pairs if a is not None and b is not None and np.array_equal(a[1], b[1])]
        if not known or len(known) < len(pairs):
            return None
        return article_interval(np.mean([a[0] - b[0] for a, b in known], axis=0), known[0][0][1])


@dataclass(frozen=True)
class CostOverMean:
    """The cost of a configuration beside the same model with the mean coupler.

    If every run timed both models alternately (``--marginal``), the cost comes from these times. Otherwise it
    comes from the separate runs of a configuration with the mean coupler.
    """

    mean: Configuration | None
    """The separate runs with the mean coupler; None where there are none and both were timed alternately."""
    in_turn: bool
    log_step_time_ratio: Summary
    """ln of the step time over the mean coupler's, by seed.

    Timed alternately it is the median of the rounds' ratios, else the ratio of the medians.
    """
    added_seconds: Summary
    """Median step minus the mean coupler's, by seed."""
    memory_bytes: float | None
    parameters: float | None
    flops_per_token: float | None
    """Of training."""

    @property
    def over(self) -> str:
        """The name of what the cost is compared with."""
        return "the mean coupler" if self.in_turn or self.mean is None else self.mean.label

    def step_time_ratio(self) -> float | None:
        """Return the geometric mean over seeds of the ratio of step times; None where not measured."""
        mean = self.log_step_time_ratio.mean
        return None if mean is None else exp_or_infinity(mean)

    def step_time_interval(self) -> Interval | None:
        """Return the 95% t interval of the ratio (of its logarithm); None for fewer than two seeds."""
        return quantities.perplexities(self.log_step_time_ratio.interval)


def cost_over_mean(configuration: Configuration, group: Group) -> CostOverMean | None:
    """Return the cost of a configuration beside its mean coupler; None for that one, or without one."""
    means = [
        other
        for other in group.configurations
        if other.coupler == "mean" and _same_model(other, configuration)
    ]
    mean = next((other for other in means if other.counted), means[0] if means else None)
    found = _in_turn(configuration, mean)
    if found is not None or mean is None or mean is configuration:
        return found
    both = configuration, mean
    ours, theirs = (over_seeds(one, STEP_SECONDS).values for one in both)
    pairs = {seed: (ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}
    return CostOverMean(
        mean,
        False,
        log_step_time_ratio=Summary({seed: math.log(one / other) for seed, (one, other) in pairs.items()}),
        added_seconds=Summary({seed: one - other for seed, (one, other) in pairs.items()}),
        memory_bytes=_minus(*(over_seeds(one, PEAK_MEMORY).mean for one in both)),
        parameters=_minus(*(of_model(one, PARAMETERS) for one in both)),
        flops_per_token=_minus(*(of_model(one, TRAINING_FLOPS) for one in both)),
    )


def _in_turn(configuration: Configuration, mean: Configuration | None) -> CostOverMean | None:
    """Return the cost from the times that each run took itself; None unless every run did so."""
    runs = configuration.counted
    found = {seed: one for seed, run in runs.items() if (one := quantities.marginal(run.record))}
    if not found or len(found) < len(runs):
        return None
    times = {seed: (one.step_seconds, one.reference_step_seconds) for seed, one in found.items()}
    ratio = {seed: math.log(statistics.median(paired_ratios(*both))) for seed, both in times.items()}
    added = {seed: difference_of_medians(*both) for seed, both in times.items()}
    peaks = [one.peak_allocated_bytes for one in found.values()]
    memory = [peak for peak in peaks if is_measured(peak)]
    first = next(iter(found.values()))
    return CostOverMean(
        mean,
        True,
        Summary(ratio),
        Summary(added),
        statistics.fmean(memory) if len(memory) == len(peaks) else None,
        first.parameters,
        first.training_flops_per_token,
    )


def _minus(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs


def _same_model(one: Configuration, other: Configuration) -> bool:
    names = (one.flags.keys() | other.flags.keys()) - OF_COUPLERS
    return all(one.flags.get(name) == other.flags.get(name) for name in names)


@dataclass(frozen=True)
class ComparisonRow:
    """One configuration of a comparison."""

    configuration: Configuration
    loss: Summary
    test_loss: Summary
    means: dict[Quantity, Summary]
    """Quantities over the seeds, except for quantities of the model."""
    model: dict[Quantity, float | None]
    """Quantities of the model."""
    against: Difference | None
    """None for the reference itself, and where the two share no seed."""
    cost: CostOverMean | None
    """None without a mean coupler to compare with."""

    @property
    def out_of_memory(self) -> bool:
        """Whether no run counts and at least one run ran out of memory."""
        return self.loss.mean is None and any(run.status == "oom" for run in self.configuration.runs)


@dataclass(frozen=True)
class Comparison:
    """All configurations of a group compared with one reference, and with each other."""

    group: Group
    reference: Configuration
    rows: list[ComparisonRow]
    """The reference first, then by loss; configurations without a loss last."""
    pairs: list[Difference]
    """Every pair once: the pairs with the reference as in ``rows``, then the other pairs, judged together."""

    @property
    def comparisons(self) -> int:
        """The number of comparisons with the reference, which are judged together."""
        return sum(row.against is not None for row in self.rows)

    def best(self) -> Configuration | None:
        """Return the configuration that is better than every other one beyond the noise, if there is one."""
        measured = [row.configuration for row in self.rows if row.loss.n]
        winners = [
            pair.candidate if pair.verdict.kind == "better" else pair.reference
            for pair in self.pairs
            if pair.verdict.kind in ("better", "worse")
        ]
        rivals = len(measured) - 1
        return next(
            (found for found in measured if rivals and sum(found is winner for winner in winners) == rivals),
            None,
        )


def compare(group: Group, reference: str | None = None) -> Comparison:
    """Compare the configurations of a group with the one labelled ``reference``, and with each other.

    None means the ``mean`` coupler, else the first configuration that was measured. Holm's correction has two
    families: the comparisons with the reference, and the comparisons among the others. So each pair has one
    verdict.

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
    """Return candidate minus reference for a family of pairs; pairs without a common seed are left out."""
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
    return ComparisonRow(
        configuration,
        losses(configuration),
        losses(configuration, "test"),
        {found: over_seeds(configuration, found) for found in QUANTITIES if not found.of_model},
        {found: of_model(configuration, found) for found in QUANTITIES if found.of_model},
        against,
        cost_over_mean(configuration, group),
    )


def simple_models(group: Group) -> dict[str, float]:
    """Return the perplexity of unigram and trigram on the scored tokens, where all runs agree on it.

    Runs that were scored on other tokens (--allow-unequal) have other values, and then there is none for all.
    """
    records = [run.record for run in group.runs if run.counts]
    found = {}
    lines = {"unigram": quantities.unigram_perplexity, "trigram": quantities.trigram_perplexity}
    for name, line in lines.items():
        values = [line(record) for record in records]
        known = [value for value in values if value is not None]
        if known and len(known) == len(values) and max(known) <= min(known) * (1 + 1e-9):
            found[name] = known[0]
    return found


@dataclass(frozen=True)
class Answered:
    """One hypothesis with its answer; without an answer where no seed of the study has both sides."""

    hypothesis: Hypothesis
    better: tuple[str, ...]
    """Labels of the configurations that are better by the hypothesis."""
    than: tuple[str, ...]
    unclear: str
    """Why it cannot be answered: no flag tells some configurations apart, or nothing was measured."""
    differences: tuple[float, ...]
    """By seed: ln of the ratio of the two sides, or for ``EXPERTS`` their difference.

    Below 0 where the ``better`` side is better, or higher.
    """
    answer: Answer | None
    family: int = 1
    """The number of hypotheses that were judged together."""

    @property
    def kind(self) -> str:
        """Supported, refuted or inconclusive."""
        return "inconclusive" if self.answer is None else self.answer.kind

    def effect(self) -> tuple[float, Interval | None] | None:
        """Return the quantity of ``better`` against ``than``, with its 95% interval.

        It is their difference for ``EXPERTS``, else their ratio.
        """
        if self.answer is None:
            return None
        sign, paired, margin = _sign(self.hypothesis), self.answer.paired, _margin(self.hypothesis)
        raw = self.hypothesis.quantity in EXPERTS

        def unshifted(value: float) -> float:
            found = sign * (value - margin)
            return found if raw else exp_or_infinity(found)

        if paired.interval is None:
            return unshifted(paired.mean), None
        low, high = sorted(map(unshifted, paired.interval))
        return unshifted(paired.mean), (low, high)

    def words(self) -> str:
        """Return the answer and its evidence in a sentence."""
        found = self.effect()
        if found is None or self.answer is None:
            return f"inconclusive: {self.unclear or self._why_not()}."
        value, ends = found
        raw = self.hypothesis.quantity in EXPERTS
        digits = digits_for(max(abs(value), ends[1] - ends[0] if ends else 0)) if raw else 2
        show, quantity = signed if raw else percent, WORDS[self.hypothesis.quantity]
        unit = " nats" if raw and EXPERTS[self.hypothesis.quantity].axis.endswith(IN_NATS) else ""
        about = f" (95% interval {show(ends[0], digits)} to {show(ends[1], digits)})" if ends else ""
        sides = " against ".join(_side(labels) for labels in (self.better, self.than))
        seeds, p = counted(self.answer.paired.n, "paired seed"), p_value(self.answer.p_adjusted)
        if self.family > 1:
            p += f" of {self.family} hypotheses"
        return f"{self.kind}: {quantity} {show(value, digits)}{unit}{about}, {sides}, {seeds}, p {p}."

    def _why_not(self) -> str:
        sides = {self.hypothesis.first_key: self.better, "than": self.than}
        missing = [side for side, labels in sides.items() if not labels]
        return f"no run is selected by {' and '.join(missing)}" if missing else "no seed counts on both sides"


def answer_hypotheses(hypotheses: Sequence[Hypothesis], groups: Sequence[Group]) -> list[Answered]:
    """Answer each hypothesis from the first group that has runs on both sides; with Holm over all answers.

    If a side selects several configurations, their mean by seed counts.
    """
    found = [_evidence(hypothesis, groups) for hypothesis in hypotheses]
    shifted = [
        np.array(one.differences) + _margin(hypothesis)
        for hypothesis, one in zip(hypotheses, found, strict=True)
        if one.differences
    ]
    answers = iter(answer_claims(shifted))
    return [
        Answered(hypothesis, *one, next(answers) if one.differences else None, len(shifted))
        for hypothesis, one in zip(hypotheses, found, strict=True)
    ]


class Evidence(NamedTuple):
    """The first fields of ``Answered``."""

    better: tuple[str, ...] = ()
    than: tuple[str, ...] = ()
    unclear: str = ""
    differences: tuple[float, ...] = ()


def _evidence(hypothesis: Hypothesis, groups: Sequence[Group]) -> Evidence:
    best = Evidence()
    for group in groups:
        better, than = (_selected(flags, group) for flags in (hypothesis.better, hypothesis.than))
        ours, theirs = (_by_seed(side, hypothesis) for side in (better, than))
        differences = tuple(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))
        labels = [tuple(one.label for one in side) for side in (better, than)]
        unclear = "; ".join(filter(None, map(_unclear, (better, than))))
        if not differences:
            unclear = unclear or _unmeasured([*better, *than], hypothesis.quantity)
        found = Evidence(labels[0], labels[1], unclear, () if unclear else differences)
        if differences:
            return found
        if sum(map(bool, labels)) > sum(map(bool, best[:2])):
            best = found
    return best


def _unclear(side: Sequence[Configuration]) -> str:
    """Return in words which configurations of a side no flag tells apart; empty where there are none."""
    alike = [
        one.label for one in side if any(other is not one and other.flags == one.flags for other in side)
    ]
    return f"no flag tells {' from '.join(alike)}" if alike else ""


def _unmeasured(sides: Sequence[Configuration], quantity: str) -> str:
    """Return why runs that count lack a quantity of the experts; empty where none lacks it."""
    records = [run.record for one in sides for run in one.counted.values()] if quantity in EXPERTS else []
    found = [of_experts(record, quantity) for record in records]
    why = dict.fromkeys(value.reason for value in found if not is_measured(value))
    return f"{WORDS[quantity]} was not measured: {'; '.join(why)}" if why else ""


def _selected(flags: FlagTable, group: Group) -> list[Configuration]:
    return [found for found in group.configurations if selects(flags, _values(found))]


def _values(configuration: Configuration) -> dict[str, Any]:
    """Return the value of every flag of a configuration; a flag in no record (the preset) has its default."""
    config = configuration.runs[0].record.config
    return {**defaults(), "preset": None, **{k: v for _, fields in config for k, v in fields.items()}}


def _by_seed(side: Sequence[Configuration], hypothesis: Hypothesis) -> dict[int, float]:
    """Return the quantity by seed on the scale of the differences, where less is better; the side's mean."""
    if hypothesis.quantity == "perplexity":
        values = [losses(found).values for found in side]
    else:
        found = [over_seeds(one, ANSWERED[hypothesis.quantity]).values for one in side]
        sign, raw = _sign(hypothesis), hypothesis.quantity in EXPERTS
        values = [
            {seed: sign * (value if raw else math.log(value)) for seed, value in some.items()}
            for some in found
        ]
    seeds = set.intersection(*map(set, values)) if values else set()
    return {seed: statistics.fmean(some[seed] for some in values) for seed in seeds}


def _sign(hypothesis: Hypothesis) -> int:
    """Return −1 where the stated side has the higher value."""
    quantity = ANSWERED.get(hypothesis.quantity)
    return -1 if quantity is not None and quantity.better != "lower" else 1


def _margin(hypothesis: Hypothesis) -> float:
    """Return by how much a difference must be below 0."""
    if hypothesis.quantity in EXPERTS:
        return hypothesis.by
    return math.log1p(hypothesis.by) if _sign(hypothesis) < 0 else -math.log1p(-hypothesis.by)


def _side(labels: Sequence[str]) -> str:
    few = ", ".join(labels) if len(labels) <= MOST_NAMED else f"{len(labels)} configurations"
    return few if len(labels) == 1 else f"the mean of {few}"
