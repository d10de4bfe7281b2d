"""The pure search (A5, A7, B2 to B6, B11): which sizes are tried, and what is answered."""

from __future__ import annotations

import json
import pickle
import random
from dataclasses import asdict
from itertools import product

import pytest
import torch

from bench.config import MemoryConfig
from bench.training.ranks import ALONE
from bench.tune.find import largest_allowed, limit_of
from bench.tune.search import (
    Found,
    NoFeasibleBatch,
    Shape,
    Trial,
    concluded,
    divisors,
    ladder,
    search,
)

pytestmark = pytest.mark.core("batch_size")
MODES = ("power", "binsearch")
ENOUGH, LENGTH = 100, 7


class Device:
    """What fits up to ``limit``; remembers what was tried."""

    def __init__(self, limit: int, seconds: float = 0.0) -> None:
        self.limit, self.seconds, self.now = limit, seconds, 0.0
        self.tried: list[int] = []

    def __call__(self, shape: Shape) -> Trial:
        size = shape.rows
        self.tried.append(size)
        self.now += self.seconds * size
        failure = None if size <= self.limit else "out of memory"
        return Trial(shape, failure, measured_peak_bytes=100 * size, seconds=self.seconds * size)


def rungs(cap: int, among=None) -> list[Shape]:
    return ladder([LENGTH], [size for size in among or range(1, cap + 1) if size <= cap])


def found(device: Device, cap: int, among=None, **settings) -> Found:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.tune.search.monotonic", lambda: device.now)
        return search(device, rungs(cap, among), **{"max_trials": ENOUGH, **settings})


def knee(trials: list[Trial]) -> int | None:
    return concluded(trials, rungs(1), "cap").knee


def of(size: int, *arguments, **settings) -> Trial:
    return Trial(Shape(size, LENGTH), *arguments, **settings)


@pytest.mark.parametrize(
    ("limit", "start", "cap", "tried", "answer"),
    [
        (100, 3, 10_000, [3, 6, 12, 24, 48, 96, 192], (96, "limit")),
        (5, 32, 10_000, [32, 16, 8, 4], (4, "limit")),
        (10_000, 3, 100, [3, 6, 12, 24, 48, 96], (96, "cap")),
    ],
)
def test_b2_power_tries_doubles_or_halves_never_above_the_cap(limit, start, cap, tried, answer):
    device = Device(limit)
    result = found(device, mode="power", start=start, cap=cap)
    assert device.tried == tried
    assert (result.shape.rows, result.stopped) == answer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [range(1, 16), range(1, 65), divisors(48), divisors(7)], ids=len)
def test_b3_b4_b5_b13_at_every_limit_init_and_number_of_trials(mode, sizes):
    """The answer is the largest that ran; with enough trials a bisection finds the largest that fits."""
    for limit, init, max_trials in product(range(1, sizes[-1] + 3), (1, 2, 7, 16, 48), (1, 2, 4, ENOUGH)):
        if init not in sizes:
            continue
        device = Device(limit)
        try:
            result = found(device, sizes[-1], sizes, mode=mode, start=init, max_trials=max_trials)
        except NoFeasibleBatch:
            assert all(size > limit for size in device.tried)
        else:
            assert result.shape.rows in [trial.shape.rows for trial in result.trials if trial.ran]
            assert result.shape.rows == max(size for size in device.tried if size <= limit)
            if (mode, max_trials) == ("binsearch", ENOUGH):
                assert result.shape.rows == max(size for size in sizes if size <= limit), (limit, init)
                assert result.stopped == ("cap" if limit >= sizes[-1] else "limit")
        assert device.tried[0] == init, "the first trial is init_val"
        assert len(device.tried) == len(set(device.tried)) <= max_trials, "no size is tried twice"
        assert set(device.tried) <= set(sizes)


@pytest.mark.parametrize("mode", MODES)
def test_b5_nothing_fits_names_the_smallest_peak_and_what_to_lower(mode):
    device = Device(limit=0)
    with pytest.raises(NoFeasibleBatch) as failure:
        found(device, mode=mode, start=8, cap=64)
    assert device.tried[-1] == 1, "down to the smallest, and not 0"
    for part in ("no batch fits", "out of memory", "smallest peak seen: 0.0 MiB", "lower max_seq_length"):
        assert part in str(failure.value)
    assert "was not tried" not in str(failure.value)
    with pytest.raises(NoFeasibleBatch, match="1 was not tried: raise --tune-max-trials"):
        found(Device(limit=0), mode=mode, start=64, cap=64, max_trials=2)
    again = pickle.loads(pickle.dumps(failure.value))  # it crosses processes
    assert (str(again), again.trials) == (str(failure.value), failure.value.trials)


