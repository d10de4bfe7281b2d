"""One quantity of a configuration over the seeds that count."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench.analysis import quantities
from bench.analysis.numbers import Interval
from bench.analysis.significance import t_interval
from bench.record import Record
from bench.study.runs import Configuration


@dataclass(frozen=True)
class Summary:
    """One quantity over the seeds that count: values by seed, mean, deviation and 95 % t interval."""

    values: dict[int, float]

    @property
    def n(self) -> int:
        """How many seeds were measured."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """The mean, None where nothing was measured."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def standard_deviation(self) -> float | None:
        """The sample's standard deviation, None for fewer than two seeds."""
        return statistics.stdev(self.values.values()) if self.n > 1 else None

    @property
    def interval(self) -> Interval | None:
        """The 95 % t interval of the mean, None for fewer than two seeds."""
        return t_interval(list(self.values.values()))


def summary(configuration: Configuration, quantity: Callable[[Record], float | None]) -> Summary:
    """Return a quantity of the runs that count, by seed; seeds without it are left out."""
    values = {seed: quantity(run.record) for seed, run in configuration.counted.items()}
    return Summary({seed: value for seed, value in values.items() if value is not None})


def losses(configuration: Configuration, split: str = "validation") -> Summary:
    """Return the losses of the runs that count, in nats by seed."""
    values = {seed: run.loss(split) for seed, run in configuration.counted.items()}
    return Summary({seed: value for seed, value in values.items() if value is not None})


def unknown_words(configuration: Configuration, split: str = "validation") -> float | None:
    """Return the share of the scored tokens that are ``<unk>`` in place of another word."""
    return summary(configuration, lambda record: quantities.unknown_words_share(record, split)).mean
