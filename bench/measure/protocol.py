"""How anything is timed here: a warm-up, then every step by itself, with nothing read back in between.

On CUDA an event before and after each step, and one wait at the end; elsewhere a clock. All times are
kept. Two things are compared by timing them in turn in one process, never by two absolute times. In turn,
each begins on an idle device: else the work of one would hide how long the host takes to launch the next.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from bench.measure.rates import tokens_per_second as tokens_per_second

Step = Callable[[int], object]
"""One step, given its number; warm-up steps are numbered 0, 1, …, timed ones go on from there."""
Agree = Callable[[float], float]
"""Makes one number of those of several ranks, so that all of them warm up equally long."""

WINDOW_STEPS, MOST_WARMUP_STEPS, TOLERANCE = 10, 50, 0.02
CUDA_SIZES, CPU_SIZES = (4096, 8192), (512, 1024, 2048, 4096)  # rows of the matrices of ``matrix_rate``
MOST_PRODUCT_SECONDS = 1.0
CUDA_COPY_BYTES, CPU_COPY_BYTES = 2**30, 2**28  # well beyond any cache


@dataclass(frozen=True)
class Warmup:
    """The steps before the timed ones: ``most``, or fewer where they become ``steady`` earlier."""

    most: int
    until_steady: bool = False

    @classmethod
    def fixed(cls, steps: int) -> Warmup:
        """Return a warm-up of so many steps, after which nobody knows whether they are steady."""
        return cls(steps)

    @classmethod
    def steady(cls) -> Warmup:
        """Return a warm-up until the median of ten steps moves by less than 2 %, of at most 50 steps."""
        return cls(MOST_WARMUP_STEPS, until_steady=True)


@dataclass(frozen=True)
class StepTimes:
    """The seconds of each timed step, and how the warm-up before them went."""

    seconds: list[float]
    warmup_seconds: list[float]
    steady: bool
    moved: float | None
    """By which share the median of ten steps moved at the end of the warm-up; None where not looked at."""

    @property
    def warmup_steps(self) -> int:
        """How many steps the warm-up had."""
        return len(self.warmup_seconds)

    @property
    def median(self) -> float:
        """The median of the timed steps in seconds."""
        return statistics.median(self.seconds)

    @property
    def remark(self) -> str:
        """What to know about the warm-up, in words."""
        if self.moved is None:
            return "not steady: a fixed, short warm-up"
        words = f"after {self.warmup_steps} steps of warm-up the median of {WINDOW_STEPS} moved by"
        return f"{'steady' if self.steady else 'not steady'}: {words} {self.moved:.1%}"


def time_steps(
    step: Step,
    *,
    device: torch.device,
    warmup: Warmup,
    steps: int,
    agree: Agree = float,
) -> StepTimes:
    """Warm up and time ``steps`` calls of ``step``, each by itself."""
    return _time({"": step}, device, warmup, steps, agree, idle=False)[""]


def time_in_turn(
    steps: Mapping[str, Step],
    *,
    device: torch.device,
    warmup: Warmup,
    rounds: int,
    agree: Agree = float,
) -> dict[str, StepTimes]:
    """Warm up each by itself, then time them in turn: ``rounds`` rounds of one step of each.

    Every other round goes backwards, so that a machine that slows down slows all of them alike. The
    times of one round belong together (``bench.measure.rates.paired_ratios``). Each step begins on an idle
    device. ``agree``: see ``Agree``.
    """
    return _time(steps, device, warmup, rounds, agree, idle=True)


def _time(
    steps: Mapping[str, Step],
    device: torch.device,
    warmup: Warmup,
    rounds: int,
    agree: Agree,
    *,
    idle: bool,
) -> dict[str, StepTimes]:
    assert rounds > 0
    assert steps
    warmed = {name: _warm_up(step, device, warmup, agree) for name, step in steps.items()}
    there = list(steps)
    order = [(name, number) for number in range(rounds) for name in there[:: -1 if number % 2 else 1]]
    calls = [(steps[name], len(warmed[name][0]) + number) for name, number in order]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    found = _seconds(calls, device, idle)
    for (name, _), value in zip(order, found, strict=True):
        seconds[name].append(value)
    return {name: StepTimes(seconds[name], *warmed[name]) for name in steps}


def _warm_up(
    step: Step, device: torch.device, warmup: Warmup, agree: Agree
) -> tuple[list[float], bool, float | None]:
    """Return the seconds of the warm-up's steps, whether they are steady, and the last move."""
    if not warmup.until_steady:
        return _seconds([(step, number) for number in range(warmup.most)], device), False, None
    seconds: list[float] = []
    median, moved = None, None
    while len(seconds) < warmup.most and (moved is None or moved >= TOLERANCE):
        numbers = range(len(seconds), len(seconds) + WINDOW_STEPS)
        window = _seconds([(step, number) for number in numbers], device)
        seconds += window
        before, median = median, statistics.median(window)
        moved = None if before is None else agree(abs(median / before - 1))
    assert moved is not None
    return seconds, moved < TOLERANCE, moved


def _seconds(calls: Sequence[tuple[Step, int]], device: torch.device, idle: bool = False) -> list[float]:
    """Return the seconds of each call; where ``idle``, each begins when the device has nothing to do."""
    if device.type == "cuda":
        return _by_events(calls, device, idle)
    seconds = []
    for step, number in calls:
        start = perf_counter()
        step(number)
        if device.type == "mps":
            torch.mps.synchronize()
        seconds.append(perf_counter() - start)
    return seconds


def _by_events(calls: Sequence[tuple[Step, int]], device: torch.device, idle: bool) -> list[float]:
    """Return the seconds between the events around each call; the host waits at the end, or for ``idle``."""
    stream = torch.cuda.current_stream(device)
    events = []
    torch.cuda.synchronize(device)
    for step, number in calls:
        if idle:
            torch.cuda.synchronize(device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        step(number)
        after.record(stream)
        events.append((before, after))
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the most FLOP/s that a square matrix product of ``dtype`` reaches here and now.

    2·n³ FLOPs over the median time, as the process's settings (tf32, threads) have it; the best of several
    sizes, since which one is the fastest depends on the processor. Sizes of which one product would take
    more than a second, by the one before, are left out.
    """
    rates: list[float] = []
    for size in CUDA_SIZES if device.type == "cuda" else CPU_SIZES:
        flops = 2 * size**3
        if rates and flops / rates[-1] > MOST_PRODUCT_SECONDS:
            break
        rates.append(flops / _product_seconds(size, device, dtype))
    return max(rates)


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator(device).manual_seed(0)  # zeros would draw less power and run faster
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return time_steps(
        lambda _: torch.mm(left, right, out=out), device=device, warmup=Warmup.fixed(1), steps=5
    ).median


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes/s of a large copy within the device's memory, read and written, by the median."""
    count = CUDA_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = time_steps(lambda _: target.copy_(source), device=device, warmup=Warmup.fixed(5), steps=15)
    return 2 * count / times.median