def test_b6_no_trial_is_begun_that_would_not_end_in_time():
    device = Device(limit=1000, seconds=1.0)
    result = found(device, mode="power", start=1, cap=1000, max_seconds=20.0)
    assert device.tried == [1, 2, 4, 8], "16 more seconds would make 31"
    assert (result.shape.rows, result.stopped) == (8, "max_seconds")
    device = Device(limit=1000, seconds=100.0)
    assert found(device, start=1, cap=1000, max_seconds=20.0).shape.rows == 1, "one trial there always is"


def test_a5_the_cap_is_the_user_s_maximum_and_enough_updates_in_the_smallest_epoch():
    assert largest_allowed(None, epoch_samples=100, min_steps=10) == 10
    assert largest_allowed(8, epoch_samples=100, min_steps=10) == 8
    assert largest_allowed(64, epoch_samples=100, min_steps=10) == 10
    assert largest_allowed(None, epoch_samples=100, min_steps=10, world_size=2) == 5
    with pytest.raises(ValueError, match="serves 9 blocks, too few for 10 updates"):
        largest_allowed(None, epoch_samples=9, min_steps=10)


def test_a7_the_safety_factor_is_applied_once():
    memory = MemoryConfig(tune_batch_size=True, memory_budget="1000000B", memory_target=0.85)
    budget, limit = limit_of(memory, torch.device("cpu"), ALONE)
    assert (budget, limit) == (1_000_000, 850_000)

    def trial(shape):
        peak = shape.rows * 10_000
        return Trial(shape, None if peak <= limit else "too much", measured_peak_bytes=peak)

    assert search(trial, rungs(1000), max_trials=ENOUGH).shape.rows == 85, "not 72, which is 0.85 twice"


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({1: 10, 2: 20, 4: 40, 8: 80}, 8), ({1: 100, 2: 100, 4: 100}, 1), ({1: 100, 2: 90, 4: 50}, 1),
        ({1: 50, 2: 80, 4: 96, 8: 99, 16: 100}, 4), ({1: 50, 2: 97, 4: 94, 8: 100, 16: 96}, 2),
        ({1: 94.9, 2: 100}, 2), ({1: 95.0, 2: 100}, 1),
    ],
)  # fmt: skip
def test_b11_the_knee_is_the_smallest_size_within_five_percent_of_the_best(curve, expected):
    failed = of(64, "too much", tokens_per_second=1000.0)
    trials = [failed, *(of(size, tokens_per_second=speed) for size, speed in curve.items())]
    random.Random(0).shuffle(trials)
    assert knee(trials) == expected
    assert knee([of(1), failed]) is None


def test_every_trial_is_kept_and_survives_the_record():
    device = Device(limit=20)
    result = found(device, start=8, cap=64)
    assert [trial.shape.rows for trial in result.trials] == device.tried
    assert {trial.failure for trial in result.trials} == {None, "out of memory"}
    assert Found.from_json(json.loads(json.dumps(asdict(result)))) == result


def test_b6_a_trial_that_was_not_run_says_nothing_of_the_time_of_the_next(monkeypatch):
    """B6: 128 was predicted away in no time; 96 would take half again as long as 64 did."""
    now = [0.0]
    monkeypatch.setattr("bench.tune.search.monotonic", lambda: now[0])

    def trial(shape: Shape) -> Trial:
        if shape.rows == 128:
            now[0] += 0.05
            return Trial(shape, "not run: far above the limit", seconds=0.05)
        now[0] += 60.0
        return Trial(shape, seconds=60.0, micro_steps=4)

    result = search(trial, rungs(128), start=64, max_trials=9, max_seconds=110.0)
    assert (result.shape.rows, result.stopped) == (64, "max_seconds")
    assert now[0] < 110


def test_b8_what_another_moment_might_better_is_not_kept():
    fits = of(4, micro_steps=4, seconds=1.0)
    short = of(8, "not run: only 1.0 MiB are free here")
    large = of(8, "not run: far above 2.0 MiB")
    limit, again = (Found(fits.shape, "limit", (fits, other)) for other in (large, short))
    late = Found(fits.shape, "max_seconds", (fits,))
    assert [result.of_the_moment for result in (limit, again, late)] == [False, True, True]
