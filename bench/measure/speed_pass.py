"""The speed pass at the end of a run: time, memory, and on request the coupler's own cost and a profile.

Everything is measured on a copy of the model, in full training steps. Nothing inside a timed step reads a
number back, logs or evaluates.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from bench.config import MeasureConfig, RunConfig
from bench.device import Attempted, at_once, attempt
from bench.measure.memory import built_bytes, meter_for
from bench.measure.rates import over_the_rate, utilisation
from bench.measure.timing import (
    WINDOW_STEPS,
    TrainingSteps,
    matrix_rate,
    products_beside,
    time_in_turn,
    time_steps,
    training_flops_per_token,
)
from bench.record import Marginal, Memory, NotMeasured, Speed, is_measured, not_measured
from bench.training.ranks import ALONE, Ranks
from bench.training.step import Batch, Execution, to_device
from gnnmoe.model import GNNMoEModel

T = TypeVar("T")
REFERENCE = "mean"
"""The coupler whose cost is subtracted."""
PROFILE_WARMUP_STEPS, PROFILED_STEPS = 1, 2
COSTLIEST = 5
TRACE, SNAPSHOT = "trace.json.gz", "memory_snapshot.pickle"
SNAPSHOT_EVENTS = 100_000  # allocations and frees that a snapshot keeps


@dataclass(frozen=True)
class SpeedPass:
    """What is measured at the end of a run, on a copy of its model and batches of its data."""

    config: RunConfig
    device: torch.device
    folder: Path
    """The folder of the run, which gets the profile."""
    say: Callable[[str], object]
    """Prints a line."""
    ranks: Ranks = ALONE
    """The processes that take each step together."""

    @property
    def execution(self) -> Execution:
        """How the run computes its models."""
        return Execution(self.config.execution, self.device)

    def run(
        self,
        model: GNNMoEModel,
        loader: Iterable[Batch],
        as_run: Callable[[Batch], Batch],
        micro_batch_size: int | None,
    ) -> tuple[Speed | NotMeasured, Memory | NotMeasured]:
        """Return the record's ``speed`` and ``memory``; the run goes on if memory runs out here.

        The model itself waits on the host, so that the copy has the device to itself, as in training.
        """
        batches, seconds = fetched(loader, self.config.measure.speed_steps, as_run, self.device)
        with on_host(model, self.device):
            return self._all(model, batches, seconds, micro_batch_size)

    def _all(
        self, model: GNNMoEModel, batches: list[Batch], fetch_seconds: list[float], rows: int | None
    ) -> tuple[Speed | NotMeasured, Memory | NotMeasured]:
        measure = self.config.measure
        outcome = self._attempt(lambda: self._measure(model, batches, rows))
        if outcome.value is None:
            self.say("note: the speed pass ran out of memory; speed and memory are not measured")
            nothing = not_measured(f"the speed pass ran out of memory: {outcome.failure}")
            return nothing, nothing
        steps, speed, memory = outcome.value
        speed.fetch_seconds = fetch_seconds
        if measure.marginal:
            speed.marginal = self._marginal(steps, memory)
        if measure.profile:  # last: a trace of kernels may slow down everything after it
            self._profile(steps)
        return speed, memory

    def _attempt(self, function: Callable[[], T]) -> Attempted[T]:
        return attempt(function) if self.ranks.alone else at_once(function)

    def _measure(
        self, model: GNNMoEModel, batches: list[Batch], rows: int | None
    ) -> tuple[TrainingSteps, Speed, Memory]:
        copied = copy.deepcopy(model).to(self.device)
        self.execution.compile(copied)
        steps = TrainingSteps(copied, batches, self.config.training, rows, self.ranks)
        speed = measure_speed(steps, self.config.measure, self.device)
        memory = self._memory(steps)
        steps.forget()
        speed.matrix_flops_per_second, speed.compile_seconds = (
            self._matrix_rate(steps),
            self._compiling(speed),
        )
        self._remark_on_utilisation(speed, copied)
        return steps, speed, memory

    def _memory(self, steps: TrainingSteps) -> Memory:
        """Return the record's ``memory``; of a compiled step, the part that a meter can see."""
        memory, execution = peak_memory(steps, self.device), self.config.execution
        if not execution.compile:
            return memory
        if self.device.type != "cuda":
            memory.remark = "of the step as it is uncompiled, since only that has tensors to track"
            return memory
        if execution.compile_mode != "reduce-overhead":
            return memory
        unseen = not_measured("CUDA graphs keep their tensors in a pool that counts as reserved only")
        if is_measured(memory.by_phase):
            memory.by_phase |= {"first_step": unseen, "steady": unseen}
        memory.peak_allocated_bytes = memory.by_part = unseen
        return memory

    def _matrix_rate(self, steps: TrainingSteps) -> float | NotMeasured:
        if self.device.type != "cuda":
            return not_measured("a run measures it on CUDA only; python -m bench.speed does everywhere")
        products = products_beside(steps.model.config, steps.batches[0]["input_ids"].numel(), self.device)
        rate = matrix_rate(self.device, self.execution.autocast_dtype or torch.float32, products)
        return sum(self.ranks.gather(rate))

    def _remark_on_utilisation(self, speed: Speed, model: GNNMoEModel) -> None:
        rate = speed.matrix_flops_per_second
        if not is_measured(rate):
            return
        remark = over_the_rate(utilisation(speed.tokens_per_second * training_flops_per_token(model), rate))
        if remark:
            self.say(f"note: {remark}")

    def _compiling(self, speed: Speed) -> float | NotMeasured:
        """Return the seconds of compiling: what the warm-up took beyond as many median steps."""
        if not self.config.execution.compile:
            return not_measured("not compiled")
        median = speed.median_step_seconds
        return sum(max(0.0, seconds - median) for seconds in speed.warmup_seconds or ())

    def _marginal(self, steps: TrainingSteps, memory: Memory) -> Marginal | NotMeasured:
        outcome = self._attempt(lambda: marginal_cost(steps, memory, self.config, self.device))
        return outcome.value or not_measured(f"ran out of memory beside the mean coupler: {outcome.failure}")

    def _profile(self, steps: TrainingSteps) -> None:
        if not self.ranks.first:  # takes the same steps as the rank that writes the profile
            for number in range(PROFILE_WARMUP_STEPS + PROFILED_STEPS + (self.device.type == "cuda")):
                steps.step(number)
            return
        outcome = self._attempt(lambda: profile_steps(steps.step, self.folder, self.device))
        if outcome.value is None:
            self.say("note: the profile ran out of memory")
            return
        self.say(f"costliest operations of a step (all of them in {TRACE} beside the record):")
        for found in outcome.value:
            self.say(f"  {found.share:6.1%}  {found.calls:5,} ×  {found.name}")


