"""The measuring protocol with made-up clocks: what is timed, when it is steady, and how rates are formed."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from bench.measure.rates import over_the_rate, paired_ratios, tokens_per_second, utilisation
from bench.measure.timing import (
    StepTimes,
    WarmupSteps,
    copy_bandwidth,
    matrix_rate,
    products_beside,
    time_in_turn,
    time_steps,
)
from gnnmoe.config import GNNMoEConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CLOCK = "bench.measure.timing.perf_counter"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


class FakeTime:
    """A clock that only steps move, by ``of(number)`` seconds each."""

    def __init__(self, of) -> None:
        self.of, self.now, self.numbers = of, 0.0, []

    def step(self, number: int) -> None:
        self.numbers.append(number)
        self.now += self.of(number)

    def clock(self) -> float:
        return self.now

    def times(self, warmup: WarmupSteps, steps: int = 4) -> StepTimes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CLOCK, self.clock)
            return time_steps(self.step, device=CPU, warmup=warmup, steps=steps)


def test_tokens_a_second_count_each_step_by_its_time():
    tokens, seconds = [10, 1000, 3], [0.1, 4.0, 0.7]
    rate = tokens_per_second(tokens, seconds)
    assert rate == pytest.approx(1013 / 4.8)
    assert tokens_per_second([64] * 3, [0.5] * 3) == 128.0, "not that times the steps"


@pytest.mark.parametrize(
    ("tokens", "seconds"), [([64, 64], [1.0]), ([192], [1.0] * 3), ([], []), ([1], [0.0])]
)
def test_no_rate_of_numbers_that_are_no_pairs_or_took_no_time(tokens, seconds):
    with pytest.raises(ValueError, match=r"no pairs|no rate"):
        tokens_per_second(tokens, seconds)


def test_utilisation_over_one_hundred_per_cent_has_a_remark():
    assert utilisation(30e12, 60e12) == 0.5
    assert not over_the_rate(1.0)
    assert over_the_rate(utilisation(63e12, 60e12)).startswith("MFU 105.0%: ")


def test_a_fixed_warm_up_is_outside_the_clock():
    fake = FakeTime(lambda number: 100.0 if number < 3 else 1.0 + number)
    times = fake.times(3)
    assert fake.numbers == list(range(7))
    assert times.seconds == [4.0, 5.0, 6.0, 7.0]
    assert times.warmup_seconds == [100.0] * 3
    assert (times.warmup.warmup_steps, times.steady, times.moved) == (3, False, None)
    assert times.warmup.remark == "not steady: the warm-up was fixed to 3 steps"


def test_steady_steps_are_found_after_two_windows_of_which_one_slow_step_moves_no_median():
    times = FakeTime(lambda number: 9.0 if number in (0, 14) else 1.0).times("auto")
    assert (times.warmup.warmup_steps, times.steady, times.moved) == (20, True, 0.0)
    assert str(times.warmup.remark).startswith("steady: after 20 warm-up steps")


def test_drifting_steps_are_warmed_up_until_they_settle():
    """10 a window: 2, 1.5, 1.2, then 1.19: the move from 1.2 to 1.19 is the first below 2 %."""
    levels = [2.0, 1.5, 1.2, 1.19]
    fake = FakeTime(lambda number: levels[min(number // 10, 3)])
    times = fake.times("auto")
    assert (times.warmup.warmup_steps, times.steady) == (40, True)
    assert times.moved == pytest.approx(1 - 1.19 / 1.2)
    assert times.seconds == pytest.approx([1.19] * 4)
    assert fake.numbers == list(range(44))


@pytest.mark.parametrize("growth", [1.03, 1 / 1.03])
def test_what_never_settles_is_timed_after_fifty_steps_and_marked(growth):
    times = FakeTime(lambda number: growth ** (number // 10)).times("auto")
    assert (times.warmup.warmup_steps, times.steady) == (50, False)
    assert times.moved == pytest.approx(abs(growth - 1))
    assert str(times.warmup.remark).startswith(
        "not steady: after 50 warm-up steps, the median of 10 steps still "
    )


@pytest.mark.parametrize(("level", "warmup_steps"), [(1.0201, 30), (1.0199, 20), (0.9799, 30), (0.9801, 20)])
def test_the_line_is_at_two_per_cent(level, warmup_steps):
    times = FakeTime(lambda number: 1.0 if number < 10 else level).times("auto")
    assert times.warmup.warmup_steps == warmup_steps


def test_things_are_timed_in_turn_there_and_back(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(CLOCK, lambda: now[0])

    def taking(name, seconds):
        def step(number):
            calls.append((name, number))
            now[0] += seconds

        return step

    steps = {"a": taking("a", 1.0), "b": taking("b", 3.0), "c": taking("c", 5.0)}
    times = time_in_turn(steps, device=CPU, warmup=2, rounds=3)
    assert calls[:6] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("c", 1)]
    rounds = [(name, number) for number, names in ((2, "abc"), (3, "cba"), (4, "abc")) for name in names]
    assert calls[6:] == rounds
    assert [times[name].seconds for name in "abc"] == [[1.0] * 3, [3.0] * 3, [5.0] * 3]


def test_a_machine_that_slows_down_moves_no_ratio_of_pairs(monkeypatch):
    """Each call is 1 % slower than the one before: the median ratio of pairs still is 2."""
    now, calls = [0.0], [0]
    monkeypatch.setattr(CLOCK, lambda: now[0])

    def taking(seconds):
        def step(number):
            now[0] += seconds * 1.01 ** calls[0]
            calls[0] += 1

        return step

    times = time_in_turn({"one": taking(1.0), "two": taking(2.0)}, device=CPU, warmup=1, rounds=40)
    ratios = paired_ratios(times["two"].seconds, times["one"].seconds)
    assert statistics.median(ratios) == pytest.approx(2.0, rel=1e-3)
    assert statistics.median(times["two"].seconds[:20]) / statistics.median(times["one"].seconds[20:]) < 1.5


class FakeEvents:
    """A device that works off its queue at the wait only: events know the time when they are reached."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.now = 0.0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream) -> None:
                assert stream == "stream"
                device.calls.append("record")
                self.at = device.now

            def elapsed_time(self, other) -> float:
                assert device.calls[-1] == "synchronize", "read before the device has got there"
                return 1e3 * (other.at - self.at)

        patch.setattr("torch.cuda.Event", Event)
        patch.setattr("torch.cuda.current_stream", lambda _: "stream")
        patch.setattr("torch.cuda.synchronize", lambda _: self.calls.append("synchronize"))

    def step(self, number: int) -> None:
        self.calls.append("step")
        self.now += 1.0 + number


