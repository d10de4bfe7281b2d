"""Hypotheses answered: what was stated before the runs, against their records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench.analysis import quantities
from bench.analysis.numbers import Interval, counted, p_value, percent
from bench.analysis.over_seeds import losses, summary
from bench.analysis.quantities import exp_or_infinity
from bench.analysis.statistics import Answer, answer_claims
from bench.analysis.study import Configuration, Group
from bench.config import FlagTable, defaults
from bench.sweeps.hypotheses import Hypothesis, selects

MOST_NAMED = 4
THROUGHPUT = "tokens_per_second"
WORDS = {"perplexity": "perplexity", THROUGHPUT: "tokens/s", "peak_memory": "peak memory of a step"}


@dataclass(frozen=True)
class Answered:
    """One hypothesis with its answer; without one where no seed of the study has both sides."""

    hypothesis: Hypothesis
    better: tuple[str, ...]
    """Labels of the configurations that are said to be better."""
    than: tuple[str, ...]
    unclear: str
    """Why it is not answered, in words: a side selects rows that no flag tells apart. Else empty."""
    differences: tuple[float, ...]
    """By seed: ln of the ratio of the two sides, less where the hypothesis' better side is better."""
    answer: Answer | None
    family: int = 1
    """How many hypotheses were judged together."""

    @property
    def kind(self) -> str:
        """Supported, refuted or inconclusive."""
        return "inconclusive" if self.answer is None else self.answer.kind

    def ratio(self) -> tuple[float, Interval | None] | None:
        """Return the ratio of the quantity, better over than, with its 95 % interval."""
        if self.answer is None:
            return None
        sign = -1 if self.hypothesis.quantity == THROUGHPUT else 1
        paired, margin = self.answer.paired, _margin(self.hypothesis)
        value = exp_or_infinity(sign * (paired.mean - margin))
        if paired.interval is None:
            return value, None
        low, high = sorted(exp_or_infinity(sign * (end - margin)) for end in paired.interval)
        return value, (low, high)

    def words(self) -> str:
        """Return the answer and its evidence in a sentence."""
        found = self.ratio()
        if found is None or self.answer is None:
            return f"inconclusive: {self.unclear or self._why_not()}."
        ratio, ends = found
        about = f" (95 % interval {percent(ends[0], 2)} to {percent(ends[1], 2)})" if ends else ""
        quantity = WORDS[self.hypothesis.quantity]
        sides = " against ".join(_side(labels) for labels in (self.better, self.than))
        seeds, p = counted(self.answer.paired.n, "paired seed"), p_value(self.answer.p_adjusted)
        if self.family > 1:
            p += f" of {self.family} hypotheses"
        return f"{self.kind}: {quantity} {percent(ratio, 2)}{about}, {sides}, {seeds}, p {p}."

    def _why_not(self) -> str:
        sides = {"better": self.better, "than": self.than}
        missing = [side for side, labels in sides.items() if not labels]
        return f"no run is selected by {' and '.join(missing)}" if missing else "no seed counts on both sides"


def answer_hypotheses(hypotheses: Sequence[Hypothesis], groups: Sequence[Group]) -> list[Answered]:
    """Answer hypotheses from the first group that has runs on both sides; Holm over all that are answered.

    Where a side selects several configurations, their mean by seed counts.
    """
    found = [_evidence(hypothesis, groups) for hypothesis in hypotheses]
    shifted = [np.array(one.differences) + _margin(hypothesis)
               for hypothesis, one in zip(hypotheses, found, strict=True) if one.differences]  # fmt: skip
    answers = iter(answer_claims(shifted))
    return [Answered(hypothesis, *one, next(answers) if one.differences else None, len(shifted))
            for hypothesis, one in zip(hypotheses, found, strict=True)]  # fmt: skip


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
        ours, theirs = (_by_seed(side, hypothesis.quantity) for side in (better, than))
        differences = tuple(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))
        labels = [tuple(one.label for one in side) for side in (better, than)]
        unclear = "; ".join(filter(None, map(_unclear, (better, than))))
        found = Evidence(labels[0], labels[1], unclear, () if unclear else differences)
        if differences:
            return found
        if sum(map(bool, labels)) > sum(map(bool, best[:2])):
            best = found
    return best


def _unclear(side: Sequence[Configuration]) -> str:
    """Return, in words, which rows of a side no flag tells apart, so that it cannot mean one of them."""
    alike = [one.label for one in side
             if any(other is not one and other.settings == one.settings for other in side)]  # fmt: skip
    return f"no flag tells {' from '.join(alike)}" if alike else ""


def _selected(flags: FlagTable, group: Group) -> list[Configuration]:
    return [found for found in group.configurations if selects(flags, _values(found))]


def _values(configuration: Configuration) -> dict[str, Any]:
    """Return the value of every flag of a configuration; what no record says (the preset) is the default."""
    config = configuration.runs[0].record.config
    return {**defaults(), "preset": None, **{k: v for _, fields in config for k, v in fields.items()}}


def _by_seed(side: Sequence[Configuration], quantity: str) -> dict[int, float]:
    """Return the mean by seed of a side's losses, of −ln(tokens/s) or ln(bytes), over the seeds all have."""
    if quantity == "perplexity":
        values = [losses(found).values for found in side]
    else:
        reading, sign = (quantities.tokens_per_second, -1) if quantity == THROUGHPUT else (
            quantities.peak_memory_bytes, 1)  # fmt: skip
        found = [summary(one, reading).values for one in side]
        values = [{seed: sign * math.log(value) for seed, value in some.items()} for some in found]
    seeds = set.intersection(*map(set, values)) if values else set()
    return {seed: statistics.fmean(some[seed] for some in values) for seed in seeds}


def _margin(hypothesis: Hypothesis) -> float:
    """Return by how much ln of the ratio must be below 0."""
    share = hypothesis.by
    return math.log1p(share) if hypothesis.quantity == THROUGHPUT else -math.log1p(-share)


def _side(labels: Sequence[str]) -> str:
    few = ", ".join(labels) if len(labels) <= MOST_NAMED else f"{len(labels)} configurations"
    return few if len(labels) == 1 else f"the mean of {few}"