def speed_pass_steps(measure: MeasureConfig) -> int:
    """Return how many steps the speed pass takes: its warm-up at its shortest, and the timed steps."""
    warmup = measure.speed_warmup_steps
    return measure.speed_steps + (2 * WINDOW_STEPS if warmup == "auto" else warmup)


def fetched(
    loader: Iterable[Batch], count: int, as_run: Callable[[Batch], Batch], device: torch.device
) -> tuple[list[Batch], list[float]]:
    """Return the first batches of a loader on the device, as they are run, and the seconds of each fetch.

    A step waits at most for a fetch. It waits less if workers or the device are ahead.
    """
    batches, seconds = [], []
    rest = islice(iter(loader), count)
    while True:
        start = perf_counter()
        batch = next(rest, None)
        if batch is None:
            return batches, seconds
        batches.append(to_device(as_run(batch), device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - start)


@contextmanager
def on_host(model: GNNMoEModel, device: torch.device) -> Iterator[None]:
    """Keep the model in the host's memory while the block lasts."""
    model.cpu()
    try:
        yield
    finally:
        model.to(device)


def measure_speed(steps: TrainingSteps, measure: MeasureConfig, device: torch.device) -> Speed:
    """Time training steps; return the part of the record's ``speed`` that follows from the times.

    All step times are kept, those of the warm-up apart. Only targets that count are tokens. Of several ranks
    the times are those of the slowest, and the tokens are of all ranks.
    """
    times = time_steps(
        steps.step,
        device=device,
        warmup=measure.speed_warmup_steps,
        steps=measure.speed_steps,
        agree=steps.ranks.largest,
    )
    rank, times = steps.ranks.worst(times, key=lambda times: sum(times.seconds))
    warmed = len(times.warmup_seconds)
    return Speed(
        step_seconds=times.seconds,
        rank=rank,
        step_tokens=[steps.tokens(number) for number in range(warmed, warmed + measure.speed_steps)],
        matrix_flops_per_second=not_measured("not asked for"),
        compile_seconds=not_measured("not compiled"),
        marginal=not_measured("not asked for; --marginal measures it"),
        **dict(times.warmup),
    )


def peak_memory(steps: TrainingSteps, device: torch.device) -> Memory:
    """Return the record's ``memory``: of one steady step, and by phase.

    ``by_phase``, in bytes: what is held once everything is *built*, the peak of the *first_step*, which
    makes the optimizer's state, and the peak of a *steady* step. All numbers are of the rank that takes most.
    """
    steps.forget()
    owners = (steps.model, steps.optimizer, steps.batches)
    built = built_bytes(owners, device)
    first, steady = (meter_for(device).measure(lambda: steps.step(0), owners) for _ in range(2))
    steady.by_phase = {
        "built": built,
        "first_step": first.peak_allocated_bytes,
        "steady": steady.peak_allocated_bytes,
    }
    rank, largest = steps.ranks.worst(steady, key=_peak_or_zero)
    return largest.model_copy(update={"rank": rank})


def _peak_or_zero(memory: Memory) -> int:
    return memory.peak_allocated_bytes if is_measured(memory.peak_allocated_bytes) else 0


def marginal_cost(
    steps: TrainingSteps, memory: Memory, config: RunConfig, device: torch.device
) -> Marginal | NotMeasured:
    """Return the record's ``speed.marginal``: our model and the mean coupler's model, alternating.

    Step times are kept by round. ``peak_allocated_bytes``, ``training_flops_per_token`` and ``parameters``
    are differences, ours minus the reference; ``memory`` is that of our steps. The result is null if the
    run's own coupler is the reference, or has another number of blocks, such as ``dense``. Our model is off
    the device while the memory of the reference is measured.
    """
    ours, execution, measure = steps.model.config, Execution(config.execution, device), config.measure
    if ours.coupler_type == REFERENCE:
        return not_measured(f"the coupler is {REFERENCE} itself")
    if steps.model.layers[0].coupler.expert_shape()[0] != ours.num_experts:  # pyright: ignore
        return not_measured(f"{ours.coupler_type} has other blocks, not a coupler more: compare the runs")
    model = execution.build(replace(ours, coupler_type=REFERENCE, coupler_options={}), config.training.seed)
    execution.compile(model)
    theirs = TrainingSteps(model, steps.batches, steps.training, steps.micro_batch_size, steps.ranks)
    times = time_in_turn(
        {"ours": steps.step, REFERENCE: theirs.step},
        device=device,
        warmup=measure.speed_warmup_steps,
        rounds=measure.speed_steps,
        agree=steps.ranks.largest,
    )
    _, times = steps.ranks.worst(times, key=lambda times: sum(times["ours"].seconds))
    steps.forget()
    with on_host(steps.model, device):
        peak, reference_peak = memory.peak_allocated_bytes, peak_memory(theirs, device).peak_allocated_bytes
    more = not_measured("no meter of allocated bytes")
    if is_measured(peak) and is_measured(reference_peak):
        more = peak - reference_peak
    return Marginal(
        reference=REFERENCE,
        step_seconds=times["ours"].seconds,
        reference_step_seconds=times[REFERENCE].seconds,
        reference_warmup=times[REFERENCE].warmup,
        steady=all(found.steady for found in times.values()),
        peak_allocated_bytes=more,
        training_flops_per_token=training_flops_per_token(steps.model) - training_flops_per_token(model),
        parameters=steps.model.parameter_counts()["total"] - model.parameter_counts()["total"],
    )


@dataclass(frozen=True)
class Operation:
    """One kind of operation: its own time, without the time of the operations that it calls."""

    name: str
    share: float
    """Of the own time of all operations, on the GPU if there is one."""
    calls: int
    """In one step."""


def profile_steps(step: Callable[[int], object], folder: Path, device: torch.device) -> list[Operation]:
    """Write a trace of two steps into ``folder``; return the costliest operations, the costliest first.

    The trace (chrome://tracing, ui.perfetto.dev) is trace.json.gz. On CUDA a third step writes
    memory_snapshot.pickle too: every allocation with its stack (pytorch.org/memory_viz). A profiled step is
    slower than other steps, so do not compare its time.
    """
    on_cuda = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it says on stderr that it starts and stops
    for number in range(PROFILE_WARMUP_STEPS):
        step(number)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_cuda)]
    with profile(activities=activities) as profiler:
        for number in range(PROFILED_STEPS):
            step(number)
        if on_cuda:
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(folder / TRACE))
    if on_cuda:
        _snapshot(step, folder, device)
    return _costliest(profiler.key_averages(), on_cuda)


def _costliest(averages: Iterable[Any], on_cuda: bool) -> list[Operation]:
    """Return the operations with most time of their own; on CUDA the time of the kernels they launched.

    On CUDA the kernels have rows too, which would count everything twice; their sum is the whole.
    """
    rows = list(averages)
    operations = [row for row in rows if row.device_type.name == "CPU"]
    own = attrgetter("self_device_time_total" if on_cuda else "self_cpu_time_total")
    kernels = [row for row in rows if row.device_type.name == "CUDA" and not row.is_user_annotation]
    total = sum(own(row) for row in (kernels if on_cuda else operations))
    costliest = sorted((row for row in operations if own(row) > 0), key=own, reverse=True)[:COSTLIEST]
    return [Operation(row.key, own(row) / total, round(row.count / PROFILED_STEPS)) for row in costliest]


def _snapshot(step: Callable[[int], object], folder: Path, device: torch.device) -> None:
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=SNAPSHOT_EVENTS)
    try:
        step(0)
        torch.cuda.synchronize(device)
        torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