def test_cuda_has_an_event_a_step_and_one_wait_at_the_end(monkeypatch):
    device = FakeEvents(monkeypatch)
    times = time_steps(device.step, device=CUDA, warmup=0, steps=3)
    assert times.seconds == [1.0, 2.0, 3.0]
    assert device.calls[-11:] == ["synchronize", *["record", "step", "record"] * 3, "synchronize"]
    assert device.calls.count("synchronize") == 4  # two for the warm-up, which has no steps


def test_in_turn_each_begins_on_an_idle_device(monkeypatch):
    """Queued work hides a launch: on an H100 one step took 0.4 ms or 1.3 ms, as it happened."""
    device = FakeEvents(monkeypatch)
    steps = {"one": device.step, "two": device.step}
    times = time_in_turn(steps, device=CUDA, warmup=0, rounds=2)
    assert device.calls[-17:] == [*["synchronize", "record", "step", "record"] * 4, "synchronize"]
    assert {name: one.seconds for name, one in times.items()} == {"one": [1.0, 2.0], "two": [1.0, 2.0]}
    time_in_turn({"one": device.step}, device=CUDA, warmup=0, rounds=2)  # alone as beside others
    assert device.calls[-9:] == [*["synchronize", "record", "step", "record"] * 2, "synchronize"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrix_rate_is_the_best_over_products_of_flops_over_time(dtype, monkeypatch):
    """Of three products the middle one is the fastest; the largest would take longer than is waited for."""
    monkeypatch.setattr("bench.measure.timing.MOST_PRODUCT_SECONDS", 5.0)
    products = [(128, 128, 128), (64, 64, 64), (32, 32, 32), (96, 8, 64)]
    seconds, seen = {32: 0.5, 96: 0.1, 64: 2.0}, []

    def timed(step, *, device, warmup, steps):
        seen.append(step(0))
        median = seconds[len(seen[-1])]
        return StepTimes([0.5 * median, median, 3.0 * median], [], False, None)

    monkeypatch.setattr("bench.measure.timing.time_steps", timed)
    assert matrix_rate(CPU, dtype, products) == 2 * 96 * 8 * 64 / 0.1
    assert [tuple(product.shape) for product in seen] == [(32, 32), (96, 64), (64, 64)]
    assert seen[0].dtype == dtype
    assert seen[0].abs().min() > 0  # not zeros, which a processor multiplies more easily


def test_a_step_is_compared_with_large_squares_and_with_its_own_products():
    """One size alone is slow on some processors: 1,024 rows reach 62 GFLOP/s there, and 4,096 rows 95."""
    model = GNNMoEConfig(embed_dim=8, num_experts=3)
    products = products_beside(model, 40, CPU)
    assert {(1024, 1024, 1024), (4096, 4096, 4096)} < set(products)
    assert {(40, 8, 8), (120, 8, 8), (40, 8, 32), (40, 32, 8), (8, 40, 32)} < set(products)


def test_the_copy_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch):
    monkeypatch.setattr("bench.measure.timing.CPU_COPY_BYTES", 1000)
    timed = lambda step, **_: (step(0), StepTimes([0.5], [], False, None))[1]  # noqa: E731
    monkeypatch.setattr("bench.measure.timing.time_steps", timed)
    assert copy_bandwidth(CPU) == 2 * 1000 / 0.5


