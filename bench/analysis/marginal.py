"""What a coupler costs: its model beside the same model with the mean coupler."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from bench.analysis import quantities
from bench.analysis.over_seeds import Interval, Summary, summary
from bench.analysis.quantities import exp_or_infinity
from bench.measure.rates import difference_of_medians, paired_ratios
from bench.record import Record, is_measured
from bench.study.labels import OF_HYPERGRAPHS
from bench.study.runs import Configuration, Group, Run

OF_COUPLERS = {*OF_HYPERGRAPHS, "coupler_type", "coupler_option", "coupler_options", "gnn_layers", "ffn_dim"}
"""Settings in which a model may differ from the same model with the mean coupler."""


@dataclass(frozen=True)
class CostOverMean:
    """What a configuration costs beside the same model with the mean coupler.

    Where every run timed both models in turn (``--marginal``), these are the figures; else those of the
    separate runs of a mean configuration.
    """

    mean: Configuration | None
    """The separate runs with the mean coupler; None where there are none, and both were timed in turn."""
    in_turn: bool
    log_step_time_ratio: Summary
    """ln of the step time over the mean coupler's, by seed: the median of the rounds' ratios where timed in
    turn, else the ratio of the medians."""
    added_seconds: Summary
    """Median step less the mean coupler's, by seed."""
    memory_bytes: float | None
    parameters: float | None
    flops_per_token: float | None
    """Of training."""

    @property
    def over(self) -> str:
        """What it is beside."""
        return "the mean coupler, in turn" if self.in_turn or self.mean is None else self.mean.label

    def step_time_ratio(self) -> float | None:
        """Return the geometric mean over seeds of the ratio of step times, None where not measured."""
        mean = self.log_step_time_ratio.mean
        return None if mean is None else exp_or_infinity(mean)

    def step_time_interval(self) -> Interval | None:
        """Return the 95 % t interval of the ratio (of its logarithm), None for fewer than two seeds."""
        found = self.log_step_time_ratio.interval
        return None if found is None else (exp_or_infinity(found[0]), exp_or_infinity(found[1]))


def any_measured(configuration: Configuration) -> Record | None:
    """Return a record that tells the size of the model; failed runs can tell it too."""
    runs: list[Run] = [*configuration.counted.values(), *configuration.runs]
    return next((run.record for run in runs if is_measured(run.record.parameters)), None)


def training_flops(record: Record | None) -> float | None:
    """Return the FLOPs a token of a training step, None where they were not counted."""
    if record is None or not is_measured(record.flops):
        return None
    return record.flops.training_flops_per_token


def cost_over_mean(configuration: Configuration, group: Group) -> CostOverMean | None:
    """Return what a configuration costs beside its mean coupler; None for that one, or without one."""
    means = [other for other in group.configurations
             if other.coupler == "mean" and _same_model(other, configuration)]  # fmt: skip
    mean = next((other for other in means if other.counted), means[0] if means else None)
    found = _in_turn(configuration, mean)
    if found is not None or mean is None or mean is configuration:
        return found
    ours, theirs = (summary(one, quantities.median_step_seconds).values for one in (configuration, mean))
    pairs = {seed: (ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}
    ratio = Summary({seed: math.log(one / other) for seed, (one, other) in pairs.items()})
    added = Summary({seed: one - other for seed, (one, other) in pairs.items()})
    memory = [summary(one, quantities.peak_memory_bytes).mean for one in (configuration, mean)]
    records = [any_measured(one) for one in (configuration, mean)]
    sizes = [record.parameters.total if record and is_measured(record.parameters) else None
             for record in records]  # fmt: skip
    flops = [training_flops(record) for record in records]
    return CostOverMean(mean, False, ratio, added, *(_less(*pair) for pair in (memory, sizes, flops)))


def _in_turn(configuration: Configuration, mean: Configuration | None) -> CostOverMean | None:
    """Return the cost by what each run timed itself; None unless every one did."""
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
        mean, True, Summary(ratio), Summary(added),
        statistics.fmean(memory) if len(memory) == len(peaks) else None,
        first.parameters, first.training_flops_per_token,
    )  # fmt: skip


def _less(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs


def _same_model(one: Configuration, other: Configuration) -> bool:
    names = (one.flags.keys() | other.flags.keys()) - OF_COUPLERS
    return all(one.flags.get(name) == other.flags.get(name) for name in names)
