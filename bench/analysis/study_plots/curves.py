"""Histories of a configuration's seeds as arrays. Letters: S seeds, T steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy.signal import lfilter

from bench.analysis.training_figure import smoothing_span
from bench.study.run_files import Row
from bench.study.runs import Configuration

MOST_STEPS = 400  # drawn and listed; of more, evenly chosen ones


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps that all seeds have."""

    seeds: tuple[int, ...]
    steps_T: np.ndarray
    values_ST: np.ndarray

    @property
    def mean_T(self) -> np.ndarray:
        """The mean over seeds; not finite where a seed's value is not."""
        with np.errstate(invalid="ignore"):
            return self.values_ST.mean(axis=0)

    @property
    def deviation_T(self) -> np.ndarray | None:
        """The sample's standard deviation over seeds, None for one seed."""
        if len(self.seeds) < 2:
            return None
        with np.errstate(invalid="ignore"):
            return self.values_ST.std(axis=0, ddof=1)

    def smoothed(self) -> Curve:
        """Return each seed's exponential average, as ``training_figure.smooth``.

        A value that is no number is passed over and leaves a gap.
        """
        keep = 1 - 2 / (smoothing_span(len(self.steps_T)) + 1)
        finite_ST = np.isfinite(self.values_ST)
        sums_ST, weights_ST = (lfilter([1.0], [1.0, -keep], values_ST, axis=1) for values_ST in (
            np.where(finite_ST, self.values_ST, 0.0), finite_ST.astype(float)))  # fmt: skip
        smooth_ST = np.divide(sums_ST, weights_ST, out=np.full_like(self.values_ST, np.nan), where=finite_ST)
        return Curve(self.seeds, self.steps_T, smooth_ST)

    def thinned(self) -> Curve:
        """Return at most ``MOST_STEPS`` steps, the first and the last among them."""
        steps = len(self.steps_T)
        if steps <= MOST_STEPS:
            return self
        chosen = np.unique(np.linspace(0, steps - 1, MOST_STEPS).round().astype(int))
        return Curve(self.seeds, self.steps_T[chosen], self.values_ST[:, chosen])

    def less(self, other: Curve) -> Curve | None:
        """Return the paired difference over the seeds and the steps that both have; None without any."""
        seeds = [seed for seed in self.seeds if seed in other.seeds]
        steps_T = np.intersect1d(self.steps_T, other.steps_T)
        if not seeds or not len(steps_T):
            return None
        ours, theirs = (one.at(seeds, steps_T) for one in (self, other))
        with np.errstate(invalid="ignore"):
            return Curve(tuple(seeds), steps_T, ours - theirs)

    def at(self, seeds: Sequence[int], steps_T: np.ndarray) -> np.ndarray:
        """Return the values of some seeds at some steps, which it has."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return self.values_ST[rows][:, np.isin(self.steps_T, steps_T)]

    def means(self) -> dict[int, float]:
        """Return step → mean over seeds."""
        return dict(zip(self.steps_T.tolist(), self.mean_T.tolist(), strict=True))


def training_curve(configuration: Configuration, key: str) -> Curve | None:
    """Return a quantity of the training steps over the runs that count, None without a history."""
    return _curve(configuration, lambda run: run.train, lambda row: row[key])


def validation_curve(configuration: Configuration) -> Curve | None:
    """Return the validation loss in nats over the runs that count, None without an evaluation."""
    return _curve(configuration, lambda run: run.validation, lambda row: row["nll_sum"] / row["tokens"])


def _curve(configuration: Configuration, rows_of: Callable, value: Callable[[Row], float]) -> Curve | None:
    rows = {seed: rows_of(run.data) for seed, run in configuration.counted.items()}
    rows = {seed: found for seed, found in rows.items() if found}
    steps = [[row["step"] for row in found] for found in rows.values()]
    if not steps:
        return None
    values = [np.array([value(row) for row in found], dtype=float) for found in rows.values()]
    common_T = np.array(steps[0])
    if any(other != steps[0] for other in steps):
        common_T = _common(steps)
        values = [one[np.isin(own, common_T)] for one, own in zip(values, steps, strict=True)]
    return Curve(tuple(rows), common_T, np.stack(values)) if len(common_T) else None


def _common(steps: Sequence[Sequence[int]]) -> np.ndarray:
    return reduce(np.intersect1d, map(np.array, steps))