@pytest.mark.gpu
@needs_gpu
def test_gpu_events_time_the_work_and_not_its_launch():
    """A product of 8192 rows is launched in microseconds; four times the products take four times as long."""
    matrix = torch.randn(4096, 4096, device=CUDA)

    def products(count):
        def step(_):
            out = matrix
            for _ in range(count):
                out = torch.mm(matrix, matrix)
            return out

        return step

    times = time_in_turn({"1": products(1), "4": products(4)}, device=CUDA, warmup="auto", rounds=20)
    ratio = statistics.median(paired_ratios(times["4"].seconds, times["1"].seconds))
    assert ratio == pytest.approx(4.0, rel=0.2)
    assert times["1"].median > 1e-3 or matrix_rate(CUDA, torch.float32, [(8192, 8192, 8192)]) > 1e14


def test_the_clock_is_not_read_on_cuda(monkeypatch):
    device = FakeEvents(monkeypatch)

    def clock() -> float:
        raise AssertionError("the host's clock")

    monkeypatch.setattr(CLOCK, clock)
    times = time_steps(device.step, device=CUDA, warmup="auto", steps=2)
    assert times.warmup.warmup_steps == 50  # each step is longer than the one before
    assert times.seconds == [51.0, 52.0]


@pytest.mark.gpu
@needs_gpu
def test_gpu_nothing_waits_between_the_steps():
    """Thirty long steps are queued long before the last has ended: else the host would wait."""
    matrix = torch.randn(8192, 8192, device=CUDA)
    queued: list[float] = []

    def step(_):
        torch.mm(matrix, matrix)
        queued.append(time.perf_counter())

    times = time_steps(step, device=CUDA, warmup=3, steps=30)
    assert queued[-1] - queued[3] < 0.5 * sum(times.seconds)


@pytest.mark.gpu
@needs_gpu
def test_gpu_bf16_products_are_faster_than_float32_and_a_copy_is_as_fast_as_memory():
    large = [(8192, 8192, 8192)]
    assert matrix_rate(CUDA, torch.bfloat16, large) > 2 * matrix_rate(CUDA, torch.float32, large)
    assert 1e11 < copy_bandwidth(CUDA) < 2e13
