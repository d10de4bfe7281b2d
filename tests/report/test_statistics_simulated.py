"""How often the verdicts and intervals err, in made studies whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.report.statistics import bca_interval, compare_family, t_interval


def slow(*cases) -> list:
    return [pytest.param(*values, marks=pytest.mark.slow) for values in cases]


DEVIATION = 0.01  # of a paired difference, in nats: as in the pilot


def kinds(studies: int, seeds: int, comparisons: int, effect: float, deviation=DEVIATION) -> np.ndarray:
    """Return the verdicts of made studies, (studies, comparisons).

    All couplers of a study share a reference and its noise; the first differs from it by ``effect``.
    """
    random = np.random.default_rng([seeds, comparisons, round(abs(effect) * 1e4)])
    losses = random.normal(0, deviation / math.sqrt(2), size=(studies, comparisons + 1, seeds))
    losses[:, 1] += effect
    differences = losses[:, 1:] - losses[:, :1]
    return np.array(
        [[verdict.kind for _, _, verdict in compare_family(list(study))] for study in differences]
    )


def three_errors(rate: float, trials: int) -> float:
    return 3 * math.sqrt(rate * (1 - rate) / trials)


@pytest.mark.parametrize(("seeds", "comparisons"), [(6, 1), *slow((8, 5), (10, 5))])
def test_a_study_without_differences_finds_one_in_twenty_at_most(seeds, comparisons):
    studies = 300
    found = np.isin(kinds(studies, seeds, comparisons, 0.0), ["better", "worse"]).any(axis=1).mean()
    assert 0 < found <= 0.05 + three_errors(0.05, studies)


@pytest.mark.parametrize(("seeds", "low", "high"), [(5, 0, 0), *slow((8, 0.95, 1), (10, 0.98, 1))])
def test_a_difference_three_times_the_noise_is_found_once_the_seeds_allow_it(seeds, low, high):
    """Five seeds have a p of 2/32 at least: five comparisons would need 8."""
    first = kinds(200, seeds, 5, -0.03)[:, 0]
    assert low <= (first == "better").mean() <= high
    assert not (first == "worse").any()


@pytest.mark.slow
@pytest.mark.parametrize("deviation", [0.01, *slow((0.004,))])
def test_a_difference_of_the_minimum_effect_is_rarely_called_equivalent(deviation):
    studies = 600
    wrong = (kinds(studies, 8, 1, 0.01, deviation) == "equivalent").mean()
    assert wrong <= 0.05 + three_errors(0.05, studies)
    same = kinds(200, 10, 1, 0.0, 0.004)
    assert (same == "equivalent").mean() > 0.9  # and no difference at all mostly is


@pytest.mark.parametrize("seeds", [5, *slow((10,))])
def test_how_often_an_interval_holds_the_mean(seeds):
    samples = np.random.default_rng(seeds).normal(size=(2000, seeds))

    def coverage(intervals) -> float:
        return float(np.mean([low <= 0 <= high for low, high in intervals]))

    assert coverage(map(t_interval, samples)) == pytest.approx(0.95, abs=three_errors(0.95, 2000))
    few = coverage(bca_interval(sample, resamples=499) for sample in samples[:300])
    assert 0.80 <= few < 0.95  # fewer than it says
